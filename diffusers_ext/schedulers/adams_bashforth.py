"""Weights of multistep integrators: Adams-Bashforth, momentum put into it, and a polynomial basis that can be chosen.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2023, arXiv 2307.11118. In X = x / alpha and
s = sigma / alpha the probability-flow ODE is dX/ds = eps, and a step of length d = s' - s is X' = X + d u. With the
backward difference nabla e_i = e_i - e_{i-1} and gamma = 1, 1/2, 5/12, 3/8, 251/720, ... Adams-Bashforth of order k is

    u_i = sum_{j<k} gamma_j nabla^j e_i

Polyak's heavy ball averages the direction, v_i = (1 - b) v_{i-1} + b u_i. GHVB averages the noise first,
v_i = (1 - b) v_{i-1} + b e_i, so that e = (1 + ((1 - b) / b) nabla) v; put into the sum and cut off at nabla^(k-1):

    u_i = sum_{j<k} (gamma_j + ((1 - b) / b) gamma_{j-1}) nabla^j v_i                               gamma_{-1} = 0

which keeps order k. On dX/ds = lambda X with constant steps, z = lambda d, the integration is stable for |z| below

    AB-k     2 / S_k
    HB-k    (2 / S_k) (2 - b) / b
    GHVB-k   2 (2 - b) / (b S_k + 2 (1 - b) S_{k-1})              S_k = sum_{j<k} gamma_j 2^j,  S_0 = 0

The power basis AB(K, p) interpolates the last K values by a polynomial in s^p and integrates it exactly: p = 1 is
Adams-Bashforth on the true nodes (LMS), p = 0 is a polynomial in log s (DEIS). The weights shrink as p grows.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


MAX_ORDER = 8
MOMENTUM_TYPES = ("ghvb", "hb", "nesterov", "none")

# Gauss-Legendre on [0, 1]; sixteen points integrate every step of a run of three or more to rounding error.
_POINTS, _WEIGHTS = (0.5 * (values + shift) for values, shift in zip(np.polynomial.legendre.leggauss(16), (1, 0)))


def check_order(order: int, name: str = "order") -> None:
    """Raises a ValueError unless `order` is an int from 1 to 8; `name` is for the message."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        raise ValueError(f"{name}={order!r} is not an order; use an int from 1 to {MAX_ORDER}")


