"""Exponential moving average of the weights, as one fused operation over all tensors."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Keeps `average <- decay * average + (1 - decay) * weights` for every trainable parameter.

    The decay is warmed up as `min(decay, (1 + step) / (10 + step))`, so that the random start is forgotten at once.
    `diffusers.training_utils.EMAModel` does the same arithmetic, but its state is not keyed by parameter name.

    Args:
        module: The network; only parameters that require gradients are averaged.
        decay: Final decay in [0, 1).
        names: Names of the parameters to average, of those that require gradients; default all.

    Raises:
        ValueError: If `decay` is outside its range.

    Example:
        >>> average = WeightAverage(nn.Linear(1, 1), decay=0.99)
        >>> average.update(step=1)
    """

    def __init__(self, module: nn.Module, decay: float, names: Collection[str] | None = None):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r} must be in [0, 1); 0 keeps the newest weights")
        self.decay = decay
        self._named = {
            name: value
            for name, value in module.named_parameters()
            if value.requires_grad and (names is None or name in names)
        }
        # clone() keeps the strides, so that average and weights stay one memory-bound pass in channels-last
        self._shadow = {name: value.detach().clone() for name, value in self._named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after optimiser step number `step` (counted from 1) into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._shadow.values()), list(self._named.values()), 1.0 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by parameter name (not copies)."""
        return dict(self._shadow)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over tensors saved from `state_dict`.

        Raises:
            ValueError: If names do not agree.
        """
        if state.keys() != self._shadow.keys():
            odd = sorted(state.keys() ^ self._shadow.keys())
            raise ValueError(
                f"the averaged weights do not belong to this network: {len(odd)} names differ, e.g. {odd[0]}"
            )
        for name, value in state.items():
            self._shadow[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network has the averaged weights; afterwards its own again, bit for bit."""
        kept = [value.detach().clone() for value in self._named.values()]
        try:
            for name, value in self._named.items():
                value.data.copy_(self._shadow[name])
            yield
        finally:
            for value, own in zip(self._named.values(), kept):
                value.data.copy_(own)
