"""Pictures of a batch do not see each other; what an edit costs; picture prompts; few-step and distilled networks."""

from typing import Any

import pytest
import torch

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, SelfAttentionEnergy
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline
from tests.helpers.tiny_models import tiny_components, tiny_unet


STEPS = 6


@pytest.fixture(scope="module")
def demo_model() -> GuideAndRescalePipeline:
    pipe = load_pipeline(GuideAndRescalePipeline, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs() -> Any:
    return EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("background", 8, 5)


def edit(pipe: GuideAndRescalePipeline, pairs: Any, rows: slice, **changes: Any) -> torch.Tensor:
    arguments = {
        "image": (pairs.source[rows] + 1) / 2, "source_prompt": pairs.source_prompts[rows],
        "prompt": pairs.target_prompts[rows], "num_inference_steps": STEPS, "output_type": "latent",
    }  # fmt: skip
    return pipe(**{**arguments, **changes}).images


def test_a_batch_of_eight_is_eight_single_calls_to_the_last_bit(demo_model, pairs):
    together = edit(demo_model, pairs, slice(0, 8))
    for i in range(8):
        assert torch.equal(together[i : i + 1], edit(demo_model, pairs, slice(i, i + 1))), i


def test_passes_of_several_pictures_give_nearly_the_same(demo_model, pairs):
    """Guidance amplifies what two batch sizes round differently; the mean over the latents stays small."""
    alone, together = (edit(demo_model, pairs, slice(0, 4), samples_per_pass=n) for n in (1, None))
    assert 0 < (alone - together).abs().max() < 0.2
    assert (alone - together).abs().mean() < 1e-3


def test_fifty_steps_cost_what_the_method_needs(pairs):
    pipe = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = pairs.source[:1, :, :32, :32]
    inversion = pipe.invert(picture, "a", num_inference_steps=50)
    counts = {}
    for preset in ("edit", "stylize"):
        output = pipe(inversion=inversion, prompt="b", preset=preset, num_inference_steps=50, output_type="latent")
        counts[preset] = (output.network_evaluations, output.backward_passes)
    assert inversion.network_evaluations == 50
    # edit: 2 a step, and 2 more in steps 1 to 29. The authors' code runs 4 in each: 200.
    assert counts["edit"] == (158, 29)
    # stylize: reference, source (not in step 0, where nothing acts on it), target and negative in 25 steps, then 2.
    assert counts["stylize"] == (24 * 4 + 3 + 25 * 2, 24 * 2 + 1)


def test_a_negative_prompt_inversion_reproduces_the_picture_at_any_scale(demo_model, pairs):
    """With the source prompt on both sides the classifier-free term vanishes, whatever its scale."""
    arguments = {
        "prompt": pairs.source_prompts[0],
        "guiders": [],
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    found = {}
    for method in ("ddim", "negative_prompt"):
        inversion = demo_model.invert(pairs.source[:1], pairs.source_prompts[0], STEPS, method=method)
        for scale in (1.0, 7.5):
            found[method, scale] = demo_model(inversion=inversion, guidance_scale=scale, **arguments).images
    plain = found["ddim", 1.0]
    torch.testing.assert_close(found["negative_prompt", 7.5], plain, atol=1e-3, rtol=0)
    assert (found["ddim", 7.5] - plain).abs().max() > 0.1


def test_timesteps_of_ones_own_are_walked(demo_model, pairs):
    seen = []
    own = [999, 749, 499, 249]

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(timestep))
        return tensors

    inversion = demo_model.invert(pairs.source[:1], pairs.source_prompts[0], timesteps=own)
    assert inversion.timesteps.tolist() == own[::-1] and inversion.config["num_inference_steps"] == 4
    call = {"inversion": inversion, "prompt": pairs.target_prompts[0], "output_type": "latent"}
    images = demo_model(**call, timesteps=own, callback_on_step_end=callback).images
    assert seen == own and torch.isfinite(images).all()
    with pytest.raises(ValueError, match="timesteps=.* there, None here"):
        demo_model(**call, num_inference_steps=4)
    for wrong in ([249, 499], [1000, 1], [5, 5], [], "999", [1.5]):
        with pytest.raises(ValueError, match="timesteps="):
            demo_model(**call, timesteps=wrong)


def test_a_network_distilled_with_its_guidance_scale_can_edit(pairs):
    components = {**tiny_components(), "unet": tiny_unet(time_cond_proj_dim=8)}
    pipe = GuideAndRescalePipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "image": pairs.source[:1, :, :32, :32],
        "source_prompt": "a",
        "prompt": "b",
        "timesteps": [999, 749, 499, 249],
    }
    output = pipe(**call, output_type="latent")
    # 4 of the inversion, one a step, and two more in the one step after the first that is guided (round(.6 * 4) = 2).
    assert (output.network_evaluations, output.backward_passes) == (4 + 4 + 2, 1)
    other = pipe(**call, output_type="latent", guidance_scale=3.0).images
    assert not torch.equal(other, output.images)  # the scale is an input of the network


