"""The loop of Guide-and-Rescale, for every family of models.

Guide-and-Rescale: Self-Guidance with Noise Rescaling for Image Editing, 2024, arXiv 2409.01322.

A picture is inverted by DDIM with its own prompt. Sampling then starts from the noise with the wanted prompt, and for the
first part of the steps each prediction is corrected by the gradient of energies that compare the network's inner state on
the edit with that on the inverted picture at the same noise level. The step is in `guidance/guided_step.py`, energies are beside
it, presets in `guidance/presets.py`, inversion in `inversion/ddim.py`. A pipeline class adds its components and how prompts
become conditions (`conditioning.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..guidance import PRESETS, GuidanceEnergy, GuidancePreset, GuidedStep, NormRescaler
from ..inversion import ALIGNMENTS, InversionOutput, ddim_step
from ..schedulers.noise import check_generator
from .ddim_inversion import INVERSION_METHODS, DDIMInversionMixin
from .editing import EditingPipelineOutput, PipelineImage
from .inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_kwargs,
    check_size,
    check_step_callback,
    checked_choice,
    checked_number,
    checked_prompts,
    checked_steps,
    checked_timesteps,
    given_latents,
    images_to_tensor,
    same_shape,
    spread,
)
from .one_at_a_time import one_at_a_time


class GuideAndRescalePipelineOutput(EditingPipelineOutput):
    """What an edit gives; see [`EditingPipelineOutput`]."""


class GuideAndRescaleMixin(DDIMInversionMixin):
    """`__call__` of the pipelines; put it before the class that has the components."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "source_prompt_embeds"]
    _presets: Mapping[str, GuidancePreset] = PRESETS

    interrupt: bool  # given by the pipeline class

    @one_at_a_time("unet")
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImage | None = None,
        source_prompt: str | list[str] | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        preset: str = "edit",
        guiders: Sequence[GuidanceEnergy] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        rescale_range: tuple[float, float] | None = None,
        guidance_end: float | None = None,
        alignment: str = "matched",
        inversion: InversionOutput | None = None,
        inversion_method: str = "ddim",
        timesteps: list[int] | None = None,
        samples_per_pass: int | None = 1,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> GuideAndRescalePipelineOutput | tuple[Any, ...]:
        """Edits pictures.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them, *optional*):
                The picture or pictures, of any size; see [`images_to_tensor`] for the accepted forms. Left out if
                `inversion` is given.
            source_prompt (`str` or `list[str]`, *optional*):
                What the picture shows; one for all pictures or one each. `""` is allowed. With `inversion` it may be left
                out.
            prompt (`str` or `list[str]`):
                What the result shall show; one for all pictures or one each. Several for a single picture give several
                results from one inversion.
            negative_prompt (`str` or `list[str]`, *optional*):
                What it shall not show; one, or one for each result. Defaults to `""`, or to the
                source prompt after an inversion with `method="negative_prompt"`.
            preset (`str`, *optional*, defaults to `"edit"`):
                The authors' settings for `guiders`, `rescale_range` and `guidance_end`: `"edit"` changes what the prompt
                says and keeps the rest, `"stylize"` repaints everything and keeps the layout. Each of the three may be
                replaced.
            guiders (list of [`GuidanceEnergy`], *optional*):
                The energies, instead of the preset's; `[]` turns guidance off, which leaves plain DDIM inversion and
                sampling.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps of the inversion and of the sampling.
            guidance_scale (`float`, *optional*, defaults to 7.5):
                Strength w of the prompt; at 1 and below without classifier-free guidance.
            rescale_range (`tuple[float, float]`, *optional*):
                Bounds of the gradient's norm relative to that of the classifier-free term, `(0.33, 3.0)` in the preset
                `"edit"` and `(1.5, 1.5)` in `"stylize"`. Larger bounds keep more of the source; see [`NormRescaler`].
            guidance_end (`float`, *optional*):
                Part of the steps, from 0 to 1, that are guided: 0.6 in the preset `"edit"`, 0.5 in `"stylize"`.
            alignment (`str`, *optional*, defaults to `"matched"`):
                `"matched"` inverts along the levels that sampling walks; `"official"` one step off, as the authors' code.
            inversion ([`InversionOutput`], *optional*):
                Result of [`GuideAndRescalePipeline.invert`] with the same model, steps and alignment.
            inversion_method (`str`, *optional*, defaults to `"ddim"`):
                `"ddim"` or `"negative_prompt"`, see [`invert`]; without effect if `inversion` is given.
            timesteps (`list[int]`, *optional*):
                Descending timesteps instead of evenly spaced ones, as few-step models are trained for;
                `num_inference_steps` has no effect then.
            samples_per_pass (`int`, *optional*, defaults to 1):
                Pictures of a batch that go through the UNet together. With 1 a picture's edit is the same, bit for bit,
                whatever is edited beside it, and memory does not grow with the batch; with more a GPU may be faster, and
                results differ in what guidance makes of rounding (up to 1e-2 of the latents). None takes all at once.
            ip_adapter_image (`PIL.Image.Image`, `torch.Tensor`, or a list of them, *optional*):
                Picture prompt of the result, one for each IP-Adapter that is loaded. The source has none.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Its embeddings instead, one tensor `(2, 1, width)` for each IP-Adapter: without and with the picture.
            height (`int`, *optional*): Scale the picture to this height in pixels. Defaults to its own.
            width (`int`, *optional*): Scale the picture to this width in pixels. Defaults to its own.
            latents (`torch.Tensor`, *optional*):
                Start from these `(batch, channels, height, width)` instead of the inverted picture.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Handed to the VAE's decoder. The edit itself draws no random number.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"`. Latents are those of the padded picture.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output object or a tuple of its four fields.
            cross_attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is that of LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each sampling step; what it returns replaces the
                tensors. The UNet is in its own state then.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors it gets: `latents`, `prompt_embeds`, `negative_prompt_embeds`, `source_prompt_embeds`.

        Returns:
            [`GuideAndRescalePipelineOutput`] or `tuple`: The pictures, and what they cost.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If `image` or `generator` is of a wrong type.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            image=image,
            source_prompt=source_prompt,
            prompt=prompt,
            negative_prompt=negative_prompt,
            preset=preset,
            guiders=guiders,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            rescale_range=rescale_range,
            guidance_end=guidance_end,
            alignment=alignment,
            inversion=inversion,
            inversion_method=inversion_method,
            timesteps=timesteps,
            samples_per_pass=samples_per_pass,
            height=height,
            width=width,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        settings = self._presets[preset]
        guiders = settings.guiders() if guiders is None else list(guiders)
        rescaler = NormRescaler(*(settings.rescale_range if rescale_range is None else rescale_range))
        ladder = self._ladder(num_inference_steps, timesteps)
        guidance_end = settings.guidance_end if guidance_end is None else guidance_end
        guided_steps = round(guidance_end * len(ladder)) if guiders else 0
        if guided_steps:
            self._check_guiders(guiders)
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip = None
        self._interrupt = False

        forward_passes, backward_passes = 0, 0
        if inversion is None:
            sources = checked_prompts(source_prompt, "source_prompt")
            pixels = images_to_tensor(image, height, width)
            prompts = self._results(prompt, len(pixels))
            check_generator(generator, len(prompts))
            inversion = self._invert(
                pixels,
                sources,
                ladder,
                alignment,
                cross_attention_kwargs,
                inversion_method,
                samples_per_pass,
                (ip_adapter_image, ip_adapter_image_embeds),
            )
            forward_passes += inversion.network_evaluations
        else:
            prompts = self._results(prompt, len(inversion.prompt))
            check_generator(generator, len(prompts))
            said = self._source_prompts(source_prompt, len(inversion.prompt))
            inversion.check_fits(self._inversion_config(ladder, alignment, inversion.config["image_size"]), said)

        batch_size, device = len(prompts), self._execution_device
        repeats = batch_size // len(inversion.prompt)
        references = inversion.latents.to(device, self.unet.dtype).repeat(1, repeats, 1, 1, 1)
        sources = inversion.prompt * repeats
        points_from_source = negative_prompt is None and inversion.config["method"] == "negative_prompt"
        negatives = checked_prompts("" if negative_prompt is None else negative_prompt, "negative_prompt")
        negatives = sources if points_from_source else spread(negatives, batch_size, "negative_prompt", "results")
        image_embeds, no_image = self._image_prompts(ip_adapter_image, ip_adapter_image_embeds, batch_size)
        about = (inversion.config["image_size"], (cross_attention_kwargs or {}).get("scale"))
        target = dict(self._condition(prompts, *about, image_embeds, guidance_scale))
        source = dict(self._condition(sources, *about, no_image))
        no_words = negative_prompt is None and not points_from_source
        negative = dict(self._condition(negatives, *about, no_image, no_words=no_words))
        latents = references[-1] if latents is None else given_latents(latents, references[-1])

        step = GuidedStep(
            self.unet,
            guiders if guided_steps else [],
            rescaler,
            ladder.prediction_type,
            {"cross_attention_kwargs": cross_attention_kwargs},
            samples_per_pass,
        )
        self._num_timesteps = len(ladder)
        with self.progress_bar(total=len(ladder)) as progress_bar:
            for i, t in enumerate(ladder.timesteps.to(device)):
                if self.interrupt:
                    continue
                level, next_level = ladder.sampling_levels(i)
                # Pure noise (zero terminal SNR) holds nothing of the picture, and no epsilon can be told from a v there.
                guided = i < guided_steps and level > 0
                output = step(
                    latents,
                    t,
                    level,
                    self._guidance_scale,
                    None if self._is_guidance_distilled else negative,
                    target,
                    source if guided else None,
                    references[len(ladder) - i] if guided else None,
                    i,
                    len(ladder),
                )
                latents = ddim_step(output.noise_pred, latents, level, next_level, ladder.prediction_type)
                check_finite(latents, f"the latents after step {i} (timestep {int(t)})", self.unet.dtype)
                forward_passes += output.forward_passes
                backward_passes += output.backward_passes

                if callback_on_step_end is not None:
                    conditions = {"prompt_embeds": target, "negative_prompt_embeds": negative}
                    conditions["source_prompt_embeds"] = source
                    tensors = {name: item["encoder_hidden_states"] for name, item in conditions.items()}
                    tensors["latents"] = latents
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, shown) or {}
                    latents = same_shape(changed.get("latents", latents), latents, "latents")
                    for name, item in conditions.items():
                        item["encoder_hidden_states"] = same_shape(
                            changed.get(name, tensors[name]), tensors[name], name
                        )
                progress_bar.update()

        has_nsfw_concept = None
        if output_type == "latent":
            images = latents
        else:
            images, has_nsfw_concept = self._decode(latents, inversion.config["image_size"], generator, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, has_nsfw_concept, forward_passes, backward_passes
        return GuideAndRescalePipelineOutput(images, has_nsfw_concept, forward_passes, backward_passes)

    def check_inputs(
        self,
        *,
        image: Any,
        source_prompt: Any,
        prompt: Any,
        negative_prompt: Any,
        preset: Any,
        guiders: Any,
        num_inference_steps: Any,
        guidance_scale: Any,
        rescale_range: Any,
        guidance_end: Any,
        alignment: Any,
        inversion: Any,
        inversion_method: Any,
        timesteps: Any,
        samples_per_pass: Any,
        height: Any,
        width: Any,
        output_type: Any,
        cross_attention_kwargs: Any,
        callback_on_step_end: Any,
        callback_on_step_end_tensor_inputs: Any,
    ) -> None:
        """Checks every argument that can be checked without computing; raises a `ValueError` or `TypeError` that names it."""
        self._check_model()
        self._check_picture(image, source_prompt, inversion, height, width)
        checked_prompts(prompt, "prompt")
        if negative_prompt is not None:
            checked_prompts(negative_prompt, "negative_prompt")
        checked_choice(preset, "preset", tuple(self._presets))
        if guiders is not None and not isinstance(guiders, (list, tuple)):
            raise ValueError(f"guiders={guiders!r} is not a list; give [{guiders!r}], or [] for none")
        for guider in guiders or ():
            if not callable(getattr(guider, "attach", None)) or not hasattr(guider, "scale"):
                raise ValueError(f"guiders holds {guider!r}, which is no energy; derive it from GuidanceEnergy")
        checked_steps(num_inference_steps)
        checked_number(guidance_scale, "guidance_scale", 0.0, float("inf"))
        if rescale_range is not None:
            if not isinstance(rescale_range, (list, tuple)) or len(rescale_range) != 2:
                raise ValueError(f"rescale_range={rescale_range!r} is not (low, high)")
            NormRescaler(*rescale_range)
        if guidance_end is not None:
            checked_number(guidance_end, "guidance_end", 0.0, 1.0)
        checked_choice(alignment, "alignment", ALIGNMENTS)
        checked_choice(inversion_method, "inversion_method", INVERSION_METHODS)
        checked_timesteps(timesteps)
        if samples_per_pass is not None:
            checked_steps(samples_per_pass, "samples_per_pass")
        check_size(height, width)
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        check_kwargs(cross_attention_kwargs)
        check_step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def _check_guiders(self, guiders: Sequence[GuidanceEnergy]) -> None:
        """What would only come to light in the first guided step, after the whole inversion."""
        self._check_gradients("guidance", "pass guiders=[]")
        with ExitStack() as stack:
            for number, guider in enumerate(guiders):
                try:
                    stack.enter_context(guider.attach(getattr(self.unet, "_orig_mod", self.unet)))
                except ValueError as error:
                    raise ValueError(f"guiders[{number}], a {type(guider).__name__}: {error}") from error
