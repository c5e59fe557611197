"""Inversion and editing on SDXL: a pipeline like any other, stock without a controller, and the conditions SDXL needs."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffusers_ext import (
    AttentionReplace,
    InversionOutput,
    LocalBlend,
    NullTextInversionPipeline,
    NullTextInversionStableDiffusionXLPipeline,
)
from diffusers_ext.inversion import INVERSIONS
from tests.conformance.pipelines import PipelineConformance
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components
from tests.pipelines.test_guide_and_rescale_sdxl import components, picture


STEPS = 3
SOURCE, EDIT = "a red cat", "a red dog"
QUICK: dict[str, dict[str, Any]] = {
    "fixed_point": {"iterations": 2}, "null_text": {"inner_steps": 4, "early_stop": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> NullTextInversionStableDiffusionXLPipeline:
    pipe = NullTextInversionStableDiffusionXLPipeline(**components(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestNullTextInversionStableDiffusionXLPipeline(PipelineConformance):
    pipeline_class = NullTextInversionStableDiffusionXLPipeline
    init_kwargs = {"add_watermarker": False}
    required_params = frozenset({"prompt", "inversion", "controller", "image", "source_prompt"})
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
            "image": picture(), "source_prompt": "a red heart", "prompt": "a blue heart", "num_inference_steps": 3,
            "output_type": "pt",
        }  # fmt: skip


@pytest.mark.parametrize("negative", [None, "ugly"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_without_a_controller_an_edit_is_stock_bit_for_bit(pipe, negative, scale):
    inversion = pipe.invert(picture(), SOURCE, num_inference_steps=STEPS)
    stock = StableDiffusionXLPipeline(**components(), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    shared = {"prompt": EDIT, "negative_prompt": negative, "guidance_scale": scale, "output_type": "latent"}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": STEPS}
    expected = stock(**shared, **size, latents=inversion.latents[-1]).images
    assert torch.equal(pipe(**shared, inversion=inversion).images, expected)


@pytest.mark.parametrize("method", INVERSIONS)
def test_every_method_inverts_edits_and_can_be_kept(pipe, method, tmp_path):
    noise = torch.Generator().manual_seed(0)
    inversion = pipe.invert(
        picture(), SOURCE, method, STEPS, settings=QUICK.get(method), generator=noise, gradient_checkpointing=True
    )
    prompts = [SOURCE, EDIT]
    blend = LocalBlend(pipe.tokenizer, prompts, ["cat", "dog"])
    call = {"controller": AttentionReplace(pipe.tokenizer, prompts, local_blend=blend), "output_type": "latent"}
    found = pipe(EDIT, inversion=inversion, return_source=True, **call).images
    assert found.shape[0] == 2 and torch.isfinite(found).all()
    if method in ("direct", "bdia", "edit_friendly"):
        assert torch.equal(found[:1], inversion.latents[0])
    inversion.save_pretrained(tmp_path)
    kept = InversionOutput.from_pretrained(tmp_path)
    assert torch.equal(pipe(EDIT, inversion=kept, return_source=True, **call).images, found)


def test_what_null_text_optimises_is_what_the_cross_attention_reads(pipe):
    told: list[dict[str, torch.Tensor]] = []

    def listen(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        heard = {**named["added_cond_kwargs"], "text": named["encoder_hidden_states"]}
        # Copies, since Adam writes into what it optimises.
        told.append({name: tensor.detach().clone() for name, tensor in heard.items()})

    handle = pipe.unet.register_forward_pre_hook(listen, with_kwargs=True)
    inversion = pipe.invert(picture(), SOURCE, "null_text", STEPS, settings=QUICK["null_text"])
    handle.remove()
    width = pipe.unet.config.cross_attention_dim
    assert inversion.null_embeddings.shape == (STEPS, 1, pipe.tokenizer.model_max_length, width)
    assert len({tuple(item["time_ids"].flatten().tolist()) for item in told}) == 1
    # Without words the pooled embedding is zeros, in every round; the embeddings move.
    without = [item for item in told if not item["text_embeds"].any()]
    assert len(without) == STEPS * 4 and len(told) == STEPS * 6
    assert not torch.equal(without[0]["text"], without[1]["text"])


def test_negative_prompt_inversion_takes_the_pooled_embedding_as_well(pipe):
    inversion = pipe.invert(picture(), SOURCE, "negative_prompt", STEPS)
    call = {"prompt": SOURCE, "inversion": inversion, "output_type": "latent"}
    plain, pushed = (pipe(guidance_scale=scale, **call).images for scale in (1.0, 6.0))
    torch.testing.assert_close(pushed, plain, atol=1e-4, rtol=0)


def test_an_autoencoder_that_overflows_in_half_precision_is_run_in_float32(monkeypatch):
    pipe = NullTextInversionStableDiffusionXLPipeline(**components(), add_watermarker=False).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.force_upcast
    seen = []
    for name in ("encode", "decode"):
        original = getattr(type(pipe.vae), name)

        def watched(self: Any, tensor: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(tensor.dtype)
            return original(self, tensor, *args, **kwargs)

        monkeypatch.setattr(type(pipe.vae), name, watched)
    inversion = pipe.invert(picture(), SOURCE, "null_text", 2, settings=QUICK["null_text"])
    images = pipe(EDIT, inversion=inversion, output_type="pt").images
    assert seen == [torch.float32, torch.float32] and torch.isfinite(images).all()
    assert pipe.vae.dtype == torch.float16 and inversion.latents.dtype == torch.float32


def test_models_of_the_other_family_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="addition_embed_type.*needs a Stable Diffusion XL model"):
        parts = {**components(), "unet": tiny_components()["unet"]}
        NullTextInversionStableDiffusionXLPipeline(**parts, add_watermarker=False)
    with pytest.raises(ValueError, match="addition_embed_type='text_time'.*needs a Stable Diffusion 1.x or 2.x model"):
        NullTextInversionPipeline(**{**tiny_components(), "unet": pipe.unet}, requires_safety_checker=False)
    NullTextInversionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a Stable Diffusion XL text-to-image model"):
        NullTextInversionStableDiffusionXLPipeline.from_pretrained(tmp_path)
