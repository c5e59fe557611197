"""Weights of the exponential integrators DPM-Solver and UniPC, as numbers of this process.

DPM-Solver++, 2022, arXiv 2211.01095; UniPC, 2023, arXiv 2302.04867. With the log-SNR lambda = log(alpha / sigma), a step from s
to t of length h = lambda_t - lambda_s, and predictions m_j made at lambda_j, both move by

    x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) g         m: predictions of the data,  z = -h
    x_t = (alpha_t / alpha_s) x_s + (sigma_t - sigma_s alpha_t / alpha_s) g         m: predictions of the noise, z = +h

with a mixture g = sum_j w_j m_j, sum_j w_j = 1. With r_j = (lambda_j - lambda_s) / h it is

    DPM-Solver   g = m_0 + c D_1 + d D_2            divided differences of m; c = psi_2 = 1 / z - 1 / (e^z - 1), or 1/2 (midpoint)
                                                    d = psi_3 = ((e^z - 1 - z) / z^2 - 1/2) / (e^z - 1)
    UniPC        g = m_0 + (B / (e^z - 1)) sum_j rho_j (m_j - m_0) / r_j            B = z (bh1) or e^z - 1 (bh2)
                 sum_j rho_j r_j^(i-1) = i! phi_{i+1}(z) z / B,  i = 1, 2, ...      its corrector has the new value, r = 1, too

phi_k are the functions of exponential integrators. diffusers makes the same numbers out of tensors in every step, which there
takes longer than the sums over the sample.
"""

import math
from functools import lru_cache

import numpy as np


def alpha_and_sigma(node: float, flow: bool) -> tuple[float, float]:
    """The factors of picture and noise at a level that diffusers keeps in `sigmas`.

    Args:
        node (`float`): The level: sigma / alpha, or for a flow schedule the time, from 0 to 1.
        flow (`bool`): Whether alpha is 1 - sigma.
    """
    if flow:
        return 1.0 - node, node
    alpha = (1.0 + node * node) ** -0.5
    return alpha, node * alpha


def log_snr(node: float, flow: bool) -> float:
    """lambda of a level; infinite without noise, and minus infinity without a picture."""
    ratio = (1.0 - node if flow else 1.0, node)
    return math.log(ratio[0] / ratio[1]) if min(ratio) > 0.0 else math.copysign(math.inf, ratio[0] - ratio[1])


