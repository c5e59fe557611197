"""Text-guided editing of real pictures with Guide-and-Rescale.

Guide-and-Rescale: Self-Guidance with Noise Rescaling for Image Editing, 2024, arXiv 2409.01322.

The picture is inverted by DDIM with its own prompt. Sampling then starts from the noise with the wanted prompt, and for the
first part of the steps each prediction is corrected by the gradient of energies that compare the network's inner state on
the edit with that on the inverted picture at the same noise level:

    eps_hat = eps(z, 0) + c + gamma dE/dz,   c = w (eps(z, y_t) - eps(z, 0)),   gamma = clip(r, low, high) / r,   r = ||dE/dz|| / ||c||

The loop is in `guide_and_rescale.py`, and shared with the pipeline for SDXL.
"""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..integrity import CheckedLoadingMixin
from .editing import check_family
from .guide_and_rescale import GuideAndRescaleMixin, GuideAndRescalePipelineOutput
from .inputs import check_text_to_image


__all__ = ["GuideAndRescalePipeline", "GuideAndRescalePipelineOutput"]


class GuideAndRescalePipeline(CheckedLoadingMixin, GuideAndRescaleMixin, StableDiffusionPipeline):
    """Edits pictures by words, without training, with any Stable Diffusion 1.x or 2.x model.

    It is made of the components of a `StableDiffusionPipeline` and loads from the same repositories. The scheduler only
    lends its config: sampling and inversion are deterministic DDIM, and the scheduler itself is never changed. While a call
    runs its guided steps the UNet carries our attention processors, so a call while another thread is in one that uses the
    same UNet raises [`PipelineBusyError`].

    Args:
        vae ([`AutoencoderKL`]): Picture to latents and back.
        text_encoder ([`~transformers.CLIPTextModel`]): Text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): Its tokenizer.
        unet ([`UNet2DConditionModel`]): Predicts noise or v from latents, timestep and text.
        scheduler ([`SchedulerMixin`]): Any scheduler of the model.
        safety_checker ([`StableDiffusionSafetyChecker`], *optional*): Checks the results.
        feature_extractor ([`~transformers.CLIPImageProcessor`], *optional*): Feeds the safety checker.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*): Encodes the
            picture prompt of an IP-Adapter.
        requires_safety_checker (`bool`, *optional*, defaults to `True`): Whether diffusers warns if there is none.

    Example:
        ```python
        from PIL import Image
        from diffusers_ext import GuideAndRescalePipeline

        pipe = GuideAndRescalePipeline.from_pretrained("pipelines/emoji-scenes-64")
        picture = Image.new("RGB", (64, 64), "red")
        edited = pipe(picture, source_prompt="a red wall", prompt="a blue wall", num_inference_steps=4)
        edited.images[0].save("blue.png")
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
    ) -> None:
        check_text_to_image(unet, vae)
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )

    @classmethod
    def _check_family(cls, index: dict[str, Any], source: str) -> None:
        check_family(cls, index, source, "Stable Diffusion 1.x or 2.x")
