"""Sampling of consistency trajectory models (CTM, Kim et al. 2023, arXiv 2310.02279) in the layout of Stable Diffusion.

The network jumps from the timestep of its input to a lower one that it is told through the input that other distilled networks have for the
guidance (`time_cond_proj_dim`). `StableDiffusionPipeline` makes the embedding for that input once, from `guidance_scale - 1`; here it is made
anew for each step, from the thousandth of the timestep that `CTMScheduler` jumps to, as in training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..integrity import CheckedLoadingMixin
from ..schedulers import CTMScheduler
from ..schedulers.noise import check_generator
from .editing import check_family
from .inputs import (
    OUTPUT_TYPES,
    check_kwargs,
    check_size,
    check_text_to_image,
    checked_choice,
    checked_prompts,
    checked_steps,
    checked_timesteps,
    given_latents,
)
from .one_at_a_time import one_at_a_time


class CTMPipeline(CheckedLoadingMixin, StableDiffusionPipeline):
    """Samples what `training/train_consistency.py --method ctm` has trained, with any share of fresh noise.

    It loads from the folder of such a run, whose stock scheduler is exchanged for a [`CTMScheduler`] of the timesteps that were trained on.
    Guidance is part of the weights. How much noise each step draws anew is `gamma` of the scheduler.

    Args:
        vae ([`AutoencoderKL`]): Picture to latents and back.
        text_encoder ([`~transformers.CLIPTextModel`]): Text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): Its tokenizer.
        unet ([`UNet2DConditionModel`]): The student, with `time_cond_proj_dim` in its config.
        scheduler ([`CTMScheduler`] or another): Another one gives its config.
        safety_checker ([`StableDiffusionSafetyChecker`], *optional*): Checks the results.
        feature_extractor ([`~transformers.CLIPImageProcessor`], *optional*): Feeds the safety checker.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*): Encodes the picture prompt of an IP-Adapter.
        requires_safety_checker (`bool`, *optional*, defaults to `True`): Whether diffusers warns if there is none.

    Raises:
        ValueError: If the network cannot be told where to jump.

    Example:
        ```python no-run
        from diffusers_ext import CTMPipeline, CTMScheduler

        pipe = CTMPipeline.from_pretrained("runs/emoji-ctm")
        pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, gamma=0.3)
        image = pipe("a red star on a blue background", num_inference_steps=2).images[0]
        ```
    """

    # Repeated in full, since diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: CTMScheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        check_text_to_image(unet, vae)
        if unet is not None and unet.config.time_cond_proj_dim is None:
            raise ValueError(
                "unet has time_cond_proj_dim=None and cannot be told where to jump; give one of train_consistency.py --method ctm"
            )
        if scheduler is not None and not isinstance(scheduler, CTMScheduler):
            scheduler = CTMScheduler.from_config(
                scheduler.config, timestep_spacing="trailing", final_sigmas_type="sigma_min"
            )
        super().__init__(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )  # fmt: skip

    @one_at_a_time("scheduler")
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        timesteps: list[int] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> StableDiffusionPipelineOutput | tuple[Any, Any]:
        """Samples pictures. All arguments are those of `StableDiffusionPipeline`; guidance has none, as it is part of the weights.

        Returns:
            `StableDiffusionPipelineOutput` or `tuple`: The pictures, and whether the safety checker held them back.

        Raises:
            ValueError: If an argument is wrong, or the scheduler is not a [`CTMScheduler`].
            TypeError: If an argument is of a wrong type.
        """
        if not isinstance(self.scheduler, CTMScheduler):
            raise ValueError(
                f"scheduler={type(self.scheduler).__name__} does not say where it jumps to; use CTMScheduler.from_config"
            )
        timesteps = checked_timesteps(timesteps)
        # the scheduler refuses more steps than it was trained on
        checked_steps(num_inference_steps)
        images = checked_steps(num_images_per_prompt, "num_images_per_prompt")
        if prompt is not None:
            images *= 1 if isinstance(prompt, str) else len(checked_prompts(prompt, "prompt"))
        elif isinstance(prompt_embeds, torch.Tensor) and prompt_embeds.ndim:
            images *= len(prompt_embeds)
        check_size(height, width)
        check_generator(generator, images)
        check_kwargs(cross_attention_kwargs)
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        if latents is not None:
            side = self.unet.config.sample_size
            sides = [(asked or side * self.vae_scale_factor) // self.vae_scale_factor for asked in (height, width)]
            given_latents(latents, torch.empty(images, self.unet.config.in_channels, *sides))
        with self._told_where_to_jump():
            return super().__call__(
                prompt=prompt, height=height, width=width, num_inference_steps=num_inference_steps, timesteps=timesteps,
                guidance_scale=1.0, num_images_per_prompt=num_images_per_prompt, generator=generator, latents=latents,
                prompt_embeds=prompt_embeds, ip_adapter_image=ip_adapter_image,
                ip_adapter_image_embeds=ip_adapter_image_embeds, output_type=output_type, return_dict=return_dict,
                cross_attention_kwargs=cross_attention_kwargs, clip_skip=clip_skip,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )  # fmt: skip

    @contextmanager
    def _told_where_to_jump(self) -> Iterator[None]:
        """The embedding of the stock loop, which is the same in all steps, is exchanged for that of each step."""

        def tell(unet: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            sample, timestep = inputs
            end = self.scheduler.target_timesteps[self.scheduler.index_for_timestep(timestep)]
            told = self.get_guidance_scale_embedding(
                end.cpu().expand(len(sample)) / 1000.0, embedding_dim=unet.config.time_cond_proj_dim
            )
            return inputs, {**options, "timestep_cond": told.to(sample)}

        hook = self.unet.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @classmethod
    def _check_family(cls, index: dict[str, Any], source: str) -> None:
        check_family(cls, index, source, "Stable Diffusion 1.x or 2.x")
