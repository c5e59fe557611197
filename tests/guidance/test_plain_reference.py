"""The settings of which the authors' code recorded no run, against the paper's formulas written out in full."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, SelfAttentionEnergy
from tests.guidance.plain_reference import PlainSettings, plain_edit


STEPS = 10

RECORDED = {
    "nonstyle": PlainSettings(),
    "nonstyle_weak": PlainSettings(attention_scale=3e3, feature_scale=50.0),
}
STYLE = PlainSettings(1e5, None, 2.5, "up_blocks.1.resnets.1", 2, "target", 5, (1.5, 1.5))
SOME_LAYERS = ("down_blocks.1.", "mid_block.", "up_blocks.0.")

# The plain settings, and the call of the pipeline that stands for them.
CASES: dict[str, tuple[PlainSettings, dict[str, Any]]] = {
    "stylize": (STYLE, {"preset": "stylize"}),
    "lower bound": (
        PlainSettings(attention_scale=300.0, feature_scale=5.0),
        {"guiders": [SelfAttentionEnergy(300.0), FeatureEnergy(5.0)]},
    ),
    "layers": (
        PlainSettings(attention_layers=SOME_LAYERS),
        {"guiders": [SelfAttentionEnergy(layers=["down_blocks.1", "mid_block", "up_blocks.0"]), FeatureEnergy()]},
    ),
    "conv_norm_out": (
        PlainSettings(attention_scale=0.0, feature_layer="conv_norm_out"),
        {"guiders": [FeatureEnergy(layer="conv_norm_out")]},
    ),
    "negative prompt": (PlainSettings(negative_is_source=True), {"inversion_method": "negative_prompt"}),
}


@pytest.fixture(scope="module")
def pipe(tiny_sd_path) -> GuideAndRescalePipeline:
    pipe = GuideAndRescalePipeline.from_pretrained(tiny_sd_path, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(pipe, golden):
    file = golden("editing/guide_and_rescale_nonstyle.npz")

    def edit(settings: PlainSettings) -> torch.Tensor:
        levels = file.tensor("alphas_cumprod_at_timesteps")
        return plain_edit(
            pipe.unet,
            file.tensor("inv_latents"),
            file["timesteps"].tolist(),
            levels,
            float(
                levels[-1]
            ),  # their last timestep is 0, and set_alpha_to_one is false: the last step stays where it is
            tuple(file.tensor("context").split(1)),
            settings,
        )

    return edit


@pytest.mark.parametrize("name", RECORDED)
def test_the_plain_reference_is_the_authors_code(plain, golden, name):
    expected = golden(f"editing/guide_and_rescale_{name}.npz").tensor("latent_out")[-1]
    assert (plain(RECORDED[name]) - expected).abs().max() <= 2e-3


@pytest.mark.parametrize("name", CASES)
def test_other_settings_are_the_formulas(pipe, plain, golden, name):
    file = golden("editing/guide_and_rescale_nonstyle.npz")
    settings, call = CASES[name]
    output = pipe(
        file["image"], str(file["source_prompt"]), str(file["target_prompt"]), num_inference_steps=STEPS,
        alignment="official", output_type="latent", **call,
    )  # fmt: skip
    expected = plain(settings)
    assert (expected - plain(PlainSettings())).abs().max() > 0.02  # the setting does ten times what is tolerated
    assert (output.images - expected).abs().max() <= 2e-3


def test_checkpointing_changes_no_bit_of_a_stylisation(pipe, golden):
    file = golden("editing/guide_and_rescale_nonstyle.npz")
    prompts = str(file["source_prompt"]), str(file["target_prompt"])
    inversion = pipe.invert(file["image"], prompts[0], STEPS)
    call = {"inversion": inversion, "prompt": prompts[1], "preset": "stylize", "num_inference_steps": STEPS}
    plain = pipe(**call, output_type="latent").images
    pipe.unet.enable_gradient_checkpointing()
    try:
        assert torch.equal(pipe(**call, output_type="latent").images, plain)
    finally:
        pipe.unet.disable_gradient_checkpointing()
