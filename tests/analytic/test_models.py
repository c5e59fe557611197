"""The closed forms against independent ways to the same numbers: autograd, finite differences, quadrature, quantiles."""

import math

import pytest
import torch
from scipy.integrate import quad

from .models import (
    PREDICTIONS,
    GaussianDiffusion,
    GaussianMixtureDiffusion,
    Level,
    anisotropic_gaussian,
    separated_mixture,
)


LEVELS = [Level.of_alpha_bar(0.9), Level.of_alpha_bar(0.2), Level.of_flow_time(0.6), Level.of_sigma(3.0)]
DATA = {"gaussian": anisotropic_gaussian(), "mixture": separated_mixture()}


def line_mixture() -> GaussianMixtureDiffusion:
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-1.5], [1.0]])
    return GaussianMixtureDiffusion(weights, means, torch.tensor([[[0.09]], [[0.25]]]))


def density_of_data(data: GaussianMixtureDiffusion, x: float) -> float:
    parts = zip(data.weights.tolist(), data.means[:, 0].tolist(), data.covariances[:, 0, 0].tolist(), strict=True)
    return sum(w * math.exp(-((x - m) ** 2) / (2 * c)) / math.sqrt(2 * math.pi * c) for w, m, c in parts)


def states(data: GaussianMixtureDiffusion, level: Level, count: int = 16) -> torch.Tensor:
    noise = torch.randn(count, data.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return level.alpha * data.sample(count) + level.sigma * noise


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_score_is_the_gradient_of_the_log_density(name: str, level: Level) -> None:
    data = DATA[name]
    x = states(data, level).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_density(x, level).sum(), x)
    torch.testing.assert_close(data.score(x.detach(), level), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DATA)
def test_score_agrees_with_finite_differences(name: str) -> None:
    data, level, width = DATA[name], LEVELS[1], 1e-5
    x = states(data, level)
    for axis in range(data.size):
        step = width * torch.eye(data.size, dtype=torch.float64)[axis]
        slope = (data.log_density(x + step, level) - data.log_density(x - step, level)) / (2 * width)
        torch.testing.assert_close(data.score(x, level)[:, axis], slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_density_and_posterior_agree_with_quadrature(level: Level) -> None:
    data = line_mixture()
    x = torch.tensor([[-1.0], [0.2], [1.4]], dtype=torch.float64)
    for i, value in enumerate(x[:, 0].tolist()):

        def joint(clean: float, value: float = value) -> float:
            noise = (value - level.alpha * clean) / level.sigma
            return density_of_data(data, clean) * math.exp(-0.5 * noise**2) / (math.sqrt(2 * math.pi) * level.sigma)

        moments = [
            quad(lambda clean, n=n, joint=joint: clean**n * joint(clean), -8, 8, epsabs=1e-13, limit=400)[0]
            for n in range(3)
        ]
        density, mean = moments[0], moments[1] / moments[0]
        variance = moments[2] / moments[0] - mean**2
        assert data.log_density(x, level)[i].exp().item() == pytest.approx(density, rel=1e-8)
        assert data.clean(x, level)[i, 0].item() == pytest.approx(mean, rel=1e-8, abs=1e-8)
        assert data.clean_covariance(x, level)[i, 0, 0].item() == pytest.approx(variance, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_posterior_covariance_is_the_jacobian_of_the_posterior_mean(name: str, level: Level) -> None:
    # Tweedie's second-order formula: Cov[x0 | x] = (sigma^2 / alpha) dE[x0 | x] / dx.
    data = DATA[name]
    x = states(data, level, count=4)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda row: data.clean(row[None], level)[0], row) for row in x]
    )
    expected = level.sigma**2 / level.alpha * jacobian
    torch.testing.assert_close(data.clean_covariance(x, level), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_all_predictions_describe_the_same_split_of_the_state(name: str, level: Level) -> None:
    data = DATA[name]
    x = states(data, level)
    epsilon, clean, v, flow = (data.predict(x, level, kind) for kind in PREDICTIONS)
    torch.testing.assert_close(level.alpha * clean + level.sigma * epsilon, x)
    torch.testing.assert_close((level.alpha * x - level.sigma * v) / level.scale**2, clean)
    torch.testing.assert_close(x - level.sigma * flow, clean * (level.alpha + level.sigma))


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type='score'"):
        DATA["gaussian"].predict(torch.zeros(1, 3), LEVELS[0], "score")


def test_samples_have_the_moments_of_the_mixture() -> None:
    data = DATA["mixture"]
    points = data.sample(200_000, seed=4)
    mean = (data.weights[:, None] * data.means).sum(0)
    offset = data.means - mean
    spread = torch.einsum("k,kij->ij", data.weights, data.covariances + offset[:, :, None] * offset[:, None, :])
    # Five standard errors: the entries have standard deviations below 3.
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=5 * 3 / math.sqrt(200_000))
    torch.testing.assert_close(points.T.cov(), spread, rtol=0, atol=5 * 9 / math.sqrt(200_000))


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (Level.of_alpha_bar(0.01), Level.of_alpha_bar(0.999)),
        (Level.of_flow_time(1.0), Level.of_flow_time(0.001)),
        (Level.of_sigma(20.0), Level.of_sigma(0.01)),
        (Level.of_alpha_bar(0.999), Level.of_alpha_bar(0.01)),
    ],
    ids=["ddpm", "flow", "exploding", "inversion"],
)
def test_the_closed_form_flow_is_the_numerical_one(start: Level, end: Level) -> None:
    data = DATA["gaussian"]
    numerical = GaussianMixtureDiffusion(data.weights, data.means, data.covariances)
    x = states(data, start)
    torch.testing.assert_close(data.transport(x, start, end), numerical.transport(x, start, end), rtol=1e-8, atol=1e-8)


