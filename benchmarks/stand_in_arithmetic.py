"""Runs a network without its expensive arithmetic, so that the memory it needs can be measured where it could not be computed.

Processors without half-precision instructions take hours over a convolution in float16, and hold exactly as many bytes for it as any
other machine. `StandInArithmetic` answers convolutions, matrix products and attention with noise of the right shape, type and
layout, so every tensor that the real call would hold is held, forward and backward, and everything else runs as it is. What a
library takes for its own work inside one of those calls is not seen.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


aten = torch.ops.aten

STOOD_IN_FOR = {
    aten.convolution,
    aten.convolution_backward,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class StandInArithmetic(TorchDispatchMode):
    """Inside this context, what is in `STOOD_IN_FOR` returns small noise instead of its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in STOOD_IN_FOR:
            return func(*args, **kwargs)
        shapes = func(
            *tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args),
            **tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), kwargs),
        )
        return tree_map_only(torch.Tensor, _noise_like, shapes)


def _noise_like(shape: torch.Tensor) -> torch.Tensor:
    held = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
    return held.normal_(std=0.1) if held.is_floating_point() else held.zero_()
