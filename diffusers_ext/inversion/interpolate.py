"""NoiseDiffusion: from the noises of two pictures to the noise of a picture between them.

NoiseDiffusion: Correcting Noise for Image Interpolation with Diffusion Models beyond Spherical Linear Interpolation, 2024,
arXiv 2403.08840. Two pictures x_1, x_2 with their inverted latents l_1, l_2 at a level with alpha-bar A, at fraction f of the
way from the first to the second, and with a share g of fresh noise n:

    a  = sqrt(1 - g^2) cos(f pi / 2)          b  = sqrt(1 - g^2) sin(f pi / 2)          a^2 + b^2 + g^2 = 1
    mu = 1.2 a / (a + b)                      nu = 1.2 b / (a + b)
    z  = clip(a clip(l_1) + b clip(l_2) + (mu - a) sqrt(A) x_1 + (nu - b) sqrt(A) x_2 + g sqrt(1 - A) n)

Noise of real pictures is not normal: spherical interpolation adds up its outliers, which become blots. Clipping takes those
away, and the share of the pictures brings back what it took with them. Denoising then starts at that level.
"""

import math

import torch

from ..schedulers.noise import Generators, check_tensor, given_noise
from .denoiser import checked_float, finite


IMAGE_WEIGHT = 1.2
BOUND = 2.0


def noise_diffusion_weights(
    fraction: float, fresh: float = 0.0, image_weight: float = IMAGE_WEIGHT
) -> tuple[float, float, float, float]:
    """The weights a, b, mu and nu of the module's head.

    Args:
        fraction (`float`): f, from 0, the first picture, to 1, the second.
        fresh (`float`, *optional*, defaults to 0.0): g, from 0 to below 1.
        image_weight (`float`, *optional*, defaults to 1.2): Sum of mu and nu.

    Returns:
        `tuple[float, float, float, float]`: a, b, mu, nu.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        ```python
        from diffusers_ext.inversion import noise_diffusion_weights

        a, b, mu, nu = noise_diffusion_weights(0.25)
        assert abs(a**2 + b**2 - 1) < 1e-12 and abs(mu + nu - 1.2) < 1e-12
        ```
    """
    angle = checked_float("fraction", fraction, 0.0, 1.0) * math.pi / 2
    kept = math.sqrt(1 - checked_float("fresh", fresh, 0.0, 0.999) ** 2)
    weight = checked_float("image_weight", image_weight, 0.0)
    # Exactly zero at the far end, where cos(pi / 2) is 6e-17.
    a, b = kept * (math.cos(angle) if fraction < 1 else 0.0), kept * math.sin(angle)
    return a, b, weight * a / (a + b), weight * b / (a + b)


@torch.no_grad()
def interpolate(
    first: torch.Tensor,
    second: torch.Tensor,
    first_picture: torch.Tensor,
    second_picture: torch.Tensor,
    alpha_bar: float | torch.Tensor,
    fraction: float = 0.5,
    fresh: float = 0.0,
    image_weight: float = IMAGE_WEIGHT,
    bound: float = BOUND,
    noise: torch.Tensor | None = None,
    generator: Generators = None,
) -> torch.Tensor:
    """Latents at a noise level from which denoising leads to a picture between two others.

    Args:
        first (`torch.Tensor` of shape `(batch, channels, height, width)`): Inverted latents of the first picture at the level.
        second (`torch.Tensor`): Those of the second, the same shape.
        first_picture (`torch.Tensor`): The first picture, encoded: its latents without noise, the same shape.
        second_picture (`torch.Tensor`): The second, the same shape.
        alpha_bar (`float` or scalar `torch.Tensor`): A, alpha-bar of the level, from 0 to 1.
        fraction (`float`, *optional*, defaults to 0.5): From 0, the first picture, to 1, the second.
        fresh (`float`, *optional*, defaults to 0.0): Share g of fresh noise, from 0 to below 1; more of it makes the result
            sharper and less like the two.
        image_weight (`float`, *optional*, defaults to 1.2): Sum of the weights of the two pictures. With 1 and no clipping
            the ends are the inverted latents themselves.
        bound (`float`, *optional*, defaults to 2.0): Values beyond it are cut off, before and after; may be infinite.
        noise (`torch.Tensor`, *optional*): The fresh noise n instead of a drawn one.
        generator (`torch.Generator` or list of them, *optional*): Draws it.

    Returns:
        `torch.Tensor` of the shape of `first`, in float32 or better.

    Raises:
        ValueError: If an argument is out of range, or shapes differ.
        TypeError: If an argument is of a wrong type.

    Example:
        ```python
        import torch
        from diffusers_ext.inversion import interpolate

        l1, l2, x1, x2 = torch.randn(4, 1, 4, 8, 8)
        ends = interpolate(l1, l2, x1, x2, alpha_bar=0.3, fraction=1.0, image_weight=1.0, bound=float("inf"))
        assert torch.allclose(ends, l2)
        ```
    """
    tensors = {"first": first, "second": second, "first_picture": first_picture, "second_picture": second_picture}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.shape != first.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; give {tuple(first.shape)}, that of first")
        finite(tensor, name)
    if isinstance(alpha_bar, torch.Tensor) and alpha_bar.numel() == 1:
        alpha_bar = alpha_bar.item()
    level = checked_float("alpha_bar", alpha_bar, 0.0, 1.0)
    if bound != math.inf:
        checked_float("bound", bound, 1e-6)
    a, b, mu, nu = noise_diffusion_weights(fraction, fresh, image_weight)
    l1, l2, x1, x2 = (t if t.dtype == torch.float64 else t.float() for t in tensors.values())
    l1, l2 = l1.clamp(-bound, bound), l2.clamp(-bound, bound)
    mixed = a * l1 + b * l2 + level**0.5 * ((mu - a) * x1 + (nu - b) * x2)
    if fresh:
        mixed = mixed + fresh * (1 - level) ** 0.5 * given_noise(mixed, generator, noise)
    return mixed.clamp(-bound, bound)
