r"""Consistency training: distances, levels and curricula.

Consistency models (Song et al. 2023, arXiv 2303.01469), with the boundary condition f(x, sigma_min) = x by
    f(x, sigma) = c_skip x + c_out F(c_in x, sigma),     c_skip = d^2 / ((sigma - sigma_min)^2 + d^2),
    c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2),     c_in = 1 / sqrt(sigma^2 + d^2),     d = sigma_data;
    N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1 levels at step k of K.
Improved techniques (iCT, Song & Dhariwal 2023, arXiv 2310.14189):
    pseudo-Huber sqrt(||x - y||^2 + c^2) - c with c = 0.00054 sqrt(dimension), weights 1 / (sigma_{i+1} - sigma_i),
    levels i with the probability of a log-normal(-1.1, 2.0) between sigma_i and sigma_{i+1},
    N(k) = min(s_0 2^floor(k / K'), s_1) + 1,     K' = floor(K / (log2 floor(s_1 / s_0) + 1)).
Latent consistency with impulsive outliers (sLCT, Dao et al. 2025, arXiv 2502.01441): Cauchy log(1 + ||x - y||^2 / (2 c^2)), with
c = exp(-1.18 ln(N - 1) - 0.72); mini-batch optimal transport of noise to data (`training.coupling`).
Easy consistency tuning (ECT, Geng et al. 2024, arXiv 2406.14548): the earlier level of t is
    r = t - t (1 - ratio) (1 + 8 sigmoid(-t)),     ratio = 1 - 2^-(stage + 1).
"""

import math

import torch

from .checks import check_range, check_same_shape


DISTANCES = ("l2", "pseudo_huber", "cauchy")


def distance(kind: str, prediction: torch.Tensor, wanted: torch.Tensor, c: float) -> torch.Tensor:
    """Distance of each sample: "l2" (squared, c unused), "pseudo_huber" or "cauchy".

    Args:
        kind: A word of `DISTANCES`.
        prediction: (n, ...).
        wanted: Same shape, without graph.
        c: Where the distance stops being quadratic, above 0.

    Returns:
        (n,).

    Example:
        >>> distance("pseudo_huber", torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), c=4.0).tolist()
        [1.0]
    """
    if kind not in DISTANCES:
        raise ValueError(f"distance={kind!r} is unknown; use one of {', '.join(DISTANCES)}")
    check_same_shape(prediction=prediction, wanted=wanted)
    squared = (prediction - wanted).square().flatten(1).sum(1)
    if kind == "l2":
        return squared
    check_range("c", c, 0.0, above=True)
    if kind == "cauchy":
        return torch.log1p(squared / (2.0 * c * c))
    # squared / (root + c) is root - c without the cancellation where the two are close
    return squared / ((squared + c * c).sqrt() + c)


def ict_constant(dimension: int) -> float:
    """c of the pseudo-Huber distance for samples of so many elements, 0.00054 sqrt(dimension)."""
    check_range("dimension", dimension, 1)
    return 0.00054 * math.sqrt(dimension)


def slct_constant(levels: int) -> float:
    """c of the Cauchy distance at a curriculum of so many levels, exp(-1.18 ln(N - 1) - 0.72)."""
    check_range("levels", levels, 2)
    return math.exp(-1.18 * math.log(levels - 1) - 0.72)


