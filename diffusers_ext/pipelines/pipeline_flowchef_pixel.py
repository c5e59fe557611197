"""FlowChef for flow models of pixels, without text and without autoencoder.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, 2024, arXiv 2412.00100. The network is a `UNet2DModel`,
as `DDPMPipeline` has it, that predicts the velocity of x_t = (1 - t) x0 + t eps with one of the signs of `velocity_sign.py`, at the
timestep of its scheduler.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..integrity import CheckedLoadingMixin
from ..schedulers import FlowChefScheduler
from ..schedulers.noise import check_generator, drawn_noise
from ..steering import LatentMaskObjective, MeasurementObjective, steer
from ..steering.objectives import check_objective
from .flow_chef import Steering, check_settings
from .inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_something_kept,
    check_step_callback,
    checked_choice,
    checked_steps,
    given_latents,
    images_to_tensor,
    same_shape,
)
from .one_at_a_time import one_at_a_time
from .velocity_sign import VELOCITIES, VelocitySignMixin, check_flow, is_of_flow


class FlowChefPixelPipeline(CheckedLoadingMixin, VelocitySignMixin, DiffusionPipeline):
    """Samples pictures from a flow model of pixels, and inpaints, restores and guides with it.

    It loads from the repositories of a `DDPMPipeline` whose network is a flow.

    Args:
        unet ([`UNet2DModel`]): Predicts the velocity from pixels in [-1, 1] and the timestep, and the class where it was trained on
            classes.
        scheduler ([`SchedulerMixin`]): One of a flow model: `FlowMatchEulerDiscreteScheduler`, `DPMSolverMultistepScheduler` or
            `UniPCMultistepScheduler` with `use_flow_sigmas`, or one of this package's FlowChef schedulers.
        velocity (`str`, *optional*, defaults to `"noise_minus_data"`): Sign of what the UNet predicts. `"data_minus_noise"` is that of
            the original rectified flows; a scheduler that is not of a flow is then exchanged for a [`FlowChefScheduler`].

    Example:
        ```python
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
        from diffusers_ext import FlowChefPixelPipeline, SuperResolution

        # an untrained network, for the look of the call; load a trained one with from_pretrained
        unet = UNet2DModel(
            16, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )
        pipe = FlowChefPixelPipeline(unet, FlowMatchEulerDiscreteScheduler())
        small = torch.rand(1, 3, 4, 4)
        large = pipe(measurement=small, operator=SuperResolution(4), num_inference_steps=4).images[0]
        ```
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, velocity: str = "noise_minus_data") -> None:
        super().__init__()
        checked_choice(velocity, "velocity", VELOCITIES)
        if unet is not None and unet.config.get("cross_attention_dim"):
            raise ValueError(
                f"the UNet reads text (cross_attention_dim={unet.config.cross_attention_dim}); use FlowChefPipeline for it"
            )
        if unet is not None and unet.config.in_channels != unet.config.out_channels:
            raise ValueError(
                f"the UNet has {unet.config.in_channels} input and {unet.config.out_channels} output channels; the velocity of a flow "
                "has as many as its sample"
            )
        if velocity == "data_minus_noise" and scheduler is not None and not is_of_flow(scheduler):
            scheduler = FlowChefScheduler()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(velocity=velocity)
        self.image_processor = VaeImageProcessor()
        self._interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set it to True from a callback to skip the remaining steps."""
        return self._interrupt

    @one_at_a_time("scheduler", "unet")
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: torch.Tensor | list[int] | int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        image: Any = None,
        mask_image: Any = None,
        operator: Any = None,
        measurement: Any = None,
        objective: Any = None,
        noise_std: float | None = None,
        steering_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples pictures, steered if an argument says where to.

        Args:
            batch_size (`int`, *optional*):
                Number of pictures; by default as many as `image` or `measurement` has, and otherwise 1.
            num_inference_steps (`int`, *optional*, defaults to 50): Steps of the scheduler, one evaluation of the network each.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the start and of noise on the way; one for each picture if a list.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): Start, instead of drawn noise.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"`, pixels as the network has them.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            class_labels (`torch.Tensor`, `list[int]` or `int`, *optional*): Class of all pictures or of each, if the network knows any.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`): Names of the tensors it gets.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them, *optional*):
                The picture to inpaint, scaled to the network's size.
            mask_image (as `image`, *optional*): White where it is to be painted, black where it stays.
            operator ([`LinearOperator`], *optional*), measurement (`torch.Tensor` or a picture, *optional*):
                What was measured of a picture in [-1, 1], and how.
            objective ([`Objective`], *optional*): Anything else that the pixels, in [-1, 1], shall be steered towards.
            noise_std (`float`, *optional*):
                Standard deviation of the noise of the measurement, by default 0.05; with `image` how far the kept pixels may be from
                the picture's, by default 0.
            steering_kwargs (`dict[str, Any]`, *optional*): `solver`, and settings of [`FlowChefScheduler`] or [`FLAIRScheduler`].

        Returns:
            `ImagePipelineOutput` or `tuple`: The pictures.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If an argument is of a wrong type.
        """
        self._check_parts()
        most = self.scheduler.config.num_train_timesteps
        if checked_steps(num_inference_steps) > most:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is more than the model was trained on; give at most {most}"
            )
        if batch_size is not None:
            checked_steps(batch_size, "batch_size")
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        check_step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        steering = Steering(
            image=image, mask_image=mask_image, operator=operator, measurement=measurement, objective=objective,
            noise_std=noise_std, settings=steering_kwargs,
        )  # fmt: skip
        wanted, count = self._wanted(steering, batch_size)
        check_generator(generator, count)
        labels = self._labels(class_labels, count)
        settings = steering_kwargs or {}
        if wanted is not None:
            check_settings(self.scheduler, wanted, settings)
        like = torch.empty(count, *self._picture_shape(), device=self._execution_device)
        sample = drawn_noise(like, generator) if latents is None else given_latents(latents, like)
        sample = sample.to(self.unet.dtype)

        self._interrupt = False
        with self._signed(), nullcontext() if wanted is None else steer(self, wanted, generator, **settings):
            scheduler = self.scheduler
            scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            self._num_timesteps = len(scheduler.timesteps)
            takes_generator = "generator" in inspect.signature(scheduler.step).parameters
            extra = {"generator": generator} if takes_generator else {}
            with self.progress_bar(total=self._num_timesteps) as progress_bar:
                for i, t in enumerate(scheduler.timesteps):
                    if self.interrupt:
                        continue
                    answer = self.unet(sample, t, class_labels=labels, return_dict=False)[0]
                    check_finite(answer, f"the network's answer at step {i} (timestep {float(t):g})", self.unet.dtype)
                    sample = scheduler.step(answer, t, sample, **extra, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        shown = {"latents": sample} if callback_on_step_end_tensor_inputs else {}
                        changed = callback_on_step_end(self, i, t, shown) or {}
                        sample = same_shape(changed.get("latents", sample), sample, "latents")
                    progress_bar.update()
        check_finite(sample, "the picture", self.unet.dtype)
        images: Any = sample
        if output_type != "latent":
            images = self.image_processor.postprocess(sample.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_parts(self) -> None:
        for name in ("unet", "scheduler"):
            if getattr(self, name, None) is None:
                raise ValueError(f"{name}=None is missing; give one when the pipeline is built")
        check_flow(self.scheduler)

    def _picture_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("the UNet has no sample_size; give it one in its config")
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def _pictures(self, image: Any, name: str) -> torch.Tensor:
        """Pictures in the size and with the channels of the network."""
        channels, height, width = self._picture_shape()
        pixels = images_to_tensor(image, height, width, name=name)
        if channels not in (1, 3):
            raise ValueError(
                f"{name} is a picture, and the network has {channels} channels; give a measurement of them"
            )
        return pixels if channels == 3 else pixels.mean(1, keepdim=True)

    def _wanted(self, steering: Steering, batch_size: int | None) -> tuple[Any, int]:
        """What a call is steered towards, if anything, and the number of its results."""
        mode = steering.check()
        if mode == "guide":
            check_objective("objective", steering.objective)
        if mode in (None, "guide"):
            return steering.objective, batch_size or 1
        if mode == "inpaint":
            pixels = self._pictures(steering.image, "image")
            count = _results(len(pixels), batch_size, "image")
            _, height, width = self._picture_shape()
            masks = images_to_tensor(steering.mask_image, height, width, name="mask_image")
            if len(masks) not in (1, count):
                raise ValueError(
                    f"mask_image has {len(masks)} entries for {count} pictures; give one of each, or one for all"
                )
            keep = 1 - (masks.mean(1, keepdim=True) > 0).float()
            check_something_kept(keep)
            noise_std = 0.0 if steering.noise_std is None else float(steering.noise_std)
            parts = (keep.to(self._execution_device), pixels.to(self._execution_device))
            return LatentMaskObjective(*parts, noise_std), count
        return self._restoration(steering, batch_size)

    def _restoration(self, steering: Steering, batch_size: int | None) -> tuple[Any, int]:
        measurement = steering.measurement
        if not isinstance(measurement, torch.Tensor):
            measurement = images_to_tensor(measurement, name="measurement")
            measurement = measurement if self._picture_shape()[0] == 3 else measurement.mean(1, keepdim=True)
        if measurement.ndim < 2 or not len(measurement):
            raise ValueError(f"measurement has shape {tuple(measurement.shape)}; give one of shape (batch, ...)")
        noise_std = 0.05 if steering.noise_std is None else float(steering.noise_std)
        wanted = MeasurementObjective(steering.operator, measurement.to(self._execution_device), noise_std)
        found = tuple(steering.operator.adjoint(wanted.measurement).shape[1:])
        if found != self._picture_shape():
            raise ValueError(
                f"measurement of shape {tuple(measurement.shape)} belongs to pictures of shape {found}, and this network's have "
                f"{self._picture_shape()}; give a measurement of such"
            )
        return wanted, _results(len(measurement), batch_size, "measurement")

    def _labels(self, class_labels: Any, count: int) -> torch.Tensor | None:
        """Classes (count,) as the network takes them."""
        known = self.unet.config.get("num_class_embeds")
        if (class_labels is None) != (known is None):
            cure = "leave it out" if known is None else f"give numbers from 0 to {known - 1}"
            raise ValueError(f"class_labels={class_labels!r} for a network of {known or 'no'} classes; {cure}")
        if known is None:
            return None
        try:
            labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"class_labels={class_labels!r} are no numbers of classes; give ints") from error
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or len(labels) not in (1, count) or int(labels.min()) < 0 or int(labels.max()) >= known:
            raise ValueError(
                f"class_labels={class_labels!r} must be one or {count} whole numbers from 0 to {known - 1}"
            )
        return labels.expand(count)


def _results(given: int, batch_size: int | None, name: str) -> int:
    """How many pictures a call makes of what it is given."""
    count = batch_size or given
    if given not in (1, count):
        raise ValueError(f"{name} has {given} entries for batch_size={count}; give one of each, or one for all")
    return count
