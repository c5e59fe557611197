"""FlowChef for FLUX.1.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, 2024, arXiv 2412.00100. The transformer predicts
v = eps - x0 of latents x0 = (z - shift) scale, z the autoencoder's, whose squares of 2 by 2 are tokens. The authors' code leaves the
shift out where it encodes, though not where it decodes.

The modes are in `flow_chef.py`, and shared with the pipelines for Stable Diffusion 3 and for UNets.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

from ..integrity import CheckedLoadingMixin
from ..steering import PackedObjective
from .flow_chef import FlowChefMixin, Steering
from .one_at_a_time import one_at_a_time


class FlowChefFluxPipeline(CheckedLoadingMixin, FlowChefMixin, FluxPipeline):
    """Samples from a FLUX.1 model, and inpaints, edits, restores and guides with it.

    It is made of the components of a `FluxPipeline` and loads from the same repositories; without an argument of steering a call is
    the stock pipeline's, bit for bit. Edits are guided by `true_cfg_scale`, which must be above 1.

    Example:
        ```python no-run
        import torch
        from diffusers_ext import FlowChefFluxPipeline
        from diffusers_ext.imaging import open_image

        pipe = FlowChefFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
        picture, mask = open_image("cat.png"), open_image("mask.png")  # white is painted
        image = pipe(
            "a dog", source_prompt="a cat", true_cfg_scale=3.0, image=picture, mask_image=mask, source_stop=0.2,
            num_inference_steps=30,
        ).images[0]
        ```
    """

    _guidance_name = "true_cfg_scale"

    @one_at_a_time("scheduler")
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 512,
        image: Any = None,
        mask_image: Any = None,
        source_prompt: str | list[str] | None = None,
        operator: Any = None,
        measurement: Any = None,
        objective: Any = None,
        noise_std: float | None = None,
        source_stop: float = 0.0,
        steering_kwargs: dict[str, Any] | None = None,
    ) -> FluxPipelineOutput | tuple[Any]:
        """Samples pictures, steered if an argument says where to.

        Args:
            image, mask_image, source_prompt, operator, measurement, objective, noise_std, source_stop, steering_kwargs (*optional*):
                As of [`FlowChefPipeline`]. An objective is one of latents of shape `(batch, channels, height, width)`, as before
                packing.

        All other arguments are those of `FluxPipeline`, with its defaults.

        Returns:
            `FluxPipelineOutput` or `tuple`: The pictures.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]).
            TypeError: If an argument is of a wrong type, or the scheduler is not one of a flow model.
        """
        call = {
            "prompt": prompt, "prompt_2": prompt_2, "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2, "true_cfg_scale": true_cfg_scale, "height": height, "width": width,
            "num_inference_steps": num_inference_steps, "sigmas": sigmas, "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt, "generator": generator, "latents": latents,
            "prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds,
            "ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "negative_ip_adapter_image": negative_ip_adapter_image,
            "negative_ip_adapter_image_embeds": negative_ip_adapter_image_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds, "output_type": output_type,
            "return_dict": return_dict, "joint_attention_kwargs": joint_attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length,
        }  # fmt: skip
        steering = Steering(
            image, mask_image, source_prompt, operator, measurement, objective, noise_std, source_stop, steering_kwargs
        )
        return self._steered(call, steering)

    def _side_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    def _default_side(self) -> tuple[int, int]:
        side = self.default_sample_size * self.vae_scale_factor
        return side, side

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, ...]:
        return count, height * width // self._side_multiple() ** 2, self.transformer.config.in_channels

    def _seen_by_scheduler(self, objective: Any, height: int, width: int) -> Any:
        return PackedObjective(objective, height // self.vae_scale_factor, width // self.vae_scale_factor)
