"""Flow pipelines of a few thousand random weights beside SD3 and Flux: Qwen-Image, Wan, Sana and Lumina 2.

They are the classes of diffusers, without text encoders and autoencoders: prompts are given as embeddings and latents come out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.schedulers.tiny_flow_pipelines import call_of, tiny_flux, tiny_sd3


WIDTH = 8


@dataclass(frozen=True)
class Subject:
    """A pipeline and how it is called.

    Attributes:
        build (`Callable`): Makes it.
        arguments (`Callable`): Arguments of a call that returns the latents of one small picture, given the pipeline.
        shape (`tuple[int, ...]`): Shape of those latents.
        packed (`tuple[int, int]`, *optional*): Height and width of the latents, where they are packed.
    """

    build: Callable[[], Any]
    arguments: Callable[[Any], dict[str, Any]]
    shape: tuple[int, ...]
    packed: tuple[int, int] | None = None


def _ready(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _ready(build())

    return call


def _embeddings(seed: int, tokens: int = 4) -> torch.Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def _call(**arguments: Any) -> dict[str, Any]:
    common = {"num_inference_steps": 10, "output_type": "latent", "generator": torch.Generator().manual_seed(2)}
    return {**common, **arguments}


@_seeded
def tiny_qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return QwenImagePipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


def call_qwen_image(pipeline: Any) -> dict[str, Any]:
    mask = torch.ones(1, 4, dtype=torch.long)
    return _call(
        prompt_embeds=_embeddings(3), prompt_embeds_mask=mask, negative_prompt_embeds=_embeddings(4),
        negative_prompt_embeds_mask=mask, true_cfg_scale=3.0, height=64, width=96,
    )  # fmt: skip


@_seeded
def tiny_wan() -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)


def call_wan(pipeline: Any) -> dict[str, Any]:
    return _call(
        prompt_embeds=_embeddings(3), negative_prompt_embeds=_embeddings(4), height=64, width=96, num_frames=5,
        guidance_scale=3.0,
    )  # fmt: skip


@_seeded
def tiny_sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)


def call_sana(pipeline: Any) -> dict[str, Any]:
    mask = torch.ones(1, 4, dtype=torch.long)
    return _call(
        prompt=None, negative_prompt=None, prompt_embeds=_embeddings(3), prompt_attention_mask=mask,
        negative_prompt_embeds=_embeddings(4), negative_prompt_attention_mask=mask, height=256, width=256,
        use_resolution_binning=False, guidance_scale=3.0,
    )  # fmt: skip


@_seeded
def tiny_lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16),
        cap_feat_dim=WIDTH,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)


def call_lumina2(pipeline: Any) -> dict[str, Any]:
    mask = torch.ones(1, 4, dtype=torch.long)
    return _call(
        prompt_embeds=_embeddings(3), prompt_attention_mask=mask, negative_prompt_embeds=_embeddings(4),
        negative_prompt_attention_mask=mask, height=64, width=96, guidance_scale=3.0,
    )  # fmt: skip


def call_small(pipeline: Any) -> dict[str, Any]:
    return call_of(pipeline, steps=10)


PIPELINES: dict[str, Subject] = {
    "SD3": Subject(tiny_sd3, call_small, (1, 4, 8, 8)),
    "Flux": Subject(tiny_flux, call_small, (1, 16, 16), (8, 8)),
    "Qwen-Image": Subject(tiny_qwen_image, call_qwen_image, (1, 24, 16), (8, 12)),
    "Wan": Subject(tiny_wan, call_wan, (1, 4, 2, 8, 12)),
    "Sana": Subject(tiny_sana, call_sana, (1, 4, 8, 8)),
    "Lumina 2": Subject(tiny_lumina2, call_lumina2, (1, 4, 8, 12)),
}
