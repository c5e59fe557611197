"""The weights against tables, closed forms, quadrature and measured stability."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from diffusers_ext.schedulers.adams_bashforth import (
    adams_bashforth_differences,
    damped_weights,
    differences_to_weights,
    ghvb_weights,
    power_basis_weights,
    stability_limit,
    variable_ghvb_weights,
)


# The coefficients as the paper's repository lists them, order by order, as functions of the damping b.
TABLES: dict[int, Callable[[float], list[float]]] = {
    1: lambda b: [1.0],
    2: lambda b: [(2 + b) / (2 * b), -(2 - b) / (2 * b)],
    3: lambda b: [(18 + 5 * b) / (12 * b), -(24 - 8 * b) / (12 * b), (6 - b) / (12 * b)],
    4: lambda b: [
        (46 + 9 * b) / (24 * b), -(78 - 19 * b) / (24 * b), (42 - 5 * b) / (24 * b), -(10 - b) / (24 * b),
    ],
    5: lambda b: [
        (1650 + 251 * b) / (720 * b), -(3420 - 646 * b) / (720 * b), (2880 - 264 * b) / (720 * b),
        -(1380 - 106 * b) / (720 * b), (270 - 19 * b) / (720 * b),
    ],
}  # fmt: skip
ADAMS_BASHFORTH = {
    2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9], 5: [1901, -2774, 2616, -1274, 251],
}  # fmt: skip
DAMPINGS = (1.0, 0.9, 0.8, 0.5, 0.2)


def test_difference_numbers_are_those_of_the_textbooks() -> None:
    expected = (1, Fraction(1, 2), Fraction(5, 12), Fraction(3, 8), Fraction(251, 720), Fraction(95, 288))
    assert adams_bashforth_differences(6) == expected


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_damping_one_is_adams_bashforth(order: int) -> None:
    divisor = {2: 2, 3: 12, 4: 24, 5: 720}[order]
    expected = [weight / divisor for weight in ADAMS_BASHFORTH[order]]
    np.testing.assert_allclose(ghvb_weights(order, 1.0), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", TABLES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_weights_are_those_of_the_published_tables(order: int, damping: float) -> None:
    np.testing.assert_allclose(ghvb_weights(order, damping), TABLES[order](damping), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("damping", DAMPINGS)
def test_weights_sum_to_one_at_every_order(order: int, damping: float) -> None:
    weights = ghvb_weights(order, damping)
    assert abs(sum(weights) - 1) < 1e-13 * max(map(abs, weights))


def test_differences_and_weights_are_each_others_reverse() -> None:
    numbers = [0.3, -1.2, 2.0, 0.7]
    np.testing.assert_allclose(differences_to_weights(differences_to_weights(numbers)), numbers, atol=1e-14)


@pytest.mark.parametrize("order", range(1, 6))
def test_the_momentum_of_any_weights_reduces_to_that_of_constant_steps(order: int) -> None:
    np.testing.assert_allclose(damped_weights(ghvb_weights(order, 1.0), 0.6), ghvb_weights(order, 0.6), atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("damping", [1.0, 0.8, 0.5])
def test_the_order_of_convergence_is_the_order(order: int, damping: float) -> None:
    # y' = cos(t) y from 0 to 2 has y = exp(sin t). Exact history, so that the start-up does not limit the order.
    errors = []
    for count in (200, 400):
        width = 2.0 / count
        past = [math.cos(-j * width) * math.exp(math.sin(-j * width)) for j in range(400)]
        velocity = 0.0
        velocities = []
        for value in reversed(past):
            velocity = (1 - damping) * velocity + damping * value
            velocities.insert(0, velocity)
        y, weights = 1.0, ghvb_weights(order, damping)
        for i in range(count):
            if i:
                velocities.insert(0, (1 - damping) * velocities[0] + damping * math.cos(i * width) * y)
            y += width * sum(w * v for w, v in zip(weights, velocities))
        errors.append(abs(y - math.exp(math.sin(2.0))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25), errors


# ---------------------------------------------------------------------------------------------------------------------
# Stability, measured: the largest step at which a long run does not grow
# ---------------------------------------------------------------------------------------------------------------------


def grows(order: int, damping: float, kind: str, z: float) -> bool:
    """Whether X' = X - z e, e = X, run for a long time grows: heavy ball averages directions, GHVB the noise."""
    weights = ghvb_weights(order, damping if kind == "ghvb" else 1.0)
    state, velocity, past = 1.0, None, []
    generator = np.random.default_rng(0)
    largest = []
    for _ in range(4000):
        value = state + 1e-9 * generator.standard_normal()  # so that no mode is missing from the start
        if kind == "ghvb":
            value = value if not past else (1 - damping) * past[0] + damping * value
        past = [value, *past[: order - 1]]
        direction = sum(w * v for w, v in zip(weights if len(past) == order else ghvb_weights(len(past)), past))
        if kind == "hb":
            velocity = direction if velocity is None else (1 - damping) * velocity + damping * direction
            direction = velocity
        state -= z * direction
        largest.append(abs(state))
        if largest[-1] > 1e6:
            return True
    return max(largest[-400:]) > 1e-6


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "damping"), [("none", 1.0), *((kind, b) for kind in ("hb", "ghvb") for b in (0.9, 0.5, 0.2))]
)
def test_measured_stability_limits_are_the_closed_forms(kind: str, order: int, damping: float) -> None:
    limit = stability_limit(order, damping, kind)
    assert not grows(order, damping, kind, 0.98 * limit)
    assert grows(order, damping, kind, 1.02 * limit)