def transfer(start: float, end: float, flow: bool, of_noise: bool) -> tuple[float, float]:
    """The factors of x_s and of g in the equations above.

    Args:
        start (`float`): Level s.
        end (`float`): Level t; 0 is the clean picture.
        flow (`bool`): Whether alpha is 1 - sigma.
        of_noise (`bool`): Whether predictions are of the noise.

    Example:
        ```python
        from diffusers_ext.schedulers.exponential_weights import transfer

        assert transfer(1.0, 0.0, flow=False, of_noise=False) == (0.0, 1.0)  # the jump to the prediction itself
        ```
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_and_sigma(start, flow), alpha_and_sigma(end, flow)
    # Not by e^-h: no logarithm of 0 at the end.
    if of_noise:
        kept = alpha_t / alpha_s if alpha_s else math.inf
        return kept, sigma_t - sigma_s * kept
    kept = sigma_t / sigma_s if sigma_s else math.inf
    return kept, alpha_t - alpha_s * kept


def conversion(prediction_type: str, node: float, flow: bool, of_noise: bool) -> tuple[float, float]:
    """Factors of the sample and of the model's output in the prediction that a solver integrates.

    Args:
        prediction_type (`str`): What the model predicts: `"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`.
        node (`float`): The level of the sample, above 0.
        flow (`bool`): Whether alpha is 1 - sigma.
        of_noise (`bool`): Whether the solver integrates predictions of the noise.

    Raises:
        ValueError: If the one cannot be made of the other.
    """
    alpha, sigma = alpha_and_sigma(node, flow)
    if prediction_type == "epsilon":
        if of_noise:
            return 0.0, 1.0
        return (1.0 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
    if prediction_type == "sample":
        if not of_noise:
            return 0.0, 1.0
        return (1.0 / sigma, -alpha / sigma) if sigma else (math.inf, -math.inf)
    if prediction_type == "v_prediction":
        return (sigma, alpha) if of_noise else (alpha, -sigma)
    if prediction_type == "flow_prediction" and not of_noise:
        return 1.0, -node
    raise ValueError(
        f"prediction_type={prediction_type!r} cannot be integrated as a prediction of the {'noise' if of_noise else 'data'}; "
        "use a solver of data predictions, algorithm_type='dpmsolver++' or predict_x0=True"
    )


def _limit(lambdas: tuple[float, ...], known: int) -> tuple[float, ...] | None:
    """Weights of a step of higher order that has no length, where only m_0 (after `known` others) counts, or an infinite one."""
    if not all(map(math.isfinite, lambdas)):
        return (math.nan,) * (len(lambdas) - 1 + known)
    if lambdas[0] == lambdas[1]:
        return tuple(float(j == known) for j in range(len(lambdas) - 1 + known))
    return None


def dpm_weights(lambdas: tuple[float, ...], midpoint: bool, of_noise: bool) -> tuple[float, ...]:
    """Weights w_j of DPM-Solver's multistep rules.

    Args:
        lambdas (`tuple[float, ...]`): lambda of the end of the step, of its start and of up to two nodes before it. Orders two and
            three need them finite: the weights are not numbers otherwise.
        midpoint (`bool`): Whether the rule of order two takes 1/2 for psi_2; of no effect in others.
        of_noise (`bool`): Whether predictions are of the noise.

    Returns:
        `tuple[float, ...]`: Weights of m_0, m_1, ..., whose sum is 1.

    Example:
        ```python
        from diffusers_ext.schedulers.exponential_weights import dpm_weights

        assert dpm_weights((2.0, 1.0, 0.0), midpoint=True, of_noise=False) == (1.5, -0.5)
        ```
    """
    order = len(lambdas) - 1
    if order == 1:
        return (1.0,)
    limit = _limit(lambdas, 0)
    if limit is not None:
        return limit
    end, start, before, *earlier = lambdas
    h = end - start
    z = h if of_noise else -h
    psi_2 = 1.0 / z - 1.0 / math.expm1(z)
    r = (start - before) / h
    if not earlier:
        share = (0.5 if midpoint else psi_2) / r
        return 1.0 + share, -share
    further = (before - earlier[0]) / h
    psi_3 = ((math.expm1(z) - z) / z**2 - 0.5) / math.expm1(z)
    bend = (psi_2 * r + psi_3) / (r + further)
    newer, older = (psi_2 + bend) / r, bend / further  # of m_0 - m_1, and of m_1 - m_2 with a minus
    return 1.0 + newer, -newer - older, older


@lru_cache(maxsize=8192)
def unipc_weights(lambdas: tuple[float, ...], corrector: bool, bh1: bool, of_noise: bool) -> tuple[float, ...]:
    """Weights w_j of UniPC's predictor and corrector.

    Args:
        lambdas (`tuple[float, ...]`): lambda of the end of the step, of its start and of nodes before it; as many after the first as
            the order. A predictor of order two or more and every corrector need them finite: the weights are
            not numbers otherwise.
        corrector (`bool`): Whether the new value, at the end of the step, is known.
        bh1 (`bool`): Whether B is z instead of e^z - 1.
        of_noise (`bool`): Whether predictions are of the noise.

    Returns:
        `tuple[float, ...]`: Weights of the new value, if there is one, of m_0, m_1, ..., whose sum is 1.

    Example:
        ```python
        from diffusers_ext.schedulers.exponential_weights import unipc_weights

        assert unipc_weights((1.0, 0.0), corrector=True, bh1=False, of_noise=False) == (0.5, 0.5)
        ```
    """
    end, start, *before = lambdas
    count = len(before) + corrector
    if count == 0:
        return (1.0,)
    limit = _limit(lambdas, int(corrector))
    if limit is not None:
        return limit
    h = end - start
    z = h if of_noise else -h
    scale = z / math.expm1(z) if bh1 else 1.0
    nodes = [1.0] * corrector + [(value - start) / h for value in before]
    # diffusers and the authors take 1/2 for one node instead of the solution.
    shares = [0.5] if count == 1 else _shares(nodes, z, scale)
    found = [scale * share / node for share, node in zip(shares, nodes, strict=True)]
    centre = 1.0 - sum(found)
    return (found[0], centre, *found[1:]) if corrector else (centre, *found)


def _shares(nodes: list[float], z: float, scale: float) -> list[float]:
    """rho of UniPC: the solution of the equations above."""
    moments, value, factorial = [], math.expm1(z) / z - 1.0, 1
    for i in range(1, len(nodes) + 1):
        moments.append(value * factorial / (scale * math.expm1(z)))
        factorial *= i + 1
        value = value / z - 1.0 / factorial
    powers = np.arange(len(nodes))[:, None]
    return np.linalg.solve(np.asarray(nodes) ** powers, np.asarray(moments)).tolist()