def ip_adapter_weights(unet: Any, width: int, cross_width: int, tokens: int = 4) -> dict[str, Any]:
    """An IP-Adapter of random weights for a UNet, as its file would have it."""
    torch.manual_seed(0)
    projection = {
        "proj.weight": torch.randn(tokens * cross_width, width), "proj.bias": torch.zeros(tokens * cross_width),
        "norm.weight": torch.ones(cross_width), "norm.bias": torch.zeros(cross_width),
    }  # fmt: skip
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    adapter = {
        f"{2 * i + 1}.{key}.weight": torch.randn(layer.inner_dim, cross_width)
        for i, layer in enumerate(layers)
        for key in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": projection, "ip_adapter": adapter}


@pytest.fixture
def adapted() -> GuideAndRescalePipeline:
    pipe = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet, 6, pipe.unet.config.cross_attention_dim)])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_ip_adapter_takes_part_and_is_intact_afterwards(adapted, pairs):
    before = dict(adapted.unet.attn_processors)
    assert any("IPAdapter" in type(processor).__name__ for processor in before.values())
    picture = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), torch.ones(1, 1, 6)])]}
    call = {
        "image": pairs.source[:1, :, :32, :32], "source_prompt": "a", "prompt": "b", "num_inference_steps": 3,
        "guiders": [SelfAttentionEnergy(), FeatureEnergy()], "output_type": "latent",
    }  # fmt: skip

    def fails(*_: Any) -> None:
        raise KeyError("on purpose")

    with pytest.raises(ValueError, match="an IP-Adapter is loaded, but no image_encoder"):
        adapted(**call)
    with_picture = adapted(**call, **picture).images
    with pytest.raises(KeyError, match="on purpose"):
        adapted(**call, **picture, callback_on_step_end=fails)
    assert all(adapted.unet.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(adapted(**call, **picture).images, with_picture)
    other = [torch.cat([torch.zeros(1, 1, 6), -torch.ones(1, 1, 6)])]
    assert not torch.allclose(adapted(**call, ip_adapter_image_embeds=other).images, with_picture, atol=1e-3)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 1, 6), [], [torch.zeros(1, 1, 6)], [None]])
def test_wrong_picture_prompts_are_named(adapted, pairs, wrong):
    with pytest.raises(ValueError, match="ip_adapter_image_embeds must be a list of 1 tensors"):
        adapted(pairs.source[:1, :, :32, :32], "a", "b", ip_adapter_image_embeds=wrong, num_inference_steps=2)


def test_a_picture_prompt_needs_an_adapter(demo_model, pairs):
    with pytest.raises(ValueError, match="ip_adapter_image_embeds is a list, but no IP-Adapter is loaded"):
        edit(demo_model, pairs, slice(0, 1), ip_adapter_image_embeds=[torch.zeros(2, 1, 6)])
