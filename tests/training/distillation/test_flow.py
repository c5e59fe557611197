import math

import pytest
import torch

from diffusers_ext.training.distillation import cdm, reflow
from diffusers_ext.training.distillation.dmd import dmd_gradient


def test_times_of_rectified_flow_have_an_exponential_density():
    uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    times = reflow.exponential_times(uniform)
    # the distribution function is (10^t - 1) / 9
    torch.testing.assert_close((10**times - 1) / 9, uniform)
    # mean of the density ln 10 10^t / 9: 10 / 9 - 1 / ln 10
    assert float(times[:-1].mean()) == pytest.approx(10 / 9 - 1 / math.log(10), abs=1e-4)


def gaussian_velocity(mean: float, deviation: float):
    """E[eps - x_0 | x_sigma] of independent eps ~ N(0, 1) and x_0 ~ N(mean, deviation^2)."""

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        covariance = sigma - (1 - sigma) * deviation**2
        return -mean + covariance / variance * (x - (1 - sigma) * mean)

    return velocity


def test_the_loss_floor_of_independent_pairs_and_the_straightness_are_the_closed_forms():
    # N(0, 1) -> N(1.5, .4^2): E Var[eps - x_0 | x_sigma] averaged over sigma is 0.62832, the flow's own S is 0.17168
    mean, deviation = 1.5, 0.4
    velocity = gaussian_velocity(mean, deviation)
    noise, normal = torch.randn(2, 40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = mean + deviation * normal
    levels = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    losses = []
    for sigma in levels.tolist():
        x, wanted = reflow.interpolate(clean, noise, torch.full((len(clean),), sigma, dtype=torch.float64))
        losses.append(float(reflow.reflow_loss(velocity(x, sigma), wanted)))
    assert sum(losses) / len(losses) == pytest.approx(0.62832, rel=0.01)

    # the ODE keeps the standardised sample, so paths and their ends are known without a solver
    def along(sigma: float) -> torch.Tensor:
        return (1 - sigma) * mean + math.sqrt((1 - sigma) ** 2 * deviation**2 + sigma**2) * noise

    velocities = torch.stack([velocity(along(sigma), sigma) for sigma in levels.tolist()])
    assert float(reflow.straightness(velocities, along(0.0), noise)) == pytest.approx(0.17168, rel=0.02)


def test_a_reflowed_gaussian_is_straight_and_one_euler_step_is_exact():
    # pairs of the flow are x_0 = m + tau eps: the velocity (1 - tau) eps - m does not depend on sigma along a path
    mean, deviation = 1.5, 0.4
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    clean = mean + deviation * noise
    velocities = torch.stack([reflow.interpolate(clean, noise, torch.full((500,), s))[1] for s in (0.1, 0.5, 0.9)])
    assert float(reflow.straightness(velocities, clean, noise)) == 0.0
    torch.testing.assert_close(noise - velocities[0], clean)


def test_a_normalised_loss_gives_each_sample_the_same_pull_on_a_logarithmic_scale():
    error = torch.tensor([[1.0], [10.0]], requires_grad=True)
    reflow.reflow_loss(error, torch.zeros(2, 1), normalize=True).backward()
    torch.testing.assert_close((error.grad * error.detach()).flatten(), torch.ones(2))
    exact = torch.zeros(2, 1, requires_grad=True)
    reflow.reflow_loss(exact, torch.zeros(2, 1), normalize=True).backward()
    assert not exact.grad.any()


def test_the_high_pass_keeps_a_constant_and_enlarges_a_checkerboard():
    flat = torch.ones(1, 1, 6, 6)
    torch.testing.assert_close(reflow.high_pass(flat, 2.0), flat)
    board = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2).float()[None, None] * 2 - 1
    inside = (reflow.high_pass(board, 2.0) / board)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 1 + 2 * (1 - 1 / 9)))
    assert reflow.high_pass(board, 0.0) is board


