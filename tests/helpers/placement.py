"""Where weights lie in memory: on some processors the last bits of a product depend on it."""

from typing import Any

import torch


def in_own_memory(model: Any) -> Any:
    """The pipeline, or network, with its weights copied from where a file was mapped, which may be any multiple of 8 bytes, to where torch would put them.

    With AVX-512 kernels a matrix that begins elsewhere is summed in another order, about 1e-7 away. What tests ask of a saved and
    loaded pipeline is that it has the same weights and settings; copies make that a question of equal bits on every processor.
    """
    for part in [model] if isinstance(model, torch.nn.Module) else model.components.values():
        if isinstance(part, torch.nn.Module):
            for value in (*part.parameters(), *part.buffers()):
                value.data = value.data.clone()
    return model
