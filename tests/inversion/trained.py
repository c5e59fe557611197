"""The small trained network of the golden vectors, as a denoiser."""

from functools import cache

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from diffusers_ext.inversion import DDIMLadder, Denoiser
from tests.helpers.golden import golden, golden_path


FILE = "editing/null_text_inversion.npz"


@cache
def unet() -> UNet2DConditionModel:
    path = golden_path("editing/tiny_sd") / "unet"
    return UNet2DConditionModel.from_pretrained(path, dtype=torch.float32).requires_grad_(False).eval()


def run_unet(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return unet()(latents, timestep, embeddings).sample


def tiny_denoiser() -> Denoiser:
    null, source = golden(FILE).tensor("context")
    return Denoiser(run_unet, source[None], null[None])


def tiny_ladder(steps: int = 10) -> DDIMLadder:
    scheduler = DDIMScheduler.from_pretrained(golden_path("editing/tiny_sd") / "scheduler")
    return DDIMLadder.from_scheduler_config(scheduler.config, steps)


def picture() -> torch.Tensor:
    return golden(FILE).tensor("ddim_latents")[0]


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())
