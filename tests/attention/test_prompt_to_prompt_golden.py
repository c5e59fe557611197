"""Whole runs of prompt-to-prompt against those of the authors' code, from noise to picture."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from diffusers_ext.attention import (
    AttentionController,
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    LocalBlend,
)
from diffusers_ext.attention import local_blend as local_blend_module
from tests.attention.test_alignment import GOLDEN, REFINE, REPLACE, SOURCE, TOKENIZER
from tests.helpers.golden import golden_path


STEPS, GUIDANCE_SCALE, TOLERANCE = 10, 7.5, 2e-3
# At this size the authors' code replaces self-attention of all layers.
OPTIONS: dict[str, Any] = {"cross_replace_steps": 0.4, "self_replace_steps": 0.6, "max_self_attention_resolution": 1.0}


@cache
def model() -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    folder = golden_path("editing/tiny_sd")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float().eval()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()
    return unet, text_encoder, DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


@torch.no_grad()
def embeddings(prompts: list[str]) -> torch.Tensor:
    ids = TOKENIZER(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return model()[1](ids)[0]


@torch.no_grad()
def sample(controller: AttentionController, direct: bool = False) -> torch.Tensor:
    """Latents after each step; with `direct` the source branch is put back on the inversion's."""
    unet, _, scheduler = model()
    scheduler.set_timesteps(STEPS)
    latents = GOLDEN.tensor("latent_T").repeat(2, 1, 1, 1)
    text, inverted = embeddings(controller.prompts), GOLDEN.tensor("ddim_latents")
    null = embeddings([""]).expand(STEPS, -1, -1) if direct else GOLDEN.tensor("uncond_embeddings")[:, 0]
    found = []
    with controller.attach(unet, latents.shape, STEPS):
        for i, t in enumerate(scheduler.timesteps):
            context = torch.cat([null[i].expand_as(text), text])
            away, towards = unet(torch.cat([latents] * 2), t, context, return_dict=False)[0].chunk(2)
            latents = scheduler.step(away + GUIDANCE_SCALE * (towards - away), t, latents).prev_sample
            if direct:
                latents = torch.cat([inverted[STEPS - 1 - i], latents[1:]])
            latents = controller.after_step(i, latents)
            found.append(latents)
    return torch.stack(found)


def make(case: str) -> AttentionController:
    prompts = [SOURCE, REPLACE if case.startswith("replace") else REFINE]
    words = ["cat", "dog" if case.startswith("replace") else "cat"]
    blend = LocalBlend(TOKENIZER, prompts, words, threshold=0.9) if case.endswith("localblend") else None
    if case.startswith("replace"):
        return AttentionReplace(TOKENIZER, prompts, local_blend=blend, **OPTIONS)
    refine = AttentionRefine(TOKENIZER, prompts, local_blend=blend, **OPTIONS)
    return AttentionReweight(TOKENIZER, prompts, {"blue": 4.0}, controller=refine) if "reweight" in case else refine


@pytest.mark.parametrize("case", ["replace", "refine"])
def test_a_run_is_that_of_the_authors(case):
    difference = (sample(make(case)) - GOLDEN.tensor(f"{case}_latents")).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("case", ["replace_localblend", "refine_reweight_localblend"])
def test_a_run_with_local_blend_has_the_masks_and_latents_of_the_authors(case, monkeypatch):
    soft_maps, masks = [], []
    soft_mask, keep_source_outside = local_blend_module.soft_mask, local_blend_module.keep_source_outside

    def recorded_soft_mask(*args, **kwargs):
        soft_maps.append(soft_mask(*args, **kwargs))
        return soft_maps[-1]

    def recorded_blend(latents, mask):
        masks.append(mask)
        return keep_source_outside(latents, mask)

    monkeypatch.setattr(local_blend_module, "soft_mask", recorded_soft_mask)
    monkeypatch.setattr(local_blend_module, "keep_source_outside", recorded_blend)
    found = sample(make(case))
    assert (found - GOLDEN.tensor(f"{case}_latents")).abs().max() < TOLERANCE
    assert torch.equal(torch.stack(masks), GOLDEN.tensor(f"{case}_masks"))
    torch.testing.assert_close(torch.stack(soft_maps), GOLDEN.tensor(f"{case}_soft_maps"), atol=1e-4, rtol=0)
    outside = ~torch.stack(masks)[:, 1].expand(-1, 4, -1, -1)
    assert outside.any() and torch.equal(found[2:, 1][outside], found[2:, 0][outside])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["replace", "replace_localblend", "refine", "refine_reweight_localblend"])
def test_a_run_on_a_direct_inversion_is_that_of_the_authors(case):
    found = sample(make(case), direct=True)[-1]
    assert (found - GOLDEN.tensor(f"{case}_direct_final")).abs().max() < TOLERANCE
