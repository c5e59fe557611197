"""Mean-reverting diffusion: its noise levels, and the ways to lay timesteps over them.

IR-SDE, Luo et al., ICML 2023, arXiv 2301.11699. A clean picture x0 decays towards a degraded one, the mean mu:

    dx = theta_t (mu - x) dt + sigma_inf sqrt(2 theta_t) dw
    x_t = mu + alpha_t (x0 - mu) + sigma_t eps,   alpha_t = exp(-int theta),   sigma_t^2 = sigma_inf^2 (1 - alpha_t^2)

so y = (x - mu) / sigma_inf is variance-preserving diffusion. OUVE (SGMSE+, Richter et al. 2023, arXiv 2208.05830) has the same
mean and another variance, with L = ln(sigma_max / sigma_min):

    alpha_t = exp(-theta t),   sigma_t^2 = sigma_min^2 L (exp(2 L t) - exp(-2 theta t)) / (theta + L),   t from 0 to 1

lambda_t = ln(alpha_t / sigma_t) is half the log of the signal-to-noise ratio. All numbers are float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


THETA_SCHEDULES = ("cosine", "linear", "constant", "trained", "ouve")
SPACINGS = ("linspace", "leading", "trailing", "karras-n", "karras-t", "linear-lambda")
INTERPOLATIONS = ("consistent", "table")


@dataclass(frozen=True)
class Level:
    """One noise level.

    Attributes:
        timestep (`float`): Its time.
        alpha (`float`): What is left of x0 - mu, in (0, 1].
        sigma (`float`): Standard deviation of the noise, 0 or more.
        lam (`float`): ln(alpha / sigma); infinite without noise.
    """

    timestep: float
    alpha: float
    sigma: float
    lam: float


class Process(Protocol):
    """What the solvers need to know of a mean-reverting process.

    Attributes:
        first (`float`): Time of pure noise around the mean, where sampling begins.
        lowest (`float`): Lowest time with noise that samplers may stop at.
        ends_at_zero (`bool`): Whether a grid that ends without noise does so after its last node, not in place of it.
        start_sigma (`float`): Standard deviation that sampling begins with.
        sigma_inf (`float`): Standard deviation at infinite time, for the velocity.
    """

    first: float
    lowest: float
    ends_at_zero: bool
    start_sigma: float
    sigma_inf: float

    def level(self, timestep: float) -> Level:
        """The noise level at a time."""

    def time_of(self, lam: np.ndarray) -> np.ndarray:
        """The times of values of lambda."""

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The times of values of sigma / alpha."""

    def drift_and_diffusion(self, start: Level, end: Level) -> tuple[float, float]:
        """Integrals of theta and of the squared diffusion coefficient from `end` up to `start`."""


def theta_table(
    schedule: str,
    num_train_timesteps: int = 100,
    cosine_s: float = 0.008,
    trained_thetas: Sequence[float] | None = None,
) -> np.ndarray:
    """theta at the timesteps 0 ... T, up to the common factor that `TableProcess` chooses.

    Args:
        schedule (`str`): `"cosine"` (1 - f(t + 1) / f(0) with f the cosine schedule of T + 2 steps), `"linear"`, `"constant"`, or
            `"trained"`, which is `trained_thetas`.
        num_train_timesteps (`int`, *optional*, defaults to 100): T, at least 2.
        cosine_s (`float`, *optional*, defaults to 0.008): Offset of the cosine.
        trained_thetas (`Sequence[float]`, *optional*): T + 1 numbers above 0.

    Returns:
        `np.ndarray` of shape `(T + 1,)`.

    Raises:
        ValueError: If `schedule` is not one of these, or `trained_thetas` is missing or not T + 1 numbers above 0.

    Example:
        >>> theta_table("cosine").round(4)[[0, 50, 100]].tolist()
        [0.0006, 0.5062, 0.9998]
    """
    count = num_train_timesteps
    if schedule == "cosine":
        phase = (np.arange(count + 3) / (count + 2) + cosine_s) / (1.0 + cosine_s)
        left = np.cos(phase * math.pi / 2.0) ** 2
        return 1.0 - left[1:-1] / left[0]
    if schedule == "linear":
        scale = 1000.0 / (count + 1)
        return np.linspace(1e-4 * scale, 0.02 * scale, count + 1)
    if schedule == "constant":
        return np.ones(count + 1)
    if schedule != "trained":
        raise ValueError(f"theta_schedule={schedule!r} is not known; use one of {', '.join(THETA_SCHEDULES)}")
    if trained_thetas is None:
        raise ValueError(
            "trained_thetas=None is missing; theta_schedule='trained' needs num_train_timesteps + 1 numbers"
        )
    thetas = as_numbers("trained_thetas", trained_thetas)
    if len(thetas) != count + 1 or not (thetas > 0).all():
        raise ValueError(
            f"trained_thetas has {len(thetas)} entries from {thetas.min(initial=0):g}; give num_train_timesteps + 1 = {count + 1} "
            "numbers above 0"
        )
    return thetas


