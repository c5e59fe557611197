"""MeanRevertingAdapter: stock schedulers on a mean-reverting model, against MRScheduler and against the true map."""

from typing import Any

import pytest
import torch

from diffusers_ext.schedulers import GHVBScheduler, MeanRevertingAdapter, MRScheduler
from diffusers_ext.schedulers.mean_reverting import Level
from tests.analytic.mean_reverting import MeanRevertingProblem, run
from tests.helpers.golden import golden


# name -> settings and number of steps at which the error of a good solver is below what order one reaches
STOCK: dict[str, tuple[dict[str, Any], int]] = {
    "DDIMScheduler": ({}, 20),
    "DPMSolverMultistepScheduler": ({"solver_order": 2}, 20),
    "UniPCMultistepScheduler": ({"solver_order": 2}, 20),
    "DEISMultistepScheduler": ({"solver_order": 2}, 20),
    "HeunDiscreteScheduler": ({}, 10),
}


def walk(
    scheduler: MeanRevertingAdapter,
    problem: MeanRevertingProblem,
    count: int,
    head: str = "epsilon",
    seed: int | None = None,
) -> torch.Tensor:
    """The end of a run from the problem's own start noise."""
    scheduler.set_timesteps(count)
    noise = (problem.start - problem.mean) / problem.sigma_inf
    sample = scheduler.prepare_initial(problem.mean, noise=noise)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for timestep in scheduler.timesteps:
        seen = scheduler.model_input(sample, problem.mean, timestep)
        x = seen[:, :3] + seen[:, 3:]
        output = problem.answer(x, scheduler.process.level(float(timestep)), head)
        sample = scheduler.step(output, timestep, sample, mean=problem.mean, generator=generator).prev_sample
    return sample


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_scheduler_restores_as_well_as_our_first_order(name: str) -> None:
    settings, count = STOCK[name]
    problem, reference = MeanRevertingProblem(), golden("mr_sampler/inputs.npz").tensor("ref_gmm")
    end = walk(MeanRevertingAdapter(name, settings), problem, count)
    ours = MRScheduler(solver_order=1)
    ours.set_timesteps(count)
    limit = 1.05 * distance(run(ours, problem)[-1], reference)
    # the reference stops at the small noise of t = 0 of the other table
    assert distance(end, reference) < limit


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_scheduler_converges_to_the_true_map(name: str) -> None:
    settings, _ = STOCK[name]
    problem, reference = MeanRevertingProblem(), golden("mr_sampler/inputs.npz").tensor("ref_gmm")
    errors = [distance(walk(MeanRevertingAdapter(name, settings), problem, count), reference) for count in (5, 100)]
    assert errors[1] < 0.005 and errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("name", STOCK)
def test_the_three_heads_give_one_result(name: str) -> None:
    problem = MeanRevertingProblem()
    ends = [
        walk(MeanRevertingAdapter(name, STOCK[name][0], prediction_type=head), problem, 10, head)
        for head in ("epsilon", "sample", "v_prediction")
    ]
    # the wrapped tables are float32
    assert max(distance(end, ends[0]) for end in ends) < 5e-5


def test_ddim_is_the_first_order_of_mr_sampler() -> None:
    problem, ours = MeanRevertingProblem(), MRScheduler(solver_order=1)
    ours.set_timesteps(10)
    end = walk(MeanRevertingAdapter("DDIMScheduler"), problem, 10)
    torch.testing.assert_close(end, run(ours, problem)[-1], rtol=0, atol=5e-5)


@pytest.mark.parametrize(("kind", "stock"), [("ode-d", "dpmsolver++"), ("sde-d", "sde-dpmsolver++")])
def test_dpm_solver_is_the_second_order_of_mr_sampler(kind: str, stock: str) -> None:
    problem = MeanRevertingProblem(torch.float32)  # the wrapped scheduler draws noise in the sample's dtype
    settings = {
        "algorithm_type": stock, "solver_order": 2, "solver_type": "heun", "lower_order_final": False,
    }  # fmt: skip
    adapter = MeanRevertingAdapter("DPMSolverMultistepScheduler", settings)
    adapter.set_timesteps(10)
    ours = MRScheduler(algorithm_type=kind, lower_order_final=False)
    ours.set_timesteps(10)
    assert adapter.timesteps.tolist() == ours.timesteps.tolist()
    start = adapter.prepare_initial(problem.mean, noise=(problem.start - problem.mean) / problem.sigma_inf)
    a = b = start
    for index, timestep in enumerate(ours.timesteps):
        level = ours.process.level(float(timestep))
        generators = [torch.Generator().manual_seed(index) for _ in range(2)]
        a = adapter.step(problem.answer(a, level), timestep, a, problem.mean, generators[0]).prev_sample
        b = ours.step(problem.answer(b, level), timestep, b, problem.mean, generators[1]).prev_sample
    torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


