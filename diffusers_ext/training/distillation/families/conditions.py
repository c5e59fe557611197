"""All that a network reads besides sample and timestep, as one tensor.

What a loss knows of a prompt is a tensor (n, length, width), to be sliced, repeated and joined along its first axis. Where a
network also reads vectors, such as a pooled embedding, they stand in further rows of it, one after another, the last row
filled up with zeros; in the published models one row holds them all.
"""

import torch


def pack(states: torch.Tensor, *vectors: torch.Tensor) -> torch.Tensor:
    """Encoder states and vectors as one condition.

    Args:
        states: (n, length, width).
        vectors: Each (n, its length), together one number or more.

    Returns:
        (n, length + rows, width) with as few rows as hold the vectors, in the type of `states`.

    Raises:
        ValueError: If the batches differ, or there is no number to add.

    Example:
        >>> pack(torch.zeros(1, 1, 2), torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]]]
    """
    shapes = [tuple(vector.shape) for vector in vectors]
    count, _, width = states.shape
    length = sum(shape[-1] for shape in shapes)
    if not length or any(len(shape) != 2 or shape[0] != count for shape in shapes):
        raise ValueError(f"vectors have shapes {shapes}; give one or more of ({count}, length), with one row a state")
    rows = -(-length // width)
    numbers = torch.cat([vector.to(states) for vector in vectors], 1)
    filled = torch.nn.functional.pad(numbers, (0, rows * width - length))
    return torch.cat([states, filled.reshape(count, rows, width)], 1)


def unpack(condition: torch.Tensor, *lengths: int) -> tuple[torch.Tensor, ...]:
    """What `pack` has put together.

    Args:
        condition: (n, length + rows, width).
        lengths: Of the vectors, one or more.

    Returns:
        The states (n, length, width), and each vector (n, its length).

    Raises:
        ValueError: If the condition has no row of states beside those of such vectors.

    Example:
        >>> states, vector = unpack(pack(torch.ones(1, 4, 2), torch.tensor([[5.0, 6.0, 7.0]])), 3)
        >>> states.shape, vector.tolist()
        (torch.Size([1, 4, 2]), [[5.0, 6.0, 7.0]])
    """
    length = sum(lengths)
    rows = -(-length // condition.shape[2])
    if condition.shape[1] <= rows:
        raise ValueError(
            f"condition has shape {tuple(condition.shape)}, and vectors of {length} numbers alone take {rows} rows; give "
            f"one that pack has made"
        )
    numbers = condition[:, condition.shape[1] - rows :].flatten(1)
    return condition[:, : condition.shape[1] - rows], *numbers[:, :length].split(lengths, 1)
