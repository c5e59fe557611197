"""Guide-and-Rescale on SDXL: a pipeline like any other, plain SDXL with guidance off, and the conditions SDXL needs."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffusers_ext import (
    GuideAndRescalePipeline,
    GuideAndRescaleStableDiffusionXLPipeline,
    InversionOutput,
    SelfAttentionEnergy,
)
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components, tiny_stable_diffusion_xl


NOT_COMPONENTS = ("force_zeros_for_empty_prompt",)


def components() -> dict[str, Any]:
    return {name: part for name, part in tiny_stable_diffusion_xl().components.items() if name not in NOT_COMPONENTS}


def picture(seed: int = 3) -> torch.Tensor:
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def pipe() -> GuideAndRescaleStableDiffusionXLPipeline:
    pipe = GuideAndRescaleStableDiffusionXLPipeline(**components(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestGuideAndRescaleStableDiffusionXLPipeline(PipelineConformance):
    pipeline_class = GuideAndRescaleStableDiffusionXLPipeline
    init_kwargs = {"add_watermarker": False}
    required_params = frozenset({"image", "source_prompt", "prompt", "preset", "guiders", "inversion"})
    optional_params = frozenset({"num_inference_steps", "generator", "latents", "output_type", "return_dict"})
    batch_params = ("image", "source_prompt", "prompt")
    not_applicable = {
        "test_several_images_per_prompt": "an edit is deterministic: a picture and a prompt have one result",
        "test_prompts_can_be_encoded_without_the_other_components": "prompts are given as text, three kinds of them",
    }

    known_failures = {
        "test_a_call_leaves_the_components_as_they_were": "transformers leaves a hook in a text encoder whose hidden states "
        "were asked for; stock SDXL asks for them"
    }

    def get_dummy_components(self) -> dict[str, Any]:
        return components()

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {
            "image": picture(), "source_prompt": "a red heart", "prompt": "a blue heart", "num_inference_steps": 4,
            "output_type": "pt",
        }  # fmt: skip


@pytest.mark.parametrize("negative", [None, "", "ugly"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_guidance_off_is_stock_bit_for_bit(pipe, negative, scale):
    inversion = pipe.invert(picture(), "a red heart", 4)
    stock = StableDiffusionXLPipeline(**components(), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    shared = {
        "prompt": "a blue heart", "negative_prompt": negative, "num_inference_steps": 4, "guidance_scale": scale,
        "output_type": "latent",
    }  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    expected = stock(**shared, **size, latents=inversion.latents[-1]).images
    assert torch.equal(pipe(**shared, inversion=inversion, guiders=[]).images, expected)


def test_the_energies_are_averaged_over_the_layers_where_the_layout_is(pipe):
    attention = pipe._presets["edit"].guiders()[0]
    assert attention.reduction == "mean" and attention.scale == 16 * 3e5
    with attention.attach(pipe.unet):
        chosen = [
            name
            for name, layer in pipe.unet.attn_processors.items()
            if type(layer).__name__.startswith("SelfAttentionEnergy")
        ]
    assert chosen and all(name.startswith(("mid_block", "up_blocks.0")) for name in chosen)


@pytest.mark.parametrize("preset", ["edit", "stylize"])
def test_guidance_changes_the_edit_and_leaves_the_network_as_it_was(pipe, preset):
    before = dict(pipe.unet.attn_processors)
    call = {"image": picture(), "source_prompt": "a red heart", "prompt": "a blue heart", "num_inference_steps": 4}
    guided = pipe(**call, preset=preset, output_type="latent").images
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, pipe(**call, guiders=[], output_type="latent").images)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_an_autoencoder_that_overflows_in_half_precision_is_run_in_float32(monkeypatch):
    pipe = GuideAndRescaleStableDiffusionXLPipeline(**components(), add_watermarker=False).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.force_upcast
    seen = []
    decode = type(pipe.vae).decode

    def watched(self: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.dtype)
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", watched)
    guiders = [SelfAttentionEnergy(1e3)]
    images = pipe(picture(), "a", "b", guiders=guiders, num_inference_steps=2, output_type="pt").images
    assert seen == [torch.float32] and torch.isfinite(images).all()
    assert pipe.vae.dtype == torch.float16


def test_models_of_the_other_family_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="addition_embed_type.*needs a Stable Diffusion XL model"):
        GuideAndRescaleStableDiffusionXLPipeline(
            **{**components(), "unet": tiny_components()["unet"]}, add_watermarker=False
        )
    plain = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a Stable Diffusion XL text-to-image model"):
        GuideAndRescaleStableDiffusionXLPipeline.from_pretrained(tmp_path)


def test_an_inversion_can_be_saved_and_used(pipe, tmp_path):
    inversion = pipe.invert(picture(), "a red heart", 3)
    inversion.save_pretrained(tmp_path / "inverted")
    again = InversionOutput.from_pretrained(tmp_path / "inverted")
    call = {"prompt": "a blue heart", "num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(pipe(inversion=again, **call).images, pipe(inversion=inversion, **call).images)
