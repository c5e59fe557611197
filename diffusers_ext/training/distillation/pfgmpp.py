r"""Perturbation of PFGM++ (Xu et al. 2023, arXiv 2302.04265): a heavy-tailed kernel between Poisson flows and diffusion.

Data of N dimensions are put into N + D; the perturbation at sigma has a uniform direction and the radius
    R = r sqrt(B / (1 - B)),     B ~ Beta(N / 2, D / 2),     r = sigma sqrt(D),
which tends to the Gaussian of deviation sigma for D -> infinity. Loss and network stay those of EDM.
"""

import torch

from .checks import check_levels, check_range


def radius(beta: torch.Tensor, sigma: torch.Tensor, extra_dimensions: float) -> torch.Tensor:
    """R of draws B in (0, 1) at levels sigma, both (n,)."""
    check_range("extra_dimensions", extra_dimensions, 0.0, above=True)
    return sigma * extra_dimensions**0.5 * (beta / (1.0 - beta)).sqrt()


def perturbation(
    shape: tuple[int, ...], sigma: torch.Tensor, extra_dimensions: float, generator: torch.Generator
) -> torch.Tensor:
    """What is added to the data instead of Gaussian noise.

    Args:
        shape: Of the data, (n, ...).
        sigma: Noise level of each sample (n,).
        extra_dimensions: D, above 0; 128 to 2048 are used on pictures; the higher, the more Gaussian.
        generator: Source of the draws.

    Returns:
        Tensor of `shape`, float32.
    """
    check_range("extra_dimensions", extra_dimensions, 0.0, above=True)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    check_levels(direction, sigma=sigma)
    flat = direction.flatten(1)
    # the quotient of the gamma variables is B / (1 - B)
    above, below = (
        torch._standard_gamma(torch.full((len(flat),), 0.5 * size, dtype=torch.float64), generator=generator)
        for size in (float(flat.shape[1]), float(extra_dimensions))
    )
    far = sigma.double() * extra_dimensions**0.5 * (above / below).sqrt()
    return (flat / flat.norm(dim=1, keepdim=True) * far[:, None]).reshape(shape).float()
