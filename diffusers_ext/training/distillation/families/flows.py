"""Stable Diffusion 3 and Flux: transformers that predict a flow and read the states of T5.

Esser et al. 2024, arXiv 2403.03206, and Black Forest Labs, FLUX.1: states and pooled embeddings as the stock pipelines give them. The
dev models of Flux are told the guidance scale, which they learned from guided runs, and make one pass.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)
from torch import nn

from .conditions import pack, unpack
from .unets import StableDiffusion, own_settings


# all linear maps of a transformer's blocks and its last one; those that a network lacks are passed over
TRANSFORMER_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
    "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
# latents of one token, along each side
PATCH = 2


def fitted_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Token ids (n, length) of prompts, padded or cut to a length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


def shift_of(config: Any, tokens: int) -> float:
    """The constant shift that a scheduler with `use_dynamic_shifting` has for pictures of so many tokens."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (tokens - low)
    return mu if config["time_shift_type"] == "linear" else math.exp(mu)


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3 and 3.5, with all three text encoders."""

    pipeline_class = StableDiffusion3Pipeline
    translator_class = None
    part = "transformer"
    tag = "sd3"
    large_pictures = True
    taken_by = "train_reflow.py and train_dmd.py take it"
    lora_layers = TRANSFORMER_MODULES
    loading = {}
    # what the stock pipeline reads of a prompt
    t5_length = 256

    def settle(self, pipeline: Any, resolution: int | None) -> None:
        """A schedule that is shifted by the resolution gets the shift of this one."""
        side = resolution or pipeline.default_sample_size * pipeline.vae_scale_factor
        step = PATCH * pipeline.vae_scale_factor
        if side % step:
            raise ValueError(
                f"resolution={side} must be a multiple of {step}, because a {type(pipeline).__name__} reads its latents in "
                f"squares; the nearest is {max(1, round(side / step)) * step}"
            )
        config = pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                config, use_dynamic_shifting=False, shift=shift_of(config, (side // step) ** 2)
            )

    def text_encoders(self, pipeline: Any) -> list[nn.Module]:
        """Both CLIP encoders and T5."""
        return [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids of the two CLIP tokenizers and of T5."""
        length = pipeline.tokenizer_max_length
        ids = [fitted_ids(part, prompts, length) for part in (pipeline.tokenizer, pipeline.tokenizer_2)]
        return torch.cat([*ids, fitted_ids(pipeline.tokenizer_3, prompts, self.t5_length)], 1)

    def condition(self, pipeline: Any, input_ids: torch.Tensor, numbers: list[float]) -> torch.Tensor:
        """The last but one states of both CLIP encoders, below them those of T5, and both pooled embeddings."""
        length = pipeline.tokenizer_max_length
        one, two, rest = input_ids.to(pipeline.device).tensor_split([length, 2 * length], 1)
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in ((pipeline.text_encoder, one), (pipeline.text_encoder_2, two))
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], 2)
        others = pipeline.text_encoder_3(rest)[0]
        states = torch.nn.functional.pad(states, (0, others.shape[2] - states.shape[2]))
        return pack(torch.cat([states, others], 1), *(output[0] for output in outputs))

    def denoise(
        self,
        network: Any,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        words: torch.Tensor,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A network's prediction; it has no place for `told`."""
        states, pooled = unpack(words, network.config.pooled_projection_dim)
        return network(sample, encoder_hidden_states=states, pooled_projections=pooled, timestep=timesteps).sample

    def making(self, pipeline: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def euler_scheduler(self, pipeline: Any) -> SchedulerMixin:
        """The stock scheduler that runs Euler's method on the levels of a flow."""
        return FlowMatchEulerDiscreteScheduler.from_config(
            own_settings(pipeline.scheduler), shift=self.shift(pipeline), stochastic_sampling=False
        )

    def renoising_scheduler(self, pipeline: Any, steps: int) -> SchedulerMixin:
        """The stock scheduler that takes a flow's clean sample in each step and adds new noise to it."""
        settings = own_settings(pipeline.scheduler)
        settings.pop("stochastic_sampling", None)  # it always is
        return FlowMatchLCMScheduler.from_config(settings, shift=self.shift(pipeline))


class Flux(StableDiffusion3):
    """FLUX.1, text to image."""

    pipeline_class = FluxPipeline
    tag = "flux"
    t5_length = 512

    def text_encoders(self, pipeline: Any) -> list[nn.Module]:
        """CLIP and T5."""
        return [pipeline.text_encoder, pipeline.text_encoder_2]

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids of CLIP and T5."""
        short, long = pipeline.tokenizer_max_length, self.t5_length
        ids = fitted_ids(pipeline.tokenizer, prompts, short), fitted_ids(pipeline.tokenizer_2, prompts, long)
        return torch.cat(ids, 1)

    def numbers(self, pipeline: Any, resolution: int | None, guidance_scale: float) -> list[float]:
        """The guidance scale, where the network reads it."""
        return [guidance_scale] if self.reads_guidance(pipeline.transformer) else []

    def condition(self, pipeline: Any, input_ids: torch.Tensor, numbers: list[float]) -> torch.Tensor:
        """The states of T5, the pooled embedding of CLIP, and the guidance scale."""
        short, long = input_ids.to(pipeline.device).tensor_split([pipeline.tokenizer_max_length], 1)
        states, pooled = pipeline.text_encoder_2(long)[0], pipeline.text_encoder(short).pooler_output
        return pack(states, pooled, states.new_tensor(numbers).expand(len(states), -1))

    def denoise(
        self,
        network: Any,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        words: torch.Tensor,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A network's prediction; it has no place for `told`."""
        height, width = (side // PATCH for side in sample.shape[2:])
        states, pooled, *guidance = unpack(
            words, network.config.pooled_projection_dim, *[1] * self.reads_guidance(network)
        )
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], 2).reshape(-1, 3)
        output = network(
            in_tokens(sample), encoder_hidden_states=states, pooled_projections=pooled, timestep=timesteps / 1000,
            img_ids=places.to(sample), txt_ids=sample.new_zeros(states.shape[1], 3),
            guidance=guidance[0][:, 0] if guidance else None,
        ).sample  # fmt: skip
        return from_tokens(output, height, width)

    def reads_guidance(self, network: Any) -> bool:
        """Whether the published network is told the guidance and makes one pass: the dev models."""
        return bool(network.config.guidance_embeds)

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """The pipeline gives the levels before the shift."""
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))


def in_tokens(sample: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) as tokens (n, h w / 4, 4 c) of squares of 2 x 2; h and w are even."""
    n, c, h, w = sample.shape
    squares = sample.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * PATCH * PATCH)


def from_tokens(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (n, height width, 4 c) as latents (n, c, 2 height, 2 width)."""
    squares = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, PATCH * height, PATCH * width)
