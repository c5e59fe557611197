"""The small trained network of the golden vectors, as a denoiser."""

from functools import cache

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from diffusers_ext.inversion import DDIMLadder, Denoiser
from tests.helpers.golden import golden, golden_path
from tests.helpers.placement import in_own_memory


FILE = "editing/null_text_inversion.npz"


@cache
def unet(dtype: torch.dtype) -> UNet2DConditionModel:
    path = golden_path("editing/tiny_sd") / "unet"
    loaded = in_own_memory(UNet2DConditionModel.from_pretrained(path, dtype=torch.float32))
    return loaded.to(dtype).requires_grad_(False).eval()


def run_unet(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return unet(embeddings.dtype)(latents, timestep, embeddings).sample


def tiny_denoiser(dtype: torch.dtype = torch.float32) -> Denoiser:
    null, source = golden(FILE).tensor("context").to(dtype)
    return Denoiser(run_unet, source[None], null[None])


def tiny_ladder(steps: int = 10) -> DDIMLadder:
    scheduler = DDIMScheduler.from_pretrained(golden_path("editing/tiny_sd") / "scheduler")
    return DDIMLadder.from_scheduler_config(scheduler.config, steps)


def picture() -> torch.Tensor:
    return golden(FILE).tensor("ddim_latents")[0]


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())
