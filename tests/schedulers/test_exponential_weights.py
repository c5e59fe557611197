"""The weights of DPM-Solver and UniPC against integrals that they stand for."""

import math

import numpy as np
import pytest

from diffusers_ext.schedulers.exponential_weights import (
    alpha_and_sigma,
    conversion,
    dpm_weights,
    log_snr,
    transfer,
    unipc_weights,
)


LAMBDAS = (1.3, 0.4, -0.2, -1.1)
KINDS = [(of_noise, flow) for of_noise in (False, True) for flow in (False, True)]


def mean_over_step(power: int, start: float, end: float, of_noise: bool) -> float:
    """Mean of (lambda - start)^power over a step, weighted as the exact solution weights predictions."""
    points, weights = np.polynomial.legendre.leggauss(40)
    along = start + 0.5 * (end - start) * (points + 1)
    weights = weights * np.exp(-along if of_noise else along)
    return float((weights * (along - start) ** power).sum() / weights.sum())


@pytest.mark.parametrize("of_noise", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_integrates_a_straight_line_exactly(order: int, of_noise: bool) -> None:
    lambdas = LAMBDAS[: order + 1]
    weights = dpm_weights(lambdas, midpoint=False, of_noise=of_noise)
    assert sum(weights) == pytest.approx(1.0, abs=1e-14)
    mixture = sum(weight * (value - lambdas[1]) for weight, value in zip(weights, lambdas[1:], strict=True))
    assert mixture == pytest.approx(mean_over_step(1, lambdas[1], lambdas[0], of_noise), abs=1e-12)


@pytest.mark.parametrize("of_noise", [False, True])
def test_the_midpoint_rule_looks_to_the_middle_of_the_step(of_noise: bool) -> None:
    weights = dpm_weights(LAMBDAS[:3], midpoint=True, of_noise=of_noise)
    assert sum(w * value for w, value in zip(weights, LAMBDAS[1:3], strict=True)) == pytest.approx(
        0.5 * (LAMBDAS[0] + LAMBDAS[1])
    )


@pytest.mark.parametrize("of_noise", [False, True])
@pytest.mark.parametrize("bh1", [False, True])
@pytest.mark.parametrize(("order", "corrector"), [(3, False), (2, True), (3, True)])
def test_unipc_integrates_polynomials_below_its_order_exactly(
    order: int, corrector: bool, bh1: bool, of_noise: bool
) -> None:
    lambdas = LAMBDAS[: order + 1]
    weights = unipc_weights(lambdas, corrector, bh1, of_noise)
    values = lambdas if corrector else lambdas[1:]
    assert len(weights) == len(values)
    for power in range(order + corrector):
        mixture = sum(w * (value - lambdas[1]) ** power for w, value in zip(weights, values, strict=True))
        expected = mean_over_step(power, lambdas[1], lambdas[0], of_noise)
        assert mixture == pytest.approx(expected, abs=1e-11), power


def test_unipc_of_one_node_takes_a_half() -> None:
    # bh2; with bh1 the half is of another length.
    assert unipc_weights((1.0, 0.0, -0.5), corrector=False, bh1=False, of_noise=False) == (2.0, -1.0)
    assert unipc_weights((1.0, 0.0), corrector=True, bh1=True, of_noise=True)[0] == pytest.approx(
        0.5 / math.expm1(1.0), abs=1e-15
    )


@pytest.mark.parametrize("of_noise", [False, True])
def test_a_thousand_short_steps_are_still_exact(of_noise: bool) -> None:
    lambdas = tuple(-0.007 * j for j in range(4))
    weights = unipc_weights(lambdas, corrector=True, bh1=False, of_noise=of_noise)
    third = sum(w * (value / 0.007) ** 3 for w, value in zip(weights, (0.007, 0.0, -0.007, -0.014), strict=True))
    assert third == pytest.approx(mean_over_step(3, 0.0, 0.007, of_noise) / 0.007**3, abs=1e-8)


@pytest.mark.parametrize(("of_noise", "flow"), KINDS)
def test_a_constant_prediction_leads_to_where_it_says(of_noise: bool, flow: bool) -> None:
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_and_sigma(node, flow) for node in (0.7, 0.3))
    kept, factor = transfer(0.7, 0.3, flow, of_noise)
    clean, noise = 0.4, -1.2
    expected = next_alpha * clean + next_sigma * noise
    result = kept * (alpha * clean + sigma * noise) + factor * (noise if of_noise else clean)
    assert result == pytest.approx(expected, abs=1e-15)
    assert log_snr(0.7, flow) == pytest.approx(math.log(alpha / sigma), abs=1e-15)


@pytest.mark.parametrize(("of_noise", "flow"), KINDS)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_every_prediction_becomes_the_one_that_is_integrated(kind: str, of_noise: bool, flow: bool) -> None:
    alpha, sigma = alpha_and_sigma(0.7, flow)
    clean, noise = 0.4, -1.2
    state = alpha * clean + sigma * noise
    outputs = {
        "epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean,
    }  # fmt: skip
    if kind == "flow_prediction" and (of_noise or not flow):
        if of_noise:
            with pytest.raises(ValueError, match="prediction_type='flow_prediction' cannot"):
                conversion(kind, 0.7, flow, of_noise)
        return
    if kind == "v_prediction" and flow:
        # alpha^2 + sigma^2 is 1 for diffusion only; diffusers has the same formula for both.
        assert conversion(kind, 0.7, flow, of_noise) == ((sigma, alpha) if of_noise else (alpha, -sigma))
        return
    of_sample, of_output = conversion(kind, 0.7, flow, of_noise)
    assert of_sample * state + of_output * outputs[kind] == pytest.approx(noise if of_noise else clean, abs=1e-14)


def test_steps_without_length_and_of_infinite_length_have_their_limits() -> None:
    assert dpm_weights((math.inf, 1.0), midpoint=False, of_noise=False) == (1.0,)
    assert dpm_weights((1.0, 1.0, 0.0), midpoint=False, of_noise=False) == (1.0, 0.0)
    assert unipc_weights((1.0, 1.0, 0.0), corrector=True, bh1=False, of_noise=False) == (0.0, 1.0, 0.0)
    assert np.isnan(dpm_weights((math.inf, 1.0, 0.0), midpoint=False, of_noise=False)).all()
    assert np.isnan(unipc_weights((math.inf, 1.0, 0.0), corrector=False, bh1=False, of_noise=True)).all()
    assert log_snr(0.0, flow=False) == math.inf == -log_snr(1.0, flow=True)
    assert transfer(0.5, 0.0, flow=True, of_noise=False) == (0.0, 1.0)
