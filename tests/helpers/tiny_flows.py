"""Complete flow pipelines of a few thousand random weights: in the layout of Stable Diffusion, Stable Diffusion 3 and FLUX.1; and one network of pixels.

See `tiny_models.py`, whose parts they are made of.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .tiny_models import TEXT_WIDTH, VOCABULARY_SIZE, _text_config, tiny_components, tiny_tokenizer


def flow_scheduler(**settings: Any) -> DPMSolverMultistepScheduler:
    """The scheduler that a flow in the layout of Stable Diffusion is published with."""
    published = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1, "steps_offset": 1}
    return DPMSolverMultistepScheduler(**{**published, **settings})


def tiny_flow_components(seed: int = 0) -> dict[str, Any]:
    """New components of a `StableDiffusionPipeline` whose UNet predicts a velocity."""
    return {**tiny_components(seed=seed), "scheduler": flow_scheduler()}


def shifted_vae() -> AutoencoderKL:
    """An autoencoder of 32-pixel pictures with latents of shape (4, 16, 16), shifted and scaled."""
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=1, layers_per_block=1, shift_factor=0.1, scaling_factor=1.5,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def tiny_unet_of_pixels(channels: int = 3, classes: int | None = None, side: int = 16) -> UNet2DModel:
    """A network of pictures, without text, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            side, channels, channels, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=classes,
        ).eval()  # fmt: skip


def _tiny_t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def tiny_sd3_components() -> dict[str, Any]:
    """New components of a `StableDiffusion3Pipeline` of 32-pixel pictures, with all three text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "transformer": SD3Transformer2DModel(
                sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * TEXT_WIDTH,
                out_channels=4, pos_embed_max_size=16,
            ).eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": shifted_vae(),
            "text_encoder": CLIPTextModelWithProjection(_text_config()).eval(), "tokenizer": tiny_tokenizer(),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config()).eval(), "tokenizer_2": tiny_tokenizer(),
            "text_encoder_3": _tiny_t5(2 * TEXT_WIDTH), "tokenizer_3": tiny_tokenizer(), "image_encoder": None, "feature_extractor": None,
        }  # fmt: skip


def tiny_flux_components() -> dict[str, Any]:
    """New components of a `FluxPipeline`, whose schedule is shifted by the resolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "transformer": FluxTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
                axes_dims_rope=[4, 4, 8],
            ).eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "vae": shifted_vae(),
            "text_encoder": CLIPTextModel(_text_config()).eval(), "tokenizer": tiny_tokenizer(),
            "text_encoder_2": _tiny_t5(TEXT_WIDTH), "tokenizer_2": tiny_tokenizer(),
            "image_encoder": None, "feature_extractor": None,
        }  # fmt: skip
