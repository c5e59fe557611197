"""The FlowChef pipelines: the stock ones without steering, and the modes of a call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from diffusers_ext import (
    FlowChefFluxPipeline,
    FlowChefPipeline,
    FlowChefScheduler,
    FlowChefStableDiffusion3Pipeline,
    SuperResolution,
)
from diffusers_ext.steering import DecodedObjective, FunctionObjective, LatentMaskObjective, MeasurementObjective
from tests.helpers.tiny_flows import flow_scheduler, tiny_flow_components, tiny_flux_components, tiny_sd3_components


@dataclass(frozen=True)
class Subject:
    ours: Any
    stock: Any
    components: Callable[[], dict[str, Any]]
    init: dict[str, Any]
    guidance: str = "guidance_scale"

    def pipeline(self, cls: Any = None, **replaced: Any) -> Any:
        pipe = (cls or self.ours)(**{**self.components(), **self.init, **replaced})
        pipe.set_progress_bar_config(disable=True)
        return pipe


SUBJECTS = {
    "UNet": Subject(FlowChefPipeline, StableDiffusionPipeline, tiny_flow_components, {"requires_safety_checker": False}),
    "SD3": Subject(FlowChefStableDiffusion3Pipeline, StableDiffusion3Pipeline, tiny_sd3_components, {}),
    "Flux": Subject(FlowChefFluxPipeline, FluxPipeline, tiny_flux_components, {}, "true_cfg_scale"),
}  # fmt: skip
every_pipeline = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 32, width: int = 32, count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def left_half(height: int = 32, width: int = 32) -> torch.Tensor:
    """A mask whose right half is painted."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., width // 2 :] = 1
    return mask


def arguments(**further: Any) -> dict[str, Any]:
    common = {
        "prompt": "a red heart", "height": 32, "width": 32, "num_inference_steps": 6, "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
    }  # fmt: skip
    return {**common, **further}


def as_picture_latents(pipe: Any, latents: torch.Tensor, height: int = 32, width: int = 32) -> torch.Tensor:
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor) if latents.ndim == 3 else latents


