"""Parts of a small text-to-image model in the layout of Stable Diffusion, and their assembly."""

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .objectives import logit_normal


TRAIN_TIMESTEPS = 1000
# of Stable Diffusion 1.x
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Denoising(nn.Module):
    """Text encoder and UNet as one module for data-parallel training."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Prediction (n, c, h, w) for noisy latents of that shape, timesteps (n,) and token ids (n, length)."""
        return self.unet(sample, timesteps, self.text_encoder(input_ids)[0]).sample


def new_unet(
    channels: tuple[int, ...],
    latent_channels: int,
    sample_size: int,
    cross_attention_dim: int,
    layers_per_block: int = 1,
    heads: int = 4,
    norm_num_groups: int = 16,
) -> UNet2DConditionModel:
    """An untrained UNet that reads the prompt at all levels but the coarsest.

    Args:
        channels: Width of each level, two or more, each a multiple of `norm_num_groups` and `heads`.
        latent_channels: Channels of the latents.
        sample_size: Side of the latents, a multiple of 2^(levels - 1).
        cross_attention_dim: Width of the text encoder.
        layers_per_block: Residual blocks a level.
        heads: Attention heads.
        norm_num_groups: Groups of the normalisation.

    Raises:
        ValueError: If the numbers do not fit each other; the message says which.
    """
    if len(channels) < 2:
        raise ValueError(f"unet_channels={list(channels)} must name two levels or more")
    for name, divisor in (("norm_num_groups", norm_num_groups), ("attention_heads", heads)):
        if any(width % divisor for width in channels):
            raise ValueError(f"unet_channels={list(channels)} must be multiples of {name}={divisor}")
    coarser = len(channels) - 1
    if sample_size % 2**coarser:
        raise ValueError(f"latents of {sample_size} pixels cannot be halved {coarser} times; use fewer unet_channels")
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        down_block_types=(*("CrossAttnDownBlock2D",) * coarser, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * coarser),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=heads,  # diffusers reads it as the number of heads here
        norm_num_groups=norm_num_groups,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 2, heads: int = 4) -> CLIPTextModel:
    """An untrained CLIP text encoder for a tokenizer.

    Args:
        tokenizer: Decides vocabulary, length and special tokens.
        width: Width of the embeddings, a multiple of `heads`.
        layers: Transformer layers.
        heads: Attention heads.

    Raises:
        ValueError: If `width` is not a multiple of `heads`.
    """
    if width % heads:
        raise ValueError(f"text_width={width} must be a multiple of the {heads} attention heads")
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            # the default, 2, is no end token here, and the pooled output would be read at the wrong place
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler(prediction_type: str) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """The scheduler that a model of this objective is published with.

    For flows it is the multistep solver of order 1 on flow sigmas, which is Euler's method: the flow-matching schedulers
    themselves lack what the Stable Diffusion pipeline asks of a scheduler.

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
    """
    if prediction_type == "flow":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=1.0,
            solver_order=1,
            steps_offset=1,  # not used on flow sigmas; the stock pipeline warns about any other value
        )
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **BETAS,
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (n, length) of prompts, padded or cut to the length that the tokenizer's model reads."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids  # fmt: skip


def noise_levels(prediction_type: str, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timesteps and levels for draws from [0, 1).

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
        uniform: Draws (n,).

    Returns:
        Timesteps as the network sees them, signal level and noise level, each (n,): with x = signal x_0 + spread eps.
    """
    if prediction_type == "flow":
        sigma = logit_normal(uniform)
        return sigma * TRAIN_TIMESTEPS, 1.0 - sigma, sigma
    timesteps = (uniform * TRAIN_TIMESTEPS).long()
    alphas = new_scheduler(prediction_type).alphas_cumprod[timesteps]
    return timesteps, alphas.sqrt(), (1.0 - alphas).sqrt()


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    prediction_type: str,
) -> StableDiffusionPipeline:
    """A stock pipeline of the parts, without safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
