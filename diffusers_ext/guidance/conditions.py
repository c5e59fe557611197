"""What a prompt is to a network: a set of keyword arguments, joined along the batch.

Stable Diffusion 1.x and 2.x take `encoder_hidden_states`; SDXL takes `added_cond_kwargs` besides; a network distilled with its
guidance scale takes `timestep_cond`; an IP-Adapter puts a list of tensors into `added_cond_kwargs`. Guidance never looks
inside: it only joins conditions, and cuts them into parts of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


Condition = Mapping[str, Any]


def text_condition(embeds: torch.Tensor) -> Condition:
    """The condition of a network that takes text only.

    Args:
        embeds (`torch.Tensor` of shape `(batch, tokens, width)`): The encoded prompts.

    Returns:
        `dict`: The network's keyword arguments.
    """
    return {"encoder_hidden_states": embeds}


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Joins conditions into one of a larger batch.

    Args:
        conditions (list of `dict`): Conditions with the same keys; tensors have the batch first, in dicts and lists too.

    Returns:
        `dict`: The same keys, tensors joined along their first axis.

    Example:
        ```python
        import torch
        from diffusers_ext.guidance import join_conditions, text_condition

        both = join_conditions([text_condition(torch.zeros(1, 7, 32)), text_condition(torch.ones(1, 7, 32))])
        assert both["encoder_hidden_states"].shape == (2, 7, 32)
        ```
    """
    return _walk(conditions, lambda tensors: torch.cat(list(tensors)))


def part_of_condition(condition: Condition, rows: slice) -> Condition:
    """The rows of a condition that belong to a part of the batch.

    Args:
        condition (`dict`): A condition.
        rows (`slice`): Rows of the batch.

    Returns:
        `dict`: The same keys, tensors cut along their first axis.
    """
    return _walk([condition], lambda tensors: tensors[0][rows])


def _walk(values: Sequence[Any], merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return merge(values)
    if isinstance(first, Mapping):
        return {key: _walk([value[key] for value in values], merge) for key in first}
    if isinstance(first, (list, tuple)):
        return [_walk(items, merge) for items in zip(*values, strict=True)]
    return first
