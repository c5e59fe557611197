"""What the editing pipelines share: pictures to latents and back, checks of a call, and the form of its result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils import BaseOutput

from ..inversion import DDIMLadder, InversionOutput, model_fingerprint
from .conditioning import ConditioningMixin, SDXLConditioningMixin
from .inputs import (
    check_finite,
    checked_prompts,
    checked_steps,
    checked_timesteps,
    pad_to_multiple,
    spread,
)


PipelineImage = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)


@dataclass
class EditingPipelineOutput(BaseOutput):
    """What an edit gives.

    Attributes:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The edited pictures.
        nsfw_content_detected (`list[bool]`, *optional*): The safety checker's flags; None without one.
        network_evaluations (`int`): Forward passes of the UNet, each sample of a batch counted, those of the inversion
            included if the call made it.
        backward_passes (`int`): Gradients through the UNet, counted in the same way.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None = None
    network_evaluations: int = 0
    backward_passes: int = 0


class EditingMixin(ConditioningMixin):
    """Latents, results and checks; put it before the pipeline class that has the components."""

    _callback_tensor_inputs: list[str]

    # Given by the pipeline class.
    scheduler: Any
    vae_scale_factor: int
    image_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    run_safety_checker: Any

    def _ladder(self, num_inference_steps: Any, timesteps: Any) -> DDIMLadder:
        steps = checked_steps(num_inference_steps)
        return DDIMLadder.from_scheduler_config(self.scheduler.config, steps, checked_timesteps(timesteps))

    def _inversion_config(
        self, ladder: DDIMLadder, alignment: str, image_size: Sequence[int], method: str = "ddim"
    ) -> dict[str, Any]:
        components = ("vae", *self._text_encoders, "unet")
        return {
            "method": method,
            "alignment": alignment,
            "num_inference_steps": len(ladder),
            "image_size": list(image_size),
            "scheduler": ladder.config,
            "model": model_fingerprint({name: getattr(self, name) for name in components}),
        }

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of pictures in [-1, 1], one picture at a time; those are extended to a size that the networks divide."""
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        padded = pad_to_multiple(pixels, multiple)
        with self._vae_precision():
            padded = padded.to(self._execution_device, self.vae.dtype)
            encoded = [retrieve_latents(self.vae.encode(picture), sample_mode="argmax") for picture in padded.split(1)]
        scale, shift = self._latent_statistics(encoded[0])
        return (torch.cat(encoded) - shift) * scale

    def _decode_latents(self, latents: torch.Tensor, generator: Any) -> torch.Tensor:
        """Pictures in [-1, 1] from latents."""
        with self._vae_precision():
            latents = latents.to(self.vae.dtype)
            scale, shift = self._latent_statistics(latents)
            return self.vae.decode(latents / scale + shift, return_dict=False, generator=generator)[0]

    def _latent_statistics(self, like: torch.Tensor) -> tuple[Any, Any]:
        """What latents are multiplied with after a shift; a few SDXL autoencoders have a mean and deviation a channel."""
        config = self.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return config.scaling_factor, 0.0
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, deviation))
        return config.scaling_factor / deviation, mean

    @contextmanager
    def _vae_precision(self) -> Iterator[None]:
        """The VAE as it is; SDXL's overflows in half precision and is float32 for the time of a `with` block."""
        yield

    def _check_picture(self, image: Any, source_prompt: Any, inversion: Any, height: Any, width: Any) -> None:
        """A picture with its prompt, or the inversion of one: raises unless there is just one of the two."""
        if inversion is None:
            if image is None:
                raise ValueError("image is missing; give a picture, or the inversion of one")
            checked_prompts(source_prompt, "source_prompt")
        elif image is not None:
            raise ValueError("image and inversion are both given; give one, the inversion holds the picture already")
        elif not isinstance(inversion, InversionOutput):
            raise TypeError(f"inversion is of type {type(inversion).__name__}; give what `invert` returned")
        elif problem := inversion.problem():
            raise ValueError(f"inversion cannot be used: {problem}")
        elif height is not None or width is not None:
            raise ValueError("height and width have no effect on an inversion; give them to `invert`")

    def _check_gradients(self, what: str, cure: str) -> None:
        """Raises where the network can give none, before the work that comes first."""
        if torch.is_inference_mode_enabled() or any(p.is_inference() for p in self.unet.parameters()):
            raise ValueError(
                f"{what} needs gradients, which torch.inference_mode() forbids; load and call the pipeline outside of it "
                f"(torch.no_grad() is fine), or {cure}"
            )
        if any(parameter.is_meta for parameter in self.unet.parameters()):
            raise ValueError(
                f"{what} needs gradients through the UNet, whose weights are put away by enable_sequential_cpu_offload(); "
                f"use enable_model_cpu_offload(), or {cure}"
            )

    @staticmethod
    def _source_prompts(source_prompt: Any, pictures: int) -> list[str] | None:
        """One source prompt for each picture of an inversion; None if the call has none."""
        if source_prompt is None:
            return None
        return spread(checked_prompts(source_prompt, "source_prompt"), pictures, "source_prompt", "pictures")

    @staticmethod
    def _results(prompt: Any, pictures: int) -> list[str]:
        prompts = checked_prompts(prompt, "prompt")
        return prompts if pictures == 1 else spread(prompts, pictures, "prompt", "pictures")

    def _decode(
        self, latents: torch.Tensor, image_size: Sequence[int], generator: Any, output_type: str
    ) -> tuple[Any, list[bool] | None]:
        pixels = self._decode_latents(latents, generator)
        check_finite(pixels, "the decoded picture", self.vae.dtype)
        height, width = image_size
        pixels = pixels[..., :height, :width]
        pixels, flags = self._checked_pixels(pixels, latents)
        keep = [True] * len(pixels) if flags is None else [not flag for flag in flags]
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=keep), flags

    def _checked_pixels(self, pixels: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Pictures that may be shown, and which of them were held back."""
        return self.run_safety_checker(pixels, latents.device, latents.dtype)


class SDXLEditingMixin(SDXLConditioningMixin):
    """What is different for SDXL; put it before the mixin of the method."""

    watermark: Any

    @contextmanager
    def _vae_precision(self) -> Iterator[None]:
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(torch.float16)

    def _checked_pixels(self, pixels: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, None]:
        return pixels if self.watermark is None else self.watermark.apply_watermark(pixels), None


def check_family(pipeline_class: Any, index: dict[str, Any], source: str, family: str) -> None:
    """Refuses a repository of another family by its `model_index.json`, before any weight is fetched.

    Args:
        pipeline_class (`type`): The pipeline that shall be loaded.
        index (`dict`): The repository's `model_index.json`.
        source (`str`): Its name, for the message.
        family (`str`): The models that the pipeline takes, for the message.

    Raises:
        ValueError: If it has no text-conditioned UNet, lacks a component, or has one that the pipeline does not know.
    """
    components = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    kind = index.get("_class_name")
    needs = f"{pipeline_class.__name__} needs a {family} text-to-image model"
    if "UNet2DConditionModel" not in components.get("unet", []):
        raise ValueError(f"{source} is a {kind}, which has no text-conditioned UNet: {needs}")
    required, optional = pipeline_class._get_signature_keys(pipeline_class)
    extra = sorted(name for name in components if not name.startswith("_") and name not in {*required, *optional})
    if extra:
        raise ValueError(f"{source} is a {kind}, which has {', '.join(extra)} besides: {needs}")
    missing = sorted({*required} - {*components} - {*pipeline_class._optional_components})
    if missing:
        raise ValueError(f"{source} is a {kind}, which has no {', '.join(missing)}: {needs}")
