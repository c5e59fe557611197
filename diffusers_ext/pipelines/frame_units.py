"""The user's units outside a network, numbers of mean 0 and variance 1 inside.

A network that was trained on normalised channels keeps their mean and standard deviation in its config, as the autoencoders of diffusers
keep `latents_mean` and `latents_std`, and the pipeline applies them: inside = (outside - mean) / std.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ChannelUnits:
    """Mean and standard deviation of channels; nothing is changed where they are not known.

    Args:
        mean (`torch.Tensor` of shape `(channels,)`, *optional*): In the user's units.
        std (`torch.Tensor` of shape `(channels,)`, *optional*): In the user's units, above 0.

    Example:
        ```python
        import torch
        from diffusers_ext.pipelines.frame_units import ChannelUnits

        units = ChannelUnits.of({"frame_mean": [10.0, 0.0], "frame_std": [2.0, 1.0]}, "frame")
        assert units.inward(torch.tensor([14.0, 3.0])).tolist() == [2.0, 3.0]
        assert units.outward(torch.tensor([2.0, 3.0])).tolist() == [14.0, 3.0]
        ```
    """

    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> "ChannelUnits":
        """Those that the config of a network has as `<name>_mean` and `<name>_std`."""
        parts = (config.get(f"{name}_{part}") for part in ("mean", "std"))
        return cls(*(None if part is None else torch.tensor(part, dtype=torch.float64) for part in parts))

    def inward(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(..., channels)` as the network sees them."""
        if self.mean is not None:
            values = values - self.mean.to(values)
        return values if self.std is None else values / self.std.to(values)

    def outward(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(..., channels)` of the network in the user's units."""
        if self.std is not None:
            values = values * self.std.to(values)
        return values if self.mean is None else values + self.mean.to(values)
