"""Edit-friendly inversion: the noise of every step of a stochastic sampler, so that it draws the picture.

An Edit Friendly DDPM Noise Space: Inversion and Manipulations, 2023, arXiv 2304.06140. With independent noises e_k,

    x_k = sqrt(a_k) x_0 + sqrt(1 - a_k) e_k                        states that are further apart than those of one trajectory
    z_k = (x_{k-1} - mu(x_k)) / s_k                                the noise that leads from one to the next
    mu  = sqrt(a_{k-1}) clean + sqrt(1 - a_{k-1} - s_k^2) eps      DDIM with s_k = eta sqrt(v_k) (arXiv 2010.02502, eq. 12, 16)
    v_k = (1 - a_{k-1}) / (1 - a_k) (1 - a_k / a_{k-1})

where clean and eps are what the guided network says at x_k. An edit runs the sampler with another prompt and the same noises,
from a step after the first (the authors skip 36 of 100, and take guidance 3.5 for the source and 15 for the edit).

Where s_k is zero, as in a last step to the clean picture, the difference itself is stored and added. The authors set
the noise of the last step to zero; `last_noise=False` does that, at the price of the exactness.
"""

import torch

from ..schedulers.noise import Generators, check_tensor, drawn_noise
from .ddim import DDIMLadder, clean_and_epsilon
from .denoiser import (
    Denoiser,
    InversionCallback,
    InversionProgress,
    Inverted,
    check_callback,
    checked_float,
    checked_start,
    finite,
    guided_passes,
)


@torch.no_grad()
def edit_friendly_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    guidance_scale: float = 3.5,
    eta: float = 1.0,
    last_noise: bool = True,
    noise: torch.Tensor | None = None,
    generator: Generators = None,
    callback: InversionCallback | None = None,
) -> Inverted:
    """Finds the noises with which a stochastic sampler draws given pictures: two network evaluations a step.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        guidance_scale (`float`, *optional*, defaults to 3.5): For the source; one evaluation a step at a scale of 1.
        eta (`float`, *optional*, defaults to 1.0): Share of noise in the sampler, above 0 (nearly DDIM) to 1 (DDPM).
        last_noise (`bool`, *optional*, defaults to `True`): Whether to keep the noise of the last step, which makes the way
            back exact. The authors drop it.
        noise (`torch.Tensor` of shape `(steps, batch, channels, height, width)`, *optional*): The noises e_k, from the
            least to the most noisy state, instead of drawn ones.
        generator (`torch.Generator` or list of them, *optional*): Draws the noises.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step.

    Returns:
        [`Inverted`]: The states, and `noise_maps` of shape `(steps, batch, channels, height, width)`.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.

    Example:
        ```python
        import torch
        from diffusers import DDIMScheduler
        from diffusers_ext.inversion import DDIMLadder, Denoiser, edit_friendly_inversion, regenerate


        def network(latents, timestep, embeddings):
            return 0.3 * latents + embeddings.mean()


        denoiser = Denoiser(network, torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
        ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 10)
        picture = torch.randn(1, 4, 8, 8)
        inverted = edit_friendly_inversion(denoiser, picture, ladder, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(regenerate(denoiser, inverted, ladder, guidance_scale=3.5), picture, atol=1e-4)
        ```
    """
    check_callback(callback)
    guidance_scale = checked_float("guidance_scale", guidance_scale, 0.0)
    if checked_float("eta", eta, 0.0, 1.0) == 0:
        raise ValueError(
            "eta=0 leaves the sampler without noise; give a number above 0 and up to 1, or use ddim_inversion"
        )
    start = checked_start(denoiser, latents, ladder)
    steps, bars = len(ladder), ladder.alpha_bars.to(start)
    if noise is None:
        noises = [drawn_noise(start, generator) for _ in range(steps)]
    else:
        check_tensor("noise", noise)
        if noise.shape != (steps, *start.shape):
            raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit; give {(steps, *start.shape)}")
        noises = list(finite(noise.to(start), "noise"))
    states = [start, *(bars[k + 1] ** 0.5 * start + (1 - bars[k + 1]) ** 0.5 * e for k, e in enumerate(noises))]
    maps: list[torch.Tensor] = [start] * steps
    for step, timestep in enumerate(ladder.timesteps):
        k = steps - 1 - step
        output = denoiser.guided(states[k + 1], timestep, guidance_scale)
        levels = ladder.sampling_levels(step)
        mean, spread = stochastic_step(output, states[k + 1], *levels, eta, ladder.prediction_type)
        maps[k] = finite((states[k] - mean) / spread, f"the noise map at timestep {int(timestep)}")
        if k == 0 and not last_noise:
            maps[k] = torch.zeros_like(start)
        # What the sampler will compute, so that its rounding does not add up.
        states[k] = mean + spread * maps[k]
        if callback is not None:
            callback(InversionProgress("inversion", step, steps, int(timestep)))
    states[0] = start
    return Inverted(
        "edit_friendly",
        torch.stack(states),
        ladder.timesteps.flip(0),
        {"alignment": "matched", "guidance_scale": guidance_scale, "eta": eta},
        noise_maps=torch.stack(maps),
        forward_passes=guided_passes(guidance_scale) * steps * len(start),
    )


def stochastic_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    alpha_bar: torch.Tensor,
    alpha_bar_next: torch.Tensor,
    eta: float,
    prediction_type: str = "epsilon",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of a stochastic DDIM step and what its noise is multiplied with: the next sample is `mean + spread * noise`.

    Args:
        model_output (`torch.Tensor`): The network's prediction.
        sample (`torch.Tensor`): The latents at level `alpha_bar`.
        alpha_bar (`torch.Tensor`): Scalar alpha-bar of `sample`.
        alpha_bar_next (`torch.Tensor`): Scalar alpha-bar of the result, larger.
        eta (`float`): Share of noise, from 0 to 1.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`.

    Returns:
        `tuple` of two `torch.Tensor`: The mean, and s as a scalar: 1 where it would be 0, so that a stored difference is added
            as it is.
    """
    clean, epsilon = clean_and_epsilon(model_output, sample, alpha_bar, prediction_type)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    spread = eta * variance**0.5
    mean = alpha_bar_next**0.5 * clean + (1 - alpha_bar_next - spread**2).clamp(min=0) ** 0.5 * epsilon
    return mean, torch.where(spread > 0, spread, torch.ones_like(spread))
