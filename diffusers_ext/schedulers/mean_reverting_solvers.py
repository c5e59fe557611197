"""One step of a mean-reverting sampler, as a handful of numbers.

MR Sampler, Li et al., ICLR 2025, arXiv 2502.07856; posterior sampling and Euler-Maruyama from IR-SDE, arXiv 2301.11699. With
h = lambda_t - lambda_s for a step from s to t, m_0 the newest prediction and m_1, m_2 the ones before, all centred on the mean mu,

    y_t = (x_t - mu) = state y_s + sum_i outputs_i m_i + noise z + mean mu

where m is the noise eps for the "n" solvers and x0 - mu for the "d" solvers:

    ode-n   (a_t/a_s) y - s_t (p1 m_0 + p2 D1 + p3 D2)      p1 = e^h - 1, p2 = p1/h - 1, p3 = p2/h - 1/2
    ode-d   (s_t/s_s) y - a_t (q1 m_0 - q2 D1 + q3 D2)      q1 = e^-h - 1, q2 = q1/h + 1, q3 = q2/h - 1/2
    sde-n   (a_t/a_s) y - 2 s_t (p1 m_0 + p2 D1) + s_t sqrt(e^2h - 1) z
    sde-d   (s_t/s_s) e^-h y + a_t (u1 m_0 + u2 D1) + s_t sqrt(u1) z          u1 = 1 - e^-2h, u2 = 1 - u1/(2h)

D1 and D2 are divided differences. As published, D2 is half of what third order needs; `corrected` doubles it. The last factor,
`mean`, is zero unless alpha, sigma and lambda contradict each other, as separately interpolated tables do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .mean_reverting import Level


# what the solver works on, and how high its order can be
NOISE_SOLVERS = {"ode-n": 3, "sde-n": 2, "euler-maruyama": 1}
DATA_SOLVERS = {"ode-d": 3, "sde-d": 2, "posterior": 1}
ALGORITHMS = (*DATA_SOLVERS, *NOISE_SOLVERS)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Update:
    """The numbers of one step; see the top of the file.

    Attributes:
        state (`float`): Factor of y.
        outputs (`tuple[float, ...]`): Factors of the predictions, the newest first.
        noise (`float`, *optional*, defaults to 0): Factor of fresh unit noise.
        mean (`float`, *optional*, defaults to 0): Factor of mu.
    """

    state: float
    outputs: tuple[float, ...]
    noise: float = 0.0
    mean: float = 0.0


def multistep_update(algorithm: str, levels: Sequence[Level], end: Level, corrected: bool = True) -> Update:
    """A step of an MR Sampler.

    Args:
        algorithm (`str`): `"ode-n"`, `"ode-d"`, `"sde-n"` or `"sde-d"`.
        levels (`Sequence[Level]`): Where the step starts and the starts of those before it, the newest first; as many as the
            order, from 1 to 3 (2 for the stochastic ones).
        end (`Level`): Where it ends. Without noise there, the result is the predicted clean picture.
        corrected (`bool`, *optional*, defaults to `True`): Whether the third order is one.

    Example:
        >>> noisy, clean = Level(1.0, 0.6, 0.8, -0.2877), Level(0.0, 1.0, 0.0, math.inf)
        >>> multistep_update("ode-d", [noisy], clean)
        Update(state=0.0, outputs=(1.0,), noise=0.0, mean=0.0)
    """
    start = levels[0]
    if end.sigma == 0.0:
        return final_update(algorithm, start)
    h = end.lam - start.lam
    if algorithm == "ode-n":
        first = math.expm1(h)
        second = first / h - 1.0
        third = second / h - 0.5
        weights = _weights(levels, h, (first, second, third), corrected)
        return Update(end.alpha / start.alpha, tuple(-end.sigma * weight for weight in weights))
    if algorithm == "ode-d":
        first = math.expm1(-h)
        second = first / h + 1.0
        third = second / h - 0.5
        weights = _weights(levels, h, (first, -second, third), corrected)
        mean = _settled(start.alpha * end.sigma / start.sigma - end.alpha * math.exp(-h))
        return Update(end.sigma / start.sigma, tuple(-end.alpha * weight for weight in weights), 0.0, mean)
    if algorithm == "sde-n":
        first = math.expm1(h)
        weights = _weights(levels, h, (first, first / h - 1.0, 0.0), corrected)
        noise = end.sigma * math.sqrt(math.expm1(2.0 * h))
        return Update(end.alpha / start.alpha, tuple(-2.0 * end.sigma * weight for weight in weights), noise)
    first = -math.expm1(-2.0 * h)
    weights = _weights(levels, h, (first, 1.0 - first / (2.0 * h), 0.0), corrected)
    state = end.sigma / start.sigma * math.exp(-h)
    mean = _settled(state - end.alpha / start.alpha * math.exp(-2.0 * h))
    return Update(state, tuple(end.alpha * weight for weight in weights), end.sigma * math.sqrt(first), mean)


def final_update(algorithm: str, start: Level) -> Update:
    """The jump to the predicted clean picture."""
    if algorithm in DATA_SOLVERS:
        return Update(0.0, (1.0,))
    return Update(1.0 / start.alpha, (-start.sigma / start.alpha,))


def posterior_update(start: Level, end: Level) -> Update:
    """A draw from q(x_t | x_s, x0), which IR-SDE calls the optimal reverse, between any two levels of the process."""
    kept = start.alpha / end.alpha
    added = start.sigma**2 - (kept * end.sigma) ** 2
    state = kept * (end.sigma / start.sigma) ** 2
    return Update(state, (end.alpha * added / start.sigma**2,), end.sigma * math.sqrt(added) / start.sigma)


def euler_maruyama_update(start: Level, drift: float, diffusion: float, last: bool = False) -> Update:
    """A step of Euler-Maruyama on the reverse SDE.

    Args:
        start (`Level`): Where it starts.
        drift (`float`): Integral of theta over the step.
        diffusion (`float`): Integral of the squared diffusion coefficient over the step.
        last (`bool`, *optional*, defaults to `False`): Whether to leave the noise out, because the result is the picture.
    """
    return Update(1.0 + drift, (-diffusion / start.sigma,), 0.0 if last else math.sqrt(diffusion))


def conversion(prediction_type: str, to_data: bool, level: Level, sigma_inf: float) -> tuple[float, float]:
    """How a network's output becomes what a solver works on: m = a y + b output (for `"sample"`: output - mu).

    Args:
        prediction_type (`str`): `"epsilon"`, `"sample"` (x0), or `"v_prediction"`, which is
            v = sigma_inf alpha eps - (sigma / sigma_inf) (x0 - mu).
        to_data (`bool`): Whether m is x0 - mu; otherwise eps.
        level (`Level`): Noise level of y, with noise.
        sigma_inf (`float`): Standard deviation at infinite time.

    Returns:
        `tuple[float, float]`: a and b.

    Raises:
        ValueError: If `prediction_type` is not one of these.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction_type == "epsilon":
        return (1.0 / alpha, -sigma / alpha) if to_data else (0.0, 1.0)
    if prediction_type == "sample":
        return (0.0, 1.0) if to_data else (1.0 / sigma, -alpha / sigma)
    if prediction_type == "v_prediction":
        return (alpha, -sigma / sigma_inf) if to_data else (sigma / sigma_inf**2, alpha / sigma_inf)
    raise ValueError(f"prediction_type={prediction_type!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")