class TableProcess:
    """Mean-reverting diffusion with a table of theta at the timesteps 0 ... T.

    Args:
        thetas (`np.ndarray` of shape `(T + 1,)`): Speed of the decay, above 0; scaled so that alpha_T is `alpha_min`.
        sigma_inf (`float`): Standard deviation of pure noise, in units of the pictures.
        alpha_min (`float`, *optional*, defaults to 0.005): alpha at T.
        zero_start (`bool`, *optional*, defaults to `True`): Whether timestep 0 is the clean picture, as in IR-SDE and DA-CLIP;
            otherwise it has a little noise, as in the code of MR Sampler.
        interpolation (`str`, *optional*, defaults to `"consistent"`): Between timesteps `"consistent"` interpolates ln alpha and
            derives the rest, `"table"` interpolates alpha, sigma and lambda, each linearly, as the code of MR Sampler.
    """

    def __init__(
        self,
        thetas: np.ndarray,
        sigma_inf: float,
        alpha_min: float = 0.005,
        zero_start: bool = True,
        interpolation: str = "consistent",
    ) -> None:
        summed = np.cumsum(thetas)
        if zero_start:
            summed = summed - thetas[0]
        # minus the integral of theta, which is ln alpha
        self.log_alphas = summed * (math.log(alpha_min) / summed[-1])
        self.sigma_inf = self.start_sigma = sigma_inf
        self.interpolation = interpolation
        self.alphas = np.exp(self.log_alphas)
        # expm1, because 1 - alpha^2 loses its digits where alpha is almost 1
        self.sigmas = sigma_inf * np.sqrt(-np.expm1(2.0 * self.log_alphas))
        with np.errstate(divide="ignore"):
            self.lambdas = self.log_alphas - np.log(self.sigmas)
        self.first = float(len(thetas) - 1)
        self.lowest = 1.0 if zero_start else 0.0
        self.ends_at_zero = False

    def level(self, timestep: float) -> Level:
        grid = np.arange(len(self.alphas))
        if self.interpolation == "table" and timestep >= self.lowest:
            tables = (self.alphas, self.sigmas, self.lambdas)
            return Level(timestep, *(float(np.interp(timestep, grid, table)) for table in tables))
        log_alpha = float(np.interp(timestep, grid, self.log_alphas))
        return _level(timestep, log_alpha, self.sigma_inf * math.sqrt(-math.expm1(2.0 * log_alpha)))

    def time_of(self, lam: np.ndarray) -> np.ndarray:
        grid = np.arange(len(self.alphas), dtype=np.float64)
        if self.interpolation == "table":
            # noisiest first, because np.interp wants ascending nodes; an infinite lambda is no node
            noisy = slice(None, int(self.lowest) - 1 if self.lowest else None, -1)
            return np.interp(lam, self.lambdas[noisy], grid[noisy])
        # alpha^-2 = 1 + exp(-2 lambda) / sigma_inf^2
        log_alphas = -0.5 * np.logaddexp(0.0, -2.0 * (lam + math.log(self.sigma_inf)))
        return np.interp(log_alphas, self.log_alphas[::-1], grid[::-1])

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        if self.interpolation == "table":
            return np.interp(ratio, self.sigmas / self.alphas, np.arange(len(self.alphas)))
        return self.time_of(-np.log(ratio))

    def drift_and_diffusion(self, start: Level, end: Level) -> tuple[float, float]:
        drift = math.log(end.alpha / start.alpha)
        return drift, 2.0 * self.sigma_inf**2 * drift


class OUVEProcess:
    """The process of SGMSE+ speech models, over times from 0 to 1; see the top of the file.

    Args:
        theta (`float`, *optional*, defaults to 1.5): Speed of the decay. At time 1 a share exp(-theta) of x0 - mu is still there.
        sigma_min (`float`, *optional*, defaults to 0.05): First diffusion coefficient.
        sigma_max (`float`, *optional*, defaults to 0.5): Last one.
        t_eps (`float`, *optional*, defaults to 0.03): Lowest time that the network was trained at, in (0, 1).
    """

    first = 1.0
    ends_at_zero = True

    def __init__(
        self, theta: float = 1.5, sigma_min: float = 0.05, sigma_max: float = 0.5, t_eps: float = 0.03
    ) -> None:
        self.theta, self.sigma_min, self.lowest = theta, sigma_min, t_eps
        self.log_ratio = math.log(sigma_max / sigma_min)
        self.sigma_inf = self.start_sigma = self.level(self.first).sigma

    def level(self, timestep: float) -> Level:
        theta, ratio = self.theta, self.log_ratio
        growth = math.exp(-2.0 * theta * timestep) * math.expm1(2.0 * (theta + ratio) * timestep)
        sigma = self.sigma_min * math.sqrt(ratio / (theta + ratio) * growth)
        return _level(timestep, -theta * timestep, sigma)

    def time_of(self, lam: np.ndarray) -> np.ndarray:
        # exp(-2 lambda) = sigma_min^2 L (exp(2 (theta + L) t) - 1) / (theta + L)
        total = self.theta + self.log_ratio
        return np.log1p(np.exp(-2.0 * lam) * total / (self.sigma_min**2 * self.log_ratio)) / (2.0 * total)

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        return self.time_of(-np.log(ratio))

    def drift_and_diffusion(self, start: Level, end: Level) -> tuple[float, float]:
        length = start.timestep - end.timestep
        coefficient = self.sigma_min**2 * math.exp(2.0 * self.log_ratio * start.timestep) * 2.0 * self.log_ratio
        return self.theta * length, coefficient * length


