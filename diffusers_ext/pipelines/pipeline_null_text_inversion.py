"""Inversion of real pictures and their editing by words: null-text inversion, its relatives, and prompt-to-prompt.

Null-text Inversion for Editing Real Images using Guided Diffusion Models, 2022, arXiv 2211.09794;
Prompt-to-Prompt Image Editing with Cross Attention Control, 2022, arXiv 2208.01626.

`invert` finds latents z*_k from which the model would have drawn a picture, by one of seven methods (`diffusers_ext.inversion`).
The call then samples the edits from the noisiest of them, and beside them the source, whose attention a controller carries
over:

    z_src <- z*_{k-1}  or  S(z_src, source prompt),      z <- S(z, prompt | attention of the source)

where S is a sampling step with guidance. The loop is in `null_text_inversion.py`, and shared with the pipeline for SDXL.
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
from .inputs import check_text_to_image
from .null_text_inversion import NullTextInversionMixin, NullTextInversionPipelineOutput


__all__ = ["NullTextInversionPipeline", "NullTextInversionPipelineOutput"]


class NullTextInversionPipeline(CheckedLoadingMixin, NullTextInversionMixin, StableDiffusionPipeline):
    """Inverts pictures and edits them by words, with any Stable Diffusion 1.x or 2.x model.

    It is made of the components of a `StableDiffusionPipeline` and loads from the same repositories. The scheduler only
    lends its config and is never changed. While a call with a controller runs, the UNet carries its attention processors, so
    a call while another thread is in one that uses the same UNet raises [`PipelineBusyError`].

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
        from diffusers_ext import AttentionReplace, NullTextInversionPipeline

        pipe = NullTextInversionPipeline.from_pretrained("pipelines/emoji-scenes-64")
        prompts = ["a red wall", "a blue wall"]
        inversion = pipe.invert(Image.new("RGB", (64, 64), "red"), prompts[0], num_inference_steps=4)
        controller = AttentionReplace(pipe.tokenizer, prompts)
        edited = pipe(prompts[1], inversion=inversion, controller=controller)
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
