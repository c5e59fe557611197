"""Measures of pictures against a reference, of sets against each other, and of latents by themselves, in float64.

Measures against a reference are per sample and take pictures in [-1, 1]. All of them refuse what is not a tensor of floats with a
TypeError, and what is not finite or does not fit with a ValueError.

PSNR is -10 log10(mean squared error / 4): the peak-to-peak range of [-1, 1] is 2. SSIM follows Wang et al. 2004 with the
usual 11-pixel Gaussian window of standard deviation 1.5 and constants .01 and .03.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


# Mean and standard deviation of each channel of Stable Diffusion latents of COCO pictures, and the size from which a
# normalised value counts as an artefact: Diffusion Sampling with Momentum, 2023, arXiv 2307.11118, and its code.
COCO_MEANS = (0.1456, -0.1077, 0.0237, 0.0460)
COCO_STANDARD_DEVIATIONS = (0.9221, 1.0914, 0.7303, 0.7227)
ARTEFACT_SIZE = 3.0
ARTEFACT_POOL = 4


def psnr(images: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture.

    Args:
        images: (n, c, H, W) in [-1, 1]; values outside are clamped.
        reference: As `images`.
        mask: (n, 1, H, W) weights in [0, 1] of the pixels that count; default all.

    Returns:
        (n,) in decibels, infinite for equal pictures, NaN where a mask is empty.
    """
    _same_shape(images, reference, mask)
    error = (images.double().clamp(-1.0, 1.0) - reference.double().clamp(-1.0, 1.0)).square().mean(1, keepdim=True)
    weight = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
    mean = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10.0 * torch.log10(mean / 4.0)


def ssim(images: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Structural similarity of each picture.

    Args:
        images: (n, c, H, W) in [-1, 1], H and W at least 11; values outside are clamped.
        reference: As `images`.
        mask: (n, 1, H, W) weights in [0, 1] of the pixels on which a window is centred; default all. A window is 11 pixels
            wide, so what lies beside the mask is still seen.

    Returns:
        (n,) in [-1, 1], 1 for equal pictures, NaN where no window is centred in the mask.

    Raises:
        ValueError: If the shapes differ or a side is too short.
    """
    _same_shape(images, reference, mask)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are smaller than the 11-pixel window of SSIM")
    x, y = (picture.double().clamp(-1.0, 1.0) / 2.0 + 0.5 for picture in (images, reference))
    channels = x.shape[1]
    ramp = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64, device=x.device) - 5.0) / 1.5).square())
    window = torch.outer(ramp, ramp) / ramp.sum().square()
    kernel = window.expand(channels, 1, 11, 11)

    def mean_of(value: torch.Tensor) -> torch.Tensor:
        return F.conv2d(value, kernel, groups=channels)

    mx, my = mean_of(x), mean_of(y)
    vx, vy, cov = mean_of(x * x) - mx * mx, mean_of(y * y) - my * my, mean_of(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    if mask is None:
        return ratio.mean((1, 2, 3))
    weight = mask.double()[..., 5:-5, 5:-5].expand_as(ratio)
    return (ratio * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def gmsd(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude similarity deviation, a perceptual distance: how unevenly edges are kept.

    Xue et al., 2014, arXiv 1308.3052: the standard deviation over pixels of (2 g h + c) / (g^2 + h^2 + c), with g and h the Prewitt
    gradient magnitudes of the two pictures in gray at half the size, and c = 170 / 255^2.

    Args:
        images: (n, 3, H, W) in [-1, 1]; values outside are clamped. Sides must be 8 pixels or more.
        reference: As `images`.

    Returns:
        (n,) of 0 or more, 0 for equal pictures.

    Raises:
        ValueError: If the shapes differ or are too small.
    """
    _same_shape(images, reference)
    if images.shape[1] != 3 or min(images.shape[-2:]) < 8:
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit; give three channels and 8 pixels or more")
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=images.device)[:, None, None]
    across = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=torch.float64, device=images.device) / 3.0
    kernel = torch.stack([across, across.T])[:, None]

    def magnitude(picture: torch.Tensor) -> torch.Tensor:
        gray = ((picture.double().clamp(-1.0, 1.0) / 2.0 + 0.5) * weights).sum(1, keepdim=True)
        return F.conv2d(F.avg_pool2d(gray, 2), kernel).square().sum(1).sqrt()

    g, h = magnitude(images), magnitude(reference)
    c = 170.0 / 255.0**2
    similarity = (2.0 * g * h + c) / (g.square() + h.square() + c)
    return similarity.flatten(1).std(1, correction=0)


