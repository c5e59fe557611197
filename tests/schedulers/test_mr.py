"""What MRScheduler promises beyond the authors' numbers: convergence orders, equal heads, finite ends, clear errors."""

import math
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_ext.schedulers import MeanRevertingAdapter, MRScheduler, scheduling_mr
from diffusers_ext.schedulers.mean_reverting import (
    SPACINGS,
    Level,
    OUVEProcess,
    TableProcess,
    spaced_timesteps,
    theta_table,
)
from diffusers_ext.schedulers.mean_reverting_solvers import (
    ALGORITHMS,
    DATA_SOLVERS,
    PREDICTION_TYPES,
    multistep_update,
    official_orders,
)
from tests.analytic.mean_reverting import MeanRevertingProblem, run
from tests.helpers.golden import golden


def laid(count: int = 5, **settings: Any) -> MRScheduler:
    scheduler = MRScheduler(**settings)
    scheduler.set_timesteps(count)
    return scheduler


def slopes(kind: str, order: int, counts: tuple[int, ...] = (80, 160, 320, 640), **settings: Any) -> list[float]:
    """Observed orders of a solver, on the map of the probability-flow ODE down to t = 0 of the table with noise there."""
    problem, reference = MeanRevertingProblem(), golden("mr_sampler/inputs.npz").tensor("ref_gmm")
    process = TableProcess(theta_table("cosine"), problem.sigma_inf, zero_start=False)
    errors = []
    for count in counts:
        lams = np.linspace(process.level(100.0).lam, process.level(0.0).lam, count + 1)
        # levels from lambda itself: alpha^-2 = 1 + exp(-2 lambda) / sigma_inf^2
        alphas = (1.0 + np.exp(-2.0 * lams) / problem.sigma_inf**2) ** -0.5
        levels = [
            Level(0.0, a, a * math.exp(-lam), lam) for a, lam in zip(alphas.tolist(), lams.tolist(), strict=True)
        ]
        state, history = problem.start - problem.mean, []
        for index in range(count):
            output = problem.answer(state + problem.mean, levels[index], "epsilon" if kind == "ode-n" else "sample")
            history.insert(0, output if kind == "ode-n" else output - problem.mean)
            used = min(order, index + 1)
            past = [levels[index - i] for i in range(used)]
            update = multistep_update(kind, past, levels[index + 1], settings.get("corrected", True))
            state = state * update.state + sum(w * m for w, m in zip(update.outputs, history, strict=False))
        errors.append(float((state + problem.mean - reference).square().mean().sqrt()))
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize("kind", ["ode-n", "ode-d"])
def test_order_one_converges_with_order_one(kind: str) -> None:
    assert slopes(kind, 1)[-1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kind", ["ode-n", "ode-d"])
def test_order_two_converges_with_order_two(kind: str) -> None:
    assert slopes(kind, 2)[-1] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("kind", ["ode-n", "ode-d"])
def test_order_three_converges_with_order_three_only_when_corrected(kind: str) -> None:
    assert slopes(kind, 3)[-1] > 2.7
    assert slopes(kind, 3, corrected=False)[-1] == pytest.approx(2.0, abs=0.1)


def test_first_orders_of_both_parameterisations_are_one_solver() -> None:
    for settings in ({}, {"zero_start": False, "final_sigmas_type": "sigma_min"}):
        noise, data = (
            run(laid(7, algorithm_type=kind, solver_order=1, **settings), MeanRevertingProblem())[-1]
            for kind in ("ode-n", "ode-d")
        )
        torch.testing.assert_close(noise, data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_three_heads_give_one_result(kind: str) -> None:
    problem = MeanRevertingProblem()
    ends = [run(laid(10, algorithm_type=kind, prediction_type=head), problem)[-1] for head in PREDICTION_TYPES]
    scale = max(1.0, float(ends[0].abs().max()))
    for end in ends[1:]:
        assert float((end - ends[0]).abs().max()) / scale < 1e-12


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_run_ends_finite_at_the_clean_picture(kind: str, spacing: str) -> None:
    problem = MeanRevertingProblem(torch.float32)
    for count in (1, 2, 5):
        for final in ("zero", "sigma_min"):
            if final == "sigma_min" and spacing == "trailing" and count == 1:
                continue  # ends at T / 2
            scheduler = laid(count, algorithm_type=kind, timestep_spacing=spacing, final_sigmas_type=final)
            if final == "zero":
                assert float(scheduler.sigmas[-1]) == 0.0 and len(scheduler.timesteps) == count
            end = run(scheduler, problem)[-1]
            assert torch.isfinite(end).all()


def test_the_last_step_to_zero_gives_the_predicted_picture() -> None:
    problem = MeanRevertingProblem()
    for kind in ("ode-d", "ode-n", "sde-d", "sde-n", "posterior"):
        scheduler = laid(5, algorithm_type=kind)
        sample = problem.start
        for index, timestep in enumerate(scheduler.timesteps):
            output = problem.answer(sample, scheduler._steps[index].level)
            result = scheduler.step(output, timestep, sample, mean=problem.mean, variance_noise=problem.noise[index])
            sample = result.prev_sample
        torch.testing.assert_close(sample, result.pred_original_sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(kind: str, dtype: torch.dtype) -> None:
    exact = run(laid(10, algorithm_type=kind), MeanRevertingProblem(torch.float32))[-1]
    problem = MeanRevertingProblem(dtype)
    end = run(laid(10, algorithm_type=kind), problem)[-1]
    assert end.dtype == dtype and torch.isfinite(end).all()
    if kind != "sde-n":  # which amplifies every rounding error
        assert float((end.float() - exact).abs().mean()) < (0.02 if dtype == torch.float16 else 0.1)


def test_few_steps_of_the_solver_are_closer_than_many_of_posterior_sampling_to_the_true_map() -> None:
    problem, reference = MeanRevertingProblem(), golden("mr_sampler/inputs.npz").tensor("ref_gmm")
    error = {
        kind: float((run(laid(count, algorithm_type=kind), problem)[-1] - reference).square().mean().sqrt())
        for kind, count in (("ode-d", 10), ("posterior", 10))
    }
    assert error["ode-d"] < 0.3 * error["posterior"]


def test_official_orders_lower_the_last_step_but_one_below_ten() -> None:
    assert official_orders(5, 2) == [1, 2, 2, 1, 2]
    assert official_orders(10, 3) == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert official_orders(1, 3) == [3]


def test_data_solvers_lower_their_last_orders_and_noise_solvers_do_not() -> None:
    settings = {"zero_start": False, "final_sigmas_type": "sigma_min", "solver_order": 3}
    assert [step.order for step in laid(6, **settings)._steps] == [1, 2, 3, 3, 2, 1]
    assert [step.order for step in laid(6, algorithm_type="ode-n", **settings)._steps] == [1, 2, 3, 3, 3, 3]


def test_consistent_levels_satisfy_their_definitions_between_timesteps() -> None:
    process = TableProcess(theta_table("cosine"), 50 / 255)
    for timestep in (0.3, 1.5, 47.1, 99.9):
        level = process.level(timestep)
        assert level.sigma**2 == pytest.approx((50 / 255) ** 2 * (1 - level.alpha**2), rel=1e-9)
        assert level.lam == pytest.approx(math.log(level.alpha / level.sigma), rel=1e-12)
        assert process.time_of(np.array(level.lam)) == pytest.approx(timestep, abs=1e-9)


def test_trained_thetas_of_the_cosine_are_the_cosine() -> None:
    thetas = theta_table("cosine").tolist()
    trained = laid(5, theta_schedule="trained", trained_thetas=thetas)
    assert torch.equal(trained.sigmas, laid(5).sigmas)


def test_linear_lambda_is_even_in_lambda() -> None:
    process = TableProcess(theta_table("cosine"), 50 / 255, zero_start=False)
    lams = [process.level(float(t)).lam for t in spaced_timesteps(process, "linear-lambda", 8)]
    assert np.diff(lams) == pytest.approx([np.diff(lams).mean()] * 8, rel=1e-9)


def test_set_mean_is_the_mean_that_a_step_gets_and_is_forgotten_by_the_next_run() -> None:
    problem = MeanRevertingProblem()
    told, given = laid(4), laid(4)
    told.set_mean(problem.mean)
    output = problem.noise[0]
    expected = given.step(output, 100, problem.start, mean=problem.mean).prev_sample
    assert torch.equal(told.step(output, 100, problem.start).prev_sample, expected)
    told.set_timesteps(4)
    assert told.mean is None
    with pytest.raises(ValueError, match="mean=None is missing.*set_mean"):
        told.step(output, 100, problem.start)


def test_noise_and_targets_of_training_are_what_a_step_inverts() -> None:
    problem = MeanRevertingProblem()
    for head in PREDICTION_TYPES:
        scheduler = laid(100, prediction_type=head)
        timesteps = torch.tensor([80, 80])
        sample = scheduler.add_noise(problem.m1, problem.noise[0], timesteps, problem.mean)
        target = scheduler.get_target(problem.m1, problem.noise[0], timesteps, problem.mean)
        seen = scheduler.step(target, 80, sample, mean=problem.mean).pred_original_sample
        torch.testing.assert_close(seen, problem.m1, rtol=0, atol=1e-9)


def test_model_input_is_the_difference_and_the_mean() -> None:
    problem = MeanRevertingProblem()
    seen = MRScheduler().model_input(problem.start, problem.mean)
    assert torch.equal(seen[:, 3:], problem.mean) and torch.equal(seen[:, :3], problem.start - problem.mean)


def test_the_start_of_a_shortened_run_has_the_noise_of_its_timestep() -> None:
    mean, scheduler = torch.full((1, 3, 64, 64), 0.5), MRScheduler()
    for timestep, expected in ((None, 50 / 255), (50, scheduler.process.level(50.0).sigma)):
        generator = torch.Generator().manual_seed(0)
        start = scheduler.prepare_initial(mean, generator, timestep=timestep)
        assert float((start - mean).std()) == pytest.approx(expected, rel=0.02)


def test_thresholding_and_clipping_hold_the_predicted_picture_in_range() -> None:
    problem = MeanRevertingProblem()
    for kind in ("ode-d", "ode-n"):
        for settings in (
            {"clip_sample": True},
            {"clip_sample": True, "clip_sample_range": [-1.0, 0.5]},
            {"thresholding": True},
        ):
            scheduler = laid(5, algorithm_type=kind, **settings)
            result = scheduler.step(9 * problem.noise[0], 100, problem.start, mean=problem.mean)
            low, high = scheduler.config.clip_sample_range or (0.0, 1.0)
            low = -1.0 if "thresholding" in settings else low
            picture = result.pred_original_sample
            assert float(picture.min()) >= low - 1e-9 and float(picture.max()) <= high + 1e-9
            assert float(picture.std()) > 0.1


def test_ouve_runs_reach_the_picture_and_stop_where_the_network_was_trained() -> None:
    scheduler = laid(5, theta_schedule="ouve", algorithm_type="sde-d")
    assert scheduler.timesteps.tolist() == pytest.approx(np.linspace(1.0, 0.03, 5).tolist(), abs=1e-6)
    assert scheduler.init_noise_sigma == pytest.approx(0.38898, abs=1e-5)
    # x0 ~ N(.3, .1^2) around mu = -.2, as scalars
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((4000, 1), -0.2, dtype=torch.float64)
    for kind, count, bias in (("ode-d", 10, 0.035), ("sde-d", 20, 0.02)):
        scheduler = laid(count, theta_schedule="ouve", algorithm_type=kind)
        sample = scheduler.prepare_initial(mean, generator)
        for index, timestep in enumerate(scheduler.timesteps):
            level = scheduler._steps[index].level
            gain = level.alpha * 0.01 / (level.alpha**2 * 0.01 + level.sigma**2)
            clean = 0.3 + gain * (sample - level.alpha * 0.3 - (1 - level.alpha) * mean)
            eps = (sample - level.alpha * clean - (1 - level.alpha) * mean) / level.sigma
            sample = scheduler.step(eps, timestep, sample, mean=mean, generator=generator).prev_sample
        # the start is biased by exp(-1.5) (mu - x0), which an ODE never forgets
        assert abs(float(sample.mean()) - 0.3) < bias
        assert float(sample.std()) == pytest.approx(0.1, abs=0.02)


def test_a_second_prediction_does_not_change_the_memory_of_the_first() -> None:
    problem, buffer = MeanRevertingProblem(torch.float32), torch.empty(2, 3, 8, 8)
    fresh, reused = laid(5, algorithm_type="ode-n"), laid(5, algorithm_type="ode-n")
    a = b = problem.start
    for index, timestep in enumerate(fresh.timesteps):
        output = problem.answer(a, fresh._steps[index].level)
        a = fresh.step(output, timestep, a, mean=problem.mean).prev_sample
        buffer.copy_(output)
        b = reused.step(buffer, timestep, b, mean=problem.mean).prev_sample
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm_type": "ode"}, "algorithm_type='ode' is not known; use one of ode-d"),
        ({"solver_order": 4}, "solver_order=4 is not possible.*use 1 to 3"),
        ({"algorithm_type": "sde-d", "solver_order": 3}, "solver_order=3.*use 1 to 2"),
        ({"theta_schedule": "cosin"}, "theta_schedule='cosin' is not known"),
        ({"theta_schedule": "trained"}, "trained_thetas=None is missing"),
        ({"theta_schedule": "trained", "trained_thetas": [1.0]}, "trained_thetas has 1 entries.*101"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' is not known"),
        ({"schedule_interpolation": "cubic"}, "schedule_interpolation='cubic' is not known"),
        ({"final_sigmas_type": "none"}, "final_sigmas_type='none' is not known"),
        ({"sigma_inf": 0.0}, "sigma_inf=0.0 is out of range"),
        ({"sigma_inf": math.nan}, "sigma_inf=nan is out of range"),
        ({"alpha_min": 1.0}, "alpha_min=1.0 is out of range"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1 is not usable"),
        ({"clip_sample_range": [1.0, 0.0]}, "clip_sample_range=.* is not usable"),
        ({"steps_offset": -1}, "steps_offset=-1 is out of range"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRScheduler(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 is out of range; use an int from 1 to 100"),
        ({"num_inference_steps": 101}, "num_inference_steps=101 is out of range"),
        ({}, "give exactly one"),
        ({"timesteps": [1, 2]}, "timesteps=.*descending"),
        ({"timesteps": [101.0]}, "up to 100"),
        ({"timesteps": [50.0, 0.0]}, "above 0"),
    ],
)
def test_a_run_that_cannot_be_laid_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRScheduler().set_timesteps(**arguments)


def test_timesteps_that_would_coincide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_inference_steps=100 is too many for timestep_spacing='leading'"):
        MRScheduler(timestep_spacing="leading").set_timesteps(100)
    assert laid(100).timesteps.tolist() == list(range(100, 0, -1))


def test_a_wrong_step_is_named_and_leaves_the_run_as_it_was() -> None:
    problem = MeanRevertingProblem()
    scheduler, output = laid(5), problem.noise[0]
    for arguments, error, message in (
        ({"mean": None}, ValueError, "mean=None is missing"),
        ({"mean": problem.mean[:, :2]}, ValueError, r"mean of shape \(2, 2, 8, 8\)"),
        ({"mean": problem.mean * math.nan}, ValueError, "mean is not finite"),
        ({"mean": "x"}, TypeError, "mean is str"),
        ({"model_output": output[:, :2]}, ValueError, r"model_output of shape \(2, 2, 8, 8\)"),
        ({"model_output": output * math.nan}, ValueError, "model_output is not finite"),
        ({"timestep": 33}, ValueError, "timestep=33 is not one of the 5"),
    ):
        call = {"model_output": output, "timestep": 100, "sample": problem.start, "mean": problem.mean, **arguments}
        with pytest.raises(error, match=message):
            scheduler.step(**call)
    result = scheduler.step(output, 100, problem.start, mean=problem.mean).prev_sample
    assert torch.equal(result, laid(5).step(output, 100, problem.start, mean=problem.mean).prev_sample)


def test_generators_and_given_noise_are_checked() -> None:
    problem = MeanRevertingProblem()
    scheduler = laid(5, algorithm_type="sde-d")
    base = {"model_output": problem.noise[0], "timestep": 100, "sample": problem.start, "mean": problem.mean}
    with pytest.raises(ValueError, match="generator is a list of 3 for a batch of 2"):
        scheduler.step(**base, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="variance_noise of shape"):
        scheduler.step(**base, variance_noise=problem.noise[0][:1])
    with pytest.raises(TypeError, match="generator=5"):
        scheduler.step(**base, generator=5)


def test_a_config_of_a_stock_scheduler_is_taken_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(scheduling_mr.logger, "warning", heard.append)
    MRScheduler.from_config(DPMSolverMultistepScheduler(solver_order=3).config)
    assert len(heard) == 1 and "noise levels are not used" in heard[0] and "sigma_inf" in heard[0]
    heard.clear()
    MRScheduler.from_config(MRScheduler(sigma_inf=0.3).config)
    MRScheduler.from_config(MeanRevertingAdapter(sigma_inf=0.3).config)
    assert not heard


def test_ouve_leaves_nothing_of_its_noise_at_time_zero() -> None:
    assert OUVEProcess().level(0.0) == Level(0.0, 1.0, 0.0, math.inf)


@pytest.mark.reliability
@pytest.mark.parametrize("kind", sorted(set(ALGORITHMS) & set(DATA_SOLVERS) - {"posterior"}))
def test_a_step_takes_no_longer_than_that_of_dpm_solver(kind: str) -> None:
    shape, ours, theirs = (4, 3, 64, 64), [], []
    sample, output, mean = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    stock = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++" if kind == "sde-d" else "dpmsolver++")
    scheduler = MRScheduler(algorithm_type=kind)
    for _ in range(15):
        for subject, extra, times in ((scheduler, {"mean": mean}, ours), (stock, {}, theirs)):
            subject.set_timesteps(20)
            state = sample
            for timestep in subject.timesteps:
                begun = time.perf_counter()
                state = subject.step(output, timestep, state, return_dict=False, **extra)[0]
                times.append(time.perf_counter() - begun)
    assert statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) <= 1.0


def test_posterior_sampling_between_any_levels_is_the_first_order_of_the_stochastic_data_solver() -> None:
    problem = MeanRevertingProblem()
    ends = [run(laid(7, algorithm_type=kind, solver_order=1), problem)[-1] for kind in ("posterior", "sde-d")]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
