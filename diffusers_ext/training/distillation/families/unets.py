"""Stable Diffusion 1.x, 2.x and XL: a UNet that reads the states of CLIP encoders.

Podell et al. 2023, "SDXL", arXiv 2307.01952: two encoders side by side, the pooled embedding of the second, and the sizes that a
picture was made in, all as the stock pipeline gives them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

from ...adapters import TARGET_MODULES
from ...text_to_image import token_ids
from .conditions import pack, unpack


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x, and what other families do alike.

    In all methods `pipeline` is of the family's class. What follows the prompt in a condition are `numbers`, the same for all prompts.
    """

    pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline
    translator_class: type[DiffusionPipeline] | None = StableDiffusionImg2ImgPipeline
    """Translates pictures with the same parts."""
    part: str = "unet"
    """Name of the denoiser in the pipeline."""
    tag: str = "stable-diffusion"
    """On the Hub."""
    taken_by: str = ""
    """The scripts that take it, if these are not all."""
    lora_layers: tuple[str, ...] = TARGET_MODULES
    """Ends of the names of the layers that a LoRA is put on."""
    large_pictures: bool = False
    """Whether pictures are so large that they pass the autoencoder one by one."""
    loading: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    """Arguments of `from_pretrained`."""

    def load(self, name: str) -> Any:
        """The pipeline of a folder or Hub id, in float32."""
        pipeline: Any = self.pipeline_class.from_pretrained(
            name, **self.loading, use_safetensors=True, dtype=torch.float32
        )
        if self.large_pictures:
            # a batch of 1024 pixels at once takes tens of GB
            pipeline.vae.enable_slicing()
        return pipeline

    def settle(self, pipeline: Any, resolution: int | None) -> None:
        """Takes from the pipeline what depends on the resolution of its pictures, and refuses one that it cannot paint.

        Args:
            pipeline: Its scheduler may be exchanged.
            resolution: Side of the pictures in pixels; `None` for that of the pipeline's own samples.

        Raises:
            ValueError: If latents of this resolution do not fit the network.
        """

    def text_encoders(self, pipeline: Any) -> list[nn.Module]:
        """Those that there are, in the order of their tokens."""
        return [pipeline.text_encoder]

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids (n, length) on the CPU; those of several tokenizers side by side."""
        return token_ids(pipeline.tokenizer, prompts)

    def numbers(self, pipeline: Any, resolution: int | None, guidance_scale: float) -> list[float]:
        """What the network reads besides sample, timestep and prompt."""
        return []

    def condition(self, pipeline: Any, input_ids: torch.Tensor, numbers: list[float]) -> torch.Tensor:
        """The condition (n, length, width) of token ids (n, length), on the pipeline's device."""
        return pipeline.text_encoder(input_ids.to(pipeline.device))[0]

    def unconditional(self, pipeline: Any, numbers: list[float]) -> torch.Tensor:
        """The condition (1, length, width) that guidance leads away from, where the stock pipeline gets no negative prompt."""
        return self.condition(pipeline, self.tokens(pipeline, [""]), numbers)

    def denoise(
        self,
        network: Any,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        words: torch.Tensor,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A network's prediction.

        Args:
            network: The denoiser of such a pipeline, or a copy of it.
            sample: Noisy latents (n, c, h, w).
            timesteps: (n,), from 0 to 1000.
            words: Their condition (n, length, width).
            told: Embedding (n, d) of a number, for a UNet that has a `time_cond_proj_dim` d.

        Returns:
            (n, c, h, w).
        """
        return network(sample, timesteps, words, **_told(told)).sample

    def reads_guidance(self, network: Any) -> bool:
        """Whether the published network is told the guidance and makes one pass."""
        return False

    def student_pipeline(
        self,
        pipeline: Any,
        network: nn.Module,
        scheduler: SchedulerMixin,
        kind: type[DiffusionPipeline] | None = None,
    ) -> Any:
        """A pipeline with another denoiser and scheduler; of the class `kind` instead of its own if one is given."""
        parts = {**pipeline.components, self.part: network, "scheduler": scheduler}
        return (kind or self.pipeline_class)(**parts, **self.making(pipeline))

    def making(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the pipeline's class besides its parts."""
        return {"requires_safety_checker": False}

    def save_lora(self, folder: Path, layers: dict[str, torch.Tensor]) -> None:
        """Writes an adapter of the denoiser as a file for `load_lora_weights`."""
        save: Any = self.pipeline_class
        save.save_lora_weights(folder, **{f"{self.part}_lora_layers": layers})

    def shift(self, pipeline: Any) -> float:
        """How much more of a flow's schedule lies at the noise: level s goes to shift s / (1 + (shift - 1) s)."""
        config = pipeline.scheduler.config
        return float(config.get("flow_shift", config.get("shift", 1.0)))

    def renoising_scheduler(self, pipeline: Any, steps: int) -> SchedulerMixin:
        """The stock scheduler that takes a flow's clean sample in each step and adds new noise to it.

        Args:
            pipeline: A flow.
            steps: Of the student.

        Raises:
            ValueError: If diffusers has none for so many steps.
        """
        if steps > 1:
            raise ValueError(
                f"num_denoising_steps={steps} needs a scheduler that adds new noise to a flow, and diffusers has none for a "
                f"{type(pipeline).__name__}; give 1, or --method cdm, which needs none"
            )
        return self.euler_scheduler(pipeline)

    def euler_scheduler(self, pipeline: Any) -> SchedulerMixin:
        """The stock scheduler that runs Euler's method on the levels of a flow.

        It is the multistep solver of order 1: the flow-matching schedulers lack what these pipelines ask for.
        """
        return DPMSolverMultistepScheduler.from_config(
            own_settings(pipeline.scheduler),
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.shift(pipeline),
            algorithm_type="dpmsolver++",
            solver_order=1,
            final_sigmas_type="zero",
            steps_offset=1,  # not used on flow sigmas; the stock pipeline warns about any other value
        )

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Sets a scheduler to so many steps, as the stock pipeline does."""
        scheduler.set_timesteps(steps)


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL."""

    pipeline_class = StableDiffusionXLPipeline
    translator_class = StableDiffusionXLImg2ImgPipeline
    tag = "stable-diffusion-xl"
    large_pictures = True
    loading = {"add_watermarker": False}

    def text_encoders(self, pipeline: Any) -> list[nn.Module]:
        """One or both of the CLIP encoders."""
        return [encoder for encoder in (pipeline.text_encoder, pipeline.text_encoder_2) if encoder is not None]

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids of both tokenizers."""
        tokenizers = [part for part in (pipeline.tokenizer, pipeline.tokenizer_2) if part is not None]
        return torch.cat([token_ids(tokenizer, prompts) for tokenizer in tokenizers], 1)

    def numbers(self, pipeline: Any, resolution: int | None, guidance_scale: float) -> list[float]:
        """The time ids: the size that a picture was made in, the corner it was cut at, and the wanted size."""
        side = float(resolution or pipeline.default_sample_size * pipeline.vae_scale_factor)
        return [side, side, 0.0, 0.0, side, side]

    def condition(self, pipeline: Any, input_ids: torch.Tensor, numbers: list[float]) -> torch.Tensor:
        """The last but one states of both encoders, the pooled embedding of the last one, and the time ids."""
        encoders = self.text_encoders(pipeline)
        parts = input_ids.to(pipeline.device).chunk(len(encoders), 1)
        outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, parts)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], 2)
        return pack(states, outputs[-1][0], states.new_tensor(numbers).expand(len(states), -1))

    def unconditional(self, pipeline: Any, numbers: list[float]) -> torch.Tensor:
        """That of the empty prompt, or zeros where the pipeline says `force_zeros_for_empty_prompt`."""
        states, pooled, sizes = unpack(
            super().unconditional(pipeline, numbers), pipeline.text_encoder_2.config.projection_dim, len(numbers)
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        return pack(states, pooled, sizes)

    def denoise(
        self,
        network: Any,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        words: torch.Tensor,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A network's prediction."""
        config, sizes = network.config, 6
        pooled_width = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        states, pooled, time_ids = unpack(words, pooled_width, sizes)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return network(sample, timesteps, states, added_cond_kwargs=added, **_told(told)).sample

    def making(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the pipeline's class besides its parts."""
        return {**self.loading, "force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt}


def own_settings(scheduler: Any) -> dict[str, Any]:
    """The configuration of a scheduler without the entries of diffusers itself, for one of another class."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def _told(told: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if told is None else {"timestep_cond": told}
