"""All inversion methods by name: what each stores, what it costs, and when it leads back exactly."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .bdia import bdia_inversion
from .ddim import DDIMLadder, ddim_inversion
from .denoiser import Denoiser, Inverted, guided_passes
from .direct import direct_inversion
from .edit_friendly import edit_friendly_inversion
from .fixed_point import fixed_point_inversion
from .negative_prompt import negative_prompt_inversion
from .null_text import SCHEDULES, null_text_inversion


@dataclass(frozen=True)
class InversionMethod:
    """One method.

    Attributes:
        name (`str`): Its name in [`INVERSIONS`].
        function (`Callable`): `function(denoiser, latents, ladder, **settings)` gives an [`Inverted`].
        stores (`tuple[str, ...]`): Fields of [`Inverted`] that it fills besides the states.
        passes (`Callable`): `passes(steps, **settings)` gives the forward and the backward passes of one picture, at most
            so many where rounds can end early.
        exact (`str`): When sampling with the source prompt gives the picture back, to rounding.
    """

    name: str
    function: Callable[..., Inverted]
    stores: tuple[str, ...]
    passes: Callable[..., tuple[int, int]]
    exact: str

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the keyword arguments that `function` has besides denoiser, latents and ladder."""
        return tuple(inspect.signature(self.function).parameters)[3:]


def _once(steps: int, **settings: Any) -> tuple[int, int]:
    return steps, 0


def _fixed_point(steps: int, iterations: int = 25, solver: str = "iterate", **settings: Any) -> tuple[int, int]:
    return steps * (1 + iterations), steps * max(iterations - 1, 0) if solver == "gradient" else 0


def _null_text(steps: int, schedule: str = "fast", inner_steps: int | None = None, **settings: Any) -> tuple[int, int]:
    plan = SCHEDULES[schedule]
    plan = replace(plan, inner_steps=inner_steps or plan.inner_steps)
    # One on the way to the noise, one for the source prompt, and the rounds.
    return steps * (2 + plan.evaluations), steps * plan.gradients


def _direct(steps: int, guidance_scale: float | None = 7.5, **settings: Any) -> tuple[int, int]:
    return steps * (1 if guidance_scale is None else 1 + guided_passes(guidance_scale)), 0


def _edit_friendly(steps: int, guidance_scale: float = 3.5, **settings: Any) -> tuple[int, int]:
    return steps * guided_passes(guidance_scale), 0


def _bdia(steps: int, guidance_scale: float = 1.0, **settings: Any) -> tuple[int, int]:
    return steps * guided_passes(guidance_scale), 0


INVERSIONS: dict[str, InversionMethod] = {
    method.name: method
    for method in (
        InversionMethod("ddim", ddim_inversion, (), _once, "never"),
        InversionMethod(
            "fixed_point", fixed_point_inversion, (), _fixed_point, "in the limit, without guidance, where G contracts"
        ),
        InversionMethod("negative_prompt", negative_prompt_inversion, ("null_embeddings",), _once, "never"),
        InversionMethod("null_text", null_text_inversion, ("null_embeddings",), _null_text, "never"),
        InversionMethod(
            "direct", direct_inversion, ("offsets",), _direct, "always, at the guidance scale of the offsets"
        ),
        InversionMethod(
            "edit_friendly", edit_friendly_inversion, ("noise_maps",), _edit_friendly,
            "always, at the same guidance scale and with last_noise",
        ),
        InversionMethod("bdia", bdia_inversion, (), _bdia, "always, at the same guidance scale"),
    )
}  # fmt: skip
DEFAULT_INVERSION = "direct"


def invert(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    method: str = DEFAULT_INVERSION,
    **settings: Any,
) -> Inverted:
    """Inverts pictures by the method of a name.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        method (`str`, *optional*, defaults to `"direct"`): A name in [`INVERSIONS`].
        settings: Keyword arguments of the method's function.

    Returns:
        [`Inverted`]: What it found.

    Raises:
        ValueError: If there is no such method, arguments do not fit, or values become infinite or NaN.
        TypeError: If an argument is of a wrong type or the method has no such setting.

    Example:
        ```python
        import torch
        from diffusers import DDIMScheduler
        from diffusers_ext.inversion import INVERSIONS, DDIMLadder, Denoiser, invert


        def network(latents, timestep, embeddings):
            return 0.3 * torch.sin(latents)


        denoiser = Denoiser(network, torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
        ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 10)
        inverted = invert(denoiser, torch.randn(1, 4, 8, 8), ladder, "fixed_point", iterations=3)
        assert inverted.forward_passes == INVERSIONS["fixed_point"].passes(10, iterations=3)[0] == 40
        ```
    """
    if not isinstance(method, str) or method not in INVERSIONS:
        raise ValueError(f"method={method!r} is not one of {', '.join(INVERSIONS)}")
    known = INVERSIONS[method].settings
    for name in settings:
        if name not in known:
            raise TypeError(f"{name}={settings[name]!r} is no setting of method={method!r}; it has {', '.join(known)}")
    return INVERSIONS[method].function(denoiser, latents, ladder, **settings)
