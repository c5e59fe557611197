"""Text-guided editing of real pictures with Guide-and-Rescale, for SDXL. Experimental: the authors did not run it.

Guide-and-Rescale: Self-Guidance with Noise Rescaling for Image Editing, 2024, arXiv 2409.01322. The loop is in
`guide_and_rescale.py`. Against Stable Diffusion 1.x and 2.x, prompts go through two text encoders, and the energies are averaged
over layers and read from the middle and the first up block only (`guidance/presets.py`): SDXL has 70 self-attention layers, and
a sum over them with the authors' scales would leave nothing to the other energies.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..guidance import SDXL_PRESETS, GuidancePreset
from ..integrity import CheckedLoadingMixin
from .editing import SDXLEditingMixin, check_family
from .guide_and_rescale import GuideAndRescaleMixin
from .inputs import check_text_to_image


class GuideAndRescaleStableDiffusionXLPipeline(
    CheckedLoadingMixin, SDXLEditingMixin, GuideAndRescaleMixin, StableDiffusionXLPipeline
):
    """Edits pictures by words, without training, with any SDXL base model. Experimental.

    It is made of the components of a `StableDiffusionXLPipeline` and loads from the same repositories; the call is that of
    [`GuideAndRescalePipeline`]. Sizes and crops that SDXL is conditioned on are those of the picture, uncropped.

    Args:
        vae ([`AutoencoderKL`]): Picture to latents and back; run in float32 if it says so (`force_upcast`).
        text_encoder ([`~transformers.CLIPTextModel`]): First text encoder.
        text_encoder_2 ([`~transformers.CLIPTextModelWithProjection`]): Second text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): Tokenizer of the first.
        tokenizer_2 ([`~transformers.CLIPTokenizer`]): Tokenizer of the second.
        unet ([`UNet2DConditionModel`]): Predicts noise or v.
        scheduler ([`SchedulerMixin`]): Any scheduler of the model.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*): Encodes the picture prompt of an
            IP-Adapter.
        feature_extractor ([`~transformers.CLIPImageProcessor`], *optional*): Prepares that picture.
        force_zeros_for_empty_prompt (`bool`, *optional*, defaults to `True`): Whether no negative prompt is zeros.
        add_watermarker (`bool`, *optional*): Whether to mark results invisibly; by default if the package for it is there.

    Example:
        ```python
        from diffusers_ext import GuideAndRescaleStableDiffusionXLPipeline

        assert "text_encoder_2" in GuideAndRescaleStableDiffusionXLPipeline._needed_components
        ```
    """

    # Unlike in the parent, which also serves a refiner without the first text encoder.
    _optional_components = ["image_encoder", "feature_extractor"]
    _presets: Mapping[str, GuidancePreset] = SDXL_PRESETS

    # Repeated in full, since diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        check_text_to_image(unet, vae, addition_embed_type="text_time")
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )

    @classmethod
    def _check_family(cls, index: dict[str, Any], source: str) -> None:
        check_family(cls, index, source, "Stable Diffusion XL")
