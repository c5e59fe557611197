"""MRScheduler against the authors' own code, and against schedulers of diffusers on the centred and scaled sample."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_ext.schedulers import MRScheduler
from diffusers_ext.schedulers.mean_reverting import OUVEProcess, TableProcess, spaced_timesteps, theta_table
from tests.analytic.mean_reverting import MeanRevertingProblem, run
from tests.helpers.golden import golden


VARIANTS = [("ode-n", k) for k in (1, 2, 3)] + [("ode-d", k) for k in (1, 2, 3)] + [
    (kind, k) for kind in ("sde-n", "sde-d") for k in (1, 2)
]  # fmt: skip
AS_PUBLISHED: dict[str, Any] = {
    "zero_start": False, "schedule_interpolation": "table", "official_order": True, "third_order_correction": False,
    "final_sigmas_type": "sigma_min",
}  # fmt: skip
SCHEDULES = [name.split("|")[0] for name in golden("mr_sampler/schedules.npz") if name.endswith("alpha")]
GRIDS = [name.removesuffix("|timesteps") for name in golden("mr_sampler/timesteps.npz") if name.endswith("timesteps")]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / max(1.0, float(expected.abs().max())))


def finished(scheduler: MRScheduler, count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    scheduler.set_timesteps(count)
    problem = MeanRevertingProblem(dtype)
    if scheduler.config.algorithm_type == "euler-maruyama":
        problem.noise.neg_()  # their Euler subtracts it
    return run(scheduler, problem)


@pytest.mark.parametrize(("kind", "order"), VARIANTS)
def test_a_run_in_float64_is_that_of_the_authors(kind: str, order: int) -> None:
    data = golden(f"mr_sampler/{kind.replace('-', '_')}_{order}.npz")
    for count in (5, 10, 20):
        scheduler = MRScheduler(algorithm_type=kind, solver_order=order, **AS_PUBLISHED)
        states = finished(scheduler, count)
        assert [step.order for step in scheduler._steps] == data[f"order_{count}"].tolist()
        expected = data.tensor(f"x_{count}")
        assert error(torch.stack(states) if count == 5 else states[-1], expected) < 1e-10


@pytest.mark.parametrize(("kind", "order"), [variant for variant in VARIANTS if variant[0] != "sde-n"])
def test_a_run_in_float32_is_that_of_the_authors(kind: str, order: int) -> None:
    data = golden(f"mr_sampler/{kind.replace('-', '_')}_{order}.npz")
    for count in (5, 10, 20):
        scheduler = MRScheduler(algorithm_type=kind, solver_order=order, **AS_PUBLISHED)
        final = finished(scheduler, count, torch.float32)[-1]
        expected = data.tensor(f"x_{count}")
        assert error(final.double(), expected[-1] if count == 5 else expected) < 2e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_those_of_the_authors(name: str) -> None:
    data = golden("mr_sampler/schedules.npz")
    kind = name.split("_")[1]
    length = len(data[f"{name}|f64|alpha"]) - 1
    sigma_inf = float(data[f"{name}|f64|max_sigma"])
    process = TableProcess(theta_table(kind, length), sigma_inf, zero_start=name.startswith("daclip"))
    np.testing.assert_allclose(process.alphas, data[f"{name}|f64|alpha"], rtol=1e-12)
    np.testing.assert_allclose(process.sigmas, data[f"{name}|f64|sigma_bars"], rtol=1e-10, atol=1e-15)
    if name.startswith("mrs"):
        np.testing.assert_allclose(process.lambdas, data[f"{name}|f64|lambda"], rtol=1e-11)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_those_of_the_authors(name: str) -> None:
    data = golden("mr_sampler/timesteps.npz")
    spacing, count = name.split("|")[0], int(name.split("|")[1])
    if name.startswith("trailing") and "lambda_min" in name:
        pytest.skip("theirs keeps the step length of the whole range and stops far from the picture")
    process = TableProcess(theta_table("cosine"), 50 / 255, zero_start=False, interpolation="table")
    options = (
        {"lambda_min_clipped": -3.0} if "lambda_min" in name else {"steps_offset": 1} if "offset1" in name else {}
    )
    times = spaced_timesteps(process, spacing, count, **options)
    np.testing.assert_allclose(times, data[f"{name}|timesteps"], atol=1e-11)
    if f"{name}|alphas" in data:
        levels = [process.level(float(time)) for time in times]
        for ours, theirs in (("alpha", "alphas"), ("sigma", "sigmas"), ("lam", "lambdas")):
            values = [getattr(level, ours) for level in levels]
            np.testing.assert_allclose(values, data[f"{name}|{theirs}"], atol=1e-10)


@pytest.mark.parametrize("kind", ["posterior", "euler-maruyama"])
@pytest.mark.parametrize("count", [100, 20, 10, 5])
def test_the_samplers_of_ir_sde_are_those_of_its_authors(kind: str, count: int) -> None:
    # they shorten a run by a table of fewer steps
    scheduler = MRScheduler(num_train_timesteps=count, algorithm_type=kind, final_sigmas_type="sigma_min")
    final = finished(scheduler, count)[-1]
    name = "posterior" if kind == "posterior" else "euler"
    assert error(final, golden("mr_sampler/baselines.npz").tensor(f"daclip_sampleT|{name}|{count}|x")) < 1e-10


@pytest.mark.parametrize("kind", ["posterior", "euler-maruyama"])
def test_the_samplers_of_ir_sde_are_those_of_its_authors_over_the_other_table(kind: str) -> None:
    scheduler = MRScheduler(zero_start=False, algorithm_type=kind, final_sigmas_type="sigma_min")
    name = "posterior" if kind == "posterior" else "euler"
    assert error(finished(scheduler, 100)[-1], golden("mr_sampler/baselines.npz").tensor(f"mrs|{name}|100|x")) < 1e-10


def test_the_two_sides_of_the_training_loss_are_those_of_the_authors() -> None:
    data, problem = golden("mr_sampler/baselines.npz"), MeanRevertingProblem()
    scheduler, times = MRScheduler(), data.tensor("train|t")
    sample = scheduler.add_noise(problem.m1, problem.noise[0], times, mean=problem.mean)
    assert error(sample, data.tensor("train|x_t")) < 1e-12
    euler, best = scheduler.training_optimum_pair(data.tensor("train|eps"), sample, problem.m1, times, problem.mean)
    assert error(best, data.tensor("train|opt_x_tm1")) < 1e-12
    assert error(euler, data.tensor("train|em_mean_true_eps")) < 1e-12


# -- the oracle: variance-preserving diffusion of y = (x - mu) / sigma_inf ---------------------------------------------

STOCK = {"ode-n": "dpmsolver", "ode-d": "dpmsolver++", "sde-n": "sde-dpmsolver", "sde-d": "sde-dpmsolver++"}


def betas_of(process: TableProcess) -> list[float]:
    """Those of T + 1 (or T) stock timesteps, index 0 being the lowest level with noise."""
    bars = process.alphas[int(process.lowest) :] ** 2
    return (1 - bars / np.concatenate([[1.0], bars[:-1]])).tolist()


@pytest.mark.parametrize(("kind", "order"), VARIANTS)
def test_each_solver_is_the_stock_one_on_the_centred_sample(kind: str, order: int) -> None:
    problem = MeanRevertingProblem()
    for count in (5, 10, 20):
        ours = MRScheduler(
            algorithm_type=kind, solver_order=order, zero_start=False, third_order_correction=False,
            lower_order_final=False, final_sigmas_type="sigma_min",
        )  # fmt: skip
        ours.set_timesteps(count)
        process = ours.process
        stock = DPMSolverMultistepScheduler(
            num_train_timesteps=101, trained_betas=betas_of(process), algorithm_type=STOCK[kind], solver_order=order,
            solver_type="heun", lower_order_final=False, final_sigmas_type="sigma_min", timestep_spacing="linspace",
        )  # fmt: skip
        stock.set_timesteps(count)
        assert stock.timesteps.tolist() == ours.timesteps.long().tolist()
        sample, centred = problem.start, (problem.start - problem.mean) / problem.sigma_inf
        for index, timestep in enumerate(ours.timesteps):
            level, noise = process.level(float(timestep)), problem.noise[index]
            output = problem.answer(sample, level)
            sample = ours.step(output, timestep, sample, mean=problem.mean, variance_noise=noise).prev_sample
            back = problem.mean + problem.sigma_inf * centred
            output = problem.answer(back, level)
            centred = stock.step(output, int(timestep), centred, variance_noise=noise).prev_sample
        assert error(problem.mean + problem.sigma_inf * centred.double(), sample) < (5e-4 if kind == "sde-n" else 5e-5)


def test_posterior_sampling_is_the_stock_ddpm_on_the_centred_sample() -> None:
    problem, generator = MeanRevertingProblem(), torch.Generator()
    ours = MRScheduler(algorithm_type="posterior")
    ours.set_timesteps(100)
    betas = betas_of(ours.process)
    stock = DDPMScheduler(num_train_timesteps=100, trained_betas=betas, variance_type="fixed_small", clip_sample=False)
    stock.set_timesteps(100)
    sample, centred = problem.start, (problem.start - problem.mean) / problem.sigma_inf
    for timestep in ours.timesteps:
        level = ours.process.level(float(timestep))
        seed = int(timestep)
        noise = torch.randn(sample.shape, generator=generator.manual_seed(seed), dtype=torch.float64)
        output = problem.answer(sample, level)
        sample = ours.step(output, timestep, sample, mean=problem.mean, variance_noise=noise).prev_sample
        output = problem.answer(problem.mean + problem.sigma_inf * centred, level)
        centred = stock.step(output, seed - 1, centred, generator=generator.manual_seed(seed)).prev_sample
    assert error(problem.mean + problem.sigma_inf * centred, sample) < 5e-5


# -- OUVE ------------------------------------------------------------------------------------------------------------


def test_ouve_levels_solve_their_differential_equation() -> None:
    process = OUVEProcess()
    assert process.start_sigma == pytest.approx(0.38898, abs=1e-5)
    for time in (0.03, 0.4, 0.9):
        low, here, high = (process.level(time + shift) for shift in (-1e-5, 0.0, 1e-5))
        slope = (high.sigma**2 - low.sigma**2) / 2e-5
        _, added = process.drift_and_diffusion(here, process.level(0.0))
        # d sigma^2 / dt = -2 theta sigma^2 + g^2
        assert slope == pytest.approx(-3.0 * here.sigma**2 + added / time, rel=1e-6)
        assert process.time_of(np.array(here.lam)) == pytest.approx(time, abs=1e-12)
