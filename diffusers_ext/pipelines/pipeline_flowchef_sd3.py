"""FlowChef for Stable Diffusion 3 and 3.5.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, 2024, arXiv 2412.00100. The transformer predicts
v = eps - x0 of latents x0 = (z - shift) scale, z the autoencoder's.

The modes are in `flow_chef.py`, and shared with the pipelines for Flux and for UNets.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

from ..integrity import CheckedLoadingMixin
from .flow_chef import FlowChefMixin, Steering
from .inputs import checked_number
from .one_at_a_time import one_at_a_time


class FlowChefStableDiffusion3Pipeline(CheckedLoadingMixin, FlowChefMixin, StableDiffusion3Pipeline):
    """Samples from a Stable Diffusion 3 model, and inpaints, edits, restores and guides with it.

    It is made of the components of a `StableDiffusion3Pipeline` and loads from the same repositories; without an argument of
    steering a call is the stock pipeline's, bit for bit.

    Example:
        ```python no-run
        import torch
        from diffusers_ext import FlowChefStableDiffusion3Pipeline
        from diffusers_ext.imaging import open_image

        pipe = FlowChefStableDiffusion3Pipeline.from_pretrained(
            "stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16
        ).to("cuda")
        picture, mask = open_image("wall.png"), open_image("mask.png")  # white is painted
        image = pipe("a red star on a blue wall", image=picture, mask_image=mask, num_inference_steps=28).images[0]
        ```
    """

    @one_at_a_time("scheduler")
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 256,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        source_prompt: str | list[str] | None = None,
        operator: Any = None,
        measurement: Any = None,
        objective: Any = None,
        noise_std: float | None = None,
        source_stop: float = 0.0,
        steering_kwargs: dict[str, Any] | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple[Any]:
        """Samples pictures, steered if an argument says where to.

        Args:
            image, mask_image, source_prompt, operator, measurement, objective, noise_std, source_stop, steering_kwargs (*optional*):
                As of [`FlowChefPipeline`].

        All other arguments are those of `StableDiffusion3Pipeline`, with its defaults.

        Returns:
            `StableDiffusion3PipelineOutput` or `tuple`: The pictures.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]).
            TypeError: If an argument is of a wrong type, or the scheduler is not one of a flow model.
        """
        call = {
            "prompt": prompt, "prompt_2": prompt_2, "prompt_3": prompt_3, "height": height, "width": width,
            "num_inference_steps": num_inference_steps, "sigmas": sigmas, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt, "negative_prompt_2": negative_prompt_2,
            "negative_prompt_3": negative_prompt_3, "num_images_per_prompt": num_images_per_prompt,
            "generator": generator, "latents": latents, "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds, "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds, "output_type": output_type, "return_dict": return_dict,
            "joint_attention_kwargs": joint_attention_kwargs, "clip_skip": clip_skip,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length, "skip_guidance_layers": skip_guidance_layers,
            "skip_layer_guidance_scale": skip_layer_guidance_scale,
            "skip_layer_guidance_stop": skip_layer_guidance_stop,
            "skip_layer_guidance_start": skip_layer_guidance_start, "mu": mu,
        }  # fmt: skip
        checked_number(skip_layer_guidance_scale, "skip_layer_guidance_scale", 0.0, 1e6)
        steering = Steering(
            image, mask_image, source_prompt, operator, measurement, objective, noise_std, source_stop, steering_kwargs
        )
        return self._steered(call, steering)

    def _side_multiple(self) -> int:
        return self.vae_scale_factor * self.patch_size

    def _default_side(self) -> tuple[int, int]:
        side = self.default_sample_size * self.vae_scale_factor
        return side, side

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, ...]:
        factor = self.vae_scale_factor
        return count, self.transformer.config.in_channels, height // factor, width // factor
