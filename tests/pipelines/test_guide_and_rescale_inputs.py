"""Everything a caller may pass: pictures of every kind are edited, everything wrong is answered in one sentence."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, SelfAttentionEnergy
from diffusers_ext.pipelines.inputs import images_to_tensor, pad_to_multiple
from tests.helpers.tiny_models import tiny_components, tiny_stable_diffusion_xl, tiny_unet


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    across = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None].repeat(height, 0)
    down = np.linspace(0, 255, height, dtype=np.uint8)[:, None, None].repeat(width, 1)
    return Image.fromarray(np.concatenate([across, down, 255 - across], axis=-1)).convert(mode)


PICTURE = gradient(32, 32)
ARRAY = np.asarray(PICTURE)
TENSOR = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def pipe() -> GuideAndRescalePipeline:
    pipe = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: GuideAndRescalePipeline, **changes: Any) -> Any:
    arguments = {"image": PICTURE, "source_prompt": "a cat", "prompt": "a dog", "num_inference_steps": 3}
    return pipe(**{**arguments, **changes})


@pytest.mark.parametrize(
    "form",
    [PICTURE, [PICTURE], ARRAY, ARRAY[None], ARRAY / 255.0, (ARRAY / 255.0).astype(np.float32), TENSOR, TENSOR[None],
     2 * TENSOR - 1, [TENSOR], [ARRAY], TENSOR.double()],
    ids=lambda form: f"{type(form).__name__} {getattr(form, 'shape', '')} {getattr(form, 'dtype', '')}",
)  # fmt: skip
def test_every_form_of_a_picture_means_the_same(form):
    torch.testing.assert_close(images_to_tensor(form), 2 * TENSOR[None] - 1, atol=1e-6, rtol=0)


def test_grayscale_is_understood_in_every_form():
    gray = PICTURE.convert("L")
    array = np.asarray(gray)
    expected = images_to_tensor(gray)
    assert torch.equal(expected[:, 0], expected[:, 1])
    for form in (array, array[..., None], array[None, ..., None], torch.from_numpy(array / 255.0)):
        torch.testing.assert_close(images_to_tensor(form), expected, atol=1e-6, rtol=0)


def test_transparency_is_laid_on_white():
    assert images_to_tensor(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).min() == 1.0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_pil_is_edited(pipe, mode):
    picture = Image.new(mode, (16, 16)) if mode in ("I;16", "I", "F") else gradient(16, 16, mode)
    assert call(pipe, image=picture).images[0].size == (16, 16)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (8, 8), (31, 33), (40, 20)], ids=str)
def test_any_size_comes_back_as_it_went_in(pipe, size):
    assert call(pipe, image=gradient(*size)).images[0].size == size


def test_a_size_can_be_asked_for(pipe):
    assert call(pipe, image=gradient(50, 30), width=24, height=40).images[0].size == (24, 40)
    pictures = [gradient(8, 8), gradient(20, 12)]
    assert [image.size for image in call(pipe, image=pictures, width=16, height=16).images] == [(16, 16)] * 2


def test_padding_mirrors_and_is_only_added():
    image = torch.arange(30.0).view(1, 1, 5, 6)
    padded = pad_to_multiple(image, 8)
    assert padded.shape == (1, 1, 8, 8) and torch.equal(padded[..., :5, :6], image)
    assert torch.equal(padded[0, 0, 0, 6:], image[0, 0, 0, [4, 3]]) and torch.equal(padded[0, 0, 5], padded[0, 0, 3])
    assert torch.equal(pad_to_multiple(padded, 4), padded)
    assert torch.equal(pad_to_multiple(torch.full((1, 1, 1, 2), 3.0), 8), torch.full((1, 1, 8, 8), 3.0))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_output_type_has_one_picture_for_each_prompt(pipe, output_type):
    assert len(call(pipe, prompt=["a dog", "a hat"], output_type=output_type).images) == 2


def test_empty_prompts_are_prompts(pipe):
    assert call(pipe, source_prompt="", prompt="", negative_prompt="").images


def test_a_negative_prompt_counts(pipe):
    plain = call(pipe, output_type="latent").images
    assert not torch.equal(call(pipe, output_type="latent", negative_prompt="a hat").images, plain)


NAN = float("nan")
WRONG = {
    "no picture": ({"image": None}, "image is missing"),
    "a path": ({"image": "cat.png"}, "is a path; open it first"),
    "something else": ({"image": 3}, "image is of type int"),
    "no pictures": ({"image": []}, "empty list"),
    "a NaN picture": ({"image": torch.full((3, 32, 32), NAN)}, "not finite"),
    "a picture of bytes in a float": ({"image": ARRAY.astype(np.float32)}, "floats must lie in"),
    "a picture without area": ({"image": np.zeros((0, 5, 3))}, "shape"),
    "five channels": ({"image": np.zeros((8, 8, 5))}, "shape"),
    "two sizes": ({"image": [gradient(8, 8), gradient(9, 8)]}, "different sizes .8x8, 9x8.; give height and width"),
    "no source prompt": ({"source_prompt": None}, "source_prompt=None is not a str"),
    "no prompt": ({"prompt": None}, "prompt=None is not a str"),
    "a number as prompt": ({"prompt": ["a", 3]}, "prompt=.'a', 3. is not a str or a list of str"),
    "too many source prompts": ({"source_prompt": ["a", "b"]}, "source_prompt has 2 entries for 1 pictures"),
    "too few prompts": ({"image": [PICTURE] * 3, "prompt": ["a", "b"]}, "prompt has 2 entries for 3 pictures; give 1 or 3"),
    "too many negative prompts": ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 results"),
    "zero steps": ({"num_inference_steps": 0}, "num_inference_steps=0 is not a whole number of at least 1"),
    "2000 steps": ({"num_inference_steps": 2000}, "num_inference_steps=2000 is out of range; this model allows 1 to 1000"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    "a word as scale": ({"guidance_scale": "high"}, "guidance_scale='high' is not a finite number"),
    "a negative scale": ({"guidance_scale": -1}, "guidance_scale=-1 is out of range; give a number of at least 0"),
    "an absurd scale": ({"guidance_scale": 1e38}, "guidance_scale"),
    "a reversed range": ({"rescale_range": (3, 0.33)}, "rescale_range=.3, 0.33. has its lower bound above"),
    "a negative range": ({"rescale_range": (-1, 1)}, "rescale_range: low=-1"),
    "one bound": ({"rescale_range": (1,)}, "rescale_range=.1,. is not .low, high."),
    "an end beyond the end": ({"guidance_end": 1.1}, "guidance_end=1.1 is out of range; give a number between 0 and 1"),
    "a misspelt alignment": ({"alignment": "mached"}, "alignment='mached' is not one of matched, official"),
    "a single guider": ({"guiders": FeatureEnergy()}, "is not a list; give .FeatureEnergy"),
    "no guider": ({"guiders": ["attention"]}, "'attention', which is no energy"),
    "an unknown layer": ({"guiders": [FeatureEnergy(layer="up.1")]}, "has no part 'up'"),
    "an unknown attention layer": ({"guiders": [SelfAttentionEnergy(layers="up.1")]}, "no self-attention layer is called"),
    "two of one kind": ({"guiders": [SelfAttentionEnergy()] * 2}, "both read down_blocks.0"),
    "a layer blind to the picture": ({"guiders": [FeatureEnergy(layer="time_embedding")]}, "does not depend on the latents"),
    "no inversion": ({"image": None, "inversion": {"a": 1}}, "inversion is of type dict"),
    "a zero height": ({"height": 0}, "height=0"),
    "a huge height": ({"height": 10**6}, "height=1000000 is out of range"),
    "an unknown output": ({"output_type": "jpg"}, "output_type='jpg' is not one of pil, np, pt, latent"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 3, 3)}, "latents has the shape .1, 4, 3, 3.; this call needs"),
    "latents with NaN": ({"latents": torch.full((1, 4, 16, 16), NAN)}, "latents holds values"),
    "a seed as generator": ({"generator": 3}, "generator=3 is not a torch.Generator"),
    "too many generators": ({"generator": [torch.Generator()] * 2}, "generator is a list of 2 for a batch of 1"),
    "kwargs of another type": ({"cross_attention_kwargs": 0.5}, "cross_attention_kwargs=0.5 is not a dict"),
    "no callback": ({"callback_on_step_end": 1}, "callback_on_step_end=1 cannot be called"),
    "an unknown tensor": ({"callback_on_step_end_tensor_inputs": ["latent"]}, "'latent' is not one of latents, prompt_embeds"),
    "a callback that reshapes": (
        {"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, "latents of shape .2,.; it must stay"
    ),
}  # fmt: skip


@pytest.mark.reliability
@pytest.mark.parametrize("changes, answer", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_answered_in_one_sentence(pipe, changes, answer):
    with pytest.raises((ValueError, TypeError), match=answer) as caught:
        call(pipe, **changes)
    assert "\n" not in str(caught.value)
    assert call(pipe, num_inference_steps=1).images


@pytest.mark.reliability
def test_a_misspelt_argument_is_an_error(pipe):
    with pytest.raises(TypeError, match="guidence_scale"):
        call(pipe, guidence_scale=3.0)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "changes, answer",
    [
        ({"num_inference_steps": 4}, "num_inference_steps=3, the call has 4"),
        ({"alignment": "official"}, "alignment='matched', the call has 'official'"),
        ({"source_prompt": "a mouse"}, "made for source_prompt=.'a cat'., the call has .'a mouse'."),
        ({"image": PICTURE}, "image and inversion are both given"),
        ({"height": 16}, "height and width have no effect on an inversion"),
    ],
)
def test_an_inversion_that_does_not_fit_is_refused(pipe, changes, answer):
    inversion = pipe.invert(PICTURE, "a cat", 3)
    with pytest.raises(ValueError, match=answer):
        call(pipe, **{"image": None, "inversion": inversion, **changes})


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"alignment": "none"}, "alignment='none'"),
        ({"source_prompt": None}, "source_prompt=None"),
        ({"image": None}, "image is missing"),
        ({"width": "wide"}, "width='wide'"),
    ],
)
def test_invert_checks_the_same(pipe, changes, answer):
    with pytest.raises(ValueError, match=answer):
        pipe.invert(**{"image": PICTURE, "source_prompt": "a cat", "num_inference_steps": 3, **changes})


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({"in_channels": 9}, "9 input and 4 output channels for a VAE of 4, as models for inpainting"),
        ({"class_embed_type": "timestep"}, "conditions besides text .class_embed_type='timestep'"),
    ],
)
def test_a_network_with_other_inputs_is_refused(changes, answer):
    with pytest.raises(ValueError, match=answer):
        GuideAndRescalePipeline(**{**tiny_components(), "unet": tiny_unet(**changes)}, requires_safety_checker=False)


def test_a_folder_of_another_family_is_refused_in_one_sentence(tmp_path):
    tiny_stable_diffusion_xl().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="StableDiffusionXLPipeline, which has text_encoder_2, tokenizer_2 besides"
    ) as caught:
        GuideAndRescalePipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_its_parts_says_so():
    parts = {**tiny_components(), "vae": None}
    with pytest.raises(ValueError, match="this pipeline has no vae"):
        call(GuideAndRescalePipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("setting", [{"num_inference_steps": 1}, {"guidance_scale": 0.0}, {"rescale_range": (0, float("inf"))},
                                     {"rescale_range": (0, 0)}, {"guidance_end": 1.0}, {"num_inference_steps": 7}], ids=str)  # fmt: skip
def test_the_ends_of_the_ranges_give_pictures(pipe, setting):
    images = call(pipe, output_type="np", **setting).images
    assert np.isfinite(images).all() and images.shape == (1, 32, 32, 3)
