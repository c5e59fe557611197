"""Pipelines of diffusers whose scheduler is exchanged: unsteered they are what they were, steered they keep what they should."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext.schedulers import FlowChefHeunScheduler, FlowChefScheduler
from diffusers_ext.steering import (
    FunctionObjective,
    LatentMaskObjective,
    MeasurementObjective,
    PackedObjective,
    SuperResolution,
    steer,
    steerable,
)
from diffusers_ext.steering.swap import STEERABLE
from tests.helpers.tiny_models import tiny_stable_diffusion

from .tiny_pipelines import PIPELINES, Subject, tiny_flux, tiny_qwen_image, tiny_wan


every_pipeline = pytest.mark.parametrize("name", PIPELINES)
# The reference is drawn as clean latents are distributed: about unit variance.


def latents_of(subject: Subject, pipeline: Any) -> torch.Tensor:
    return pipeline(**subject.arguments(pipeline))[0]


def noise(shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep_left(subject: Subject) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An objective that keeps the left half, the mask of what is kept in the layout of the latents, and what is kept."""
    if subject.packed is None:
        mask, reference = torch.zeros(subject.shape), noise(subject.shape)
        mask[..., : subject.shape[-1] // 2] = 1
        return LatentMaskObjective(mask, reference), mask, reference
    height, width = subject.packed
    mask, reference = torch.zeros(1, 4, height, width), noise((1, 4, height, width))
    mask[..., : width // 2] = 1
    objective = PackedObjective(LatentMaskObjective(mask, reference), height, width)
    return objective, objective.pack(mask), objective.pack(reference)


def kept_error(latents: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mask * (latents - reference)).square().sum() / mask.sum())


@every_pipeline
def test_a_pipeline_that_is_not_steered_is_what_it_was(name: str) -> None:
    subject = PIPELINES[name]
    pipeline = subject.build()
    before, scheduler = latents_of(subject, pipeline), pipeline.scheduler
    with steer(pipeline, None) as ours:
        assert pipeline.scheduler is ours and type(ours) is STEERABLE[type(scheduler)]
        assert torch.equal(latents_of(subject, pipeline), before)
    assert pipeline.scheduler is scheduler
    assert torch.equal(latents_of(subject, pipeline), before)


@every_pipeline
@pytest.mark.parametrize("settings", [{}, {"data_step": "project"}, {"data_step": "repaint"}, {"data_step": "grad"},
                                      {"data_step": "grad", "optimization_steps": 5, "learning_rate": 0.8}], ids=str)  # fmt: skip
def test_the_error_of_the_kept_part_falls_a_thousandfold(name: str, settings: dict[str, Any]) -> None:
    subject = PIPELINES[name]
    pipeline = subject.build()
    objective, mask, reference = keep_left(subject)
    free = latents_of(subject, pipeline)
    torch.manual_seed(0)
    with steer(pipeline, objective, generator=torch.Generator().manual_seed(3), **settings):
        steered = latents_of(subject, pipeline)
    assert kept_error(steered, mask, reference) * 1000 <= kept_error(free, mask, reference)
    # what is free is painted, and not with the reference
    assert kept_error(steered, 1 - mask, reference) > 0.1
    assert torch.isfinite(steered).all() and steered.shape == subject.shape


@every_pipeline
def test_the_scheduler_comes_back_after_an_error(name: str) -> None:
    subject = PIPELINES[name]
    pipeline = subject.build()
    before, scheduler, index = latents_of(subject, pipeline), pipeline.scheduler, dict(pipeline.config)

    def broken(latents: torch.Tensor) -> torch.Tensor:
        raise KeyError("a fault of the caller's")

    with pytest.raises(KeyError, match="a fault of the caller's"):  # noqa: SIM117
        with steer(pipeline, FunctionObjective(broken)):
            latents_of(subject, pipeline)
    assert pipeline.scheduler is scheduler and dict(pipeline.config) == index
    assert torch.equal(latents_of(subject, pipeline), before)


@every_pipeline
def test_a_function_of_the_estimate_steers_as_well(name: str) -> None:
    subject = PIPELINES[name]
    pipeline = subject.build()
    objective = FunctionObjective(lambda latents: (latents.flatten(1).mean(1) - 1.0).square())
    free = latents_of(subject, pipeline)
    with steer(pipeline, objective):
        steered = latents_of(subject, pipeline)
    assert abs(float(steered.mean()) - 1.0) < 0.2 < abs(float(free.mean()) - 1.0)


def test_a_measurement_of_packed_latents_is_met() -> None:
    pipeline, subject, small = tiny_flux(), PIPELINES["Flux"], noise((1, 4, 4, 4))
    objective = PackedObjective(MeasurementObjective(SuperResolution(2), small, noise_std=0.01), 8, 8)
    with steer(pipeline, objective, generator=torch.Generator().manual_seed(3)):
        latents = objective.unpack(latents_of(subject, pipeline))
    assert float((SuperResolution(2).A(latents) - small).square().mean().sqrt()) < 0.05


def test_several_pictures_of_a_prompt_are_steered_by_one_reference() -> None:
    pipeline, subject = tiny_qwen_image(), PIPELINES["Qwen-Image"]
    objective, mask, reference = keep_left(subject)
    with steer(pipeline, objective):
        latents = pipeline(**subject.arguments(pipeline), num_images_per_prompt=2)[0]
    assert len(latents) == 2 and not torch.equal(latents[0], latents[1])
    for one in latents:
        assert kept_error(one[None], mask, reference) < 1e-3


def test_wan_is_steered_frame_by_frame() -> None:
    pipeline, subject = tiny_wan(), PIPELINES["Wan"]
    small = noise((1, 4, 2, 4, 6))
    with steer(pipeline, MeasurementObjective(SuperResolution(2), small, noise_std=0.01)):
        latents = latents_of(subject, pipeline)
    assert float((SuperResolution(2).A(latents) - small).square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("stock", [
    FlowMatchEulerDiscreteScheduler(shift=2.0), FlowMatchHeunDiscreteScheduler(shift=2.0), FlowMatchLCMScheduler(shift=2.0),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
], ids=lambda scheduler: type(scheduler).__name__)  # fmt: skip
def test_every_scheduler_of_flow_models_has_one_that_steers(stock: Any) -> None:
    ours = steerable(stock, learning_rate=0.5)
    assert isinstance(ours, type(stock)) and ours.config.learning_rate == 0.5
    assert ours.config.get("shift", ours.config.get("flow_shift")) == 2.0
    again = steerable(ours, steer_stop=0.5)
    assert type(again) is type(ours) and again.config.steer_stop == 0.5 and again.config.learning_rate == 0.5


def test_a_shift_that_was_set_afterwards_is_kept() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=2.0)
    stock.set_shift(5.0)
    ours = steerable(stock)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    assert torch.equal(stock.sigmas, ours.sigmas)


def test_blocks_may_be_nested() -> None:
    pipeline, subject = tiny_wan(), PIPELINES["Wan"]
    outer, mask, reference = keep_left(subject)
    scheduler = pipeline.scheduler
    with steer(pipeline, outer) as first:
        with steer(pipeline, None, steer_stop=0.5):
            pass
        assert pipeline.scheduler is first
        assert kept_error(latents_of(subject, pipeline), mask, reference) < 1e-3
    assert pipeline.scheduler is scheduler


def test_heun_in_a_pipeline_keeps_what_it_should() -> None:
    subject = PIPELINES["SD3"]
    pipeline = subject.build()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    objective, mask, reference = keep_left(subject)
    with steer(pipeline, objective) as scheduler:
        assert type(scheduler) is FlowChefHeunScheduler
        assert kept_error(latents_of(subject, pipeline), mask, reference) < 1e-3


@pytest.mark.parametrize(("arguments", "message"), [
    ({"pipe": object()}, "pipe=object has no scheduler; give a pipeline"),
    ({"objective": 5}, "objective=int has no method grad"),
    ({"settings": {"learning_rat": 1.0}}, "learning_rat=1.0 is no setting of FlowChefScheduler"),
    ({"generator": "seed"}, "generator='seed' is not a torch.Generator"),
])  # fmt: skip
def test_what_cannot_be_steered_is_refused(arguments: dict[str, Any], message: str) -> None:
    pipeline = arguments.get("pipe", tiny_wan())
    before = getattr(pipeline, "scheduler", None)
    objective = arguments.get("objective", keep_left(PIPELINES["Wan"])[0])
    with pytest.raises(TypeError, match=message):  # noqa: SIM117
        with steer(pipeline, objective, arguments.get("generator"), **arguments.get("settings", {})):
            pass
    assert getattr(pipeline, "scheduler", None) is before


def test_a_pipeline_of_noise_prediction_is_refused() -> None:
    pipeline = tiny_stable_diffusion()
    with pytest.raises(
        TypeError, match="scheduler=DDIMScheduler is not one of a flow model; use a pipeline with one of"
    ):
        steerable(pipeline.scheduler)
    with pytest.raises(ValueError, match="prediction_type='epsilon'.*only flow models are steered"):
        steerable(DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="steer_start=0.5, steer_stop=0.2"):
        steerable(FlowMatchEulerDiscreteScheduler(), steer_start=0.5, steer_stop=0.2)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert not isinstance(FlowMatchEulerDiscreteScheduler(), FlowChefScheduler)


def test_a_mask_of_another_size_is_named_and_the_pipeline_stays_usable() -> None:
    pipeline, subject = tiny_wan(), PIPELINES["Wan"]
    before = latents_of(subject, pipeline)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 5\) does not fit pictures of shape"):
        LatentMaskObjective(torch.ones(5, 5), noise(subject.shape))
    objective = LatentMaskObjective(torch.ones(4, 4), noise((1, 4, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"mask of shape \(4, 4\) does not fit pictures of shape \(1, 4, 2, 8, 12\)"):  # noqa: SIM117
        with steer(pipeline, objective):
            latents_of(subject, pipeline)
    assert torch.equal(latents_of(subject, pipeline), before)
