"""Steps of a picture through a few noise levels, and guidance by the noise that it would hold if it had not changed.

StreamDiffusion, 2023, arXiv 2312.12491. The latents x of a picture go through stages i with a_i^2 + b_i^2 = 1:

    z_0 = a_0 x + b_0 n_0
    x_i = c_out (z_i - b_i e_i) / a_i + c_skip z_i        predicted data; c_out = 1, c_skip = 0 but for consistency models
    z_{i+1} = a_{i+1} x_i + b_{i+1} n_{i+1}               n_{i+1} is e_i (DDIM), or new noise (consistency models)

Classifier-free guidance takes e = u + g (c - u) of the predictions c with and u without words. Residual guidance puts d v_i, which
costs nothing, in the place of u. v_i is the virtual residual noise, (z_i - a_i x) / b_i, kept without x:

    v_{i+1} = n_{i+1} + (a_{i+1} / b_{i+1}) (c_out (b_i v_i - b_i e_i) / a_i + c_skip b_i v_i)

with v_0 = n_0 ("self"), or v_0 = u, asked for once a picture ("initialize").
"""

import math
from typing import TypeAlias

import torch


Factor: TypeAlias = float | torch.Tensor

# Of latent consistency models, arXiv 2310.04378, as LCMScheduler has it.
SIGMA_DATA = 0.5


def boundary_scalings(timestep: float, timestep_scaling: float = 10.0) -> tuple[float, float]:
    """c_skip and c_out of a consistency model, which make it the identity at timestep 0.

    Args:
        timestep (`float`): Timestep of the model, at least 0.
        timestep_scaling (`float`, *optional*, defaults to 10.0): What it is multiplied with.

    Returns:
        `tuple[float, float]`: `c_skip` and `c_out`.

    Example:
        ```python
        from diffusers_ext.schedulers.residual_guidance import boundary_scalings

        assert boundary_scalings(0) == (1.0, 0.0)
        ```
    """
    scaled = timestep * timestep_scaling
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / math.sqrt(total)


def guided_noise(
    noise: torch.Tensor, without_words: torch.Tensor, guidance_scale: float, delta: float = 1.0
) -> torch.Tensor:
    """e = d u + g (c - d u): classifier-free guidance with `delta` 1, residual guidance with the virtual noise as u.

    Args:
        noise (`torch.Tensor`): Noise predicted with the prompt, c.
        without_words (`torch.Tensor` of the same shape): Noise predicted without it, or the virtual residual noise; u.
        guidance_scale (`float`): g; 1 leaves `noise` as it is.
        delta (`float`, *optional*, defaults to 1.0): d, how much of u counts.

    Returns:
        `torch.Tensor` of the same shape.
    """
    without_words = delta * without_words
    return without_words + guidance_scale * (noise - without_words)


def predicted_data(
    sample: torch.Tensor, noise: torch.Tensor, alpha: Factor, sigma: Factor, c_skip: Factor = 0.0, c_out: Factor = 1.0
) -> torch.Tensor:
    """x_i = c_out (z - b e) / a + c_skip z.

    Args:
        sample (`torch.Tensor`): Noisy latents z.
        noise (`torch.Tensor` of the same shape): Predicted noise e, after guidance.
        alpha (`float` or `torch.Tensor`), sigma (`float` or `torch.Tensor`): a, above 0, and b; they may differ from row to row.
        c_skip (`float` or `torch.Tensor`, *optional*, defaults to 0.0): Share of the sample itself.
        c_out (`float` or `torch.Tensor`, *optional*, defaults to 1.0): Share of what was predicted.

    Returns:
        `torch.Tensor` of the shape of `sample`.
    """
    return c_out * (sample - sigma * noise) / alpha + c_skip * sample


def next_residual(
    residual: torch.Tensor,
    noise: torch.Tensor,
    new_noise: torch.Tensor,
    level: tuple[Factor, Factor],
    next_level: tuple[Factor, Factor],
    c_skip: Factor = 0.0,
    c_out: Factor = 1.0,
) -> torch.Tensor:
    """v_{i+1} from v_i: the noise that the picture holds at the next stage, if its data were those that entered.

    Args:
        residual (`torch.Tensor`): v_i.
        noise (`torch.Tensor` of the same shape): Predicted noise e_i, after guidance.
        new_noise (`torch.Tensor` of the same shape): n_{i+1}, what the next stage is noised with.
        level (pair of `float` or `torch.Tensor`): a_i, above 0, and b_i.
        next_level (pair of `float` or `torch.Tensor`): a_{i+1} and b_{i+1}, above 0.
        c_skip (`float` or `torch.Tensor`, *optional*, defaults to 0.0): As in `predicted_data`.
        c_out (`float` or `torch.Tensor`, *optional*, defaults to 1.0): As in `predicted_data`.

    Returns:
        `torch.Tensor` of the same shape.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers.residual_guidance import next_residual, predicted_data

        data, noise, predicted = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
        before, after = (0.6, 0.8), (0.8, 0.6)
        moved = predicted_data(0.6 * data + 0.8 * noise, predicted, *before)
        state = 0.8 * moved + 0.6 * predicted  # DDIM
        found = next_residual(noise, predicted, predicted, before, after)
        torch.testing.assert_close(found, (state - 0.8 * data) / 0.6)
        ```
    """
    change = predicted_data(level[1] * residual, noise, *level, c_skip, c_out)
    return new_noise + next_level[0] * change / next_level[1]


def strength_indices(num_inference_steps: int, strength: float) -> range:
    """Which steps of a schedule an image-to-image call makes, as diffusers counts them.

    Args:
        num_inference_steps (`int`): Steps of the whole schedule.
        strength (`float`): Share of them that is made, above 0 and up to 1; the first ones are left out.

    Returns:
        `range`: Places in the schedule, ascending.

    Raises:
        ValueError: If no step is left.

    Example:
        ```python
        from diffusers_ext.schedulers.residual_guidance import strength_indices

        assert list(strength_indices(8, 0.5)) == [4, 5, 6, 7]
        ```
    """
    count = min(int(num_inference_steps * strength), num_inference_steps)
    if count < 1:
        raise ValueError(
            f"strength={strength!r} of num_inference_steps={num_inference_steps!r} leaves no step; give a strength of at least "
            f"{1 / num_inference_steps:.3g}"
        )
    return range(num_inference_steps - count, num_inference_steps)


def skip_probability(similarity: float, threshold: float) -> float:
    """How likely a picture that resembles the one before is left out, 1 - (1 - similarity) / (1 - threshold), at least 0.

    Args:
        similarity (`float`): Cosine of the two pictures, from -1 to 1.
        threshold (`float`): Similarity at and below which no picture is left out, below 1.

    Returns:
        `float`: From 0 to 1.

    Example:
        ```python
        from diffusers_ext.schedulers.residual_guidance import skip_probability

        assert skip_probability(1.0, 0.98) == 1.0 and skip_probability(0.97, 0.98) == 0.0
        ```
    """
    return min(1.0, max(0.0, 1.0 - (1.0 - similarity) / (1.0 - threshold)))
