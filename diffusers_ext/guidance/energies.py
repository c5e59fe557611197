"""Energies that hold an edited picture to its source, and the protocol by which anyone writes more.

Guide-and-Rescale, 2024, arXiv 2409.01322. With A the self-attention probabilities and F the features of the edit, A*, F*
those of the source at the same noise level:

    self-attention   sum over layers of mean((A - A*)^2)
    features         mean|F - F*|   (or mean((F - F*)^2))

All energies are computed per sample and in float32: the square of a half precision difference of probabilities is zero.

**The protocol.** An energy is any object with

    scale: float                       its weight in the sum
    attach(unet) -> context manager    installs what reads the network, and takes it away again; yields a probe

and a probe any object with

    begin(phase)                       the next pass is "reference" (the source) or "source" (the edit, with gradient)
    energy(state) -> (batch,)          float32, differentiable with respect to `state.latents`

[`GuidanceEnergy`] implements both, so that an energy of the latents needs one method: [`GuidanceEnergy.measure`].
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import nn

from ..attention import (
    SelfAttentionEnergyProcessor,
    SelfAttentionRecord,
    installed_processors,
    select_self_attention_layers,
)
from ..attention.self_attention import Phase


def mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of every sample, in float32.

    Args:
        a (`torch.Tensor` of shape `(batch, ...)`): Any floating dtype.
        b (`torch.Tensor`): Shape of `a`.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The means.
    """
    return (a.float() - b.float()).square().flatten(1).mean(1)


