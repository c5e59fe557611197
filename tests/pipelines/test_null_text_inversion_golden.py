"""The authors' whole edits and inversions, reproduced through the pipeline on the small trained model."""

from typing import Any

import pytest
import torch

from diffusers_ext import AttentionRefine, InversionOutput, NullTextInversionPipeline
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline
from diffusers_ext.inversion import Inverted
from tests.attention.test_alignment import GOLDEN, REFINE, REPLACE, SOURCE
from tests.attention.test_prompt_to_prompt_golden import GUIDANCE_SCALE, STEPS, TOLERANCE, make
from tests.inversion.trained import picture, rmse


CASES = ["replace", "replace_localblend", "refine", "refine_reweight_localblend"]


@pytest.fixture(scope="module")
def pipe(tiny_sd_path) -> NullTextInversionPipeline:
    pipe = NullTextInversionPipeline.from_pretrained(tiny_sd_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded(pipe: NullTextInversionPipeline, method: str, **found: torch.Tensor) -> InversionOutput:
    """The authors' inversion as if this pipeline had made it."""
    ladder = pipe._ladder(STEPS, None)
    settings = {"guidance_scale": GUIDANCE_SCALE} if method == "null_text" else {}
    inverted = Inverted(method, GOLDEN.tensor("ddim_latents"), ladder.timesteps.flip(0), settings, **found)
    return InversionOutput.of(inverted, [SOURCE], pipe._inversion_config(ladder, "matched", [128, 128], method))


def edit(pipe: NullTextInversionPipeline, case: str, inversion: InversionOutput) -> torch.Tensor:
    prompt = REPLACE if case.startswith("replace") else REFINE
    arguments: dict[str, Any] = {"controller": make(case), "guidance_scale": GUIDANCE_SCALE, "return_source": True}
    return pipe(prompt, inversion=inversion, output_type="latent", **arguments).images


@pytest.mark.parametrize("case", CASES)
def test_an_edit_on_a_direct_inversion_is_that_of_the_authors(pipe, case):
    found = edit(pipe, case, recorded(pipe, "direct"))
    assert (found - GOLDEN.tensor(f"{case}_direct_final")).abs().max() < TOLERANCE
    assert torch.equal(found[:1], GOLDEN.tensor("ddim_latents")[0])


@pytest.mark.parametrize("case", CASES[1::2])
def test_an_edit_on_null_embeddings_is_that_of_the_authors(pipe, case):
    embeddings = GOLDEN.tensor("uncond_embeddings").flip(0)
    found = edit(pipe, case, recorded(pipe, "null_text", null_embeddings=embeddings))
    assert (found - GOLDEN.tensor(f"{case}_latents")[-1]).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def reconstructed(pipe):
    """`reconstructed(method, scale, **settings)`: error of the latents after the way back with the source prompt."""
    encode = pipe._encode
    pipe._encode = lambda pixels: picture()

    def error(method: str, scale: float, **settings: Any) -> float:
        own = {"guidance_scale": scale} if method == "null_text" else {}
        inversion = pipe.invert(torch.zeros(3, 128, 128), SOURCE, method, STEPS, settings=settings, **own)
        found = pipe(SOURCE, inversion=inversion, guidance_scale=scale, output_type="latent", return_source=True)
        return rmse(found.images[:1], picture())

    yield error
    pipe._encode = encode


@pytest.mark.parametrize(
    "method, scale, settings, limit",
    [
        ("direct", 7.5, {}, 1e-7),
        ("null_text", 7.5, {}, 0.081),
        ("bdia", 1.0, {}, 1e-5),
        ("fixed_point", 1.0, {"iterations": 25}, 2e-3),
        ("negative_prompt", 7.5, {}, 0.149),
        pytest.param("null_text", 7.5, {"schedule": "official"}, 0.082, marks=pytest.mark.slow),
    ],
)
def test_the_way_back_is_as_near_as_promised(reconstructed, method, scale, settings, limit):
    assert reconstructed(method, scale, **settings) <= limit


def test_the_two_baselines_are_those_of_the_authors(reconstructed):
    assert reconstructed("ddim", 1.0) == pytest.approx(0.148, abs=2e-3)
    assert reconstructed("ddim", 7.5) == pytest.approx(0.394, abs=2e-2)


@pytest.mark.parametrize("method", ["direct", "bdia"])
def test_on_the_demo_model_a_real_picture_comes_back_as_from_the_autoencoder(method):
    pipe = load_pipeline(NullTextInversionPipeline)
    pipe.set_progress_bar_config(disable=True)
    pair = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", 1, 0)
    inversion = pipe.invert(pair.source, pair.source_prompts, method, num_inference_steps=4)
    controller = AttentionRefine(pipe.tokenizer, [*pair.source_prompts, *pair.target_prompts])
    edited = pipe(
        pair.target_prompts, inversion=inversion, controller=controller, return_source=True, output_type="pt"
    ).images
    with torch.no_grad():
        round_trip = pipe.vae.decode(pipe.vae.encode(pair.source).latent_dist.mode()).sample / 2 + 0.5
    truth = pair.source / 2 + 0.5
    assert abs(psnr(edited[:1], truth) - psnr(round_trip.clamp(0, 1), truth)) < 0.01
    assert float((edited[0] - edited[1]).abs().max()) > 0.1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())