def test_the_closed_form_flow_solves_the_equation() -> None:
    # In y = x / alpha and lambda = sigma / alpha the equation is dy/dlambda = E[eps | x].
    data, width = DATA["gaussian"], 1e-5
    x = states(data, Level.of_sigma(1.5))
    ahead = data.transport(x, Level.of_sigma(1.5), Level.of_sigma(1.5 + width))
    behind = data.transport(x, Level.of_sigma(1.5), Level.of_sigma(1.5 - width))
    torch.testing.assert_close(
        (ahead - behind) / (2 * width), data.noise(x, Level.of_sigma(1.5)), rtol=1e-7, atol=1e-7
    )


def test_the_flow_velocity_is_the_slope_in_flow_time() -> None:
    data, time, width = DATA["gaussian"], 0.4, 1e-5
    x = states(data, Level.of_flow_time(time))
    ahead, behind = (
        data.transport(x, Level.of_flow_time(time), Level.of_flow_time(time + change)) for change in (width, -width)
    )
    velocity = data.predict(x, Level.of_flow_time(time), "flow_prediction")
    torch.testing.assert_close((ahead - behind) / (2 * width), velocity, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (Level.of_alpha_bar(0.005), Level.of_alpha_bar(0.99)),
        (Level.of_flow_time(1.0), Level.of_flow_time(0.1)),
        (Level.of_sigma(10.0), Level.of_sigma(0.2)),
    ],
    ids=["ddpm", "flow", "exploding"],
)
def test_the_flow_of_a_mixture_keeps_every_quantile(start: Level, end: Level) -> None:
    # In one dimension the flow is monotone and carries the marginals over, so it must map quantile to quantile.
    data = line_mixture()
    x = states(data, start)
    moved = data.transport(x, start, end)
    torch.testing.assert_close(
        data.distribution_function(moved, end), data.distribution_function(x, start), rtol=0, atol=1e-9
    )


def test_a_point_is_where_all_of_the_flow_ends() -> None:
    target = torch.tensor([0.3, -0.8], dtype=torch.float64)
    data = GaussianDiffusion(target, torch.zeros(2, 2))
    x = states(data, Level.of_flow_time(1.0))
    moved = data.transport(x, Level.of_flow_time(1.0), Level.of_flow_time(0.0))
    torch.testing.assert_close(moved, target.expand_as(moved))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        GaussianMixtureDiffusion(torch.ones(2), torch.zeros(3, 2), torch.zeros(3, 2, 2))
