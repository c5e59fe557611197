"""Convergence of stock solvers to the exact flow of a Gaussian: the yardstick that later solvers are held against."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from .models import GaussianDiffusion, Level, alpha_bar_levels, anisotropic_gaussian


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DATA = anisotropic_gaussian()


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the least-squares slope of log error over log steps."""
    x = torch.tensor([math.log(n) for n in steps], dtype=torch.float64)
    y = torch.tensor([math.log(error) for error in errors], dtype=torch.float64)
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())


def ddim_error(data: GaussianDiffusion, steps: int, prediction_type: str) -> float:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    levels = alpha_bar_levels(scheduler.alphas_cumprod)
    model = data.model(levels, prediction_type)
    goal = data.sample(64)
    x = data.transport(goal, levels(0), levels(int(scheduler.timesteps[0])))
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep), timestep, x).prev_sample
    return float((x - goal).abs().mean())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_converges_with_order_one(prediction_type: str) -> None:
    steps = [25, 50, 100, 200]
    errors = [ddim_error(DATA, count, prediction_type) for count in steps]
    assert slope(steps, errors) == pytest.approx(1.0, abs=0.15), errors


def dpm_error(data: GaussianDiffusion, steps: int, solver_order: int) -> float:
    # Even steps in log(alpha / sigma) down to the smallest noise of the schedule; no step of lower order at the end.
    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, solver_order=solver_order, algorithm_type="dpmsolver++", use_lu_lambdas=True,
        final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    ratios = scheduler.sigmas.double().tolist()
    levels = [Level.of_alpha_bar(1 / (1 + ratio**2)) for ratio in ratios]
    goal = data.sample(64)
    x = data.transport(goal, levels[-1], levels[0])
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(data.noise(x, levels[i]), timestep, x).prev_sample
    return float((x - goal).abs().mean())


@pytest.mark.parametrize("solver_order", [1, 2])
def test_dpm_solver_converges_with_its_order(solver_order: int) -> None:
    steps = [20, 40, 80, 160]
    errors = [dpm_error(DATA, count, solver_order) for count in steps]
    assert slope(steps, errors) == pytest.approx(solver_order, abs=0.25), errors


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_expects_the_posterior_mean(prediction_type: str) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    levels = alpha_bar_levels(scheduler.alphas_cumprod)
    timestep = scheduler.timesteps[4]
    level = levels(int(timestep))
    x = DATA.transport(DATA.sample(8), levels(0), level)
    expected = scheduler.step(DATA.model(levels, prediction_type)(x, timestep), timestep, x).pred_original_sample
    torch.testing.assert_close(expected, DATA.clean(x, level), rtol=1e-5, atol=1e-5)


def test_one_step_of_ddim_is_exact_for_a_point() -> None:
    point = GaussianDiffusion(torch.tensor([0.5, -0.25]), torch.zeros(2, 2))
    assert ddim_error(point, 5, "epsilon") < 1e-5