def mean_absolute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of every sample, in float32.

    Args:
        a (`torch.Tensor` of shape `(batch, ...)`): Any floating dtype.
        b (`torch.Tensor`): Shape of `a`.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The means.
    """
    return (a.float() - b.float()).abs().flatten(1).mean(1)


LOSSES = {"l1": mean_absolute, "l2": mean_square}


@dataclass(frozen=True)
class GuidanceState:
    """What an energy may look at in a guided step.

    Attributes:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The edit; gradients are taken to these.
        reference_latents (`torch.Tensor`): The source picture at the same noise level.
        noise_pred (`torch.Tensor`): Predicted noise of `latents` with the source prompt, differentiable.
        reference_noise_pred (`torch.Tensor`): Predicted noise of `reference_latents` with the source prompt.
        alpha_bar (`torch.Tensor`): Scalar in (0, 1], the noise level.
        timestep (`torch.Tensor`): Scalar.
    """

    latents: torch.Tensor
    reference_latents: torch.Tensor
    noise_pred: torch.Tensor
    reference_noise_pred: torch.Tensor
    alpha_bar: torch.Tensor
    timestep: torch.Tensor

    @property
    def clean_latents(self) -> torch.Tensor:
        """The edit without its predicted noise, differentiable."""
        return self._clean(self.latents, self.noise_pred)

    @property
    def reference_clean_latents(self) -> torch.Tensor:
        """The source without its predicted noise."""
        return self._clean(self.reference_latents, self.reference_noise_pred)

    def _clean(self, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        return (latents - (1 - self.alpha_bar) ** 0.5 * noise_pred) / self.alpha_bar**0.5


class EnergyProbe(Protocol):
    """Looks at the passes of one guided step."""

    def begin(self, phase: Phase) -> None:
        """Announces the next forward pass."""

    def energy(self, state: GuidanceState) -> torch.Tensor:
        """The energy of every sample, after both passes."""


class GuidanceEnergy:
    """Base of the energies, and the shortest way to one's own.

    Args:
        scale (`float`): Weight of the energy in the sum; finite.

    Attributes:
        zero_at_reference (`bool`): True if the energy is zero where edit and source are the same. Its gradient is then
            left out where they still are: what is left of it there is rounding noise, which rescaling would amplify.

    Example:
        ```python
        import torch
        from diffusers_ext.guidance import GuidanceEnergy


        class KeepRegion(GuidanceEnergy):
            def __init__(self, mask, scale=100.0):
                super().__init__(scale)
                self.mask = mask  # (1, 1, height, width) in latent pixels, 1 where the picture must stay

            def measure(self, state):
                change = state.clean_latents - state.reference_clean_latents
                return (self.mask * change).float().square().flatten(1).mean(1)


        guiders = [KeepRegion(torch.ones(1, 1, 16, 16))]
        ```
    """

    zero_at_reference = True

    def __init__(self, scale: float) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale={scale!r} of {type(self).__name__} is not a finite number")
        self.scale = float(scale)

    def measure(self, state: GuidanceState) -> torch.Tensor:
        """The energy of every sample, for an energy that needs nothing from inside the network.

        Args:
            state ([`GuidanceState`]): Latents and predictions of the step.

        Returns:
            `torch.Tensor` of shape `(batch,)`: float32, differentiable.
        """
        raise NotImplementedError(f"{type(self).__name__} must define measure(state), or attach(unet)")

    def attach(self, unet: nn.Module) -> AbstractContextManager[EnergyProbe]:
        """Installs what reads the network for the time of a `with` block.

        Args:
            unet (`torch.nn.Module`): The network.

        Returns:
            A context manager that yields an [`EnergyProbe`].
        """
        return _measuring(self)


class _MeasureProbe:
    def __init__(self, energy: GuidanceEnergy) -> None:
        self._energy = energy

    def begin(self, phase: Phase) -> None:
        """Such an energy sees the results of the passes, not the passes."""

    def energy(self, state: GuidanceState) -> torch.Tensor:
        return self._energy.measure(state)


@contextmanager
def _measuring(energy: GuidanceEnergy) -> Iterator[EnergyProbe]:
    yield _MeasureProbe(energy)


class SelfAttentionEnergy(GuidanceEnergy):
    """Holds the layout: the squared difference of self-attention probabilities, summed over layers.

    Args:
        scale (`float`, *optional*, defaults to 300 000):
            Weight, the authors' for editing. Large because the mean runs over all pairs of tokens.
        layers (`str` or list of `str`, *optional*, defaults to `"all"`):
            `"all"`, or names of self-attention layers or leading parts of names (`"mid_block"`, `"up_blocks.1"`). Memory
            grows with the squared number of tokens, so leaving out the outermost blocks saves most of it.

    Raises:
        ValueError: If `scale` is not finite, or, when used, if a name fits no layer.

    Example:
        ```python
        from diffusers_ext import FeatureEnergy, SelfAttentionEnergy

        guiders = [SelfAttentionEnergy(scale=3e5, layers=["mid_block", "up_blocks"]), FeatureEnergy()]
        ```
    """

    def __init__(self, scale: float = 3e5, layers: str | Sequence[str] = "all") -> None:
        super().__init__(scale)
        names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Sequence) else [layers]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"layers={layers!r} is neither 'all' nor a list of layer names")
        self.layers = layers if isinstance(layers, str) else tuple(names)

    @contextmanager
    def attach(self, unet: nn.Module) -> Iterator[EnergyProbe]:
        layers = select_self_attention_layers(unet, self.layers)
        record = SelfAttentionRecord(mean_square)
        with installed_processors(layers, lambda name: SelfAttentionEnergyProcessor(name, record)):
            yield _SelfAttentionProbe(record)

    def __repr__(self) -> str:
        return f"SelfAttentionEnergy(scale={self.scale:g}, layers={self.layers!r})"


class _SelfAttentionProbe:
    def __init__(self, record: SelfAttentionRecord) -> None:
        self._record = record

    def begin(self, phase: Phase) -> None:
        self._record.phase = phase

    def energy(self, state: GuidanceState) -> torch.Tensor:
        return torch.stack(list(self._record.energies.values())).sum(0)


class FeatureEnergy(GuidanceEnergy):
    """Holds the content: the difference of the features of one layer.

    Args:
        scale (`float`, *optional*, defaults to 500):
            Weight, the authors' for editing.
        layer (`str`, *optional*, defaults to `"up_blocks.-1"`):
            Dotted name of the layer in the UNet; negative numbers count from the end. `"conv_norm_out"` is the authors'
            other choice.
        loss (`str`, *optional*, defaults to `"l1"`):
            `"l1"` (mean absolute) or `"l2"` (mean squared) difference.

    Raises:
        ValueError: If an argument is out of range, or, when used, if there is no such layer.

    Example:
        ```python
        from diffusers_ext import FeatureEnergy

        guiders = [FeatureEnergy(scale=500, layer="conv_norm_out")]
        ```
    """

    def __init__(self, scale: float = 500.0, layer: str = "up_blocks.-1", loss: str = "l1") -> None:
        super().__init__(scale)
        if not isinstance(layer, str) or not layer:
            raise ValueError(f"layer={layer!r} is not the dotted name of a layer, such as 'up_blocks.-1'")
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
        self.layer = layer
        self.loss = loss

    @contextmanager
    def attach(self, unet: nn.Module) -> Iterator[EnergyProbe]:
        probe = _FeatureProbe(self.layer, LOSSES[self.loss])
        # Only our own handle is removed: the hooks of accelerate and of the user are none of our business.
        handle = find_layer(unet, self.layer).register_forward_hook(probe.hook)
        try:
            yield probe
        finally:
            handle.remove()

    def __repr__(self) -> str:
        return f"FeatureEnergy(scale={self.scale:g}, layer={self.layer!r}, loss={self.loss!r})"


class _FeatureProbe:
    def __init__(self, layer: str, loss: Any) -> None:
        self._layer = layer
        self._loss = loss
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
        elif self._reference is not None:
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
