"""Exact inversion with BDIA: from the latents of a picture to a pair of states, and from the pair back.

Exact Diffusion Inversion via Bi-directional Integration Approximation, ECCV 2024, arXiv 2307.10829. The equations are at the head
of `diffusers_ext.schedulers.scheduling_bdia_ddim`. An edit is a way back with another prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
    guided_passes,
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
    scheduler = laid_scheduler(BDIADDIMInverseScheduler, config, num_inference_steps, latents, gamma=gamma)
    state = latents if latents.dtype == torch.float64 else latents.float()
    deque(_walked(predict, scheduler, state), maxlen=0)
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
    return deque(bdia_states(predict, pair), maxlen=1).pop()


def bdia_states(predict: Predict, pair: BDIAPair) -> Iterator[torch.Tensor]:
    """The states of [`bdia_regenerate`] one by one, the pair first; arguments as there."""
    settings = {key: value for key, value in pair.config.items() if not key.startswith("_")}
    scheduler = laid_scheduler(BDIADDIMScheduler, settings, pair.num_inference_steps, pair.noisiest)
    scheduler.set_initial_pair(pair.noisiest, pair.next_noisiest)
    yield pair.noisiest
    yield pair.next_noisiest
    yield from _walked(predict, scheduler, pair.next_noisiest, first=1)


def laid_scheduler(kind: Any, config: Mapping[str, Any], steps: int, like: torch.Tensor, **given: Any) -> Any:
    """A scheduler of a kind with its steps laid; a ladder's config may name timesteps of its own."""
    settings = dict(config)
    own = settings.pop("timesteps", None)
    scheduler = kind.from_config(settings, **given)
    scheduler.set_timesteps(None if own else steps, device=like.device, timesteps=own)
    return scheduler


def _walked(predict: Predict, scheduler: Any, state: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
    """The states after each step from `first` on."""
    for timestep in scheduler.timesteps[first:]:
        state = scheduler.step(predict(state, timestep).to(state.dtype), timestep, state).prev_sample
        yield state


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
    steps = len(ladder)
    if steps < 2:
        raise ValueError(f"the ladder has {steps} step, which leaves no pair; use at least 2")
    scheduler = laid_scheduler(BDIADDIMInverseScheduler, ladder.config, steps, state, gamma=gamma)
    predict = partial(denoiser.guided, guidance_scale=guidance_scale)
    states = [state]
    for step, following in enumerate(_walked(predict, scheduler, state)):
        states.append(following)
        if callback is not None:
            callback(InversionProgress("inversion", step, steps, int(scheduler.timesteps[step])))
    return Inverted(
        "bdia",
        torch.stack(states),
        ladder.timesteps.flip(0),
        {"alignment": "matched", "gamma": float(gamma), "guidance_scale": guidance_scale},
        forward_passes=guided_passes(guidance_scale) * steps * len(latents),
    )
