"""FLAIR on flows whose posteriors are known and in pipelines, and what it refuses."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_ext.schedulers import FLAIRScheduler, FlowChefScheduler
from diffusers_ext.steering import (
    Compose,
    DecodedObjective,
    FunctionObjective,
    GaussianBlur,
    InpaintMask,
    LatentMaskObjective,
    LinearOperator,
    MeasurementObjective,
    MotionBlur,
    PackedObjective,
    SuperResolution,
    steer,
    steerable,
    velocity_errors,
)
from tests.analytic.steering import (
    NOISE_STD,
    OFFICIAL,
    SHAPE,
    box_mask,
    picture_flow,
    quality,
    run,
    start_noise,
    steered,
    tasks,
)
from tests.helpers.tiny_flows import shifted_vae
from tests.steering.tiny_pipelines import PIPELINES


# -- quality -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("name", ["inpainting", "super-resolution", "deblurring"])
def test_the_default_is_ahead_of_flowchef_as_its_authors_have_it(name: str, steps: int) -> None:
    ours = quality(name, FLAIRScheduler, steps)
    theirs = quality(name, FlowChefScheduler, 30, tuple(OFFICIAL.items()))
    assert ours.psnr >= theirs.psnr and ours.mean_error <= 0.04
    assert 0.5 <= ours.residual <= 1.2


def test_the_data_is_not_fitted_below_its_noise_as_by_projection() -> None:
    assert quality("inpainting", FLAIRScheduler, 30, (("data_step", "project"),)).residual < 0.01


OPERATORS: dict[str, LinearOperator] = {
    "few pixels": InpaintMask((torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.8).double()),
    "wide blur": GaussianBlur(7, 2.0),
    "motion": MotionBlur(5, 20.0),
    "camera": Compose(GaussianBlur(5, 1.0), SuperResolution(2, "bicubic")),
    "amplifier": InpaintMask(0.2 + 0.8 * box_mask()),
}


@pytest.mark.parametrize("settings", [{}, {"data_step": "prox"}, {"prior_scale": 3.0}, {"final_level": 0.02}], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_diverges(name: str, settings: dict[str, Any]) -> None:
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(0)
    truth = picture_flow().sample(8, generator)
    clean = operator.A(truth)
    measurement = clean + NOISE_STD * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    if isinstance(operator, InpaintMask):
        measurement = measurement * (operator.mask > 0)
    start = torch.randn(8, *SHAPE, generator=generator)
    samples = steered(FLAIRScheduler(**settings), operator, measurement.float(), start, 20).double()
    free = run(FlowMatchEulerDiscreteScheduler(), 20, start).double()
    assert float((samples - truth).square().mean()) < 0.9 * float((free - truth).square().mean())


def test_pictures_of_a_batch_are_solved_alone() -> None:
    task, start = tasks()["super-resolution"], start_noise()[:3]

    def of(count: int) -> torch.Tensor:
        scheduler = FLAIRScheduler()
        scheduler.set_objective(
            MeasurementObjective(task.operator, task.repeated[:count], NOISE_STD),
            [torch.Generator().manual_seed(seed) for seed in range(count)],
        )
        return run(scheduler, 10, start[:count])

    torch.testing.assert_close(of(3)[:1], of(1), rtol=1e-4, atol=1e-5)


# -- as a scheduler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"stochastic_sampling": True}], ids=str
)
def test_without_an_objective_it_is_its_parent_bit_for_bit(config: dict[str, Any]) -> None:
    states = []
    for cls in (FlowMatchEulerDiscreteScheduler, FLAIRScheduler):
        torch.manual_seed(0)
        states.append(run(cls(**config), 7, start_noise()[:2]))
    assert torch.equal(*states)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_kept_part_of_every_pipelines_latents_is_the_reference(name: str) -> None:
    subject = PIPELINES[name]
    pipeline = subject.build()
    generator = torch.Generator().manual_seed(5)
    shape = subject.shape if subject.packed is None else (1, 4, *subject.packed)
    reference, mask = torch.randn(shape, generator=generator), torch.zeros(shape)
    mask[..., : shape[-1] // 2] = 1
    objective: Any = LatentMaskObjective(mask, reference)
    if subject.packed is not None:
        objective = PackedObjective(objective, *subject.packed)
        mask, reference = objective.pack(mask), objective.pack(reference)
    before = pipeline.scheduler
    free = pipeline(**subject.arguments(pipeline))[0]
    with steer(
        pipeline, objective, torch.Generator().manual_seed(3), solver="flair", data_learning_rate=2.0
    ) as scheduler:
        assert type(scheduler) is FLAIRScheduler
        made = pipeline(**subject.arguments(pipeline))[0]
    errors = [float((mask * (latents - reference)).square().sum() / mask.sum()) for latents in (made, free)]
    assert errors[0] * 1000 <= errors[1] and torch.isfinite(made).all() and pipeline.scheduler is before
    assert float(((1 - mask) * (made - reference)).square().mean()) > 0.1


def test_levels_of_ones_own_are_brought_into_the_range() -> None:
    scheduler = FLAIRScheduler(final_level=0.2)
    scheduler.set_objective(FunctionObjective(lambda x: x.flatten(1).mean(1)))
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.6, 0.4, 0.0]))
    scheduler.set_timesteps(timesteps=[1000.0, 500.0])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 600.0]))


def test_the_last_step_returns_the_mean_and_the_others_its_noised_form() -> None:
    task, start = tasks()["inpainting"], start_noise()[:2]
    scheduler = FLAIRScheduler()
    scheduler.set_objective(MeasurementObjective(task.operator, task.repeated[:2], NOISE_STD))
    assert scheduler.mean is None
    final = run(scheduler, 5, start)
    assert torch.equal(final, scheduler.mean)
    scheduler.set_timesteps(5)
    assert scheduler.mean is None
    state = scheduler.step(torch.zeros_like(start), scheduler.timesteps[0], start).prev_sample
    noise = (state - (1 - scheduler.sigmas[1]) * scheduler.mean) / scheduler.sigmas[1]
    assert abs(float(noise.std()) - 1) < 0.15


def test_it_begins_where_it_is_told_to() -> None:
    task, start = tasks()["super-resolution"], start_noise()[:2]
    objective, scheduler = (
        MeasurementObjective(task.operator, task.repeated[:2], NOISE_STD),
        FLAIRScheduler(prior_scale=1e-9),
    )
    for begin, expected in ((task.truth[:1].float(), task.truth[:1].float()), (None, objective.start(start))):
        scheduler.set_objective(objective, start=begin)
        scheduler.set_timesteps(5)
        scheduler.step(torch.zeros_like(start), scheduler.timesteps[0], start)
        torch.testing.assert_close(scheduler.mean, expected.expand_as(start), rtol=1e-4, atol=1e-4)


def test_a_decoded_objective_begins_with_the_encoded_measurement() -> None:
    vae, operator = shifted_vae(), SuperResolution(4)
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inner = MeasurementObjective(operator, small, noise_std=0.01)
    objective = DecodedObjective(vae, inner)
    latents = objective.start(torch.zeros(1, 4, 16, 16))
    with torch.no_grad():
        pictures = inner.start(torch.zeros(1, 3, 32, 32)).clamp(-1, 1)
        encoded = (vae.encode(pictures).latent_dist.mode() - 0.1) * 1.5
    torch.testing.assert_close(latents, encoded)
    packed = PackedObjective(objective, 16, 16)
    torch.testing.assert_close(packed.start(torch.zeros(1, 64, 16)), packed.pack(latents))


def test_saving_keeps_the_table_of_errors(tmp_path: Any) -> None:
    FLAIRScheduler(velocity_errors=[0.5, 0.2, 1.0]).save_pretrained(tmp_path)
    assert FLAIRScheduler.from_pretrained(tmp_path).config.velocity_errors == [0.5, 0.2, 1.0]


# -- the errors of a network -------------------------------------------------------------------------------------------


def test_errors_of_a_perfect_network_are_the_posterior_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 1, 2, 2, generator=generator)

    def white(state: torch.Tensor, level: float) -> torch.Tensor:
        return state * (2 * level - 1) / (level**2 + (1 - level) ** 2)

    # Var[eps - x0 | x_t] of unit Gaussians: 2 - (2 t - 1)^2 / (t^2 + (1 - t)^2)
    expected = [2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    found = velocity_errors(white, samples, count=5, generator=generator)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"velocity": 5}, TypeError, "velocity=5"),
        ({"velocity": lambda x, t: x[:1]}, ValueError, "velocity returned shape"),
        ({"velocity": lambda x, t: x * float("nan")}, ValueError, "velocity is not finite"),
        ({"count": 1}, ValueError, "count=1"),
        ({"samples": "x"}, TypeError, "samples is str"),
        ({"generator": 5}, TypeError, "generator=5"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_measurement_are_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    good: dict[str, Any] = {"velocity": lambda x, t: x, "samples": torch.randn(2, 3, 4, 4), "count": 2}
    with pytest.raises(error, match=message):
        velocity_errors(**{**good, **arguments})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_step": "repaint"}, "data_step='repaint'"),
        ({"data_learning_rate": 0.0}, "data_learning_rate=0.0"),
        ({"data_steps": 0}, "data_steps=0"),
        ({"prior_scale": float("nan")}, "prior_scale=nan"),
        ({"final_level": 1.0}, "final_level=1.0"),
        ({"velocity_errors": [1.0]}, "velocity_errors="),
        ({"velocity_errors": [1.0, 0.0]}, "velocity_errors=0.0"),
        ({"invert_sigmas": True}, "invert_sigmas=True"),
    ],
)
def test_settings_out_of_range_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FLAIRScheduler(**config)


def test_wrong_calls_are_refused_and_the_next_run_is_as_before() -> None:
    task, start = tasks()["inpainting"], start_noise()[:2]
    objective, scheduler = MeasurementObjective(task.operator, task.repeated[:2], NOISE_STD), FLAIRScheduler()

    def good() -> torch.Tensor:
        scheduler.set_objective(objective, torch.Generator().manual_seed(0))
        return run(scheduler, 4, start)

    before = good()
    scheduler.set_objective(objective)
    with pytest.raises(ValueError, match="no steps are laid"):
        scheduler.step(start, 1000.0, start)
    for begin, error in ((torch.zeros(2, 3, 4, 4), ValueError), ("x", TypeError)):
        with pytest.raises(error, match="start"):  # noqa: PT012
            scheduler.set_objective(objective, start=begin)  # type: ignore[arg-type]
            scheduler.set_timesteps(4)
            scheduler.step(start, scheduler.timesteps[0], start)
    scheduler.set_objective(objective)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="not finite|NaN"):
        scheduler.step(start * float("nan"), scheduler.timesteps[0], start)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(start, scheduler.timesteps[0], start, per_token_timesteps=start)
    scheduler.step(start, scheduler.timesteps[0], start)
    with pytest.raises(ValueError, match="in a run of"):
        scheduler.step(start[:1], scheduler.timesteps[1], start[:1])
    assert torch.equal(good(), before)
    with pytest.raises(ValueError, match="solver='dps'"):
        steerable(FlowMatchEulerDiscreteScheduler(), solver="dps")
    with pytest.raises(TypeError, match=r"learning_rate=1.0 is no setting of FLAIRScheduler"):
        steerable(FlowMatchEulerDiscreteScheduler(), solver="flair", learning_rate=1.0)
