"""SD3 and Flux pipelines of a few thousand random weights, without text encoders: prompts are given as embeddings."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.helpers.tiny_flows import shifted_vae


WIDTH = 8


def tiny_sd3() -> StableDiffusion3Pipeline:
    """An SD3 pipeline whose schedule is shifted by 3, as SD3's is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, out_channels=4,
        ).eval()  # fmt: skip
        pipe = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=shifted_vae(), text_encoder=None,
            tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(dynamic: bool = True) -> FluxPipeline:
    """A Flux pipeline whose schedule is shifted by the resolution (dev) or not at all (schnell)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
        ).eval()  # fmt: skip
        pipe = FluxPipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic), vae=shifted_vae(),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: Any, steps: int = 4) -> dict[str, Any]:
    """Arguments of a call with one picture of 16 pixels."""
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "prompt_embeds": torch.randn(1, 3, WIDTH, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, WIDTH, generator=generator), "height": 16, "width": 16,
        "num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(2),
    }  # fmt: skip
    if isinstance(pipe, StableDiffusion3Pipeline):
        arguments["negative_prompt_embeds"] = torch.randn(1, 3, WIDTH, generator=generator)
        arguments["negative_pooled_prompt_embeds"] = torch.randn(1, WIDTH, generator=generator)
    return arguments