def ict_levels(step: int, total: int, start: int = 10, end: int = 640) -> int:
    """N(k) of iCT: the number of intervals doubles at equal distances of the run.

    Args:
        step: Optimiser step k, from 0 on; beyond `total` the last number stays.
        total: Steps of the run K, 1 or more.
        start: First number of intervals s_0, 1 or more.
        end: Last number of intervals s_1, `start` or more; iCT 1280, sLCT 640.

    Returns:
        Number of levels.

    Example:
        >>> [ict_levels(step, 400_000) for step in (0, 57_142, 399_999)]
        [11, 21, 641]
    """
    check_range("step", step, 0)
    check_range("total", total, 1)
    check_range("start", start, 1)
    check_range("end", end, start)
    period = max(1, math.floor(total / (math.log2(end // start) + 1)))
    # the doubling ends at `end`: a longer shift would only make a huge integer
    doublings = min(step // period, end.bit_length())
    return min(start * 2**doublings, end) + 1


def cm_levels(step: int, total: int, start: int = 2, end: int = 150) -> int:
    """N(k) of the original consistency training; arguments as in `ict_levels`."""
    check_range("total", total, 1)
    check_range("step", step, 0, total)
    check_range("start", start, 1)
    check_range("end", end, start)
    return math.ceil(math.sqrt(step / total * ((end + 1) ** 2 - start**2) + start**2) - 1) + 1


def karras_levels(count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Rising noise levels of EDM (Karras et al. 2022, arXiv 2206.00364), equally spaced in sigma^(1 / rho).

    Args:
        count: Number of levels, 2 or more.
        sigma_min: Lowest, above 0.
        sigma_max: Highest, above `sigma_min`.
        rho: 1 or more; higher values put more levels near `sigma_min`.

    Returns:
        (count,) in float64.
    """
    check_range("count", count, 2)
    check_range("sigma_min", sigma_min, 0.0, sigma_max, above=True, below=True)
    check_range("rho", rho, 1.0)
    ramp = torch.linspace(0.0, 1.0, count, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho


def lognormal_probabilities(sigmas: torch.Tensor, mean: float = -1.1, deviation: float = 2.0) -> torch.Tensor:
    """Probability of each interval between neighbouring levels, of a log-normal sigma.

    Args:
        sigmas: Rising levels (N,), above 0.
        mean: Mean of ln sigma.
        deviation: Deviation of ln sigma, above 0.

    Returns:
        (N - 1,) with sum 1, float64: for `torch.multinomial`.
    """
    check_range("deviation", deviation, 0.0, above=True)
    _check_rising(sigmas)
    reached = torch.erf((sigmas.double().log() - mean) / (math.sqrt(2.0) * deviation))
    mass = reached.diff()
    return mass / mass.sum()


def interval_weights(sigmas: torch.Tensor) -> torch.Tensor:
    """1 / (sigma_{i+1} - sigma_i) of rising levels (N,), shape (N - 1,)."""
    _check_rising(sigmas)
    return 1.0 / sigmas.diff()


def ect_earlier(time: torch.Tensor, ratio: float, sigma_min: float = 0.002) -> torch.Tensor:
    """The level r <= t that t is compared with.

    Args:
        time: Levels t of any shape, above 0.
        ratio: From 0, where r is the clean end, towards 1, where it comes close to t; see `ect_ratio`.
        sigma_min: Lowest level.

    Returns:
        Levels of that shape, `sigma_min` or more.
    """
    check_range("ratio", ratio, 0.0, 1.0)
    return (time - time * (1.0 - ratio) * (1.0 + 8.0 * torch.sigmoid(-time))).clamp(min=sigma_min)


def ect_ratio(stage: int) -> float:
    """1 - 2^-(stage + 1), at most 0.999, of stages counted from 0."""
    check_range("stage", stage, 0)
    return min(1.0 - 2.0 ** -(stage + 1), 0.999)


def boundary_scalings(
    sigma: torch.Tensor, sigma_min: float = 0.002, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_skip, c_out and c_in of a consistency model at levels of any shape; at `sigma_min` they are 1, 0 and about 1 / d.

    Args:
        sigma: Noise levels, `sigma_min` or more.
        sigma_min: Lowest level, where the model is the identity.
        sigma_data: Deviation of the data, above 0.
    """
    check_range("sigma_data", sigma_data, 0.0, above=True)
    away, variance = sigma - sigma_min, sigma_data**2
    norm = (sigma.square() + variance).sqrt()
    return variance / (away.square() + variance), sigma_data * away / norm, 1.0 / norm


def _check_rising(sigmas: torch.Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() > 0).all()) or float(sigmas[0]) <= 0:
        raise ValueError(f"sigmas of shape {tuple(sigmas.shape)} must be two or more rising numbers above 0")