def test_a_scheduler_of_this_package_can_be_wrapped() -> None:
    problem, reference = MeanRevertingProblem(), golden("mr_sampler/inputs.npz").tensor("ref_gmm")
    adapter = MeanRevertingAdapter("GHVBScheduler", {"solver_order": 2, "damping": 1.0})
    assert isinstance(adapter.inner, GHVBScheduler)
    assert distance(walk(adapter, problem, 20), reference) < 0.05


def test_the_wrapped_noise_levels_are_those_of_the_process() -> None:
    for zero_start in (True, False):
        adapter = MeanRevertingAdapter("DDIMScheduler", zero_start=zero_start)
        low = 1 if zero_start else 0
        for index in (0, 30, len(adapter.inner.alphas_cumprod) - 1):
            level: Level = adapter.process.level(float(index + low))
            assert float(adapter.inner.alphas_cumprod[index]) == pytest.approx(level.alpha**2, rel=2e-5)


def test_heun_samples_are_scaled_between_steps_and_a_picture_at_the_end() -> None:
    problem, adapter = MeanRevertingProblem(), MeanRevertingAdapter("HeunDiscreteScheduler")
    adapter.set_timesteps(4)
    assert len(adapter.timesteps) == 7 and adapter.order == 2
    sample = adapter.prepare_initial(problem.mean, noise=problem.noise[0])
    assert float((sample - problem.mean).std()) > 30
    seen = adapter.model_input(sample, problem.mean, adapter.timesteps[0])
    torch.testing.assert_close(seen[:, :3], problem.sigma_inf * problem.noise[0], rtol=0, atol=1e-4)
    end = walk(adapter, problem, 4)
    assert float((end - problem.mean).abs().max()) < 2


def test_a_shortened_run_starts_with_the_noise_of_its_timestep() -> None:
    problem = MeanRevertingProblem()
    for name in STOCK:
        adapter = MeanRevertingAdapter(name)
        adapter.set_timesteps(10)
        timestep = adapter.timesteps[4 * adapter.order]
        start = adapter.prepare_initial(problem.mean, noise=problem.noise[0], timestep=timestep)
        adapter.set_begin_index(4 * adapter.order)
        seen = adapter.model_input(start, problem.mean, timestep)[:, :3]
        expected = adapter.process.level(float(timestep)).sigma
        assert float((seen / problem.noise[0]).median()) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler_class": "NoSuchScheduler"}, "scheduler_class='NoSuchScheduler' is not known"),
        ({"scheduler_class": "UNet2DModel"}, "scheduler_class='UNet2DModel' is not known"),
        ({"scheduler_class": "FlowMatchEulerDiscreteScheduler"}, "takes no trained_betas"),
        ({"scheduler_class": 5}, "scheduler_class=5 is not known"),
        ({"scheduler_config": {"beta_start": 0.1}}, "beta_start is set by the process; leave it out"),
        ({"scheduler_config": {"ordre": 3}}, "ordre is no setting of DPMSolverMultistepScheduler"),
        ({"theta_schedule": "ouve"}, "theta_schedule='ouve' is not variance-preserving"),
        ({"sigma_inf": -1.0}, "sigma_inf=-1.0 is out of range"),
    ],
)
def test_a_wrong_setting_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanRevertingAdapter(**arguments)


def test_a_wrong_step_is_named() -> None:
    problem, adapter = MeanRevertingProblem(), MeanRevertingAdapter()
    with pytest.raises(ValueError, match="num_inference_steps=101 is out of range"):
        adapter.set_timesteps(101)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        adapter.step(problem.start, 100, problem.start, problem.mean)
    adapter.set_timesteps(1)
    with pytest.raises(ValueError, match="mean=None is missing"):
        adapter.step(problem.start, 100, problem.start)
    with pytest.raises(ValueError, match="mean is not finite"):
        adapter.step(problem.start, 100, problem.start, problem.mean / 0)
    adapter.step(problem.start, adapter.timesteps[0], problem.start, problem.mean)
    with pytest.raises(ValueError, match="all 1 steps are done; call set_timesteps first"):
        adapter.step(problem.start, adapter.timesteps[0], problem.start, problem.mean)