def encoded(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents as the stock pipelines decode them: decoding undoes this."""
    config = pipe.vae.config
    with torch.no_grad():
        return (pipe.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor


# -- as the stock pipelines --------------------------------------------------------------------------------------------


@every_pipeline
@pytest.mark.parametrize(
    "further", [{}, {"guided": 3.0, "negative_prompt": "a dog"}, {"num_images_per_prompt": 2}], ids=str
)
def test_without_steering_it_is_the_stock_pipeline_bit_for_bit(subject: Subject, further: dict[str, Any]) -> None:
    further = {subject.guidance if name == "guided" else name: value for name, value in further.items()}
    ours, stock = subject.pipeline(), subject.pipeline(subject.stock)
    for output_type in ("latent", "pt"):
        made = ours(**arguments(output_type=output_type, **further)).images
        assert torch.equal(made, stock(**arguments(output_type=output_type, **further)).images)


@every_pipeline
def test_a_learning_rate_of_zero_is_the_stock_pipeline_too(subject: Subject) -> None:
    ours, stock = subject.pipeline(), subject.pipeline(subject.stock)
    made = ours(**arguments(image=picture(), mask_image=left_half(), steering_kwargs={"learning_rate": 0.0})).images
    assert torch.equal(made, stock(**arguments()).images)


@every_pipeline
def test_it_is_made_from_a_stock_pipeline_without_copies(subject: Subject) -> None:
    stock = subject.pipeline(subject.stock)
    ours = subject.ours.from_pipe(stock)
    assert ours.vae is stock.vae and type(ours.scheduler) is type(stock.scheduler)


# -- inpainting and editing --------------------------------------------------------------------------------------------


@every_pipeline
@pytest.mark.parametrize("settings", [None, {"data_step": "grad"}, {"data_step": "repaint"}], ids=str)
def test_what_the_mask_leaves_black_is_kept(subject: Subject, settings: dict[str, Any] | None) -> None:
    pipe = subject.pipeline()
    wanted = encoded(pipe, picture())[..., :8]
    free = as_picture_latents(pipe, pipe(**arguments()).images)
    made = pipe(**arguments(image=picture(), mask_image=left_half(), steering_kwargs=settings)).images
    made = as_picture_latents(pipe, made)
    before, after = (float((latents[..., :8] - wanted).square().mean()) for latents in (free, made))
    assert after * 1000 <= before
    assert float((made[..., 8:] - encoded(pipe, picture())[..., 8:]).square().mean()) > 0.1


@every_pipeline
def test_a_latent_is_kept_only_where_no_pixel_of_it_is_painted(subject: Subject) -> None:
    pipe = subject.pipeline()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5, 5] = 1  # of the latents' pixel (2, 2), where each is the mean of four
    made = as_picture_latents(pipe, pipe(**arguments(image=picture(), mask_image=mask)).images)
    error = (made - encoded(pipe, picture())).abs().amax((0, 1))
    assert float(error[2, 2]) > 1e-2
    error[2, 2] = 0
    assert float(error.max()) < 1e-4


@every_pipeline
def test_pictures_of_a_batch_keep_to_their_own(subject: Subject) -> None:
    pipe = subject.pipeline()
    pixels, masks = picture(count=2), torch.cat([left_half(), 1 - left_half()])
    made = pipe(
        **arguments(prompt=["a", "b"], image=pixels, mask_image=masks, num_images_per_prompt=2)
    ).images  # fmt: skip
    made, wanted = as_picture_latents(pipe, made), encoded(pipe, pixels)
    assert len(made) == 4 and not torch.equal(made[0], made[1])
    for index, half in ((0, slice(8)), (1, slice(8)), (2, slice(8, 16)), (3, slice(8, 16))):
        torch.testing.assert_close(made[index][..., half], wanted[index // 2][..., half], rtol=0, atol=1e-4)


@every_pipeline
def test_size_is_the_pictures_unless_it_is_given(subject: Subject) -> None:
    pipe = subject.pipeline()
    call = arguments(image=picture(24, 40), mask_image=left_half(24, 40), output_type="pt", height=None, width=None)
    assert pipe(**call).images.shape == (1, 3, 24, 40)
    assert pipe(**{**call, "height": 32, "width": 16}).images.shape == (1, 3, 32, 16)


@every_pipeline
def test_pil_pictures_and_masks_are_those_of_tensors(subject: Subject) -> None:
    pipe = subject.pipeline()
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    from_tensor = pipe.image_processor.pil_to_numpy(image)
    made = pipe(**arguments(image=image, mask_image=mask)).images
    tensor = torch.from_numpy(from_tensor).permute(0, 3, 1, 2) * 2 - 1
    assert torch.equal(made, pipe(**arguments(image=tensor, mask_image=left_half())).images)


@every_pipeline
def test_an_edit_is_guided_away_from_the_source_prompt(subject: Subject) -> None:
    pipe = subject.pipeline()
    call = {"image": picture(), "mask_image": left_half(), subject.guidance: 3.0}
    edited = pipe(**arguments(source_prompt="a dog", **call)).images
    assert torch.equal(edited, pipe(**arguments(negative_prompt="a dog", **call)).images)
    assert not torch.equal(edited, pipe(**arguments(negative_prompt="a cat", **call)).images)


@every_pipeline
def test_the_whole_picture_is_held_until_source_stop(subject: Subject) -> None:
    pipe = subject.pipeline()
    pixels = picture()
    settings = {"data_step": "project", "renoise": 0.0}
    call = arguments(image=pixels, mask_image=left_half(), steering_kwargs=settings)
    made = [as_picture_latents(pipe, pipe(**call, source_stop=stop).images) for stop in (0.0, 0.5, 1.0)]
    wanted = encoded(pipe, pixels)
    errors = [float((latents - wanted)[..., 8:].abs().max()) for latents in made]
    assert errors[2] < 1e-4 < errors[1] and 1e-4 < errors[0]
    for latents in made:
        torch.testing.assert_close(latents[..., :8], wanted[..., :8], rtol=0, atol=1e-4)


# -- restoration and guidance ------------------------------------------------------------------------------------------


@every_pipeline
def test_a_measurement_of_the_decoded_picture_is_approached(subject: Subject) -> None:
    pipe, operator = subject.pipeline(), SuperResolution(4)
    target = operator.A(0.3 * picture())
    call = {"measurement": target, "operator": operator, "noise_std": 0.01}
    free = pipe(**arguments(output_type="pt")).images * 2 - 1
    made = pipe(**arguments(**call, output_type="pt", height=None, width=None)).images * 2 - 1
    assert made.shape == (1, 3, 32, 32)
    before, after = (float((operator.A(pixels) - target).square().mean()) for pixels in (free, made))
    assert after < 0.5 * before


@every_pipeline
def test_restoration_is_the_decoded_objective_of_the_pipelines_decoder(subject: Subject) -> None:
    pipe, operator = subject.pipeline(), SuperResolution(4)
    target = operator.A(0.3 * picture())
    made = pipe(**arguments(measurement=target, operator=operator, noise_std=0.02)).images
    objective = DecodedObjective(pipe.vae, MeasurementObjective(operator, target, noise_std=0.02))
    assert torch.equal(made, pipe(**arguments(objective=objective, steering_kwargs={"renoise": 1.0})).images)


@every_pipeline
@pytest.mark.parametrize("solver", ["flowchef", "flair"])
def test_restoration_draws_its_noise_anew_unless_told_otherwise(subject: Subject, solver: str) -> None:
    pipe, operator = subject.pipeline(), SuperResolution(4)
    call = {"measurement": operator.A(0.3 * picture()), "operator": operator}
    settings = {"renoise": 0.0} if solver == "flowchef" else {"solver": "flair"}
    made = pipe(**arguments(**call, steering_kwargs=settings)).images
    objective = DecodedObjective(pipe.vae, MeasurementObjective(operator, call["measurement"]))
    assert torch.equal(made, pipe(**arguments(objective=objective, steering_kwargs=settings)).images)


@every_pipeline
def test_an_objective_sees_latents_of_pictures(subject: Subject) -> None:
    pipe, shapes = subject.pipeline(), set()

    def brightness(latents: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(latents.shape))
        return (latents.flatten(1).mean(1) - 1).square()

    made = pipe(**arguments(objective=FunctionObjective(brightness))).images
    assert shapes == {(1, 4, 16, 16)} and abs(float(made.mean()) - 1) < 0.2


# -- signs and schedulers of UNets -------------------------------------------------------------------------------------


def test_the_other_sign_of_the_velocity_is_the_same_flow() -> None:
    parts = tiny_flow_components()
    plain = FlowChefPipeline(**parts, requires_safety_checker=False)
    turned = FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False, velocity="data_minus_noise")
    for weight in turned.unet.conv_out.parameters():
        weight.data.neg_()
    for pipe in (plain, turned):
        pipe.set_progress_bar_config(disable=True)
    for further in ({}, {"image": picture(), "mask_image": left_half()}):
        torch.testing.assert_close(turned(**arguments(**further)).images, plain(**arguments(**further)).images)
    assert not turned.unet._forward_hooks


def test_the_sign_is_kept_in_the_repository(tmp_path: Any) -> None:
    pipe = FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False, velocity="data_minus_noise")
    pipe.save_pretrained(tmp_path)
    assert FlowChefPipeline.from_pretrained(tmp_path).config.velocity == "data_minus_noise"


def test_a_repository_of_a_rectified_flow_needs_no_other_scheduler() -> None:
    parts = {**tiny_flow_components(), "scheduler": PNDMScheduler()}
    pipe = FlowChefPipeline(**parts, requires_safety_checker=False, velocity="data_minus_noise")
    assert type(pipe.scheduler) is FlowChefScheduler
    # one step of InstaFlow: x0 = eps + v(eps, 1000)
    pipe.set_progress_bar_config(disable=True)
    start = noise(1, 4, 16, 16)
    with torch.no_grad():
        embeds = pipe.encode_prompt("a red heart", "cpu", 1, False)[0]
        velocity = pipe.unet(start, 1000.0, encoder_hidden_states=embeds).sample
    made = pipe(**arguments(num_inference_steps=1, latents=start, guidance_scale=1.0)).images
    torch.testing.assert_close(made, start + velocity)


@pytest.mark.parametrize(
    "scheduler", [FlowChefScheduler(), FlowChefScheduler.from_config(flow_scheduler(flow_shift=2.0).config)]
)
def test_a_flow_in_this_layout_runs_on_eulers_scheduler(scheduler: FlowChefScheduler) -> None:
    pipe = FlowChefPipeline(**{**tiny_flow_components(), "scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(6)
    state = noise(1, 4, 16, 16)
    made = pipe(**arguments(latents=state, guidance_scale=1.0)).images
    embeds = pipe.encode_prompt("a red heart", "cpu", 1, False)[0]
    for level, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        with torch.no_grad():
            state = state + (following - level) * pipe.unet(state, 1000 * level, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(made, state, rtol=1e-4, atol=1e-5)


def test_the_shift_of_a_multistep_scheduler_is_taken_over() -> None:
    assert FlowChefScheduler.from_config(flow_scheduler(flow_shift=2.0).config).config.shift == 2.0
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        FlowChefScheduler.from_config(flow_scheduler(prediction_type="epsilon", use_flow_sigmas=False).config)


# -- wrong calls -------------------------------------------------------------------------------------------------------


@every_pipeline
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"image": picture()}, ValueError, "mask_image=None is missing"),
        ({"mask_image": left_half()}, ValueError, "image=None is missing"),
        ({"measurement": picture()}, ValueError, "operator=None is missing"),
        ({"image": picture(), "mask_image": left_half(), "objective": 5}, ValueError, "image and objective are both given"),
        ({"objective": 5}, TypeError, "objective has int"),
        ({"image": picture(), "mask_image": torch.ones(1, 1, 32, 32)}, ValueError, "mask_image leaves nothing"),
        ({"image": picture(), "mask_image": picture()[:, :2]}, ValueError, "mask_image"),
        ({"image": picture(count=3), "mask_image": left_half()}, ValueError, "image has 3 entries for 1 prompt"),
        ({"image": picture(30, 34), "mask_image": left_half(30, 34), "height": None, "width": None}, ValueError, "34x30"),
        ({"image": picture() * float("nan"), "mask_image": left_half()}, ValueError, "NaN"),
        ({"source_prompt": "a"}, ValueError, "source_prompt='a' has no effect"),
        ({"source_stop": 0.5}, ValueError, "source_stop=0.5 has no effect"),
        ({"noise_std": 0.5}, ValueError, "noise_std=0.5 has no effect"),
        ({"source_stop": 2.0}, ValueError, "source_stop=2.0"),
        ({"steering_kwargs": {"data_step": "grad"}}, ValueError, "steering_kwargs="),
        ({"image": picture(), "mask_image": left_half(), "steering_kwargs": {"data_stop": 1}}, TypeError, "data_stop=1"),
        ({"image": picture(), "mask_image": left_half(), "steering_kwargs": 5}, TypeError, "steering_kwargs=5"),
        ({"image": picture(), "mask_image": left_half(), "steering_kwargs": {"steer_start": 1.0}}, ValueError, "steer_start"),
        ({"measurement": torch.zeros(3, 8, 8), "operator": SuperResolution(4)}, ValueError, r"\(3, 8, 8\)"),
        ({"measurement": torch.zeros(1, 1, 8, 8), "operator": SuperResolution(4)}, ValueError, "1 channels"),
        ({"measurement": torch.zeros(1, 3, 5, 5), "operator": SuperResolution(4)}, ValueError, "height=32 does not fit"),
        ({"measurement": torch.zeros(1, 3, 8, 8), "operator": 5}, TypeError, "operator=int"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0"),
        ({"num_inference_steps": 2000}, ValueError, "num_inference_steps=2000"),
        ({"height": 33}, ValueError, "height=33 is not a multiple"),
        ({"latents": torch.zeros(1, 1, 16, 16)}, ValueError, r"\(1, 1, 16, 16\)"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "list of 3"),
        ({"prompt": None}, ValueError, "prompt is missing"),
        ({"output_type": "jpg"}, ValueError, "output_type='jpg'"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused_and_leave_the_pipeline_as_it_was(
    subject: Subject, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipe = subject.pipeline()
    scheduler = pipe.scheduler
    with pytest.raises(error, match=message):
        pipe(**arguments(**wrong))
    assert pipe.scheduler is scheduler and type(scheduler) in (
        FlowMatchEulerDiscreteScheduler,
        type(flow_scheduler()),
    )


@every_pipeline
def test_guidance_that_does_not_guide_is_refused_beside_a_source_prompt(subject: Subject) -> None:
    call = arguments(image=picture(), mask_image=left_half(), source_prompt="a", **{subject.guidance: 1.0})
    with pytest.raises(ValueError, match=f"{subject.guidance}=1.0 does not guide"):
        subject.pipeline()(**call)
    with pytest.raises(ValueError, match="takes the place of negative_prompt"):
        subject.pipeline()(**{**call, subject.guidance: 2.0, "negative_prompt": "b"})


def test_a_diffusion_model_is_refused() -> None:
    pipe = FlowChefPipeline(**{**tiny_flow_components(), "scheduler": DDIMScheduler()}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="scheduler=DDIMScheduler with prediction_type='epsilon'"):
        pipe(**arguments())
    with pytest.raises(ValueError, match="velocity='up'"):
        FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False, velocity="up")


def test_a_latent_mask_can_be_given_as_an_objective_too() -> None:
    pipe = SUBJECTS["Flux"].pipeline()
    latents, keep = encoded(pipe, picture()), torch.ones(1, 1, 16, 16)
    keep[..., 8:] = 0
    by_hand = pipe(**arguments(objective=LatentMaskObjective(keep, latents))).images
    assert torch.equal(by_hand, pipe(**arguments(image=picture(), mask_image=left_half())).images)
