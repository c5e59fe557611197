"""FlowChef for flow models in the layout of Stable Diffusion.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, 2024, arXiv 2412.00100. The UNet predicts the
velocity of x_t = (1 - t) x0 + t eps at the timestep 1000 t, with one of the signs of `velocity_sign.py`. The modes are in `flow_chef.py`, and
shared with the pipelines for SD3 and Flux.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..integrity import CheckedLoadingMixin
from ..schedulers import FlowChefScheduler
from .editing import check_family
from .flow_chef import FlowChefMixin, Steering
from .inputs import check_kwargs, check_text_to_image, checked_choice, checked_number
from .one_at_a_time import one_at_a_time
from .velocity_sign import VELOCITIES, VelocitySignMixin, check_flow, is_of_flow


class FlowChefPipeline(CheckedLoadingMixin, VelocitySignMixin, FlowChefMixin, StableDiffusionPipeline):
    """Samples from a flow model in the layout of Stable Diffusion, and inpaints, edits, restores and guides with it.

    It is made of the components of a `StableDiffusionPipeline` and loads from the same repositories; without an argument of
    steering a call is the stock pipeline's, bit for bit. The scheduler may be one of a flow model, or that which a repository of a
    rectified flow was left with; see `velocity`.

    Args:
        vae ([`AutoencoderKL`]): Picture to latents and back.
        text_encoder ([`~transformers.CLIPTextModel`]): Text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): Its tokenizer.
        unet ([`UNet2DConditionModel`]): Predicts the velocity from latents, timestep (1000 t) and text.
        scheduler ([`SchedulerMixin`]): One of a flow model: `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler` with
            `use_flow_sigmas`, or one of this package's FlowChef schedulers.
        safety_checker ([`StableDiffusionSafetyChecker`], *optional*): Checks the results.
        feature_extractor ([`~transformers.CLIPImageProcessor`], *optional*): Feeds the safety checker.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*): Encodes the picture prompt of an IP-Adapter.
        requires_safety_checker (`bool`, *optional*, defaults to `True`): Whether diffusers warns if there is none.
        velocity (`str`, *optional*, defaults to `"noise_minus_data"`): Sign of what the UNet predicts. `"data_minus_noise"` is
            InstaFlow's, whose repositories hold the scheduler of the diffusion model that it was made from: it is exchanged for a
            [`FlowChefScheduler`].

    Example:
        ```python
        import torch
        from PIL import Image
        from diffusers import DPMSolverMultistepScheduler
        from diffusers_ext import FlowChefPipeline

        # a flow in the layout of this repository; its scheduler says so in a repository that was trained as one
        flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1)
        pipe = FlowChefPipeline.from_pretrained("pipelines/emoji-scenes-64", scheduler=flow)
        picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
        mask.paste(255, (16, 16, 48, 48))  # white is painted
        painted = pipe("a blue star", image=picture, mask_image=mask, num_inference_steps=4).images[0]
        ```
    """

    # Repeated in full, since diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        velocity: str = "noise_minus_data",
    ) -> None:
        checked_choice(velocity, "velocity", VELOCITIES)
        check_text_to_image(unet, vae)
        if velocity == "data_minus_noise" and scheduler is not None and not is_of_flow(scheduler):
            scheduler = FlowChefScheduler()
        super().__init__(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )  # fmt: skip
        self.register_to_config(velocity=velocity)

    @one_at_a_time("scheduler", "unet")
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        image: Any = None,
        mask_image: Any = None,
        source_prompt: str | list[str] | None = None,
        operator: Any = None,
        measurement: Any = None,
        objective: Any = None,
        noise_std: float | None = None,
        source_stop: float = 0.0,
        steering_kwargs: dict[str, Any] | None = None,
    ) -> StableDiffusionPipelineOutput | tuple[Any, Any]:
        """Samples pictures, steered if an argument says where to.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them, *optional*):
                The picture to inpaint or edit, one for all prompts or one for each. It is scaled to `height` and `width` if given.
            mask_image (as `image`, *optional*):
                White where it is to be painted, black where it stays.
            source_prompt (`str` or `list[str]`, *optional*):
                What the picture shows. With it a call is an edit: guidance leads from it to `prompt`.
            operator ([`LinearOperator`], *optional*), measurement (`torch.Tensor` or a picture, *optional*):
                What was measured of a picture in [-1, 1], and how. The gradient goes through the decoder.
            objective ([`Objective`], *optional*):
                Anything else that the latents, shifted and scaled, shall be steered towards; [`DecodedObjective`] makes one of an
                objective of pictures.
            noise_std (`float`, *optional*):
                Standard deviation of the noise of the measurement, by default 0.05; with `image` how far the kept latents may be from
                the picture's, by default 0.
            source_stop (`float`, *optional*, defaults to 0.0):
                Share of the run that holds the whole picture, also where it is to be painted: the larger, the more of its layout
                stays.
            steering_kwargs (`dict[str, Any]`, *optional*):
                Settings of [`FlowChefScheduler`], such as `data_step`, `learning_rate`, `renoise` and `steer_stop`.

        All other arguments are those of `StableDiffusionPipeline`, with its defaults.

        Returns:
            `StableDiffusionPipelineOutput` or `tuple`: The pictures, and whether the safety checker held them back.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or the scheduler is not one of a flow model.
            TypeError: If an argument is of a wrong type.
        """
        call = {
            "prompt": prompt, "height": height, "width": width, "num_inference_steps": num_inference_steps,
            "timesteps": timesteps, "sigmas": sigmas, "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt, "num_images_per_prompt": num_images_per_prompt, "generator": generator,
            "latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds,
            "ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "output_type": output_type, "return_dict": return_dict, "cross_attention_kwargs": cross_attention_kwargs,
            "guidance_rescale": guidance_rescale, "clip_skip": clip_skip, "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }  # fmt: skip
        check_kwargs(cross_attention_kwargs)
        checked_number(guidance_rescale, "guidance_rescale", 0.0, 1.0)
        check_flow(self.scheduler)
        steering = Steering(
            image, mask_image, source_prompt, operator, measurement, objective, noise_std, source_stop, steering_kwargs
        )
        with self._signed():
            return self._steered(call, steering)

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, level: float, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """eps - x0 as the UNet predicts it, whatever the sign it was trained with.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            level (`float`): t, from 1 (noise) to 0 (clean).
            prompt_embeds (`torch.Tensor` of shape `(batch, tokens, width)`): Of the prompts, from `encode_prompt`.

        Returns:
            `torch.Tensor` of the shape of `latents`: float32.
        """
        timestep = torch.full((len(latents),), 1000.0 * level, device=latents.device)
        with self._signed():
            answer = self.unet(
                latents.to(self.unet.dtype), timestep, encoder_hidden_states=prompt_embeds, return_dict=False
            )
        return answer[0].float()

    def _side_multiple(self) -> int:
        return math.lcm(8, self.vae_scale_factor)

    def _default_side(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, ...]:
        factor = self.vae_scale_factor
        return count, self.unet.config.in_channels, height // factor, width // factor

    @classmethod
    def _check_family(cls, index: dict[str, Any], source: str) -> None:
        check_family(cls, index, source, "Stable Diffusion 1.x or 2.x")