def spaced_timesteps(
    process: Process,
    spacing: str,
    count: int,
    steps_offset: int = 0,
    rho: float = 7.0,
    lambda_min_clipped: float | None = None,
) -> np.ndarray:
    """The `count` + 1 times that a run of `count` steps visits, descending.

    Args:
        process (`Process`): The process.
        spacing (`str`): `"linspace"` (even in time, all of it), `"leading"`, `"trailing"`, `"karras-n"` (even in
            (sigma / alpha)^(1/rho)), `"karras-t"` (even in t^(1/rho)), or `"linear-lambda"` (even in lambda).
        count (`int`): Steps, at least 1.
        steps_offset (`int`, *optional*, defaults to 0): Added to `"leading"` times, up to the last one trained on.
        rho (`float`, *optional*, defaults to 7): The exponent above.
        lambda_min_clipped (`float`, *optional*): Levels noisier than this lambda are left out.

    Returns:
        `np.ndarray` of shape `(count + 1,)`. Except for `"linspace"`, `"leading"` and `"trailing"` the lowest one is the
        lowest that has noise.

    Raises:
        ValueError: If the spacing is not known or nothing is left of the range.
    """
    top, low = process.first, process.lowest
    if lambda_min_clipped is not None and lambda_min_clipped > process.level(top).lam:
        top = float(process.time_of(np.array(lambda_min_clipped)))
        if spacing != "linear-lambda" and not process.ends_at_zero:
            # networks are trained at whole timesteps; the noisier neighbour is clipped away too
            top = math.floor(top)
        if not top > low:
            raise ValueError(f"lambda_min_clipped={lambda_min_clipped!r} leaves no noise to start from; give less")
    if spacing in ("leading", "trailing") and process.ends_at_zero:
        raise ValueError(
            f"timestep_spacing={spacing!r} counts whole timesteps, which theta_schedule='ouve' has not; use 'linspace'"
        )
    end = low if process.ends_at_zero else 0.0
    share = np.arange(count + 1) / max(count, 1)
    if spacing == "linspace":
        return top + (end - top) * share
    if spacing == "leading":
        times = (top // (count + 1)) * np.arange(count + 1)[::-1] + steps_offset
        return np.minimum(times, process.first)
    if spacing == "trailing":
        return top - np.arange(count + 1) * (top / (count + 1))
    if spacing == "karras-t":
        # 0 would be the end of everything; the authors of MR Sampler stop at 1
        return _powers(top, low if process.ends_at_zero else 1.0, count + 1, rho)
    if spacing == "karras-n":
        ratios = _powers(math.exp(-process.level(top).lam), math.exp(-process.level(low).lam), count + 1, rho)
        times = process.time_of_ratio(ratios)
    elif spacing == "linear-lambda":
        high_lam, low_lam = process.level(top).lam, process.level(low).lam
        times = process.time_of(high_lam + (low_lam - high_lam) * share)
    else:
        raise ValueError(f"timestep_spacing={spacing!r} is not known; use one of {', '.join(SPACINGS)}")
    # rounding must not lead out of the range at either end
    times[0], times[-1] = top, low
    return times


def _powers(highest: float, lowest: float, count: int, rho: float) -> np.ndarray:
    return np.linspace(highest ** (1.0 / rho), lowest ** (1.0 / rho), count) ** rho


def _level(timestep: float, log_alpha: float, sigma: float) -> Level:
    lam = log_alpha - math.log(sigma) if sigma > 0 else math.inf
    return Level(timestep, math.exp(log_alpha), sigma, lam)


def as_numbers(name: str, values: Any) -> np.ndarray:
    """A flat list as float64 numbers.

    Raises:
        ValueError: If it is not a flat list of finite numbers.
    """
    try:
        numbers = np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r} is not a list of numbers; give finite numbers") from error
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{name}={values!r} is not a flat list of finite numbers; give finite numbers")
    return numbers