def test_real_pairs_replace_the_simulated_ones_where_they_shall():
    made, real = (torch.zeros(3, 2), torch.zeros(3, 2)), (torch.ones(3, 2), torch.full((3, 2), 2.0))
    clean, noise = reflow.mixed_pairs(made, real, torch.tensor([False, True, False]))
    assert clean[:, 0].tolist() == [0.0, 1.0, 0.0] and noise[:, 0].tolist() == [0.0, 2.0, 0.0]


def test_the_sigmoid_grid_is_dense_at_both_ends_and_even_in_the_limit():
    grid = reflow.sigmoid_grid(8)
    gaps = -grid.diff()
    assert grid[0] == 1.0 and grid[-1] == 0.0 and bool((gaps > 0).all())
    assert float(gaps[0]) < 0.1 * float(gaps[3]) and float(gaps[0]) == pytest.approx(float(gaps[-1]))
    torch.testing.assert_close(
        reflow.sigmoid_grid(8, 1e-3), torch.linspace(1, 0, 9, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_the_number_of_steps_is_shared_and_reaches_every_value():
    lengths = [cdm.schedule_length(7, step, 5) for step in range(200)]
    assert set(lengths) == {1, 2, 3, 4, 5} and lengths == [cdm.schedule_length(7, step, 5) for step in range(200)]


def test_a_dynamic_schedule_falls_from_noise_to_sample_within_its_range():
    schedule = cdm.dynamic_schedule(6, torch.Generator().manual_seed(0))
    assert schedule[0] == 1.0 and schedule[-1] == 0.0 and len(schedule) == 7
    inner = schedule[1:-1]
    assert bool((schedule.diff() < 0).all()) and bool(((inner >= 0.25) & (inner <= 0.95)).all())


def test_extrapolating_along_the_true_velocity_stays_on_the_straight_path():
    clean, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    here, there = torch.tensor([0.2, 0.9, 0.5, 1.0]), torch.tensor([0.9, 0.1, 0.5, 0.02])
    sample, velocity = reflow.interpolate(clean, noise, here)
    torch.testing.assert_close(
        cdm.extrapolate(sample, velocity, here, there), reflow.interpolate(clean, noise, there)[0]
    )


def test_the_guidance_term_pulls_towards_what_guidance_adds():
    clean = torch.zeros(2, 4, requires_grad=True)
    conditional = torch.tensor([[2.0, -2.0, 2.0, -2.0], [0.01] * 4])
    direction = cdm.guidance_direction(clean, conditional, torch.zeros(2, 4), alpha=7.0)
    # the first sample is scaled by its mean distance 2, the second by the floor 0.1
    torch.testing.assert_close(direction, -7.0 * conditional / torch.tensor([[2.0], [0.1]]))
    loss = cdm.direction_loss(clean, direction)
    loss.backward()
    torch.testing.assert_close(clean.grad, 2 * direction / 8)
    assert float(loss.detach()) == pytest.approx(float(direction.detach().square().mean()))


def test_the_matching_term_is_that_of_dmd_with_a_floor():
    clean, real, fake = torch.zeros(1, 4), torch.full((1, 4), 0.01), torch.full((1, 4), 0.03)
    torch.testing.assert_close(cdm.matching_direction(clean, real, fake), torch.full((1, 4), 0.2))
    far = real + 1.0
    torch.testing.assert_close(cdm.matching_direction(clean, far, fake), dmd_gradient(clean, far, fake))


def test_levels_are_kept_off_the_ends():
    torch.testing.assert_close(cdm.clamp_sigma(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.02, 0.5, 0.98]))


def test_wrong_calls_are_answered_in_one_sentence():
    with pytest.raises(ValueError, match=r"base=1.0 must be a number in \(1, inf\)"):
        reflow.exponential_times(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match=r"velocities have shape \(3, 2\); give \(steps, 2, 1\)"):
        reflow.straightness(torch.zeros(3, 2), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"inner=0.9 must be a number in \[0, 0.5\]"):
        cdm.dynamic_schedule(2, torch.Generator(), (0.9, 0.5))
    with pytest.raises(ValueError, match=r"the high-pass filter needs \(n, c, h, w\)"):
        reflow.reflow_loss(torch.zeros(2, 3), torch.zeros(2, 3), high_pass_strength=1.0)
