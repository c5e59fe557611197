"""Complete pipelines of a few thousand random weights, built from code in about a second.

They have every part of the real ones (byte-level CLIP tokenizer, text encoder, UNet with self- and cross-attention,
autoencoder) and nothing is read from disk or network. What they paint is noise; use them for whatever does not depend on
what is painted: shapes, types, saving, wrong calls.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


VOCABULARY_SIZE = 514  # 256 bytes, the same at the end of a word, start and end of text
MAX_LENGTH = 16  # tokens of a prompt
TEXT_WIDTH = 8
IMAGE_SIZE = 32  # pixels; the autoencoder halves them once
LATENT_SIZE = 16
SD_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def byte_characters() -> list[str]:
    """The printable stand-in of each of the 256 bytes that byte-level tokenizers use, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells every text in bytes: 514 tokens and no merges."""
    characters = byte_characters()
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=MAX_LENGTH
    )


def _text_config(projection: int = TEXT_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=TEXT_WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_LENGTH, projection_dim=projection,
        bos_token_id=VOCABULARY_SIZE - 2, eos_token_id=VOCABULARY_SIZE - 1, pad_token_id=VOCABULARY_SIZE - 1,
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    """An autoencoder of 32-pixel pictures with latents of shape (4, 16, 16)."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), layers_per_block=1,
        latent_channels=4, norm_num_groups=2, sample_size=IMAGE_SIZE,
    ).eval()  # fmt: skip


def tiny_unet(**overrides: Any) -> UNet:
    """A UNet of two levels (4 and 8 channels) with self- and cross-attention in each of them."""
    config: dict[str, Any] = {
        "sample_size": LATENT_SIZE, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": TEXT_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet(**(config | overrides)).eval()


def tiny_components(prediction_type: str = "epsilon", seed: int = 0) -> dict[str, Any]:
    """New components of a `StableDiffusionPipeline`, the same weights for the same seed.

    Args:
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            What the UNet is taken to predict: `"epsilon"`, `"v_prediction"` or `"sample"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random weights; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "vae": tiny_vae(),
            "text_encoder": CLIPTextModel(_text_config()).eval(),
            "tokenizer": tiny_tokenizer(),
            "unet": tiny_unet(),
            "scheduler": DDIMScheduler(prediction_type=prediction_type, **SD_SCHEDULE),
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
        }


def tiny_stable_diffusion(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline of 32-pixel pictures; see `tiny_components`."""
    pipeline = StableDiffusionPipeline(**tiny_components(prediction_type, seed), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """An SDXL pipeline: a valid model of another family, with two text encoders and added time embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = tiny_unet(
            cross_attention_dim=2 * TEXT_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + TEXT_WIDTH, transformer_layers_per_block=(1, 1),
        )  # fmt: skip
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(), text_encoder=CLIPTextModel(_text_config()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(), tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(), unet=unet, scheduler=DDIMScheduler(**SD_SCHEDULE), add_watermarker=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_latents(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Start noise of the tiny pipelines, shape (batch, 4, 16, 16)."""
    return torch.randn(batch, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))
