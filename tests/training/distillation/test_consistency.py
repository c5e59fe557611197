import math

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from diffusers_ext.training.distillation import consistency, ctm, lcm
from diffusers_ext.training.distillation.parameterization import NoiseSchedule

from .golden import golden


TABLE = golden("consistency")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 2e-6, "atol": 1e-9}


def test_pseudo_huber_and_cauchy_are_the_recorded_values():
    c = consistency.ict_constant(256)
    assert c == pytest.approx(float(TABLE["c_ict"]), rel=1e-12)
    for kind in ("pseudo_huber", "cauchy"):
        found = consistency.distance(kind, TABLE["x"], TABLE["y"], c)
        torch.testing.assert_close(found, TABLE[f"{kind}_c_ict"], **EXACT)


def test_cauchy_with_its_schedule_is_the_recorded_value():
    for i, levels in enumerate(TABLE["N_for_c"].tolist()):
        c = consistency.slct_constant(levels)
        assert c == pytest.approx(float(TABLE["c_slct"][i]), rel=1e-10)
        found = consistency.distance("cauchy", TABLE["x"], TABLE["y"], c)
        torch.testing.assert_close(found, TABLE["cauchy_c_slct"][i], **EXACT)


@pytest.mark.parametrize("kind", ["pseudo_huber", "cauchy"])
def test_robust_distances_are_quadratic_for_small_errors_and_have_a_gradient_at_zero(kind: str):
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    consistency.distance(kind, x, torch.zeros(1, 4, dtype=torch.float64), c=0.1).sum().backward()
    assert not x.grad.any()
    small = torch.full((1, 4), 1e-5, dtype=torch.float64)
    found = float(consistency.distance(kind, small, torch.zeros_like(small), c=0.1))
    assert found == pytest.approx(4e-10 / (2 * (0.1 if kind == "pseudo_huber" else 0.01)), rel=1e-6)


def test_one_outlier_pulls_the_cauchy_fit_less_than_the_others():
    data = torch.cat([torch.zeros(49), torch.full((1,), 100.0)])[:, None]
    centre = {}
    for kind in consistency.DISTANCES:
        grid = torch.linspace(-1, 3, 801)
        cost = torch.stack([consistency.distance(kind, data, m.expand(50, 1), c=1.0).sum() for m in grid])
        centre[kind] = float(grid[cost.argmin()].abs())
    assert centre["l2"] == pytest.approx(2.0, abs=0.01)
    assert centre["cauchy"] <= 0.005 < centre["pseudo_huber"] < 0.05


def test_curricula_are_those_of_the_authors():
    steps = TABLE["steps"].tolist()
    assert [consistency.ict_levels(k, 400_000) for k in steps] == TABLE["N_ict_s0_10_s1_640_K400k"].tolist()
    assert [consistency.cm_levels(k, 400_000) for k in steps] == TABLE["N_cm_s0_2_s1_150"].tolist()


def test_a_curriculum_far_beyond_its_end_stays_there():
    assert consistency.ict_levels(10**9, 3) == 641


@pytest.mark.parametrize("count", [11, 41])
def test_levels_their_probabilities_and_weights_are_the_recorded_ones(count: int):
    sigmas = consistency.karras_levels(count)
    torch.testing.assert_close(sigmas, TABLE[f"grid{count}"], **EXACT)
    torch.testing.assert_close(consistency.lognormal_probabilities(sigmas), TABLE[f"plog{count}"], **EXACT)
    torch.testing.assert_close(consistency.interval_weights(sigmas), TABLE[f"lam{count}"], **EXACT)


def test_easy_consistency_tuning_pairs_times_as_its_authors_do():
    for i, ratio in enumerate(TABLE["ect_ratio"].tolist()):
        torch.testing.assert_close(
            consistency.ect_earlier(TABLE["ect_t"], ratio), TABLE["ect_r"][i], rtol=5e-6, atol=0
        )
    assert [consistency.ect_ratio(stage) for stage in range(12)] == TABLE["ect_ratio_stage"].tolist()


