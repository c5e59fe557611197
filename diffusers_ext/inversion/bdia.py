"""Exact inversion with BDIA: from the latents of a picture to a pair of states, and from the pair back.

Exact Diffusion Inversion via Bi-directional Integration Approximation, ECCV 2024, arXiv 2307.10829. The equations are at the head
of `diffusers_ext.schedulers.scheduling_bdia_ddim`. An edit is a way back with another prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..schedulers import BDIADDIMInverseScheduler, BDIADDIMScheduler
from .ddim import DDIMLadder
from .denoiser import (
    Denoiser,
    InversionCallback,
    InversionProgress,
    Inverted,
    check_callback,
    checked_float,
    checked_start,
)


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BDIAPair:
    """What an exact inversion leaves: the two noisiest states, and the run that they belong to.

    Attributes:
        noisiest (`torch.Tensor` of shape `(batch, ...)`): z_N, float32 or better.
        next_noisiest (`torch.Tensor`): z_{N-1}.
        config (`dict[str, Any]`): Settings of the scheduler, gamma among them.
        num_inference_steps (`int`): N.
    """

    noisiest: torch.Tensor
    next_noisiest: torch.Tensor
    config: Mapping[str, Any]
    num_inference_steps: int


@torch.no_grad()
def bdia_invert(
    predict: Predict, latents: torch.Tensor, config: Mapping[str, Any], num_inference_steps: int, gamma: float = 0.96
) -> BDIAPair:
    """Follows a picture to the noise so that the way back is exact.

    Args:
        predict (`Callable`): Network output for `(latents, timestep)`. It gets states in float32 and may answer in any dtype. With
            guidance above 3 the way back is still exact, but the pair is far from noise and edits suffer.
        latents (`torch.Tensor` of shape `(batch, ...)`): The encoded picture.
        config (`dict`): A scheduler's config, for example `pipe.scheduler.config`.
        num_inference_steps (`int`): Steps, at least 2; as many network evaluations.
        gamma (`float`, *optional*, defaults to 0.96): From 0.9 to 1; see [`BDIADDIMScheduler`].

    Returns:
        [`BDIAPair`]: The pair, for [`bdia_regenerate`].

    Raises:
        TypeError: If `latents` is not a tensor of floats.
        ValueError: If an argument is out of range or a state is not finite.

    Example:
        ```python
        import torch
        from diffusers_ext.inversion import bdia_invert, bdia_regenerate
        from diffusers_ext.schedulers import BDIADDIMScheduler


        def network(latents, timestep):
            return 0.5 * torch.sin(latents)


        picture = torch.randn(1, 4, 8, 8)
        pair = bdia_invert(network, picture, BDIADDIMScheduler().config, num_inference_steps=20)
        assert torch.allclose(bdia_regenerate(network, pair), picture, atol=1e-4)
        ```
    """
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents is {type(latents).__name__}; give a tensor of floats")
    if num_inference_steps == 1:
        raise ValueError("num_inference_steps=1 leaves no pair; use at least 2")
    scheduler = BDIADDIMInverseScheduler.from_config(config, gamma=gamma)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    state = latents if latents.dtype == torch.float64 else latents.float()
    for timestep in scheduler.timesteps:
        state = scheduler.step(predict(state, timestep).to(state.dtype), timestep, state).prev_sample
    noisiest, next_noisiest = scheduler.pair
    return BDIAPair(noisiest, next_noisiest, dict(scheduler.config), num_inference_steps)


@torch.no_grad()
def bdia_regenerate(predict: Predict, pair: BDIAPair) -> torch.Tensor:
    """Follows a pair back to the picture, or with another `predict` to an edit of it.

    Args:
        predict (`Callable`): Network output for `(latents, timestep)`; the same function as in the inversion gives the same
            picture.
        pair ([`BDIAPair`]): What [`bdia_invert`] returned.

    Returns:
        `torch.Tensor` of the shape of the pair's states: the latents of the picture, float32 or better.

    Raises:
        ValueError: If a state is not finite.
    """
    settings = {key: value for key, value in pair.config.items() if not key.startswith("_")}
    scheduler = BDIADDIMScheduler.from_config(settings)
    scheduler.set_timesteps(pair.num_inference_steps, device=pair.noisiest.device)
    scheduler.set_initial_pair(pair.noisiest, pair.next_noisiest)
    state = pair.next_noisiest
    for timestep in scheduler.timesteps[1:]:
        state = scheduler.step(predict(state, timestep).to(state.dtype), timestep, state).prev_sample
    return state


@torch.no_grad()
def bdia_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    gamma: float = 0.96,
    guidance_scale: float = 1.0,
    callback: InversionCallback | None = None,
) -> Inverted:
    """[`bdia_invert`] in the form of the other methods: the pair is the last two states.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels, at least 2 steps.
        gamma (`float`, *optional*, defaults to 0.96): From 0.9 to 1; see [`BDIADDIMScheduler`].
        guidance_scale (`float`, *optional*, defaults to 1.0): Of both ways. Above 3 the states are far from noise.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step.

    Returns:
        [`Inverted`]: The states.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.
    """
    check_callback(callback)
    guidance_scale = checked_float("guidance_scale", guidance_scale, 0.0)
    state = checked_start(denoiser, latents, ladder)
    steps, settings = len(ladder), dict(ladder.config)
    if steps < 2:
        raise ValueError(f"the ladder has {steps} step, which leaves no pair; use at least 2")
    own = settings.pop("timesteps", None)
    scheduler = BDIADDIMInverseScheduler.from_config(settings, gamma=gamma)
    scheduler.set_timesteps(None if own else steps, device=state.device, timesteps=own)
    states = [state]
    for step, timestep in enumerate(scheduler.timesteps):
        state = scheduler.step(denoiser.guided(state, timestep, guidance_scale), timestep, state).prev_sample
        states.append(state)
        if callback is not None:
            callback(InversionProgress("inversion", step, steps, int(timestep)))
    return Inverted(
        "bdia",
        torch.stack(states),
        ladder.timesteps.flip(0),
        {"alignment": "matched", "gamma": float(gamma), "guidance_scale": guidance_scale},
        forward_passes=(1 if guidance_scale == 1 else 2) * steps * len(latents),
    )