def test_stability_limits_have_the_values_of_the_tables() -> None:
    assert [round(stability_limit(k, 1.0), 3) for k in (1, 2, 3, 4)] == [2, 1, 0.545, 0.3]
    expected = [0.3, 0.326, 0.352, 0.378, 0.428, 0.476]
    assert [stability_limit(4, b) for b in (1, 0.9, 0.8, 0.7, 0.5, 0.3)] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Variable steps and the power basis
# ---------------------------------------------------------------------------------------------------------------------

NODES = (1.3, 2.1, 3.9, 7.0)


@pytest.mark.parametrize("power", [1.0, 0.8, 0.25, 0.0, -0.5])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_power_basis_integrates_its_polynomials_exactly(power: float, count: int) -> None:
    nodes, end = NODES[:count], 0.8
    weights = power_basis_weights(nodes, nodes[0], end, power)
    assert sum(weights) == pytest.approx(end - nodes[0], abs=1e-12)
    for m in range(count):
        if power == 0:
            # antiderivatives of 1, log s, log^2 s, log^3 s
            def antiderivative(s: float, m: int = m) -> float:
                log = math.log(s)
                return s * [1, log - 1, log**2 - 2 * log + 2, log**3 - 3 * log**2 + 6 * log - 6][m]

            values = [math.log(node) ** m for node in nodes]
        else:

            def antiderivative(s: float, m: int = m) -> float:
                exponent = power * m + 1
                return math.log(s) if exponent == 0 else s**exponent / exponent

            values = [node ** (power * m) for node in nodes]
        exact = antiderivative(end) - antiderivative(nodes[0])
        assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.8, 0.25])
def test_a_power_basis_reaches_zero(power: float) -> None:
    weights = power_basis_weights(NODES, NODES[0], 0.0, power)
    for m in range(4):
        exact = -(NODES[0] ** (power * m + 1)) / (power * m + 1)
        value = sum(w * node ** (power * m) for w, node in zip(weights, NODES, strict=True))
        assert value == pytest.approx(exact, rel=1e-9)


def test_many_small_steps_keep_their_precision() -> None:
    # A thousand steps: nodes 0.6 % apart. A polynomial of degree three in s^p is still integrated to nine digits.
    nodes = tuple(1.006**j for j in range(4))
    weights = power_basis_weights(nodes, 1.0, 1 / 1.006, 0.25)
    exact = ((1 / 1.006) ** 1.75 - 1) / 1.75
    assert sum(w * node**0.75 for w, node in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-9)


def test_equal_nodes_give_adams_bashforth() -> None:
    nodes = (4.0, 4.1, 4.2, 4.3)
    weights = [weight / -0.1 for weight in power_basis_weights(nodes, 4.0, 3.9, 1.0)]
    np.testing.assert_allclose(weights, ghvb_weights(4, 1.0), atol=1e-9)
    np.testing.assert_allclose(variable_ghvb_weights(nodes, 4.0, 3.9, 0.7), ghvb_weights(4, 0.7), atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ghvb_weights(0), "order=0"),
        (lambda: ghvb_weights(9), "order=9"),
        (lambda: ghvb_weights(True), "order=True"),
        (lambda: ghvb_weights(2, 0.0), "damping=0.0"),
        (lambda: ghvb_weights(2, float("nan")), "damping=nan"),
        (lambda: stability_limit(2, 0.5, "nesterov"), "momentum_type='nesterov'"),
        (lambda: power_basis_weights((1.0, 1.0), 1.0, 0.5, 1.0), "nodes"),
        (lambda: power_basis_weights((1.0, 2.0), 1.0, 0.0, -0.5), "end=0.0"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