def official_orders(count: int, order: int) -> list[int]:
    """The orders that the authors' code uses in a run of `count` steps: with fewer than 10 the last step but one is lowered.

    Example:
        >>> official_orders(5, 2)
        [1, 2, 2, 1, 2]
    """
    orders = [
        min(number, order) if count >= 10 or number < order else min(order, count - number)
        for number in range(1, count)
    ]
    return [*orders, order]


def _weights(
    levels: Sequence[Level], h: float, factors: tuple[float, float, float], corrected: bool
) -> tuple[float, ...]:
    """Weights of m_0, m_1, m_2 in factors_0 m_0 + factors_1 D1 + factors_2 D2."""
    first, second, third = factors
    if len(levels) == 1:
        return (first,)
    r = (levels[0].lam - levels[1].lam) / h
    if len(levels) == 2:
        return (first + second / r, -second / r)
    older = (levels[1].lam - levels[2].lam) / h
    # D10 = (m_0 - m_1) / r, D11 = (m_1 - m_2) / r', D1 = D10 + (D10 - D11) r / (r + r'), D2 = (D10 - D11) / (r + r')
    change = (second * r + third * (2.0 if corrected else 1.0)) / (r + older)
    newer, older_part = (second + change) / r, -change / older
    return (first + newer, older_part - newer, -older_part)


def _settled(value: float) -> float:
    """Zero where only rounding is left."""
    return value if abs(value) > 1e-12 else 0.0
