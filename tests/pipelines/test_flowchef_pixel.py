"""The FlowChef pipeline for flows of pixels: under the checks of every pipeline, as the stock one without steering, and its modes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image

from diffusers_ext import FlowChefPixelPipeline, FlowChefScheduler, InpaintMask, SuperResolution
from diffusers_ext.steering import LatentMaskObjective, MeasurementObjective, steer
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_flows import flow_scheduler, tiny_flow_components, tiny_unet_of_pixels


SIDE = 16


def components(**unet: Any) -> dict[str, Any]:
    return {"unet": tiny_unet_of_pixels(**unet), "scheduler": FlowMatchEulerDiscreteScheduler()}


def pipeline(cls: Any = FlowChefPixelPipeline, **replaced: Any) -> Any:
    pipe = cls(**{**components(), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def call(pipe: Any, **arguments: Any) -> Any:
    common = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    return pipe(**{**common, **arguments}).images


def right_half() -> torch.Tensor:
    """White where it is to be painted."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    return mask


class TestFlowChefPixelPipeline(PipelineConformance):
    pipeline_class = FlowChefPixelPipeline
    output_shape = (3, SIDE, SIDE)
    required_params = frozenset(
        {"image", "mask_image", "operator", "measurement", "objective", "noise_std", "steering_kwargs"}
    )
    optional_params = frozenset(
        {"batch_size", "num_inference_steps", "generator", "latents", "output_type", "return_dict"}
    )
    batch_params = ("image",)
    not_applicable = {
        "test_several_images_per_prompt": "there are no prompts; batch_size does it",
        "test_guidance_scale_takes_effect": "there is no guidance",
        "test_a_callback_can_change_the_guidance_scale": "there is no guidance",
        "test_prompts_can_be_encoded_without_the_other_components": "there are no prompts",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {
            "image": drawn(1, 3, SIDE, SIDE), "mask_image": right_half(), "num_inference_steps": 3, "output_type": "pt",
        }  # fmt: skip

    def test_output_types_show_the_same_picture(self) -> None:
        pipe = self.pipeline()
        tensor, array, pictures, pixels = (
            self.call(pipe, output_type=output_type) for output_type in ("pt", "np", "pil", "latent")
        )
        np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
        np.testing.assert_allclose(np.asarray(pictures[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)
        torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), tensor)  # its latents are the pixels


def test_without_steering_it_is_the_stock_pipeline_bit_for_bit():
    stock = pipeline(DDPMPipeline)
    # as arrays: early releases of diffusers have no tensors here
    expected = stock(2, torch.Generator().manual_seed(1), 4, output_type="np").images
    assert np.array_equal(call(pipeline(), batch_size=2, output_type="np"), expected)


@pytest.mark.parametrize("mode", ["inpaint", "restore", "guide"])
def test_a_mode_is_the_stock_pipeline_with_that_objective(mode: str):
    pixels, keep = drawn(1, 3, SIDE, SIDE), 1 - right_half()
    small = SuperResolution(4).A(pixels)
    arguments, objective = {
        "inpaint": ({"image": pixels, "mask_image": right_half()}, LatentMaskObjective(keep, pixels, 0.0)),
        "restore": (
            {"measurement": small, "operator": SuperResolution(4)},
            MeasurementObjective(SuperResolution(4), small, 0.05),
        ),
        "guide": ({"objective": LatentMaskObjective(keep, pixels, 0.1)}, LatentMaskObjective(keep, pixels, 0.1)),
    }[mode]
    stock = pipeline(DDPMPipeline)
    with steer(stock, objective, torch.Generator().manual_seed(7)):
        expected = stock(1, torch.Generator().manual_seed(1), 4, output_type="np").images
    found = call(pipeline(), output_type="np", **arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert not np.array_equal(found, call(pipeline(), output_type="np"))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), flow_scheduler()])
