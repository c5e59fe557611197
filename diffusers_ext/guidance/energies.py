"""What an energy is: the protocol by which anyone writes one, and the shortest way to do so.

An energy says, with one number per sample, how far an edit has gone from its source; guidance lowers it.

**The protocol.** An energy is any object with

    scale: float or (step, num_steps) -> float     its weight in the sum
    attach(unet) -> context manager                installs what reads the network, and takes it away again; yields a probe

and, if it wants to differ from the defaults,

    branch = "source"             the pass of the edit it looks at: with the "source" or with the "target" prompt
    zero_at_reference = True      whether it is zero where edit and source are the same

A probe is any object with

    begin(phase)                  the next pass is "reference" (the source picture, with the source prompt), "source" or
                                  "target" (the edit, with that prompt and with a graph)
    energy(state) -> (batch,)     float32, differentiable with respect to `state.latents`

After `begin("source")`, one forward and one backward pass follow before the next `begin`; under gradient checkpointing parts of
the forward pass run again in the backward pass, so what a probe writes down must not depend on how often it is told.

[`GuidanceEnergy`] implements all of it, so that an energy of the latents needs one method: [`GuidanceEnergy.measure`].
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..attention.self_attention import Phase


Branch = Literal["source", "target"]
Scale = float | Callable[[int, int], float]

BRANCHES: tuple[Branch, ...] = ("source", "target")


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
        noise_pred (`torch.Tensor`): Predicted noise of `latents` with the prompt of the energy's branch, differentiable.
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
        scale (`float` or `Callable`):
            Weight of the energy in the sum: a finite number, or a function `(step, num_steps)` that gives one, with `step`
            counted from 0 at the noisy end. Where it is 0 the energy costs nothing.
        branch (`str`, *optional*, defaults to `"source"`):
            The pass of the edit it looks at, `"source"` or `"target"` by the prompt. The reference is always the source
            picture with the source prompt.

    Attributes:
        zero_at_reference (`bool`): True if the energy is zero where edit and source are the same. Its gradient is then
            left out where they still are: what is left of it there is rounding noise, which rescaling would amplify.

    Raises:
        ValueError: If an argument is none of these.

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


        guiders = [KeepRegion(torch.ones(1, 1, 16, 16), scale=lambda step, num_steps: 100.0 * (1 - step / num_steps))]
        ```
    """

    zero_at_reference = True
    branch: Branch = "source"

    def __init__(self, scale: Scale, branch: Branch = "source") -> None:
        if not callable(scale):
            scale = _finite(scale, type(self).__name__)
        if branch not in BRANCHES:
            raise ValueError(f"branch={branch!r} of {type(self).__name__} is not one of {', '.join(BRANCHES)}")
        self.scale = scale
        self.branch = branch

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


def weight_of(energy: Any, step: int, num_steps: int) -> float:
    """The weight of an energy in a step.

    Args:
        energy ([`GuidanceEnergy`]): The energy.
        step (`int`): The step, from 0 at the noisy end.
        num_steps (`int`): Steps of the whole run.

    Returns:
        `float`: Its `scale`, or what that function gives.

    Raises:
        ValueError: If the function gives anything but a finite number.
    """
    if not callable(energy.scale):
        return float(energy.scale)
    return _finite(energy.scale(step, num_steps), f"{type(energy).__name__} in step {step}")


def _finite(value: Any, whose: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            f"scale={value!r} of {whose} is not a finite number; give one, or a function (step, num_steps) that does"
        )
    return float(value)


def _scale_text(scale: Scale) -> str:
    return repr(scale) if callable(scale) else f"{scale:g}"


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