def magnitude_score(
    latents: torch.Tensor,
    means: Sequence[float] = COCO_MEANS,
    standard_deviations: Sequence[float] = COCO_STANDARD_DEVIATIONS,
    threshold: float = ARTEFACT_SIZE,
) -> torch.Tensor:
    """How much of each picture's latents is far outside the usual range: the divergence artefacts of a sampler.

    Latents are normalised channel by channel; of each 4x4 patch the largest absolute value over its pixels and channels counts if it
    reaches the threshold, and as 0 otherwise; the score is the mean over patches.

    Args:
        latents: (n, c, h, w) before decoding, h and w at least 4. A rest that fills no patch is left out.
        means: c usual means, in the units of `latents`; default those of Stable Diffusion 1 on COCO.
        standard_deviations: c usual standard deviations, above 0.
        threshold: In standard deviations; default 3.

    Returns:
        (n,) at least 0; 0 where nothing reaches the threshold.

    Raises:
        ValueError: If the shapes do not fit or a standard deviation is not positive.

    Example:
        ```python
        import torch

        from diffusers_ext.metrics import magnitude_score

        latents = torch.zeros(1, 4, 8, 8)
        assert magnitude_score(latents).item() == 0
        latents[0, 0, 0, 0] = 0.1456 + 8 * 0.9221
        assert abs(magnitude_score(latents).item() - 8 / 4) < 1e-5  # one of four patches, eight standard deviations
        ```
    """
    _check("latents", latents)
    if latents.ndim != 4 or min(latents.shape[-2:], default=0) < ARTEFACT_POOL:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} must be (n, c, h, w) with h and w at least {ARTEFACT_POOL}"
        )
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold!r} is out of range; use a number of at least 0")
    try:
        centre, spread = (
            torch.tensor(list(v), dtype=torch.float64, device=latents.device) for v in (means, standard_deviations)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"means={means!r} and standard_deviations={standard_deviations!r} must be lists of numbers"
        ) from error
    if (
        centre.shape != (latents.shape[1],)
        or centre.shape != spread.shape
        or not bool((spread > 0).all() & centre.isfinite().all())
    ):
        raise ValueError(
            f"means={tuple(means)} and standard_deviations={tuple(standard_deviations)} must be one number for each of the "
            f"{latents.shape[1]} channels of latents, the latter above 0"
        )
    size = ((latents.double() - centre[:, None, None]) / spread[:, None, None]).abs().amax(1, keepdim=True)
    peaks = F.max_pool2d(size, ARTEFACT_POOL)
    return torch.where(peaks < threshold, 0.0, peaks).mean((1, 2, 3))


def sliced_wasserstein(
    samples: torch.Tensor, reference: torch.Tensor, projections: int = 512, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Distance of two sets: the 2-Wasserstein distance of their projections on random directions, in root mean square.

    Along a direction it compares the sorted projections, which is exact. The distance of a set and itself moved by d is
    |d| / sqrt(D) on average over directions, with D the number of dimensions.

    Args:
        samples: (n, ...).
        reference: (m, ...), the same shape behind the first axis. Where n and m differ, quantiles are interpolated.
        projections: How many directions; the relative standard error is about 1 / sqrt(2 projections).
        generator: Of the directions, on the CPU; default seed 0, so that two calls compare.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: If the shapes do not fit, a set is empty, or `projections` is not positive.

    Example:
        ```python
        import torch

        from diffusers_ext.metrics import sliced_wasserstein

        a = torch.randn(100, 3)
        assert sliced_wasserstein(a, a).item() == 0
        ```
    """
    _check("samples", samples)
    _check("reference", reference)
    if samples.shape[1:] != reference.shape[1:] or samples.ndim < 2:
        raise ValueError(
            f"samples {tuple(samples.shape)} and reference {tuple(reference.shape)} must be (n, ...) and (m, ...), with the same "
            "shape behind the first axis"
        )
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise ValueError(f"projections={projections!r} is not a count; use an int of at least 1")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r} is of type {type(generator).__name__}; give a torch.Generator")
    x, y = (value.double().flatten(1) for value in (samples, reference))
    generator = generator or torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], projections, dtype=torch.float64, generator=generator).to(x.device)
    directions = directions / directions.norm(dim=0)
    along_x, along_y = ((value @ directions).sort(0).values for value in (x, y))
    if len(x) != len(y):
        # Where quantiles of both are known: the middles of the larger set's steps.
        count = max(len(x), len(y))
        levels = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
        along_x, along_y = (_quantiles(value, levels) for value in (along_x, along_y))
    return (along_x - along_y).square().mean().sqrt()


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Distance of two sets by their means and covariances, that of FID (Heusel et al., 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared 2-Wasserstein distance of the two normal distributions. Its bias falls with the
    number of samples, so compare only values of equally many, well above the number of dimensions.

    Args:
        features: (n, d), n at least 2.
        reference: (m, d), m at least 2.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        ```python
        import torch

        from diffusers_ext.metrics import frechet_distance

        a = torch.randn(100, 3)
        assert abs(frechet_distance(a, a + 2).item() - 12) < 1e-6
        ```
    """
    _check_sets("features", features, reference)
    if min(len(features), len(reference)) < 2:
        raise ValueError("features and reference need 2 samples or more each, one has no covariance")
    first, second = features.double(), reference.double()
    moved = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (torch.atleast_2d(torch.cov(value.T)) for value in (first, second))
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    # the eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2), which is symmetric
    shared = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0.0).sqrt().sum()
    return (moved + one.trace() + two.trace() - 2.0 * shared).clamp(min=0.0)


