"""Everything a caller may pass: pictures of every kind and size, and one sentence for everything wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import AttentionRefine, AttentionReplace, InversionOutput, LocalBlend, NullTextInversionPipeline
from diffusers_ext.inversion import INVERSIONS
from tests.helpers.tiny_models import tiny_components, tiny_unet
from tests.pipelines.test_guide_and_rescale_inputs import ARRAY, PICTURE, TENSOR, gradient


SOURCE, EDIT = "a red cat", "a red dog"


@pytest.fixture(scope="module")
def pipe() -> NullTextInversionPipeline:
    pipe = NullTextInversionPipeline(**tiny_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inversion(pipe) -> InversionOutput:
    return pipe.invert(PICTURE, SOURCE, num_inference_steps=2)


@pytest.mark.parametrize("form", [ARRAY, TENSOR, 2 * TENSOR - 1, [PICTURE]], ids=["array", "tensor", "signed", "list"])
def test_every_form_of_a_picture_is_the_same_picture(pipe, inversion, form):
    found = pipe.invert(form, SOURCE, num_inference_steps=2)
    torch.testing.assert_close(found.latents, inversion.latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["RGBA", "L", "I;16", "1", "CMYK"])
def test_every_mode_of_pil_is_inverted_and_edited(pipe, mode):
    picture = Image.new(mode, (16, 16)) if mode == "I;16" else gradient(16, 16, mode)
    made = pipe.invert(picture, SOURCE, num_inference_steps=2)
    assert pipe(EDIT, inversion=made).images[0].size == (16, 16)


@pytest.mark.parametrize("method", ["direct", "null_text", "bdia"])
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (40, 20)], ids=str)
def test_any_size_comes_back_as_it_went_in(pipe, method, size):
    settings = {"inner_steps": 2} if method == "null_text" else {}
    made = pipe.invert(gradient(*size), SOURCE, method, num_inference_steps=2, settings=settings)
    prompts = [SOURCE, EDIT]
    blend = LocalBlend(pipe.tokenizer, prompts, ["cat", "dog"])
    controller = AttentionReplace(pipe.tokenizer, prompts, local_blend=blend)
    images = pipe(EDIT, inversion=made, controller=controller, return_source=True).images
    assert [image.size for image in images] == [size] * 2 and made.config["image_size"] == [size[1], size[0]]


def test_the_source_of_a_padded_picture_is_the_picture_without_the_padding(pipe):
    made = pipe.invert(gradient(31, 33), SOURCE, num_inference_steps=2)
    latents = pipe(EDIT, inversion=made, return_source=True, output_type="latent").images
    assert latents.shape == (2, 4, 18, 16)
    images = pipe(EDIT, inversion=made, return_source=True, output_type="pt").images
    with torch.no_grad():
        whole = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (whole / 2 + 0.5).clamp(0, 1)[..., :33, :31], atol=1e-6, rtol=0)


def test_a_size_can_be_asked_for(pipe):
    made = pipe.invert(gradient(50, 30), SOURCE, num_inference_steps=2, height=24, width=40)
    assert pipe(EDIT, inversion=made).images[0].size == (40, 24)
    call = {"image": gradient(50, 30), "source_prompt": SOURCE, "num_inference_steps": 2, "height": 16, "width": 8}
    assert pipe(EDIT, **call).images[0].size == (8, 16)


@pytest.mark.parametrize("prompts", [["", ""], ["a", "b"], [SOURCE, "a red cat in a hat"], ["cat " * 40, "dog " * 40]])
def test_prompts_of_any_length_are_edited_with_a_controller(pipe, prompts):
    made = pipe.invert(PICTURE, prompts[0], num_inference_steps=2)
    controller = AttentionRefine(pipe.tokenizer, prompts)
    images = pipe(prompts[1], inversion=made, controller=controller, output_type="np").images
    assert np.isfinite(images).all()


def test_the_number_of_steps_is_that_of_the_inversion(pipe, inversion):
    seen: list[int] = []
    pipe(EDIT, inversion=inversion, callback_on_step_end=lambda pipe, step, *_: seen.append(step))
    assert seen == [0, 1] and pipe.num_timesteps == 2


NAN = float("nan")
WRONG = {
    "nothing": ({"inversion": None}, "image is missing; give a picture, or the inversion of one"),
    "both": ({"image": PICTURE}, "image and inversion are both given"),
    "no prompt": ({"prompt": None}, "prompt=None is not a str"),
    "something else as inversion": ({"inversion": {"a": 1}}, "inversion is of type dict; give what `invert` returned"),
    "another source prompt": ({"source_prompt": "a mouse"}, "made for source_prompt=.'a red cat'., the call has .'a mouse'."),
    "other steps": ({"num_inference_steps": 4}, "num_inference_steps=2, the call has 4; use the same value, or invert again"),
    "zero steps": ({"num_inference_steps": 0}, "num_inference_steps=0"),
    "timesteps": ({"timesteps": [5, 1]}, "timesteps=.5, 1. has no effect on an inversion; give it to `invert`"),
    "no controller": ({"controller": "replace"}, "controller='replace' is not a controller of attention; give an AttentionReplace"),
    "a word as scale": ({"guidance_scale": "high"}, "guidance_scale='high' is not a finite number"),
    "a negative skip": ({"skip": -1}, "skip=-1 is not a whole number of at least 0"),
    "nothing left": ({"skip": 2}, "skip=2 leaves none of the 2 steps; use at most 1"),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 results"),
    "an unknown output": ({"output_type": "jpg"}, "output_type='jpg' is not one of pil, np, pt, latent"),
    "source or not": ({"return_source": "yes"}, "return_source='yes' is not True or False"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 3, 3)}, "latents has the shape .1, 4, 3, 3.; this call needs"),
    "too many generators": ({"generator": [torch.Generator()] * 2}, "generator is a list of 2 for a batch of 1"),
    "no callback": ({"callback_on_step_end": 1}, "callback_on_step_end=1 cannot be called"),
    "an unknown tensor": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise' is not one of latents, prompt_embeds"),
    "an unknown method": (
        {"inversion": None, "image": PICTURE, "source_prompt": "a", "inversion_method": "exact"},
        "inversion_method='exact' is not one of ddim, fixed_point, negative_prompt, null_text, direct, edit_friendly, bdia",
    ),
    "an unknown setting": (
        {"inversion": None, "image": PICTURE, "source_prompt": "a", "inversion_settings": {"rounds": 3}},
        "inversion_settings has 'rounds', which method='direct' does not know",
    ),
    "null text without guidance": (
        {"inversion": None, "image": PICTURE, "source_prompt": "a", "inversion_method": "null_text", "guidance_scale": 1.0},
        "guidance_scale=1.0 uses no null embeddings; give that of the edits, above 1",
    ),
}  # fmt: skip


@pytest.mark.reliability
@pytest.mark.parametrize("changes, answer", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_answered_in_one_sentence(pipe, inversion, changes, answer):
    with pytest.raises((ValueError, TypeError), match=answer) as caught:
        pipe(**{"prompt": EDIT, "inversion": inversion, **changes})
    assert "\n" not in str(caught.value)


WRONG_INVERSIONS = {
    "no picture": ({"image": None}, "image is missing"),
    "no prompt": ({"prompt": None}, "prompt=None is not a str"),
    "too many prompts": ({"prompt": ["a", "b"]}, "prompt has 2 entries for 1 pictures; give one"),
    "an unknown method": ({"method": "exact"}, "method='exact' is not one of ddim, fixed_point"),
    "an unknown setting": ({"settings": {"eta": 1.0}}, "settings has 'eta', which method='direct' does not know; it knows none"),
    "a setting of another": (
        {"method": "null_text", "settings": {"gamma": 1.0}},
        "settings has 'gamma', which method='null_text' does not know; it knows schedule, inner_steps",
    ),
    "no settings": ({"settings": 5}, "settings=5 is not a dict; give settings of the method by name"),
    "guidance without effect": (
        {"method": "ddim", "guidance_scale": 7.5}, "guidance_scale=7.5 has no effect on method='ddim', which inverts without"
    ),
    "guidance that is none": ({"method": "null_text", "guidance_scale": 0.5}, "guidance_scale=0.5 uses no null embeddings"),
    "one step": ({"method": "bdia", "num_inference_steps": 1}, "method='bdia' begins with a pair of states, which num_inference_steps=1 leaves out; use"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    "2000 steps": ({"num_inference_steps": 2000}, "num_inference_steps=2000 is out of range; this model allows 1 to 1000"),
    "timesteps that climb": ({"timesteps": [1, 5]}, "timesteps=.1, 5. is not a list of descending whole numbers"),
    "a width of words": ({"width": "wide"}, "width='wide'"),
    "a seed as generator": ({"method": "edit_friendly", "generator": 3}, "generator=3 is not a torch.Generator"),
    "no callback": ({"callback_on_step_end": 5}, "callback_on_step_end=5 cannot be called"),
    "checkpointing": ({"gradient_checkpointing": 1}, "gradient_checkpointing=1 is not True or False"),
}  # fmt: skip


@pytest.mark.reliability
@pytest.mark.parametrize("changes, answer", WRONG_INVERSIONS.values(), ids=WRONG_INVERSIONS)
def test_a_wrong_inversion_is_answered_in_one_sentence(pipe, changes, answer):
    with pytest.raises((ValueError, TypeError), match=answer) as caught:
        pipe.invert(**{"image": PICTURE, "prompt": SOURCE, "num_inference_steps": 2, **changes})
    assert "\n" not in str(caught.value)


def test_a_controller_of_other_prompts_or_for_several_pictures_is_refused(pipe, inversion):
    controller = AttentionReplace(pipe.tokenizer, [SOURCE, "a tan cat"])
    with pytest.raises(
        ValueError, match="controller was made for the prompts .*, the call has .*, the source's first"
    ):
        pipe(EDIT, inversion=inversion, controller=controller)
    two = pipe.invert([PICTURE, PICTURE], SOURCE, num_inference_steps=2)
    with pytest.raises(
        ValueError, match="controller belongs to one picture, the call has 2; give a list with one for each"
    ):
        pipe("a tan cat", inversion=two, controller=controller)


@pytest.mark.parametrize("changes", [{"skip": 1}, {"latents": torch.zeros(1, 4, 16, 16)}])
def test_a_pair_of_states_leaves_no_choice_of_the_start(pipe, changes):
    made = pipe.invert(PICTURE, SOURCE, "bdia", num_inference_steps=3)
    with pytest.raises(ValueError, match="is not possible with method='bdia', which starts from its own pair"):
        pipe(EDIT, inversion=made, **changes)


def test_an_inversion_of_another_model_scheduler_or_guidance_is_refused(pipe):
    made = pipe.invert(PICTURE, SOURCE, "null_text", num_inference_steps=2, settings={"inner_steps": 1})
    with pytest.raises(
        ValueError, match="made for guidance_scale=7.5, the call has 5.0; use the same value, or invert"
    ):
        pipe(EDIT, inversion=made, guidance_scale=5.0)
    other = NullTextInversionPipeline(**tiny_components(seed=1), requires_safety_checker=False)
    with pytest.raises(ValueError, match="made with another model: its vae differs; invert again"):
        other(EDIT, inversion=made)
    scheduler = NullTextInversionPipeline(**tiny_components("v_prediction"), requires_safety_checker=False)
    with pytest.raises(ValueError, match="another scheduler: prediction_type='epsilon' there, 'v_prediction' here"):
        scheduler(EDIT, inversion=made)


def test_a_torn_inversion_is_refused(pipe):
    made = pipe.invert(PICTURE, SOURCE, "null_text", num_inference_steps=2, settings={"inner_steps": 1})
    made.null_embeddings = made.null_embeddings[..., :3]
    with pytest.raises(
        ValueError, match=r"null_embeddings of shape \(2, 1, 16, 3\), the text encoder gives \(16, 8\)"
    ):
        pipe(EDIT, inversion=made)


def test_a_network_distilled_with_its_guidance_is_refused(pipe):
    parts = {**tiny_components(), "unet": tiny_unet(time_cond_proj_dim=8)}
    distilled = NullTextInversionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match="time_cond_proj_dim=8.*use a network that was not distilled, or GuideAndRescale"
    ):
        distilled.invert(PICTURE, SOURCE, num_inference_steps=2)


def test_weights_that_are_put_away_give_no_gradients(pipe):
    parts = tiny_components()
    with torch.device("meta"):
        parts["unet"] = tiny_unet()
    offloaded = NullTextInversionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match="enable_sequential_cpu_offload.*use enable_model_cpu_offload.*method='direct'"
    ):
        offloaded.invert(PICTURE, SOURCE, "null_text", num_inference_steps=2)


def test_the_methods_of_the_pipeline_are_those_of_the_library(pipe):
    for method in INVERSIONS:
        assert isinstance(pipe._method_settings(method, None, None), dict)
