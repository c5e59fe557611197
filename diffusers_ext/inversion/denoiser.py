"""What every inversion method works on, and what every one of them returns.

A method sees a network only through [`Denoiser`]: what it says of noisy latents with the source prompt, and what it says with
embeddings in place of those of the empty prompt. Guidance (Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598) is

    output = null + w (source - null)

on the raw output, which is the same rule for a network that predicts noise and for one that predicts v.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..schedulers.noise import check_tensor


@dataclass(frozen=True)
class Denoiser:
    """A network with the conditions of a batch of pictures: their source prompts, and the empty prompt.

    States stay in the precision in which they were given; only what enters the network is cast to `dtype`. So an
    optimisation runs in float32 over weights in float16.

    Attributes:
        network (`Callable`): `network(latents, timestep, embeddings, **extra)` gives the output as a tensor of the shape of
            `latents`.
        source_embeddings (`torch.Tensor` of shape `(batch, tokens, width)`): Of the source prompts.
        null_embeddings (`torch.Tensor`): Of the empty prompt, the same shape.
        dtype (`torch.dtype`, *optional*): Precision of the network. Defaults to that of `source_embeddings`.
        source_extra (`dict`, *optional*): Further keyword arguments that go with the source prompts: tensors with the batch
            first, or dicts of them. SDXL has its pooled embeddings and sizes there, as `added_cond_kwargs`.
        null_extra (`dict`, *optional*): Those that go with the empty prompt.

    Raises:
        TypeError: If the network cannot be called or embeddings are not tensors of floats.
        ValueError: If the two embeddings differ in shape.

    Example:
        ```python
        import torch
        from diffusers_ext.inversion import DDIMLadder, Denoiser, direct_inversion, regenerate
        from diffusers import DDIMScheduler


        def network(latents, timestep, embeddings):
            return 0.3 * torch.sin(latents) + embeddings.mean()


        denoiser = Denoiser(network, torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
        ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 10)
        picture = torch.randn(1, 4, 8, 8)
        inverted = direct_inversion(denoiser, picture, ladder, guidance_scale=7.5)
        assert torch.allclose(regenerate(denoiser, inverted, ladder, 7.5), picture, atol=2e-4)
        ```
    """

    network: Callable[..., torch.Tensor]
    source_embeddings: torch.Tensor
    null_embeddings: torch.Tensor
    dtype: torch.dtype | None = None
    source_extra: Mapping[str, Any] = field(default_factory=dict)
    null_extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise TypeError(f"network is a {type(self.network).__name__} and cannot be called; give a function")
        check_tensor("source_embeddings", self.source_embeddings)
        check_tensor("null_embeddings", self.null_embeddings)
        if self.source_embeddings.shape != self.null_embeddings.shape or self.source_embeddings.ndim < 2:
            raise ValueError(
                f"null_embeddings of shape {tuple(self.null_embeddings.shape)} and source_embeddings of shape "
                f"{tuple(self.source_embeddings.shape)} do not fit; give both as (batch, tokens, width)"
            )

    def __len__(self) -> int:
        return len(self.source_embeddings)

    def source(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Output for the source prompts, in the precision of `latents`."""
        return self._run(latents, timestep, self.source_embeddings, self.source_extra)

    def null(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output for the empty prompt, or for embeddings in its place, in the precision of `latents`."""
        embeddings = self.null_embeddings if embeddings is None else embeddings
        return self._run(latents, timestep, embeddings, self.null_extra)

    def guided(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        guidance_scale: float,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output with guidance; at a scale of 1 that of the source prompts alone, which costs one pass instead of two."""
        source = self.source(latents, timestep)
        if guided_passes(guidance_scale) == 1:
            return source
        return with_guidance(self.null(latents, timestep, embeddings), source, guidance_scale)

    def part(self, row: int) -> "Denoiser":
        """The same network with the condition of one picture of the batch, copied."""
        rows = slice(row, row + 1)
        # Copies, because autograd refuses tensors that were made in inference mode.
        return Denoiser(
            self.network,
            self.source_embeddings[rows].clone(),
            self.null_embeddings[rows].clone(),
            self.dtype,
            _rows(self.source_extra, rows, len(self)),
            _rows(self.null_extra, rows, len(self)),
        )

    def _run(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, extra: Mapping[str, Any]
    ) -> torch.Tensor:
        dtype = self.dtype or self.source_embeddings.dtype
        output = self.network(latents.to(dtype), timestep.to(latents.device), embeddings.to(dtype), **extra)
        if not isinstance(output, torch.Tensor) or output.shape != latents.shape:
            found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"network returned {found} for latents of shape {tuple(latents.shape)}; return that shape"
            )
        return output.to(latents.dtype)


