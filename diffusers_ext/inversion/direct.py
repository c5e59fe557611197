"""Direct inversion: what sampling misses of the inverted trajectory is stored and given back.

Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code (PnP Inversion), 2023, arXiv 2310.01506. With z*_k the
states of DDIM inversion and S_k a sampling step with guidance,

    o_k   = z*_{k-1} - S_k(z*_k)               the offsets
    z_src = S_k(z_src) + o_k = z*_{k-1}        the branch of an edit that carries the source prompt

so the source branch is exact to rounding, and the branch of the edit is left alone. Nothing is optimised.

Offsets hold for one guidance scale. Code that runs the source branch itself can put it on z*_{k-1} after each step instead, which
is the same at every scale: `guidance_scale=None` stores no offsets and saves their passes, and `regenerate` then does that.
"""

from dataclasses import replace

import torch

from .ddim import DDIMLadder, ddim_inversion, ddim_step
from .denoiser import Denoiser, InversionCallback, InversionProgress, Inverted, checked_float, finite, guided_passes


@torch.no_grad()
def direct_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    guidance_scale: float | None = 7.5,
    callback: InversionCallback | None = None,
) -> Inverted:
    """Inverts pictures by DDIM and finds what sampling with guidance misses in each step.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        guidance_scale (`float`, *optional*, defaults to 7.5): That of the sampling; two more passes a step, one at a scale of
            1. None stores no offsets.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step.

    Returns:
        [`Inverted`]: The states, and `offsets` of shape `(steps, batch, channels, height, width)`.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.
    """
    if guidance_scale is not None:
        guidance_scale = checked_float("guidance_scale", guidance_scale, 0.0)
    inverted = replace(ddim_inversion(denoiser, latents, ladder, callback=callback), method="direct")
    if guidance_scale is None:
        return inverted
    states, offsets, steps = inverted.latents, [], len(ladder)
    for step, timestep in enumerate(ladder.timesteps):
        state, wanted = states[steps - step], states[steps - 1 - step]
        output = denoiser.guided(state, timestep, guidance_scale)
        found = ddim_step(output, state, *ladder.sampling_levels(step), ladder.prediction_type)
        offsets.append(finite(wanted - found, f"the offset at timestep {int(timestep)}"))
        if callback is not None:
            callback(InversionProgress("source", step, steps, int(timestep)))
    passes = guided_passes(guidance_scale) * steps * len(denoiser)
    return replace(
        inverted,
        settings={**inverted.settings, "guidance_scale": guidance_scale},
        offsets=torch.stack(offsets[::-1]),
        forward_passes=inverted.forward_passes + passes,
    )
