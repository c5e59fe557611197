"""What a stream of pictures needs of a pipeline: its networks, with prompts and pictures brought to them and back."""

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .pipeline_guide_and_rescale import GuideAndRescalePipeline
from .pipeline_guide_and_rescale_sdxl import GuideAndRescaleStableDiffusionXLPipeline


def networks_of(pipe: Any) -> Any:
    """The editing pipeline of a model's family, which knows how words and pictures become what the network takes, and back.

    Args:
        pipe ([`DiffusionPipeline`]): A pipeline with the components of Stable Diffusion 1.x, 2.x or XL; they are shared.

    Returns:
        [`GuideAndRescalePipeline`] or [`GuideAndRescaleStableDiffusionXLPipeline`].

    Raises:
        ValueError: If it is of another family, or a component is missing.
    """
    unet, scheduler = (getattr(pipe, name, None) for name in ("unet", "scheduler"))
    if not isinstance(pipe, DiffusionPipeline) or unet is None:
        raise ValueError(
            f"pipe={type(pipe).__name__} has no UNet; give a StableDiffusionPipeline or a StableDiffusionXLPipeline"
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} is not that of a diffusion model with variances; give the pipeline a "
            "DDIMScheduler"
        )
    settings: dict[str, Any] = {"requires_safety_checker": False}
    family: Any = GuideAndRescalePipeline
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        family = GuideAndRescaleStableDiffusionXLPipeline
        settings = {
            "add_watermarker": getattr(pipe, "watermark", None) is not None,
            "force_zeros_for_empty_prompt": pipe.config.get("force_zeros_for_empty_prompt", True),
        }
    components, _ = family._get_signature_keys(family)
    networks = family(**{name: getattr(pipe, name, None) for name in components}, **settings)
    networks._check_model()
    return networks
