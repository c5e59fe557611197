"""Consistency training and trajectories on the timesteps of a diffusion, for data whose ODE is known."""

import math
from collections.abc import Callable

import pytest
import torch

from diffusers_ext.schedulers import CTMScheduler
from diffusers_ext.training.distillation import consistency, ctm, lcm, slct
from diffusers_ext.training.distillation.parameterization import NoiseSchedule


MEAN, DEVIATION = 0.4, 0.6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOP = 1000


def schedule(kind: str = "v_prediction") -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(CTMScheduler(**BETAS, prediction_type=kind))


def levels(timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    signal, spread = schedule().levels(timesteps)
    return signal.to(like)[:, None], spread.to(like)[:, None]


def landed(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The exact ODE from timestep t to s: for Gaussian data it keeps the standardised sample."""
    (a, b), (c, d) = levels(t, x), levels(s, x)
    return c * MEAN + (x - a * MEAN) * ((c**2 * DEVIATION**2 + d**2) / (a**2 * DEVIATION**2 + b**2)).sqrt()


def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a, b = levels(t, x)
    return MEAN + a * DEVIATION**2 * (x - a * MEAN) / (a**2 * DEVIATION**2 + b**2)


def v_of(clean: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a, b = levels(t, x)
    return a * (x - a * clean) / b - b * clean


def teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return v_of(denoised(x, t), x, t)


def jumper(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The perfect network of CTM: g = (X_s - (s / t) X_t) / (1 - s / t), and the denoiser where s is t."""
    (a, b), (c, d) = levels(t, x), levels(s, x)
    ratio = (d / c) / (b / a)
    there = torch.where(ratio < 1, ratio, torch.zeros_like(ratio))
    clean = (landed(x, t, s) / c - there * x / a) / (1 - there)
    return v_of(torch.where(ratio < 1, clean, denoised(x, t)), x, t)


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    clean, noise = torch.randn(2, count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + DEVIATION * clean, noise


# -- trajectories ------------------------------------------------------------------------------------------------------


def test_a_jump_of_a_prediction_is_that_of_the_paper_in_noise_over_signal() -> None:
    x, g = drawn(3)
    t, s = torch.tensor([999, 500, 100]), torch.tensor([0, 499, 20])
    reached = ctm.latent_jump(schedule(), v_of(g, x, t), x, t, s)
    (a, b), (c, d) = levels(t, x), levels(s, x)
    plain = ctm.jump(x / a, g, (b / a).flatten(), (d / c).flatten())
    torch.testing.assert_close(reached.double(), c * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_jump_to_where_one_is_stays_there(kind: str) -> None:
    x, output = (part.float() for part in drawn(4))
    at = torch.tensor([0, 19, 500, 999])
    torch.testing.assert_close(ctm.latent_jump(schedule(kind), output, x, at, at), x, rtol=1e-5, atol=1e-5)


def trajectory_loss(student: Callable[..., torch.Tensor], steps: int, weight: float = 0.0) -> float:
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(steps).repeat(4)
    ends = torch.minimum((torch.rand(len(rows), generator=generator) * (rows + 1)).long(), rows)
    clean, noise = drawn(len(rows))
    loss = ctm.latent_ctm_loss(
        schedule(), student, student, lambda x, t: (teacher(x, t),) * 2, clean, noise, rows, ends,
        torch.zeros(len(rows)), steps, denoising_weight=weight,
    )  # fmt: skip
    return float(loss)


def test_the_exact_jumper_has_a_loss_that_vanishes_with_the_steps_of_the_solver() -> None:
    losses = [trajectory_loss(jumper, steps) for steps in (10, 50, 250)]
    assert losses[0] > 4 * losses[1] > 16 * losses[2] and losses[2] < 2e-4
    assert losses[1] < 0.2 * trajectory_loss(lambda x, t, s: teacher(x, t), 50)


def test_the_exact_jumper_is_the_denoiser_where_it_stays() -> None:
    assert trajectory_loss(jumper, 50, 1.0) == pytest.approx(trajectory_loss(jumper, 50), abs=1e-9)


def test_an_untrained_student_has_no_loss_of_the_denoiser_and_another_one_has() -> None:
    plain = trajectory_loss(lambda x, t, s: teacher(x, t), 20)
    assert trajectory_loss(lambda x, t, s: teacher(x, t), 20, 1.0) == pytest.approx(plain, abs=1e-9)
    shifted = [trajectory_loss(lambda x, t, s: teacher(x, t) + 0.3 * (s == t)[:, None], 20, w) for w in (0.0, 1.0)]
    assert shifted[1] - shifted[0] == pytest.approx(0.09, rel=1e-5)


def test_the_students_jump_learns_and_the_target_does_not() -> None:
    own, other = (torch.ones((), requires_grad=True) for _ in range(2))
    clean, noise = drawn(4)
    loss = ctm.latent_ctm_loss(
        schedule(), lambda x, t, s: own * teacher(x, t), lambda x, t, s: other.detach() * teacher(x, t),
        lambda x, t: (teacher(x, t),) * 2, clean, noise, torch.tensor([3, 9, 20, 49]), torch.tensor([3, 0, 7, 20]),
        torch.zeros(4),
    )  # fmt: skip
    loss.backward()
    assert own.grad is not None and own.grad != 0 and other.grad is None


def test_the_scheduler_samples_what_the_loss_trains() -> None:
    scheduler = CTMScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(5)
    grid = lcm.solver_timesteps().tolist()
    assert set(scheduler.timesteps.tolist()) <= set(grid)
    assert set(scheduler.target_timesteps.tolist()) <= {0, *grid}
    start = x = drawn(6)[1]
    for t, s in zip(scheduler.timesteps, scheduler.target_timesteps):
        x = scheduler.step(jumper(x, t.expand(6), s.long().expand(6)), t, x).prev_sample
    end = landed(start, torch.full((6,), 999), torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(x, end, rtol=1e-5, atol=1e-5)


# -- training without a solver -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 11, 41, 641])
def test_levels_are_timesteps_next_to_those_of_edm_and_the_ends_of_the_schedule(count: int) -> None:
    timesteps, sigmas = slct.level_timesteps(schedule(), count)
    assert timesteps[0] == 0 and timesteps[-1] == 999 and bool((timesteps.diff() > 0).all())
    assert len(timesteps) == count if count < 50 else 500 < len(timesteps) < count
    signal, spread = schedule().levels(torch.arange(TOP))
    table = spread / signal
    torch.testing.assert_close(sigmas, table[timesteps])
    # no wanted level is further away than half a timestep
    wanted = consistency.karras_levels(count, float(table[0]), float(table[-1])).log()
    gap = (wanted[:, None] - sigmas.log()[None]).abs().amin(1)
    assert bool((gap <= table.log().diff().max() / 2 + 1e-9).all())


def test_pairs_are_neighbours_with_the_probability_of_a_lognormal() -> None:
    timesteps, sigmas = slct.level_timesteps(schedule(), 11)
    pairs = slct.draw_pairs(schedule(), 20000, 0, 100, torch.Generator().manual_seed(0))
    rows = torch.searchsorted(timesteps, pairs.timesteps)
    assert pairs.levels == 11 and torch.equal(timesteps[rows - 1], pairs.earlier)
    torch.testing.assert_close(pairs.weights, 1 / (sigmas[rows] - sigmas[rows - 1]))
    share = torch.bincount(rows, minlength=11)[1:] / 20000
    torch.testing.assert_close(share.double(), consistency.lognormal_probabilities(sigmas), rtol=0, atol=2e-4)


def test_levels_double_over_the_run() -> None:
    found = [
        slct.draw_pairs(schedule(), 1, step, 4, torch.Generator().manual_seed(0), 4, 32).levels for step in range(5)
    ]
    assert found == [5, 9, 17, 33, 33]


@pytest.mark.parametrize("kind", slct.CONSISTENCY_DISTANCES)
def test_without_noise_in_the_data_the_exact_network_has_no_loss(kind: str) -> None:
    # for a single picture two levels of the same noise lie on one line of the ODE, so that its end is a perfect student
    clean, noise = torch.full((64, 1), 0.7, dtype=torch.float64), drawn(64)[1]
    pairs = slct.draw_pairs(schedule(), 64, 0, 1, torch.Generator().manual_seed(0), 40, 40)

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b = levels(t, x)
        first, least = levels(torch.zeros_like(t), x)
        end = first * 0.7 + least * (x - a * 0.7) / b
        skip, out = (part.to(x)[:, None] for part in lcm.boundary_scalings(t))
        return v_of(torch.where(out > 0, (end - skip * x) / out.clamp(min=1e-12), end), x, t)

    loss = slct.slct_loss(schedule(), perfect, perfect, clean, noise, pairs, kind)
    wrong = slct.slct_loss(schedule(), teacher, teacher, clean, noise, pairs, kind)
    assert float(loss) < 1e-4 * float(wrong)


def test_the_weighted_distance_is_that_of_the_paper() -> None:
    clean, noise = drawn(4)
    pairs = slct.draw_pairs(schedule(), 4, 0, 1, torch.Generator().manual_seed(0), 20, 20)
    later, before = (schedule().noisy(clean, noise, at) for at in (pairs.timesteps, pairs.earlier))
    ends = [
        lcm.consistency_output(schedule(), teacher(x, at), x, at)
        for x, at in ((later, pairs.timesteps), (before, pairs.earlier))
    ]
    c = math.exp(-1.18 * math.log(20) - 0.72)
    wanted = (torch.log1p((ends[0] - ends[1]).square().sum(1) / (2 * c * c)) * pairs.weights).mean()
    found = slct.slct_loss(schedule(), teacher, teacher, clean, noise, pairs)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_no_gradient_flows_through_the_target_of_consistency_training() -> None:
    own, other = (torch.ones((), requires_grad=True) for _ in range(2))
    pairs = slct.draw_pairs(schedule(), 4, 0, 1, torch.Generator().manual_seed(0))
    slct.slct_loss(schedule(), lambda x, t: own * x, lambda x, t: other * x, *drawn(4), pairs).backward()
    assert own.grad is not None and other.grad is None


def test_a_schedule_that_ends_in_pure_noise_has_finite_levels() -> None:
    scheduler = CTMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    sigmas = slct.level_timesteps(NoiseSchedule.from_scheduler(scheduler), 11)[1]
    assert bool(torch.isfinite(sigmas).all())


def test_wrong_calls_are_answered_in_one_sentence() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="schedule is one of a flow"):
        slct.level_timesteps(NoiseSchedule("flow", None), 5)
    pairs = slct.draw_pairs(schedule(), 2, 0, 1, torch.Generator())
    with pytest.raises(ValueError, match="kind='l2' is unknown; use one of cauchy, pseudo_huber"):
        slct.slct_loss(schedule(), teacher, teacher, x, x, pairs, "l2")
    with pytest.raises(ValueError, match="ends must lie from 0 to rows"):
        ctm.latent_ctm_loss(
            schedule(), jumper, jumper, teacher, x, x, torch.tensor([1, 2]), torch.tensor([2, 2]), torch.zeros(2)
        )
