"""Restoration of degraded pictures by mean-reverting diffusion.

IR-SDE, Luo et al., ICML 2023, arXiv 2301.11699, sampled by MR Sampler, Li et al., ICLR 2025, arXiv 2502.07856. Diffusion leads from
the clean picture to the degraded one, mu, with noise around it; restoring is the way back. It starts at mu + sigma_inf eps, and
the network sees x_t - mu and mu in every step. With an autoencoder all of it happens in latents, as in Refusion (arXiv 2304.08291).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..integrity import CheckedLoadingMixin
from ..models import RestorationUNet2DModel
from ..schedulers.noise import check_generator, drawn_noise
from .inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_step_callback,
    checked_choice,
    checked_number,
    checked_steps,
    given_latents,
    images_to_tensor,
    pad_to_multiple,
    same_shape,
)
from .one_at_a_time import one_at_a_time


PipelineImage = PIL.Image.Image | np.ndarray | torch.Tensor | list[Any]


@dataclass
class MRRestorationPipelineOutput(BaseOutput):
    """What a restoration gives.

    Attributes:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The restored pictures.
        network_evaluations (`int`): Forward passes of the UNet, of the whole batch each.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    network_evaluations: int = 0


class MRRestorationPipeline(CheckedLoadingMixin, DiffusionPipeline):
    """Restores pictures with a network of mean-reverting diffusion.

    Args:
        unet ([`RestorationUNet2DModel`] or [`UNet2DModel`]): Takes x - mu and mu along the channels, and the
            timestep; so it has twice as many input as output channels. Other networks with the same call (`sample`,
            `timestep`, `return_dict`) do.
        scheduler ([`MRScheduler`], [`MeanRevertingAdapter`] or [`ResfusionScheduler`]): Its process and sampler.
        vae ([`AutoencoderKL`], *optional*): Where restoration happens in latents.

    Example:
        ```python
        import torch
        from PIL import Image
        from diffusers_ext import MRRestorationPipeline, RestorationUNet2DModel
        from diffusers_ext.schedulers import MRScheduler

        # an untrained network, for the look of the call; load a trained pipeline with from_pretrained
        unet = RestorationUNet2DModel(block_out_channels=(8, 8), layers_per_block=1)
        pipe = MRRestorationPipeline(unet, MRScheduler(prediction_type="v_prediction"))
        restored = pipe(Image.new("RGB", (50, 40), "gray"), num_inference_steps=5).images[0]
        ```
    """

    model_cpu_offload_seq = "vae->unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "mean"]

    def __init__(
        self, unet: RestorationUNet2DModel | UNet2DModel, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        if unet is not None:
            taken, given = unet.config.in_channels, unet.config.out_channels
            if taken != 2 * given:
                raise ValueError(
                    f"the UNet has {taken} input and {given} output channels; a network of mean-reverting diffusion takes the "
                    "noisy and the degraded picture, so it needs twice as many input channels as output channels"
                )
            channels = 3 if vae is None else vae.config.latent_channels
            if given != channels:
                where = "pictures" if vae is None else "latents of the VAE"
                raise ValueError(f"the UNet has {given} output channels for {where} of {channels}; use one that fits")
        if scheduler is not None and not hasattr(scheduler, "prepare_initial"):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} knows no mean; use MRScheduler, or put it into a MeanRevertingAdapter"
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor(do_normalize=False)
        self._interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set it to True from a callback to skip the remaining steps."""
        return self._interrupt

    @one_at_a_time("scheduler")
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImage | None = None,
        num_inference_steps: int = 10,
        strength: float = 1.0,
        noise_scale: float = 1.0,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> MRRestorationPipelineOutput | tuple[Any, int]:
        """Restores pictures.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                The degraded picture or pictures, of any size; see [`images_to_tensor`] for the accepted forms.
            num_inference_steps (`int`, *optional*, defaults to 10):
                Steps of the whole process. One network evaluation each (two with Heun in the adapter).
            strength (`float`, *optional*, defaults to 1.0):
                Share of the process that is run, above 0 and up to 1. Less starts with less noise and keeps more of the
                degraded picture.
            noise_scale (`float`, *optional*, defaults to 1.0):
                Size of the start noise over that of the process, from 0 to 1. At 1 the results are samples: fine texture, other for
                every generator. At 0 a deterministic sampler leads from the degraded picture itself to one smooth result, nearer to the
                clean picture on average.
            latents (`torch.Tensor`, *optional*):
                Start from these, of the shape that `output_type="latent"` gives, instead of drawn noise around the picture.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the start noise, and of the noise of stochastic samplers; one for each picture if a list.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"`, the last state of the scheduler for the padded picture.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple of its fields.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors it gets: `latents`, the sample, and `mean`, the degraded picture.

        Returns:
            [`MRRestorationPipelineOutput`] or `tuple`: The pictures, and the network evaluations.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If `image`, `generator` or the callback is of a wrong type.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            num_inference_steps,
            strength,
            noise_scale,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        pixels = images_to_tensor(image)
        height, width = pixels.shape[-2:]
        check_generator(generator, len(pixels))
        device = self._execution_device
        mean = self._mean(pixels, device)
        timesteps, first = self._timesteps(num_inference_steps, strength, device)
        sample = self._start(latents, mean, generator, noise_scale, timesteps[0] if first else None)

        self._interrupt = False
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        evaluations = 0
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                seen = self.scheduler.model_input(sample, mean, t)
                answer = self.unet(seen, t.to(torch.float32).expand(len(seen)), return_dict=False)[0]
                check_finite(answer, f"the network's answer at step {i} (timestep {float(t):g})", self.unet.dtype)
                sample = self.scheduler.step(answer, t, sample, mean=mean, **extra, return_dict=False)[0]
                evaluations += 1
                if callback_on_step_end is not None:
                    tensors = {"latents": sample, "mean": mean}
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, shown) or {}
                    sample = same_shape(changed.get("latents", sample), sample, "latents")
                    mean = same_shape(changed.get("mean", mean), mean, "mean")
                progress_bar.update()
        check_finite(sample, "the restored picture", self.unet.dtype)

        images: Any = sample
        if output_type != "latent":
            images = self._pictures(sample)[..., :height, :width]
            images = self.image_processor.postprocess(
                images, output_type=output_type, do_denormalize=[False] * len(images)
            )
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, evaluations
        return MRRestorationPipelineOutput(images, evaluations)

    def check_inputs(
        self,
        num_inference_steps: Any,
        strength: Any,
        noise_scale: Any,
        output_type: Any,
        callback_on_step_end: Any,
        callback_on_step_end_tensor_inputs: Any,
    ) -> None:
        """Checks every argument that can be checked without computing; raises a `ValueError` or `TypeError` that names it."""
        for name in ("unet", "scheduler"):
            if getattr(self, name, None) is None:
                raise ValueError(f"{name}=None is missing; give one when the pipeline is built")
        checked_steps(num_inference_steps)
        if not checked_number(strength, "strength", 0.0, 1.0) > 0.0:
            raise ValueError(f"strength={strength!r} would run no step; give a number above 0 and up to 1")
        checked_number(noise_scale, "noise_scale", 0.0, 1.0)
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        check_step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def _mean(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The degraded pictures, padded, in the range that the scheduler's process is defined on, or as latents."""
        levels = len(getattr(self.unet.config, "block_out_channels", None) or (1,)) - 1
        if self.vae is None:
            low, high = getattr(self.scheduler, "value_range", (0.0, 1.0))
            pixels = low + (pixels + 1.0) * ((high - low) / 2.0)
            return pad_to_multiple(pixels, 2**levels).to(device, self.unet.dtype)
        levels += len(self.vae.config.block_out_channels) - 1
        padded = pad_to_multiple(pixels, 2**levels).to(device, self.vae.dtype)
        latents = self.vae.encode(padded).latent_dist.mode() * self.vae.config.scaling_factor
        check_finite(latents, "the encoded picture", self.vae.dtype)
        return latents.to(self.unet.dtype)

    def _timesteps(self, count: int, strength: float, device: torch.device) -> tuple[torch.Tensor, int]:
        """The timesteps that are run, and the number of the first."""
        scheduler = self.scheduler
        scheduler.set_timesteps(count, device=device)
        skipped = (count - max(1, round(count * strength))) * scheduler.order
        timesteps = scheduler.timesteps[skipped:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        return timesteps, skipped

    def _start(
        self, latents: Any, mean: torch.Tensor, generator: Any, noise_scale: float, timestep: torch.Tensor | None
    ) -> torch.Tensor:
        if latents is None:
            # in float32 whatever the network computes in, so that equal seeds give equal noise
            wide = mean.float()
            noise = noise_scale * drawn_noise(wide, generator)
            start = self.scheduler.prepare_initial(wide, noise=noise, timestep=timestep)
            return start.to(mean.dtype)
        return given_latents(latents, mean)

    def _pictures(self, sample: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            low, high = getattr(self.scheduler, "value_range", (0.0, 1.0))
            pixels = (sample.float() - low) / (high - low)
        else:
            decoded = self.vae.decode((sample / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[
                0
            ]
            check_finite(decoded, "the decoded picture", self.vae.dtype)
            pixels = decoded.float() / 2.0 + 0.5
        return pixels.clamp(0.0, 1.0)
