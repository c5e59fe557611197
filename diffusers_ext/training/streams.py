"""Counter-based randomness: every random draw of a training run is a pure function of (seed, step, name, rank).

A run then has no random state to save or restore: what step 5000 draws is the same whether the run came there in one go,
was killed and resumed, or starts there. Draws that concern the batch are made for the *global* batch and sliced by each
process, so that they do not depend on the number of processes either.
"""

import hashlib

import torch


def stream_seed(seed: int, step: int, name: str, rank: int = 0) -> int:
    """A 63-bit seed that belongs to one purpose at one step.

    Args:
        seed: Seed of the run, any integer.
        step: Optimiser step (or epoch) that the draw is for.
        name: What is drawn, e.g. "noise". Two purposes must not share a name.
        rank: Process, only for draws that shall differ between processes.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> stream_seed(0, 1, "noise") == stream_seed(0, 1, "noise")
        True
    """
    digest = hashlib.blake2b(f"{int(seed)}|{name}|{int(step)}|{int(rank)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, step: int, name: str, rank: int = 0) -> torch.Generator:
    """A CPU generator that belongs to one purpose at one step; see `stream_seed` for the arguments.

    It lives on the CPU whatever the training device is, so that a run draws the same numbers everywhere.

    Example:
        >>> noise = torch.randn(2, generator=stream(0, 1, "noise"))
    """
    return torch.Generator().manual_seed(stream_seed(seed, step, name, rank))


def epoch_rows(seed: int, start: int, count: int, length: int, name: str = "epoch") -> torch.Tensor:
    """Rows `start ... start + count` of an endless list that is `length` items shuffled anew in every epoch.

    Args:
        seed: Seed of the run.
        start: Position in the endless list, 0 or more.
        count: Number of rows wanted; may be more than one epoch.
        length: Number of items, 1 or more.
        name: Name of the stream.

    Returns:
        Long tensor (count,) of item numbers in [0, length).
    """
    rows, position = [], start
    while position < start + count:
        epoch, offset = divmod(position, length)
        order = torch.randperm(length, generator=stream(seed, epoch, name))
        taken = order[offset : offset + start + count - position]
        rows.append(taken)
        position += len(taken)
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