def check_damping(damping: float, name: str = "damping") -> None:
    """Raises a ValueError unless `damping` is a number in (0, 1]; `name` is for the message."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0.0 < damping <= 1.0:
        raise ValueError(f"{name}={damping!r} is out of range; use a number above 0 and up to 1 (1 is no momentum)")


@lru_cache(maxsize=MAX_ORDER)
def adams_bashforth_differences(order: int) -> tuple[Fraction, ...]:
    """The numbers gamma_j = integral_0^1 binomial(u + j - 1, j) du that multiply the backward differences.

    Args:
        order (`int`): How many, from 1 to 8.

    Returns:
        `tuple[Fraction, ...]`: gamma_0 to gamma_{order - 1}, exactly.

    Raises:
        ValueError: If `order` is not an int from 1 to 8.

    Example:
        ```python
        from fractions import Fraction

        from diffusers_ext.schedulers.adams_bashforth import adams_bashforth_differences

        assert adams_bashforth_differences(4) == (1, Fraction(1, 2), Fraction(5, 12), Fraction(3, 8))
        ```
    """
    check_order(order)
    numbers: list[Fraction] = []
    for j in range(order):
        # Generating function: sum gamma_j x^j = -x / ((1 - x) log(1 - x)).
        numbers.append(1 - sum((gamma / (j + 1 - i) for i, gamma in enumerate(numbers)), Fraction(0)))
    return tuple(numbers)


def differences_to_weights(differences: Sequence[float]) -> list[float]:
    """Weights of (e_i, e_{i-1}, ...) that equal `sum_j differences[j] nabla^j e_i`. The reverse is the same function."""
    count = len(differences)
    return [
        (-1) ** k * sum(math.comb(j, k) * differences[j] for j in range(k, count)) for k in range(count)
    ]  # fmt: skip


def damped_weights(weights: Sequence[float], damping: float) -> list[float]:
    """Weights of the averaged values that stand for given weights of the values themselves.

    With v_i = (1 - b) v_{i-1} + b e_i, `sum_j weights[j] e_{i-j}` is written in backward differences of v and cut off at
    the order of `weights`.

    Args:
        weights (`Sequence[float]`): Weights of e_i, e_{i-1}, ...
        damping (`float`): The b above, the beta of the paper, in (0, 1]; 1 returns `weights`.

    Returns:
        `list[float]`: Weights of v_i, v_{i-1}, ..., with the same sum.
    """
    check_damping(damping)
    differences = differences_to_weights(weights)
    ratio = (1.0 - damping) / damping
    shifted = [0.0, *differences[:-1]]
    return differences_to_weights([own + ratio * before for own, before in zip(differences, shifted, strict=True)])


def ghvb_weights(order: int, damping: float = 1.0) -> tuple[float, ...]:
    """Weights of the velocities in a step of GHVB with constant step length.

    Args:
        order (`int`): From 1 to 8.
        damping (`float`, *optional*, defaults to 1.0): The paper's beta, in (0, 1]; 1 is Adams-Bashforth.

    Returns:
        `tuple[float, ...]`: Weights of v_i, v_{i-1}, ..., whose sum is 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        ```python
        from diffusers_ext.schedulers.adams_bashforth import ghvb_weights

        assert ghvb_weights(2, 1.0) == (1.5, -0.5)
        assert ghvb_weights(2, 0.5) == (2.5, -1.5)
        ```
    """
    check_order(order)
    check_damping(damping)
    return _ghvb_weights(order, damping)


@lru_cache(maxsize=64)
def _ghvb_weights(order: int, damping: float) -> tuple[float, ...]:
    # Fractions up to the end: the sums of large alternating terms cancel.
    differences = adams_bashforth_differences(order)
    ratio = (1 - Fraction(damping)) / Fraction(damping)
    mixed = [own + ratio * before for own, before in zip(differences, (Fraction(0), *differences[:-1]), strict=True)]
    return tuple(float(weight) for weight in differences_to_weights(mixed))  # type: ignore[arg-type]


def stability_limit(order: int, damping: float = 1.0, momentum_type: str = "ghvb") -> float:
    """Largest |lambda d| at which the integration of dX/ds = lambda X with constant steps does not grow.

    Args:
        order (`int`): From 1 to 8.
        damping (`float`, *optional*, defaults to 1.0): The paper's beta, in (0, 1].
        momentum_type (`str`, *optional*, defaults to `"ghvb"`): `"ghvb"`, `"hb"` or `"none"`.

    Returns:
        `float`: The limit on the negative real axis, where guidance puts its stiffness.

    Raises:
        ValueError: If an argument is out of range; Nesterov's momentum has no closed form.
    """
    check_order(order)
    check_damping(damping)
    partial = [0.0]
    for j, gamma in enumerate(adams_bashforth_differences(order)):
        partial.append(partial[-1] + float(gamma) * 2**j)
    if momentum_type == "none":
        return 2.0 / partial[order]
    if momentum_type == "hb":
        return 2.0 / partial[order] * (2.0 - damping) / damping
    if momentum_type == "ghvb":
        return 2.0 * (2.0 - damping) / (damping * partial[order] + 2.0 * (1.0 - damping) * partial[order - 1])
    raise ValueError(f"momentum_type={momentum_type!r} has no closed form; use 'ghvb', 'hb' or 'none'")


@lru_cache(maxsize=8192)
def power_basis_weights(nodes: tuple[float, ...], start: float, end: float, power: float) -> tuple[float, ...]:
    """Weights of values at `nodes` that integrate polynomials in s^`power` from `start` to `end` exactly.

    With tau = (s / start)^p - 1 the weights solve `sum_j w_j tau_j^m = integral tau^m ds` for m below the number of nodes.

    Args:
        nodes (`tuple[float, ...]`): Different positive s_j, one to eight of them, in the order of the weights.
        start (`float`): Where the step begins, above 0.
        end (`float`): Where it ends; 0 needs a positive `power`.
        power (`float`): The p above. 1 is a polynomial in s, 0 one in log s; negative values lean towards data prediction.

    Returns:
        `tuple[float, ...]`: The weights, whose sum is `end - start`.

    Raises:
        ValueError: If nodes repeat, something is negative, or the integral does not exist.

    Example:
        ```python
        from diffusers_ext.schedulers.adams_bashforth import power_basis_weights

        weights = power_basis_weights((1.0, 2.0), start=1.0, end=0.5, power=1.0)
        assert abs(weights[0] * 3.0 + weights[1] * 5.0 + 1.25) < 1e-12  # the integral of 1 + 2 s from 1 to 0.5
        ```
    """
    if len(nodes) == 1:
        return (end - start,)
    if min(*nodes, start) <= 0 or len(set(nodes)) < len(nodes) or end < 0 or (end == 0 and power <= 0):
        raise ValueError(
            f"nodes={nodes}, start={start}, end={end} with power={power}: nodes and start must be positive, the nodes "
            "different, and end above 0 (or 0 where power is positive)"
        )
    ratios = np.log(np.asarray(nodes) / start)
    # expm1, and a scale that makes the largest |tau| 1: with a thousand steps tau is about 1e-4 and tau^3 about 1e-12.
    taus = np.expm1(power * ratios) if power else ratios
    scale = float(np.abs(taus).max())
    powers = np.arange(len(nodes))[:, None]
    if end == 0:
        # log s has no end to integrate to. integral_s^0 ((x / s)^p - 1)^m dx, binomially; at m below 8 nothing cancels.
        moments = np.array([
            -start * sum(math.comb(m, k) * (-1) ** (m - k) / (power * k + 1) for k in range(m + 1)) / scale**m
            for m in range(len(nodes))
        ])  # fmt: skip
    else:
        length = math.log(end / start)
        inner = _POINTS * length
        along = (np.expm1(power * inner) if power else inner) / scale
        moments = (along**powers) @ (_WEIGHTS * length * start * np.exp(inner))
        moments[0] = end - start
    return tuple(np.linalg.solve((taus / scale) ** powers, moments).tolist())


@lru_cache(maxsize=8192)
def variable_ghvb_weights(nodes: tuple[float, ...], start: float, end: float, damping: float) -> tuple[float, ...]:
    """As [`ghvb_weights`], from the true nodes: damping 1 is Adams-Bashforth with variable steps (LMS).

    Args:
        nodes (`tuple[float, ...]`): s_i, s_{i-1}, ...; different and positive unless there is only one.
        start (`float`): s_i.
        end (`float`): s_{i+1}, different from `start`.
        damping (`float`): The paper's beta, in (0, 1].

    Returns:
        `tuple[float, ...]`: Weights of v_i, v_{i-1}, ..., whose sum is 1.
    """
    if len(nodes) == 1:
        return (1.0,)
    weights = power_basis_weights(nodes, start, end, 1.0)
    return tuple(damped_weights([weight / (end - start) for weight in weights], damping))
