"""What the FlowChef pipelines share: from the arguments of a call to an objective of the latents.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation (FlowChef), 2024, arXiv 2412.00100. The steering
itself is in the schedulers; a pipeline of this kind is the stock one with three ways to say what is wanted:

    image, mask_image            inpaint: the latents outside of the mask are the picture's. With source_prompt, edit.
    measurement, operator        restore: the operator of the decoded picture gives the measurement
    objective                    guide: anything else

An edit is an inpainting whose guidance leads away from the source prompt, v = v_src + w (v_tgt - v_src). The authors guide so
inside of the mask only. Outside of it the estimate is replaced by the picture, whatever the velocity, so that for every data step but
`"grad"` both are the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch.nn import functional

from ..schedulers.noise import check_generator
from ..steering import DecodedObjective, LatentMaskObjective, MeasurementObjective, StagedObjective, steer, steerable
from ..steering.objectives import check_objective
from .inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_size,
    check_something_kept,
    check_step_callback,
    checked_choice,
    checked_number,
    checked_prompts,
    checked_steps,
    given_latents,
    images_to_tensor,
)


@dataclass(frozen=True)
class Steering:
    """What a call of a FlowChef pipeline has beside the stock arguments.

    Attributes:
        image, mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them, *optional*): Of an inpainting.
        source_prompt (`str` or `list[str]`, *optional*): What the picture shows, for an edit.
        operator ([`LinearOperator`], *optional*), measurement (*optional*): Of a restoration.
        objective ([`Objective`], *optional*): Of latents, for guidance.
        noise_std (`float`, *optional*): Noise of the measurement, or how far what is kept may move.
        source_stop (`float`): Share of the run that holds the whole picture.
        settings (`dict[str, Any]`, *optional*): Of the scheduler.
    """

    image: Any = None
    mask_image: Any = None
    source_prompt: Any = None
    operator: Any = None
    measurement: Any = None
    objective: Any = None
    noise_std: Any = None
    source_stop: Any = 0.0
    settings: Any = None

    def check(self) -> str | None:
        """The mode of a call, once it is one: `"inpaint"`, `"restore"`, `"guide"`, or nothing.

        Raises:
            ValueError: If arguments of several modes are given, or half of one.
            TypeError: If an argument is of a wrong type.
        """
        pairs = {"inpaint": ("image", "mask_image"), "restore": ("measurement", "operator"), "guide": ("objective",)}
        modes: list[str] = []
        for kind, names in pairs.items():
            given = [getattr(self, name) is not None for name in names]
            if any(given):
                modes.append(kind)
                if not all(given):
                    lacking, present = names[given.index(False)], names[given.index(True)]
                    raise ValueError(f"{lacking}=None is missing; give one beside {present}, or neither")
        if len(modes) > 1:
            first, second = (pairs[kind][0] for kind in modes[:2])
            raise ValueError(f"{first} and {second} are both given; give one, or a SumObjective as objective")
        mode = modes[0] if modes else None
        settings = {} if self.settings is None else self.settings
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise TypeError(
                f"steering_kwargs={self.settings!r} is not a dict; give settings such as {{'data_step': 'grad'}}"
            )
        checked_number(self.source_stop, "source_stop", 0.0, 1.0)
        if self.noise_std is not None:
            checked_number(self.noise_std, "noise_std", 0.0, math.inf)
        if mode != "inpaint":
            for name, off in (("source_prompt", None), ("source_stop", 0.0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect without image and mask_image; leave it out"
                    )
        if mode in (None, "guide") and self.noise_std is not None:
            raise ValueError(
                f"noise_std={self.noise_std!r} has no effect here; give it beside a measurement or an image"
            )
        if mode is None and settings:
            raise ValueError(
                f"steering_kwargs={settings!r} without anything to steer towards; leave it out, or give an objective"
            )
        return mode


def check_settings(scheduler: Any, objective: Any, settings: dict[str, Any]) -> None:
    """Says which argument of a call the scheduler that steers refuses.

    Raises:
        ValueError: If a setting is out of range, or the objective does not fit.
        TypeError: If a setting is not known.
    """
    try:
        steerable(scheduler, **settings).set_objective(objective)
    except (ValueError, TypeError) as error:
        if not settings:
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"steering_kwargs={settings!r}: {error}") from error


class FlowChefMixin:
    """The modes of a call; put it before the pipeline class that has the components.

    A subclass says how large its pictures are and how its latents lie, and which argument guides away from a negative prompt.
    """

    _callback_tensor_inputs: list[str]
    _execution_device: Any
    _guidance_name = "guidance_scale"

    # Given by the pipeline class.
    scheduler: Any
    vae: Any
    vae_scale_factor: int

    # -- what a subclass says --------------------------------------------------------------------------------------

    def _side_multiple(self) -> int:
        """What divides the sides of its pictures, in pixels."""
        raise NotImplementedError(f"{type(self).__name__} must define _side_multiple()")

    def _default_side(self) -> tuple[int, int]:
        """Height and width of its pictures where a call does not say."""
        raise NotImplementedError(f"{type(self).__name__} must define _default_side()")

    def _latent_shape(self, count: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of pictures of a size."""
        raise NotImplementedError(f"{type(self).__name__} must define _latent_shape(count, height, width)")

    def _seen_by_scheduler(self, objective: Any, height: int, width: int) -> Any:
        """An objective of latents (batch, channels, height, width) as one of what the scheduler steps."""
        return objective

    # -- a call ----------------------------------------------------------------------------------------------------

    def _steered(self, call: dict[str, Any], steering: Steering) -> Any:
        """The stock pipeline's call, steered if anything says where to.

        Args:
            call (`dict[str, Any]`): Arguments of the stock pipeline.
            steering ([`Steering`]): The others.
        """
        mode = steering.check()
        self._check_call(call)
        call = dict(call)
        objective: Any = None
        if mode == "inpaint":
            objective = self._inpainting(call, steering)
        elif mode == "restore":
            objective = self._restoration(call, steering)
        elif mode == "guide":
            check_objective("objective", steering.objective)
            objective = self._seen_by_scheduler(steering.objective, *self._size_of(call))
        self._check_latents(call)
        if objective is None:
            return super().__call__(**call)  # type: ignore[misc]
        settings = steering.settings or {}
        check_settings(self.scheduler, objective, settings)
        if mode == "restore" and steerable(self.scheduler, **settings).config.get("renoise", 0.0) is None:
            # What a decoder's gradient adds to the state stays there as grain unless its noise is drawn anew.
            settings = {"renoise": 1.0, **settings}
        with steer(self, objective, call["generator"], **settings):
            return super().__call__(**call)  # type: ignore[misc]

    def _check_call(self, call: dict[str, Any]) -> None:
        """The stock arguments that the stock pipelines let through to an error of torch."""
        for name in ("scheduler", "vae"):
            if getattr(self, name, None) is None:
                raise ValueError(f"{name}=None is missing; give one when the pipeline is built")
        steps, most = call["num_inference_steps"], self.scheduler.config.num_train_timesteps
        if call.get("sigmas") is None and call.get("timesteps") is None and checked_steps(steps) > most:
            raise ValueError(f"num_inference_steps={steps} is more than the model was trained on; give at most {most}")
        if call["prompt"] is None and call["prompt_embeds"] is None:
            raise ValueError("prompt is missing; give one, or prompt_embeds")
        if call["prompt"] is not None:
            checked_prompts(call["prompt"], "prompt")
        if call["negative_prompt"] is not None:
            checked_prompts(call["negative_prompt"], "negative_prompt")
        for name in {"guidance_scale", self._guidance_name}:
            checked_number(call[name], name, 0.0, 1e6)
        checked_steps(call["num_images_per_prompt"], "num_images_per_prompt")
        check_size(call["height"], call["width"])
        for name in ("height", "width"):
            if call[name] is not None and call[name] % self._side_multiple():
                raise ValueError(f"{name}={call[name]} is not a multiple of {self._side_multiple()}; give one")
        checked_choice(call["output_type"], "output_type", OUTPUT_TYPES)
        callback = call["callback_on_step_end"]
        names = call["callback_on_step_end_tensor_inputs"]
        if not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            check_step_callback(callback, names, self._callback_tensor_inputs)
        check_generator(call["generator"], self._results(call))

    def _check_latents(self, call: dict[str, Any]) -> None:
        latents = call["latents"]
        if latents is not None:
            like = torch.empty(self._latent_shape(self._results(call), *self._size_of(call)))
            given_latents(latents, like.to(latents) if isinstance(latents, torch.Tensor) else like)

    def _prompts(self, call: dict[str, Any]) -> int:
        prompt, embeds = call["prompt"], call["prompt_embeds"]
        if prompt is None:
            return len(embeds) if isinstance(embeds, torch.Tensor) and embeds.ndim else 1
        return 1 if isinstance(prompt, str) else len(prompt)

    def _results(self, call: dict[str, Any]) -> int:
        return self._prompts(call) * int(call["num_images_per_prompt"])

    def _size_of(self, call: dict[str, Any]) -> tuple[int, int]:
        height, width = self._default_side()
        return call["height"] or height, call["width"] or width

    def _spread(self, pictures: torch.Tensor, call: dict[str, Any], name: str) -> torch.Tensor:
        """One for all results, or one for each."""
        prompts = self._prompts(call)
        if len(pictures) not in (1, prompts):
            raise ValueError(
                f"{name} has {len(pictures)} entries for {prompts} prompt{'s' * (prompts != 1)}; give one of each, or one for all"
            )
        return pictures if len(pictures) == 1 else pictures.repeat_interleave(int(call["num_images_per_prompt"]), 0)

    def _check_side(self, name: str, height: int, width: int, cure: str) -> None:
        multiple = self._side_multiple()
        if height % multiple or width % multiple:
            raise ValueError(
                f"{name} belongs to a picture of {width}x{height} pixels, and this model's have sides that are multiples of "
                f"{multiple}; {cure}"
            )

    # -- inpainting and editing ------------------------------------------------------------------------------------

    def _inpainting(self, call: dict[str, Any], steering: Steering) -> Any:
        pixels = images_to_tensor(steering.image, call["height"], call["width"])
        height, width = pixels.shape[-2:]
        near = [max(1, round(side / self._side_multiple())) * self._side_multiple() for side in (height, width)]
        self._check_side("image", height, width, f"give height={near[0]} and width={near[1]}, to which it is scaled")
        repainted = images_to_tensor(steering.mask_image, height, width, name="mask_image").mean(1, keepdim=True) > 0
        # A latent is kept only where no pixel of it is to be painted.
        free = functional.max_pool2d(repainted.float(), self.vae_scale_factor)
        check_something_kept(1 - free)
        call["height"], call["width"] = height, width
        noise_std = 0.0 if steering.noise_std is None else float(steering.noise_std)
        keep, latents = (
            self._spread(1 - free, call, "mask_image"),
            self._spread(self.encode_pictures(pixels), call, "image"),
        )
        masked = LatentMaskObjective(keep.to(latents.device), latents, noise_std)
        if steering.source_prompt is not None:
            self._lead_away(call, steering.source_prompt)
        objective = self._seen_by_scheduler(masked, height, width)
        if not steering.source_stop:
            return objective
        whole = self._seen_by_scheduler(LatentMaskObjective(torch.ones_like(keep), latents, noise_std), height, width)
        return StagedObjective([whole, objective], [float(steering.source_stop)])

    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of pictures, shifted and scaled as the network has them, and not packed.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Pictures in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch, channels, ...)`: float32.

        Raises:
            ValueError: If the encoder answers with values that are not finite.
        """
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        found = [retrieve_latents(self.vae.encode(picture), sample_mode="argmax") for picture in pixels.split(1)]
        latents = torch.cat(found).float()
        check_finite(latents, "the encoded picture", self.vae.dtype)
        config = self.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _lead_away(self, call: dict[str, Any], source_prompt: Any) -> None:
        """The source prompt in place of the negative one."""
        prompts = checked_prompts(source_prompt, "source_prompt")
        given = [name for name in ("negative_prompt", "negative_prompt_embeds") if call[name] is not None]
        if given:
            raise ValueError(f"source_prompt takes the place of {given[0]}; give one of them")
        scale = call[self._guidance_name]
        if scale <= 1:
            raise ValueError(
                f"{self._guidance_name}={scale!r} does not guide, and source_prompt would have no effect; give more than 1"
            )
        count = self._prompts(call)
        if len(prompts) not in (1, count):
            raise ValueError(
                f"source_prompt has {len(prompts)} entries for {count} prompts; give one of each, or one for all"
            )
        call["negative_prompt"] = prompts[0] if isinstance(call["prompt"], str) else prompts * (count // len(prompts))

    # -- restoration -----------------------------------------------------------------------------------------------

    def _restoration(self, call: dict[str, Any], steering: Steering) -> Any:
        measurement = steering.measurement
        if not isinstance(measurement, torch.Tensor):
            measurement = images_to_tensor(measurement, name="measurement")
        if measurement.ndim != 4:
            raise ValueError(
                f"measurement has shape {tuple(measurement.shape)}; give one of shape (batch, channels, height, width)"
            )
        noise_std = 0.05 if steering.noise_std is None else float(steering.noise_std)
        spread = self._spread(measurement.to(self._execution_device), call, "measurement")
        wanted = MeasurementObjective(steering.operator, spread, noise_std)
        _, channels, height, width = self._measured_shape(wanted)
        if channels != 3:
            raise ValueError(
                f"measurement of shape {tuple(measurement.shape)} belongs to pictures of {channels} channels; the decoder's have 3"
            )
        for name, side in (("height", height), ("width", width)):
            if call[name] not in (None, side):
                raise ValueError(
                    f"{name}={call[name]} does not fit: {steering.operator} measures {width}x{height} pixels"
                )
        self._check_side(
            f"measurement of shape {tuple(measurement.shape)}", height, width, "crop or pad what was measured"
        )
        call["height"], call["width"] = height, width
        return self._seen_by_scheduler(DecodedObjective(self.vae, wanted), height, width)

    @staticmethod
    def _measured_shape(wanted: MeasurementObjective) -> torch.Size:
        """Shape of the pictures that a measurement is one of."""
        shape = wanted.operator.adjoint(wanted.measurement).shape
        if len(shape) != 4:
            raise ValueError(
                f"operator={wanted.operator} gives {tuple(shape)} for the picture; it must have four axes"
            )
        return shape