@dataclass(frozen=True)
class Inverted:
    """What an inversion found. Entry k of every array belongs to `timesteps[k]`, the step between states k + 1 and k.

    Attributes:
        method (`str`): Name of the method in [`INVERSIONS`].
        latents (`torch.Tensor` of shape `(steps + 1, batch, ...)`): From the pictures to the noise.
        timesteps (`torch.Tensor` of shape `(steps,)`): Ascending.
        settings (`dict`): What the way back must know, as plain values, `guidance_scale` for example.
        null_embeddings (`torch.Tensor` of shape `(steps or 1, batch, tokens, width)`, *optional*): To be used in place of the
            empty prompt's; with a first axis of 1 the same ones in every step.
        noise_maps (`torch.Tensor` of shape `(steps, batch, ...)`, *optional*): The noise of each stochastic step.
        offsets (`torch.Tensor` of shape `(steps, batch, ...)`, *optional*): To be added to the source after each step.
        forward_passes (`int`): Network evaluations, each picture counted.
        backward_passes (`int`): Gradients through the network, counted in the same way.
    """

    method: str
    latents: torch.Tensor
    timesteps: torch.Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    null_embeddings: torch.Tensor | None = None
    noise_maps: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    forward_passes: int = 0
    backward_passes: int = 0

    def null_embeddings_at(self, step: int) -> torch.Tensor | None:
        """The embeddings for sampling step `step`, counted from 0 at the noisy end; None where the empty prompt serves."""
        if self.null_embeddings is None:
            return None
        return self.null_embeddings[0 if len(self.null_embeddings) == 1 else len(self.timesteps) - 1 - step]


@dataclass(frozen=True)
class InversionProgress:
    """Where an inversion is: handed to `callback` after every step and after every round of an optimisation.

    Attributes:
        stage (`str`): `"inversion"` on the way to the noise, `"optimisation"` for rounds inside a step, `"source"` for passes
            along a trajectory that is already there.
        step (`int`): Counted from 0 in the order of the stage.
        steps (`int`): How many there are.
        timestep (`int`): The timestep of the step.
        picture (`int`, *optional*): Which one of the batch; None for all.
        round (`int`, *optional*): Round within the step, from 0.
        loss (`float`, *optional*): What is being lowered, its mean over the picture.
    """

    stage: str
    step: int
    steps: int
    timestep: int
    picture: int | None = None
    round: int | None = None
    loss: float | None = None


InversionCallback = Callable[[InversionProgress], None]


class InversionStoppedError(ValueError):
    """An optimisation left the range of finite numbers.

    Attributes:
        best ([`Inverted`], *optional*): The best that was found until then. From the step where it stopped on, the last good
            embeddings are repeated. A pipeline puts an [`InversionOutput`] there.
    """

    def __init__(self, message: str, best: Any = None) -> None:
        super().__init__(message)
        self.best = best


def with_guidance(null: torch.Tensor, source: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: `null + w (source - null)`.

    Args:
        null (`torch.Tensor`): Output without a prompt.
        source (`torch.Tensor`): Output with it, the same shape.
        guidance_scale (`float`): w.

    Returns:
        `torch.Tensor`: The guided output.
    """
    return null + guidance_scale * (source - null)


def guided_passes(guidance_scale: float) -> int:
    """Passes of [`Denoiser.guided`] for one picture: without guidance the empty prompt is not asked."""
    return 1 if guidance_scale == 1 else 2


def checked_start(denoiser: Denoiser, latents: torch.Tensor, ladder: Any) -> torch.Tensor:
    """The encoded pictures, checked, in float32 or better and outside any graph.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the batches differ or a value is not finite.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser is a {type(denoiser).__name__}; give a Denoiser(network, source, null)")
    if not hasattr(ladder, "alpha_bars"):
        raise TypeError(f"ladder is a {type(ladder).__name__}; give a DDIMLadder")
    check_tensor("latents", latents)
    if latents.ndim < 2 or latents.numel() == 0:
        raise ValueError(f"latents has the shape {tuple(latents.shape)}; give (batch, channels, height, width)")
    if len(latents) != len(denoiser):
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} holds {len(latents)} pictures, the denoiser prompts of {len(denoiser)}; "
            "give as many"
        )
    start = latents.detach().clone()
    start = start if start.dtype == torch.float64 else start.float()
    return finite(start, "latents")


def finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor itself.

    Raises:
        ValueError: If a value is infinite or not a number.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} holds values that are infinite or not a number; load the network in float32")
    return tensor


def checked_float(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number between two bounds.

    Raises:
        ValueError: If it is none.
    """
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not low <= value <= high:
        wanted = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is out of range; give a number {wanted}")
    return float(value)


def checked_count(name: str, value: Any, low: int = 1, high: int = 10_000) -> int:
    """A whole number between two bounds.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is out of range; give a whole number from {low} to {high}")
    return value


def check_callback(callback: Any) -> None:
    """Raises unless `callback` is None or can be called.

    Raises:
        TypeError: If it is neither.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback={callback!r} cannot be called; give a function of one InversionProgress, or None")


def _rows(value: Any, rows: slice, batch: int) -> Any:
    """The part of keyword arguments that belongs to some pictures; what is not a batch stays as it is."""
    if isinstance(value, Mapping):
        return {name: _rows(item, rows, batch) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rows(item, rows, batch) for item in value]
    if isinstance(value, torch.Tensor):
        return (value[rows] if value.ndim and len(value) == batch else value).clone()
    return value