def coverage(samples: torch.Tensor, reference: torch.Tensor, neighbours: int = 5) -> torch.Tensor:
    """Share of a reference set that samples come near to (Naeem et al., 2020, arXiv 2002.09797).

    A point of the reference is covered if a sample lies within its distance to its k-th nearest neighbour among the others of the
    reference. A set that leaves modes out covers less, however good its samples are. More samples cover more, so compare only values of
    equally many.

    Args:
        samples: (n, d), n at least 1.
        reference: (m, d), m above `neighbours`.
        neighbours: k, 1 or more; default that of the paper.

    Returns:
        A scalar in [0, 1]; 1 for the reference itself. Two sets of one distribution tend to 1 - 1 / 2^k where n = m.

    Raises:
        ValueError: If the shapes do not fit or `neighbours` is no count below m.

    Example:
        ```python
        import torch

        from diffusers_ext.metrics import coverage

        line = torch.arange(10.0)[:, None]
        assert coverage(line[:5], line, neighbours=1).item() == 0.6  # the first five, and the next, 1 away from the fifth
        ```
    """
    _check_sets("samples", samples, reference)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or not 1 <= neighbours < len(reference):
        raise ValueError(
            f"neighbours={neighbours!r} is out of range; use an int from 1 to {len(reference) - 1}, below the size of reference"
        )
    first, second = samples.double(), reference.double()
    # differences, not products: rounding would move points that lie on the edge of a ball
    exact = "donot_use_mm_for_euclid_dist"
    # the nearest of all is the point itself
    radii = torch.cdist(second, second, compute_mode=exact).kthvalue(neighbours + 1, dim=1).values
    return (torch.cdist(second, first, compute_mode=exact).amin(1) <= radii).double().mean()


def _quantiles(ordered: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Values at `levels` of columns in ascending order, straight between the middles of their steps."""
    place = (levels * len(ordered) - 0.5).clamp(0, len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], (place - low)[:, None].expand(-1, ordered.shape[1]))


def _same_shape(images: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    _check("images", images)
    _check("reference", reference)
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must both have the shape (n, c, H, W)"
        )
    if mask is not None:
        _check("mask", mask)
        n, _, height, width = images.shape
        if mask.shape != (n, 1, height, width):
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit; give {(n, 1, height, width)}")


def _check_sets(name: str, values: torch.Tensor, reference: torch.Tensor) -> None:
    _check(name, values)
    _check("reference", reference)
    if values.ndim != 2 or reference.ndim != 2 or values.shape[1] != reference.shape[1]:
        raise ValueError(
            f"{name} {tuple(values.shape)} and reference {tuple(reference.shape)} must be (n, d) and (m, d)"
        )


def _check(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {found}; give a tensor of floats")
    if not value.numel():
        raise ValueError(f"{name} of shape {tuple(value.shape)} is empty; give at least one")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{name} is not finite in {int((~torch.isfinite(value)).sum())} values; leave those samples out"
        )