def test_a_consistency_model_is_the_identity_at_the_lowest_level():
    skip, out, scale = consistency.boundary_scalings(torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert skip[0] == 1.0 and out[0] == 0.0
    assert float(skip[1]) < 1e-4 and float(out[1]) == pytest.approx(0.5, rel=1e-3)
    assert float(scale[0]) == pytest.approx(2.0, rel=1e-4)


def test_latent_consistency_scalings_are_those_of_the_stock_scheduler():
    skip, out = lcm.boundary_scalings(TABLE["lcm_t"])
    torch.testing.assert_close(skip.float(), TABLE["lcm_cskip"], **SINGLE)
    torch.testing.assert_close(out.float(), TABLE["lcm_cout"], **SINGLE)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_inference_timesteps_of_the_stock_scheduler_are_trained_on(steps: int):
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    assert set(scheduler.timesteps.tolist()) <= set(lcm.solver_timesteps().tolist())


@pytest.mark.parametrize("dimension", [8, 256, 257])
def test_the_guidance_embedding_is_that_of_the_pipelines(dimension: int):
    w = torch.tensor([0.0, 3.5, 14.0])
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, dimension)
    torch.testing.assert_close(lcm.guidance_embedding(w, dimension), stock, rtol=0, atol=2e-3)


