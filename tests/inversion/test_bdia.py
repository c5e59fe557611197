"""Exact inversion on a trained network, with and without guidance."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ext.data import EmojiScenes
from diffusers_ext.inversion import bdia_invert, bdia_regenerate
from diffusers_ext.metrics import psnr
from diffusers_ext.schedulers import BDIADDIMScheduler


MODEL = Path(__file__).resolve().parents[2] / "pipelines" / "emoji-scenes-64"
needs_model = pytest.mark.skipif(not (MODEL / "model_index.json").is_file(), reason="needs the demo model")


def predictor(pipe: StableDiffusionPipeline, prompt: str, guidance_scale: float) -> Callable[..., torch.Tensor]:
    wanted, empty = pipe.encode_prompt(prompt, pipe.device, 1, True)

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output = pipe.unet(latents, timestep, wanted).sample
        if guidance_scale == 1:
            return output
        plain = pipe.unet(latents, timestep, empty).sample
        return plain + guidance_scale * (output - plain)

    return predict


@needs_model
@torch.no_grad()
def test_a_real_picture_comes_back_as_well_as_the_autoencoder_allows() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    scenes = EmojiScenes(objects=["star", "apple"])
    drawn = scenes.sample(1, 3, "all")
    picture, _ = scenes.render(drawn)
    latents = pipe.vae.encode(picture).latent_dist.mode() * pipe.vae.config.scaling_factor
    (caption,) = scenes.captions(drawn)
    limit = psnr(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, picture).item()
    for steps, guidance_scale in ((50, 1.0), (20, 3.0)):
        predict = predictor(pipe, caption, guidance_scale)
        pair = bdia_invert(predict, latents, pipe.scheduler.config, steps)
        back = bdia_regenerate(predict, pair)
        assert float((back - latents).abs().max()) <= 1e-5 * max(1.0, float(pair.noisiest.abs().max()))
        found = psnr(pipe.vae.decode(back / pipe.vae.config.scaling_factor).sample, picture).item()
        assert found == pytest.approx(limit, abs=1e-3)


def test_a_network_in_half_precision_changes_nothing_of_the_exactness() -> None:
    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0.4 * torch.sin(latents.half() + 0.001 * timestep)

    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pair = bdia_invert(network, picture, BDIADDIMScheduler().config, 30, gamma=1.0)
    # A state that rounds to the neighbouring half gives another prediction: a few of those, each far below half precision.
    assert float((bdia_regenerate(network, pair) - picture).abs().max()) < 2e-3
    assert pair.noisiest.dtype == torch.float32


def test_wrong_arguments_are_named() -> None:
    config, picture = BDIADDIMScheduler().config, torch.zeros(1, 4, 8, 8)

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents

    with pytest.raises(ValueError, match="num_inference_steps=1 leaves no pair"):
        bdia_invert(network, picture, config, 1)
    with pytest.raises(ValueError, match="gamma=0.5"):
        bdia_invert(network, picture, config, 5, gamma=0.5)
    with pytest.raises(TypeError, match="latents is str"):
        bdia_invert(network, "picture", config, 5)
    with pytest.raises(ValueError, match="model_output is not finite"):
        bdia_invert(lambda latents, timestep: latents / 0, picture, config, 5)
