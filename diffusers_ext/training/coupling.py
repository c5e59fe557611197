"""Which noise goes with which sample of a batch.

Immiscible diffusion (Li et al. 2024, arXiv 2406.12303): before noise is added, the noise vectors of a batch are assigned
to its samples so that the sum of their Euclidean distances is smallest. Each noise is still standard normal and used
once; only the pairing is no longer random, so that each sample diffuses to its own part of the noise.

Its successor (Li et al. 2025, arXiv 2505.18521) draws k noises for each sample and keeps the nearest: no assignment to solve and no
exchange between processes. In few dimensions the noise that is kept is no longer standard normal; in those of pictures the shift is
small, since distances to all noises are nearly alike there.

Mini-batch optimal transport (Tong et al. 2023, arXiv 2302.00482) assigns by the sum of squared distances, which for flows makes the
paths of a batch free of crossings.
"""

import torch


COUPLINGS = ("none", "immiscible", "immiscible_knn", "optimal_transport")
CANDIDATES = 4


def draw_noise(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise for `couple`.

    Args:
        kind: A word of `COUPLINGS`.
        shape: Of the samples, (n, ...).
        generator: Source of the draws.

    Returns:
        Noise of `shape`; for "immiscible_knn" four candidates for each sample, (n, 4, ...).
    """
    if kind == "immiscible_knn":
        shape = (shape[0], CANDIDATES, *shape[1:])
    return torch.randn(shape, generator=generator)


def couple(kind: str, samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Chooses a noise for each sample.

    Args:
        kind: "none" leaves `noise` as it is, "immiscible" minimises the summed distance to `samples`, "optimal_transport" the
            summed squared distance, "immiscible_knn" takes the nearest of each sample's own candidates.
        samples: Clean samples (n, ...), scaled as they are noised.
        noise: Noise of the same shape, of which the rows get a new order; for "immiscible_knn" (n, k, ...).

    Returns:
        Noise in the shape of `samples`.

    Raises:
        ValueError: For an unknown `kind` or shapes that do not fit.
        ImportError: If SciPy, which solves the assignment, is missing.

    Example:
        >>> couple("immiscible", torch.tensor([[1.0], [-1.0]]), torch.tensor([[-2.0], [2.0]])).flatten().tolist()
        [2.0, -2.0]
    """
    if kind not in COUPLINGS:
        raise ValueError(f"noise_coupling={kind!r} is unknown; use one of {', '.join(COUPLINGS)}")
    if kind == "none":
        return noise
    if kind == "immiscible_knn":
        return nearest(samples, noise)
    if noise.shape != samples.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; give that of samples, {tuple(samples.shape)}")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f"noise_coupling={kind!r} needs SciPy; pip install 'diffusers-ext[training]'") from error
    distance = torch.cdist(samples.flatten(1).float(), noise.flatten(1).float())
    if kind == "optimal_transport":
        distance = distance.square()
    _, order = linear_sum_assignment(distance.cpu().numpy())
    return noise[torch.from_numpy(order).to(noise.device)]


def nearest(samples: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The candidate that is nearest to each sample.

    Args:
        samples: Clean samples (n, ...).
        candidates: k noises for each of them (n, k, ...).

    Returns:
        (n, ...).

    Raises:
        ValueError: For shapes that do not fit.
    """
    if candidates.ndim != samples.ndim + 1 or (candidates.shape[0], *candidates.shape[2:]) != tuple(samples.shape):
        shape = ", ".join(map(str, samples.shape[1:]))
        raise ValueError(f"candidates have shape {tuple(candidates.shape)}; give ({len(samples)}, k, {shape})")
    distance = (candidates - samples[:, None]).float().square().flatten(2).sum(2)
    return candidates[torch.arange(len(samples), device=samples.device), distance.argmin(1)]
