"""MRRestorationPipeline: the checks of every pipeline, and what restoration needs besides."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.schedulers import MeanRevertingAdapter, MRScheduler, ResfusionScheduler
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.placement import in_own_memory
from tests.helpers.tiny_models import tiny_unet, tiny_vae
from tests.helpers.tiny_restoration import tiny_restoration, tiny_restoration_unet


class TestMRRestorationPipeline(PipelineConformance):
    pipeline_class = MRRestorationPipeline
    output_shape = (3, 18, 21)
    required_params = frozenset(
        {"image", "strength", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "latents"}
    )
    optional_params = frozenset({"num_inference_steps", "generator", "latents", "output_type", "return_dict"})
    batch_params = ("image",)
    not_applicable = {
        "test_several_images_per_prompt": "there are no prompts; a batch of copies restores a picture several times",
        "test_guidance_scale_takes_effect": "there is no guidance",
        "test_a_callback_can_change_the_guidance_scale": "there is no guidance",
        "test_prompts_can_be_encoded_without_the_other_components": "there are no prompts",
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return {"unet": tiny_restoration_unet(), "scheduler": MRScheduler(prediction_type="v_prediction"), "vae": None}

    def get_dummy_inputs(self) -> dict[str, Any]:
        picture = torch.rand(1, 3, 18, 21, generator=torch.Generator().manual_seed(3))
        return {"image": picture, "num_inference_steps": 4, "output_type": "pt"}

    def test_output_types_show_the_same_picture(self) -> None:
        # The suite takes latents of three channels for pictures that were not left alone; here they are the padded sample.
        pipe = self.pipeline()
        tensor, array, pictures, latents = (
            self.call(pipe, output_type=output_type) for output_type in ("pt", "np", "pil", "latent")
        )
        np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
        bytes_ = np.stack([np.asarray(picture) for picture in pictures])
        np.testing.assert_allclose(bytes_ / 255, array, atol=0.5 / 255 + 1e-6)
        assert latents.shape == (1, 3, 18, 22)
        assert torch.equal(latents.clamp(0, 1)[..., :18, :21], tensor)


class TestMRRestorationPipelineInLatents(TestMRRestorationPipeline):
    def get_dummy_components(self) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            vae = tiny_vae()
        scheduler = MRScheduler(algorithm_type="sde-d", sigma_inf=1.0)
        return {"unet": tiny_restoration_unet(4), "scheduler": scheduler, "vae": vae}

    def test_optional_components_may_be_left_out(self, tmp_path: Path) -> None:
        pytest.skip("without its autoencoder the network has the wrong number of channels, and says so")

    def test_output_types_show_the_same_picture(self) -> None:
        assert self.call(self.pipeline(), output_type="latent").shape == (1, 4, 10, 12)

    @pytest.mark.slow  # the class above shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


def picture(width: int = 21, height: int = 18) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_perfect_network_restores_the_clean_picture() -> None:
    clean, degraded = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))

    def perfect(seen: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert timestep.shape == (2,) and torch.equal(seen[:, 3:], degraded)
        return (clean,)

    for scheduler in (
        MRScheduler(prediction_type="sample"), MRScheduler(prediction_type="sample", algorithm_type="posterior"),
        MeanRevertingAdapter("UniPCMultistepScheduler", prediction_type="sample"),
        MeanRevertingAdapter("HeunDiscreteScheduler", prediction_type="sample"),
    ):  # fmt: skip
        pipe = tiny_restoration(scheduler)
        pipe.unet.forward = perfect
        restored = pipe(degraded, num_inference_steps=5, output_type="pt")
        torch.testing.assert_close(restored.images, clean, rtol=0, atol=2e-4)
        assert restored.network_evaluations == len(scheduler.timesteps)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (37, 5)])
def test_any_size_comes_back_in_its_size(size: tuple[int, int]) -> None:
    restored = tiny_restoration()(picture(*size), num_inference_steps=1).images[0]
    assert restored.size == size


def test_every_kind_of_picture_is_taken_and_means_the_same() -> None:
    pipe, image = tiny_restoration(), picture()
    array = np.asarray(image)
    tensor = torch.from_numpy(array / 255.0).float().permute(2, 0, 1)
    results = [
        pipe(given, 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for given in (image, [image], array, array / 255.0, tensor, tensor[None], 2 * tensor - 1)
    ]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-5)


def test_strength_runs_a_part_of_the_process_and_keeps_more_of_the_picture() -> None:
    pipe, image = tiny_restoration(prediction_type="epsilon"), torch.rand(1, 3, 16, 16)
    changes = []
    for strength, evaluations in ((1.0, 10), (0.5, 5), (0.01, 1)):
        result = pipe(image, 10, strength, generator=torch.Generator().manual_seed(0), output_type="latent")
        assert result.network_evaluations == evaluations
        changes.append(float((result.images - image).square().mean()))
    assert changes[0] > changes[1] > changes[2]


@pytest.mark.parametrize("scheduler", [MRScheduler(), MeanRevertingAdapter("UniPCMultistepScheduler")])
def test_the_start_noise_may_be_smaller(scheduler: Any) -> None:
    pipe, image = tiny_restoration(scheduler), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def run(seed: int, **settings: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(image, 4, generator=generator, output_type="latent", **settings).images

    assert torch.equal(run(0), run(0, noise_scale=1.0)) and not torch.equal(run(0), run(1))
    # without noise there is no chance, and the start is the degraded picture
    assert torch.equal(run(0, noise_scale=0.0), run(1, noise_scale=0.0))
    assert torch.equal(run(0, noise_scale=0.0), run(0, latents=image))
    nearer = [(run(0, noise_scale=scale) - run(0, noise_scale=0.0)).square().mean() for scale in (0.1, 0.5, 1.0)]
    assert 0 < nearer[0] < nearer[1] < nearer[2]


def test_an_interrupted_run_skips_the_remaining_evaluations() -> None:
    pipe = tiny_restoration()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        pipe._interrupt = step == 1

    assert pipe(picture(), 6, callback_on_step_end=stop).network_evaluations == 2


def test_resfusion_runs_in_the_same_pipeline() -> None:
    pipe = tiny_restoration(ResfusionScheduler(prediction_type="residual"))
    restored = pipe(picture(), num_inference_steps=5, output_type="pt").images
    assert restored.shape == (1, 3, 18, 21) and bool(torch.isfinite(restored).all())
    with pytest.raises(ValueError, match="num_inference_steps=10 is not possible.*use 5"):
        pipe(picture())


def test_the_saved_adapter_comes_back_with_its_scheduler(tmp_path: Path) -> None:
    adapter = MeanRevertingAdapter("UniPCMultistepScheduler", {"solver_order": 3}, prediction_type="v_prediction")
    pipe = tiny_restoration(adapter)
    pipe.save_pretrained(tmp_path)
    loaded = in_own_memory(MRRestorationPipeline.from_pretrained(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.inner.config.solver_order == 3
    here, there = (
        p(picture(), 4, generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipe, loaded)
    )
    assert torch.equal(here, there)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image is missing"),
        ({"image": []}, "image is an empty list"),
        ({"image": torch.full((1, 3, 8, 8), math.nan)}, "image contains values that are not finite"),
        ({"image": torch.zeros(1, 5, 8, 8)}, r"image has the shape \(1, 5, 8, 8\)"),
        ({"image": "cat.png"}, "image='cat.png' is a path; open it first"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 101}, "num_inference_steps=101 is out of range; use an int from 1 to 100"),
        ({"strength": 0.0}, "strength=0.0 would run no step"),
        ({"strength": 1.5}, "strength=1.5 is out of range"),
        ({"noise_scale": -0.1}, "noise_scale=-0.1 is out of range"),
        ({"noise_scale": True}, "noise_scale=True"),
        ({"output_type": "jpg"}, "output_type='jpg' is not one of pil"),
        (
            {"latents": torch.zeros(1, 3, 4, 4)},
            r"latents has the shape \(1, 3, 4, 4\); this call needs \(1, 3, 18, 22\)",
        ),
        ({"generator": 5}, "generator=5"),
        ({"callback_on_step_end": 5}, "callback_on_step_end=5 cannot be called"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "'x' is not one of latents, mean"),
    ],
)
def test_a_wrong_call_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_restoration()(**{"image": picture(), "num_inference_steps": 2, **arguments})


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="4 input and 4 output channels.*twice as many"):
        MRRestorationPipeline(tiny_unet(), MRScheduler())
    with pytest.raises(ValueError, match="4 output channels for pictures of 3"):
        MRRestorationPipeline(tiny_restoration_unet(4), MRScheduler())
    with pytest.raises(
        ValueError, match="DDIMScheduler knows no mean; use MRScheduler, or put it into a MeanRevertingAdapter"
    ):
        MRRestorationPipeline(tiny_restoration_unet(), DDIMScheduler())


def test_a_network_that_answers_nan_is_reported_at_its_step() -> None:
    pipe = tiny_restoration()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the network's answer at step 0"):
        pipe(picture(), 3)