def test_what_is_kept_is_the_picture_and_the_rest_is_painted(scheduler: Any):
    pixels = drawn(2, 3, SIDE, SIDE)
    found = call(pipeline(scheduler=scheduler), image=pixels, mask_image=right_half(), num_inference_steps=8)
    kept, painted = (found - pixels)[..., : SIDE // 2], (found - pixels)[..., SIDE // 2 :]
    assert float(kept.abs().max()) < 1e-5 < 0.1 < float(painted.abs().mean())


def test_a_restoration_agrees_with_its_measurement():
    operator, pixels = SuperResolution(4), drawn(1, 3, SIDE, SIDE)
    measured = operator.A(pixels)
    free = call(pipeline(), num_inference_steps=8)
    found = call(pipeline(), measurement=measured, operator=operator, noise_std=0.01, num_inference_steps=8)
    assert float((operator.A(found) - measured).abs().mean()) < 0.02 * float(
        (operator.A(free) - measured).abs().mean()
    )


@pytest.mark.parametrize("steering", [{}, {"image": drawn(1, 3, SIDE, SIDE), "mask_image": right_half()}])
def test_a_network_of_the_other_sign_gives_the_same_pictures(steering: dict[str, Any]):
    turned = tiny_unet_of_pixels()
    with torch.no_grad():
        turned.conv_out.weight.neg_()
        turned.conv_out.bias.neg_()
    pipe = pipeline(unet=turned, scheduler=DDIMScheduler(), velocity="data_minus_noise")
    assert type(pipe.scheduler) is FlowChefScheduler, "a rectified flow's repository holds the scheduler it came from"
    assert torch.equal(call(pipe, **steering), call(pipeline(scheduler=FlowChefScheduler()), **steering))


def test_grey_pictures_of_a_network_of_one_channel():
    pipe = pipeline(unet=tiny_unet_of_pixels(1))
    grey = Image.new("L", (SIDE, SIDE), 200)
    mask = Image.fromarray((right_half()[0, 0].numpy() * 255).astype("uint8"))
    found = call(pipe, image=grey, mask_image=mask, output_type="pil")[0]
    assert found.mode == "L" and found.size == (SIDE, SIDE)
    assert found.getpixel((0, 0)) == 200


def test_classes_reach_the_network():
    pipe = pipeline(unet=tiny_unet_of_pixels(classes=3))
    both = call(pipe, batch_size=2, class_labels=[0, 2], generator=[torch.Generator().manual_seed(i) for i in (1, 1)])
    alone = call(pipe, class_labels=2)
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_pictures_are_scaled_to_the_size_of_the_network():
    large = Image.new("RGB", (3 * SIDE, 2 * SIDE), (255, 0, 0))
    mask = Image.new("L", (50, 50), 0)
    mask.paste(255, (25, 0, 50, 50))
    found = call(pipeline(), image=large, mask_image=mask, output_type="pil")[0]
    assert found.size == (SIDE, SIDE) and found.getpixel((2, 8)) == (255, 0, 0)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001 is more than the model was trained on; give at most 1000"),
    ({"image": drawn(1, 3, SIDE, SIDE)}, "mask_image=None is missing; give one beside image"),
    ({"image": drawn(2, 3, SIDE, SIDE), "mask_image": right_half(), "batch_size": 3}, "image has 2 entries for batch_size=3"),
    ({"image": drawn(1, 3, SIDE, SIDE), "mask_image": torch.ones(1, 1, SIDE, SIDE)}, "mask_image leaves nothing"),
    ({"image": drawn(1, 3, SIDE, SIDE), "mask_image": right_half().repeat(2, 1, 1, 1)}, "mask_image has 2 entries for 1"),
    ({"measurement": drawn(1, 3, 8, 8), "operator": SuperResolution(4)}, r"belongs to pictures of shape \(3, 32, 32\)"),
    ({"measurement": torch.tensor(1.0), "operator": SuperResolution(4)}, r"measurement has shape \(\)"),
    ({"class_labels": 1}, "class_labels=1 for a network of no classes; leave it out"),
    ({"noise_std": 0.1}, "noise_std=0.1 has no effect here"),
    ({"latents": torch.zeros(1, 3, 8, 8)}, "latents"),
    ({"objective": LatentMaskObjective(right_half(), drawn(1, 3, SIDE, SIDE)), "steering_kwargs": {"learning_rate": -1.0}}, "steering_kwargs=.*learning_rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=[next(iter(wrong)) + str(i) for i, (wrong, _) in enumerate(WRONG)]
)
def test_wrong_arguments_are_named_and_the_pipeline_stays_usable(arguments: dict[str, Any], message: str):
    pipe = pipeline()
    before = pipe.scheduler
    with pytest.raises((ValueError, TypeError), match=message):
        call(pipe, **arguments)
    assert pipe.scheduler is before
    assert bool(call(pipe).isfinite().all())


@pytest.mark.parametrize("labels", [3, -1, [0, 1], 0.5, "a", None])
def test_wrong_classes_are_named(labels: Any):
    with pytest.raises((ValueError, TypeError), match="class_labels="):
        call(pipeline(unet=tiny_unet_of_pixels(classes=3)), class_labels=labels)


def test_wrong_parts_are_named():
    with pytest.raises(ValueError, match="is not one of a flow model"):
        call(pipeline(scheduler=DDIMScheduler()))
    with pytest.raises(ValueError, match="velocity='up' "):
        pipeline(velocity="up")
    unequal = UNet2DModel(
        SIDE, 3, 6, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 input and 6 output channels"):
        pipeline(unet=unequal)
    with pytest.raises(ValueError, match="the UNet reads text .*use FlowChefPipeline"):
        pipeline(unet=tiny_flow_components()["unet"])
    many = pipeline(unet=tiny_unet_of_pixels(4))
    with pytest.raises(ValueError, match="image is a picture, and the network has 4 channels"):
        call(many, image=drawn(1, 3, SIDE, SIDE), mask_image=right_half())
    measured = InpaintMask(1 - right_half()[0, 0]).A(drawn(1, 4, SIDE, SIDE))
    found = call(many, measurement=measured, operator=InpaintMask(1 - right_half()[0, 0]))
    assert found.shape == (1, 4, SIDE, SIDE)