def gaussian_teacher(schedule: NoiseSchedule, mean: float, deviation: float):
    """The exact prediction for latents N(mean, deviation^2)."""

    def denoise(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, spread = (part.to(sample)[:, None] for part in schedule.levels(timesteps))
        variance = signal**2 * deviation**2 + spread**2
        clean = mean + signal * deviation**2 * (sample - signal * mean) / variance
        noise = (sample - signal * clean) / spread.clamp(min=1e-12)
        return signal * noise - spread * clean

    return denoise


def ddpm() -> NoiseSchedule:
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    return NoiseSchedule("v_prediction", alphas)


def test_a_teacher_step_is_a_step_along_the_exact_ode():
    # for Gaussian data the ODE keeps the standardised sample: (x_t - a m) / sqrt(a^2 tau^2 + s^2) is constant
    schedule, mean, deviation = ddpm(), 0.4, 0.6
    teacher = gaussian_teacher(schedule, mean, deviation)
    timesteps = torch.tensor([999, 500, 60])
    sample = torch.tensor([[1.2], [-0.7], [0.3]])

    def standardised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, spread = (part.float()[:, None] for part in schedule.levels(t))
        return (x - signal * mean) / (signal**2 * deviation**2 + spread**2).sqrt()

    earlier = timesteps - 1
    prediction = teacher(sample, timesteps)
    reached = lcm.teacher_step(schedule, prediction, prediction, sample, timesteps, earlier, torch.zeros(3))
    torch.testing.assert_close(standardised(reached, earlier), standardised(sample, timesteps), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_guided_teacher_step_is_that_of_the_stock_sampler(prediction_type: str):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(50)
    sample, conditional, unconditional = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    timesteps, w = torch.tensor([499, 499]), torch.tensor([3.0, 3.0])
    reached = lcm.teacher_step(
        NoiseSchedule.from_scheduler(scheduler), conditional, unconditional, sample, timesteps, timesteps - 20, w
    )
    prediction = unconditional + 4.0 * (conditional - unconditional)
    torch.testing.assert_close(reached, scheduler.step(prediction, 499, sample).prev_sample, rtol=1e-4, atol=1e-5)


def test_guidance_is_counted_as_excess_over_the_condition():
    conditional, unconditional = torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    assert lcm.guided(conditional, unconditional, torch.tensor([0.0, 3.0])).tolist() == [[2.0], [5.0]]


def exact_student(schedule: NoiseSchedule, mean: float, deviation: float):
    """The network whose consistency output is the end of the exact ODE."""

    def denoise(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, spread = (part.to(sample)[:, None] for part in schedule.levels(timesteps))
        first, least = (part.to(sample) for part in schedule.levels(torch.zeros(1, dtype=torch.long)))
        scale = ((first**2 * deviation**2 + least**2) / (signal**2 * deviation**2 + spread**2)).sqrt()
        end = first * mean + scale * (sample - signal * mean)
        skip, out = (part.to(sample)[:, None] for part in lcm.boundary_scalings(timesteps))
        clean = torch.where(out > 0, (end - skip * sample) / out.clamp(min=1e-12), end)
        return (signal * sample - clean) / spread

    return denoise


def loss_of(student, solver_steps: int, rows: torch.Tensor) -> float:
    schedule = ddpm()
    teacher = gaussian_teacher(schedule, 0.4, 0.6)
    clean, noise = torch.randn(2, len(rows), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(
        lcm.lcm_loss(
            schedule, student, student, lambda *x: (teacher(*x),) * 2, 0.4 + 0.6 * clean, noise, rows,
            torch.zeros(len(rows)), solver_steps,
        )
    )  # fmt: skip


def test_the_exact_student_has_a_loss_that_vanishes_with_the_steps_of_the_solver():
    student = exact_student(ddpm(), 0.4, 0.6)
    losses = [loss_of(student, steps, torch.arange(steps)) for steps in (10, 50, 250)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-3
    untrained = loss_of(gaussian_teacher(ddpm(), 0.4, 0.6), 50, torch.arange(50))
    assert losses[1] < 0.3 * untrained


def test_no_gradient_flows_through_the_target():
    schedule = ddpm()
    own, other = (torch.ones((), requires_grad=True) for _ in range(2))
    loss = lcm.lcm_loss(
        schedule, lambda x, t: own * x, lambda x, t: other * x, lambda x, t: (x, x), torch.ones(4, 1), torch.ones(4, 1),
        torch.arange(4), torch.ones(4),
    )  # fmt: skip
    loss.backward()
    assert own.grad is not None and other.grad is None


def exact_jump(mean: float, deviation: float):
    def jump(sample: torch.Tensor, level: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        scale = ((deviation**2 + wanted**2) / (deviation**2 + level**2)).sqrt()[:, None]
        return mean + scale * (sample - mean)

    return jump


def test_a_jump_to_where_one_is_stays_there_and_one_to_zero_is_the_denoiser():
    sample, denoised, level = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 1.0, 80.0])
    assert torch.equal(ctm.jump(sample, denoised, level, level), sample)
    assert torch.equal(ctm.jump(sample, denoised, level, torch.zeros(3)), denoised)


def test_the_exact_jump_satisfies_the_trajectory_condition_and_heun_is_of_second_order():
    mean, deviation = 0.3, 0.5
    jump = exact_jump(mean, deviation)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        variance = (t**2)[:, None]
        return (deviation**2 * x + variance * mean) / (deviation**2 + variance)

    sample, level = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None], torch.full((7,), 2.0, dtype=torch.float64)
    errors = []
    for gap in (0.1, 0.05, 0.025):
        middle, low = level - gap, torch.full_like(level, 0.5)
        reached, expected = ctm.trajectory_pair(
            jump, jump, lambda x, t, u: ctm.heun_step(x, t, u, denoise), sample, level, middle, low
        )
        errors.append(float((reached - expected).abs().max()))
    # one step of a method of order 2 errs by the third power of its length
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([8.0, 8.0], rel=0.15)


def test_the_students_jump_gets_its_gradient_through_the_target_and_the_target_none():
    own, other = (torch.ones((), requires_grad=True) for _ in range(2))
    with torch.no_grad():
        frozen = other.clone()
    ones = torch.ones(2)
    # a solver with weights that learn, as where the teacher is the student's own average
    reached, expected = ctm.trajectory_pair(
        lambda x, t, s: own * x,
        lambda x, t, s: frozen * x,
        lambda x, t, u: other * x,
        torch.ones(2, 1),
        3 * ones,
        2 * ones,
        ones,
    )
    (reached - 2 * expected).square().sum().backward()
    assert own.grad is not None and other.grad is None and not expected.requires_grad


def test_drawn_levels_are_in_order_and_reach_every_level():
    grid = consistency.karras_levels(5).float()
    top, middle, low = ctm.draw_levels(grid, 2000, torch.Generator().manual_seed(0))
    assert bool(((low <= middle) & (middle < top)).all())
    assert set(top.tolist()) == set(grid[1:].tolist()) and set(low.tolist()) == set(grid[:-1].tolist())


def test_gamma_sampling_keeps_the_variance_of_the_noise():
    for gamma in (0.0, 0.3, 1.0):
        assert math.hypot(*ctm.gamma_levels(2.5, gamma)) == pytest.approx(2.5)
    assert ctm.gamma_levels(2.5, 1.0) == (0.0, 2.5)


def test_wrong_calls_are_answered_in_one_sentence():
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="distance='l1' is unknown; use one of l2, pseudo_huber, cauchy"):
        consistency.distance("l1", x, x, 1.0)
    with pytest.raises(ValueError, match=r"num_ddim_timesteps=2000 must be a number in \[1, 1000\]"):
        lcm.solver_timesteps(1000, 2000)
    with pytest.raises(ValueError, match="wanted <= middle <= level"):
        ctm.trajectory_pair(None, None, None, x, torch.ones(2), 2 * torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="must be two or more rising numbers above 0"):
        consistency.interval_weights(torch.tensor([2.0, 1.0]))
