"""The energy that holds the content of a picture: the features of one layer.

Guide-and-Rescale, 2024, arXiv 2409.01322. With F the output of a layer for the edit and F* for the source at the same noise
level:

    editing       E = mean|F - F*|      F of the last up block, both with the source prompt
    stylisation   E = mean((F - F*)^2)  F of `up_blocks[1].resnets[1]`, the edit's with the target prompt
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from ..attention.self_attention import Phase
from .energies import LOSSES, Branch, EnergyProbe, GuidanceEnergy, GuidanceState, Scale, _scale_text


class FeatureEnergy(GuidanceEnergy):
    """Holds the content: the difference of the features of one layer.

    Args:
        scale (`float` or `Callable`, *optional*, defaults to 500):
            Weight, the authors' for editing, or a function `(step, num_steps)` of it.
        layer (`str`, *optional*, defaults to `"up_blocks.-1"`):
            Dotted name of the layer in the UNet; negative numbers count from the end. `"conv_norm_out"` is the authors'
            other choice for editing.
        loss (`str`, *optional*, defaults to `"l1"`):
            `"l1"` (mean absolute) or `"l2"` (mean squared) difference.
        branch (`str`, *optional*, defaults to `"source"`):
            Prompt of the edit's pass that is compared, `"source"` or `"target"`.

    Raises:
        ValueError: If an argument is out of range, or, when used, if there is no such layer.

    Example:
        ```python
        from diffusers_ext import FeatureEnergy

        guiders = [FeatureEnergy(scale=500, layer="conv_norm_out")]
        ```
    """

    def __init__(
        self,
        scale: Scale = 500.0,
        layer: str = "up_blocks.-1",
        loss: Literal["l1", "l2"] = "l1",
        branch: Branch = "source",
    ) -> None:
        super().__init__(scale, branch)
        if not isinstance(layer, str) or not layer:
            raise ValueError(f"layer={layer!r} is not the dotted name of a layer, such as 'up_blocks.-1'")
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
        self.layer = layer
        self.loss = loss
        self.zero_at_reference = branch == "source"

    @contextmanager
    def attach(self, unet: nn.Module) -> Iterator[EnergyProbe]:
        probe = _FeatureProbe(self.layer, LOSSES[self.loss], self.branch)
        # Only our own handle is removed: the hooks of accelerate and of the user are none of our business.
        handle = find_layer(unet, self.layer).register_forward_hook(probe.hook)
        try:
            yield probe
        finally:
            handle.remove()

    def __repr__(self) -> str:
        return f"FeatureEnergy(scale={_scale_text(self.scale)}, layer={self.layer!r}, loss={self.loss!r})"


class _FeatureProbe:
    def __init__(self, layer: str, loss: Any, branch: Branch) -> None:
        self._layer = layer
        self._loss = loss
        self._branch = branch
        self._phase: Phase = "reference"
        self._reference: torch.Tensor | None = None
        self._energy: torch.Tensor | None = None

    def begin(self, phase: Phase) -> None:
        self._phase = phase

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        features = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(features, torch.Tensor):
            raise ValueError(
                f"layer={self._layer!r} of FeatureEnergy puts out {type(features).__name__}; choose one that puts out a "
                "tensor"
            )
        if self._phase == "reference":
            self._reference = features.detach()
        elif self._phase == self._branch and self._reference is not None:
            self._energy = self._loss(features, self._reference)

    def energy(self, state: GuidanceState) -> torch.Tensor:
        if self._energy is None:
            raise ValueError(f"layer={self._layer!r} of FeatureEnergy does not run in a pass of this UNet")
        return self._energy


def find_layer(network: nn.Module, path: str) -> nn.Module:
    """Looks a layer up by its dotted name.

    Args:
        network (`torch.nn.Module`): The network.
        path (`str`): A name such as `"up_blocks.1.resnets.0"`; a negative number counts from the end of a list.

    Returns:
        `torch.nn.Module`: The layer.

    Raises:
        ValueError: If there is none; the message lists the names at the place where the search ended.
    """
    module = network
    found: list[str] = []
    for part in path.split("."):
        children = dict(module.named_children())
        if part.startswith("-") and part[1:].isdigit() and 0 < int(part[1:]) <= len(children):
            part = list(children)[int(part)]
        if part not in children:
            place = ".".join(found) or type(network).__name__
            near = get_close_matches(part, children, n=1)
            guess = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"layer={path!r}: {place} has no part {part!r}{guess}; "
                + (f"it has {', '.join(children)}" if children else "it has no parts")
            )
        module = children[part]
        found.append(part)
    return module
