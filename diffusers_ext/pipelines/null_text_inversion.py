"""Edits of inverted pictures by words, for every family of models: the loop that runs source and edits side by side.

Null-text Inversion for Editing Real Images using Guided Diffusion Models, 2022, arXiv 2211.09794, and the methods after it.
Inversion is in `picture_inversion.py`, what a step does to each branch in `edit_branches.py`, the controllers of attention in
`diffusers_ext.attention`. A pipeline class adds its components and how prompts become conditions (`conditioning.py`).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..attention import AttentionController, ControllerGroup
from ..guidance import Condition
from ..inversion import DEFAULT_INVERSION, INVERSIONS, DDIMLadder, InversionOutput, Inverted
from ..schedulers.noise import check_generator
from .edit_branches import FOLLOWS, BranchNetwork, EditSteps
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
from .picture_inversion import PictureInversionMixin


class NullTextInversionPipelineOutput(EditingPipelineOutput):
    """What an edit gives; see [`EditingPipelineOutput`]. With `return_source=True` the sources come first."""


class NullTextInversionMixin(PictureInversionMixin):
    """`__call__` of the pipelines; put it before the class that has the components."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    interrupt: bool  # given by the pipeline class

    @one_at_a_time("unet")
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        inversion: InversionOutput | None = None,
        controller: AttentionController | list[AttentionController] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        image: PipelineImage | None = None,
        source_prompt: str | list[str] | None = None,
        inversion_method: str = DEFAULT_INVERSION,
        inversion_settings: Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        skip: int = 0,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        return_source: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> NullTextInversionPipelineOutput | tuple[Any, ...]:
        """Edits pictures.

        Args:
            prompt (`str` or `list[str]`):
                What the result shall show. Several for a single picture give several results of one run; for several
                pictures one for all or one each.
            inversion ([`InversionOutput`], *optional*):
                Result of [`invert`] with the same model. It says how many steps there are.
            controller ([`AttentionController`] or a list of them, *optional*):
                Carries the source's attention over to the edits: an `AttentionReplace`, `AttentionRefine` or
                `AttentionReweight` that was made for `[source prompt, *prompt]`. For several pictures a list with one for
                each, made for its source prompt and its prompt; see [`ControllerGroup`] for what they have in common.
                Shares of the steps refer to those that are run.
            guidance_scale (`float`, *optional*, defaults to 7.5):
                Strength w of the prompts; at 1 and below without guidance. Must be that of a `"null_text"` inversion.
            negative_prompt (`str` or `list[str]`, *optional*):
                What the edits shall not show; one, or one for each result. Defaults to the embeddings that the inversion
                has found, or to `""`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them, *optional*):
                Instead of `inversion`: pictures to invert in this call, with `source_prompt`.
            source_prompt (`str` or `list[str]`, *optional*):
                What `image` shows. With `inversion` it may be left out.
            inversion_method (`str`, *optional*, defaults to `"direct"`): The `method` of [`invert`] for `image`.
            inversion_settings (`dict`, *optional*): The `settings` of [`invert`] for `image`.
            num_inference_steps (`int`, *optional*):
                Steps of the inversion and of the sampling: those of `inversion`, or 50.
            timesteps (`list[int]`, *optional*): Descending timesteps for `image` instead of evenly spaced ones.
            skip (`int`, *optional*, defaults to 0):
                Steps to leave out at the noisy end: sampling starts from a later state, which keeps more of the picture.
                `"edit_friendly"` needs some, its authors skip 36 of 100; `"bdia"` allows none.
            height (`int`, *optional*): Scale `image` to this height in pixels. Defaults to its own.
            width (`int`, *optional*): Scale `image` to this width in pixels. Defaults to its own.
            latents (`torch.Tensor`, *optional*):
                Start the edits from these `(results, channels, height, width)` instead of the inverted picture.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws the noise of an `"edit_friendly"` inversion made here; else no random number is drawn.
            ip_adapter_image (`PIL.Image.Image`, `torch.Tensor`, or a list of them, *optional*):
                Picture prompt of the edits, one for each IP-Adapter that is loaded. The source has none.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Its embeddings instead, one tensor `(2, 1, width)` for each IP-Adapter: without and with the picture.
            return_source (`bool`, *optional*, defaults to `False`):
                Whether the sources, as their own branch draws them, come before the edits.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"`. Latents are those of the padded picture.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output object or a tuple of its four fields.
            cross_attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is that of LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each sampling step; what it returns replaces the
                tensors. A controller is paused meanwhile.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors it gets, those of the edits: `latents`, `prompt_embeds`, `negative_prompt_embeds`.

        Returns:
            [`NullTextInversionPipelineOutput`] or `tuple`: The pictures, and what they cost.

        Raises:
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If an argument is of a wrong type.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt=prompt,
            inversion=inversion,
            controller=controller,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            image=image,
            source_prompt=source_prompt,
            inversion_method=inversion_method,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            skip=skip,
            height=height,
            width=width,
            return_source=return_source,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip = None
        self._interrupt = False

        made_here = inversion is None
        if inversion is None:
            steps = 50 if num_inference_steps is None else num_inference_steps
            ladder = self._ladder(steps, timesteps)
            scale = guidance_scale if inversion_method == "null_text" else None
            settings = self._method_settings(inversion_method, scale, inversion_settings, "inversion_settings")
            pixels = images_to_tensor(image, height, width)
            sources = spread(checked_prompts(source_prompt, "source_prompt"), len(pixels), "source_prompt", "pictures")
            prompts = self._results(prompt, len(pixels))
            attached = self._check_run(controller, sources, prompts, inversion_method, skip, len(ladder), latents)
            check_generator(generator, len(prompts))
            of_pictures = generator[:1] if isinstance(generator, list) and len(pixels) == 1 else generator
            adapters = (ip_adapter_image, ip_adapter_image_embeds)
            inversion = self._invert(
                pixels,
                sources,
                ladder,
                inversion_method,
                settings,
                of_pictures,
                False,
                cross_attention_kwargs,
                adapters,
            )
        else:
            prompts = self._results(prompt, len(inversion.prompt))
            check_generator(generator, len(prompts))
            ladder = self._ladder_of(inversion, num_inference_steps, source_prompt, guidance_scale)
            method = inversion.config["method"]
            attached = self._check_run(controller, inversion.prompt, prompts, method, skip, len(ladder), latents)

        device, pictures = self._execution_device, len(inversion.prompt)
        inverted = _on(inversion.inverted, device)
        follows, repeats = inverted.method in FOLLOWS, len(prompts) // pictures
        runs_source = attached is not None or (return_source and not follows)
        image_embeds, no_image = self._image_prompts(ip_adapter_image, ip_adapter_image_embeds, len(prompts))
        about = (inversion.config["image_size"], (cross_attention_kwargs or {}).get("scale"))
        of_source = no_image and [embeds[:pictures] for embeds in no_image]
        words = dict(self._condition(prompts, *about, image_embeds))
        source_words = self._condition(inversion.prompt, *about, of_source)
        source_null = self._condition([""] * pictures, *about, of_source, no_words=True)
        if inverted.method == "negative_prompt":
            source_null = source_words
        found = _NullText(inverted, source_null)
        if negative_prompt is None:
            negative = self._condition([""] * len(prompts), *about, no_image, no_words=True)
            if inverted.method == "negative_prompt":
                negative = self._condition(inversion.prompt * repeats, *about, no_image)
        else:
            negatives = spread(
                checked_prompts(negative_prompt, "negative_prompt"), len(prompts), "negative_prompt", "results"
            )
            negative = self._condition(negatives, *about, no_image)
        negative = dict(negative)
        finds_negative = negative_prompt is None

        stepper = EditSteps(inverted, ladder, repeats, skip)
        start = stepper.repeated(stepper.state(stepper.first))
        latents = start if latents is None else given_latents(latents, start)
        source = stepper.state(stepper.first) if runs_source else None
        kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        network = BranchNetwork(self.unet, attached, follows, kwargs)
        self._num_timesteps = len(ladder) - stepper.first
        with ExitStack() as stack:
            if attached is not None:
                stack.enter_context(attached.attach(self.unet, tuple(latents.shape), self._num_timesteps))
            progress_bar = stack.enter_context(self.progress_bar(total=self._num_timesteps))
            for i in range(self._num_timesteps):
                if self.interrupt:
                    continue
                step = stepper.first + i
                t: Any = ladder.timesteps[step].to(device)
                if finds_negative:
                    negative = found.at(negative, step, repeats)
                output = network(
                    latents,
                    source,
                    t,
                    self._guidance_scale,
                    (negative, words),
                    (found.at(source_null, step), source_words),
                )
                rows = 0 if source is None else pictures
                latents = stepper(output[rows:], latents, step)
                if source is not None:
                    source = stepper.state(step + 1) if follows else stepper.source(output[:rows], source, step)
                check_finite(latents, f"the latents after step {i} (timestep {int(t)})", self.unet.dtype)
                if attached is not None and source is not None:
                    together = attached.after_step(i, torch.cat([source, latents]))
                    source, latents = together[:rows], together[rows:]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": words["encoder_hidden_states"],
                        "negative_prompt_embeds": negative["encoder_hidden_states"],
                    }
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    with nullcontext() if attached is None else attached.paused():
                        changed = callback_on_step_end(self, i, t, shown) or {}
                    tensors |= {
                        name: same_shape(changed.get(name, tensor), tensor, name) for name, tensor in tensors.items()
                    }
                    latents, words["encoder_hidden_states"] = tensors["latents"], tensors["prompt_embeds"]
                    # From then on those of the callback, also where each step has its own.
                    finds_negative &= tensors["negative_prompt_embeds"] is negative["encoder_hidden_states"]
                    negative = {**negative, "encoder_hidden_states": tensors["negative_prompt_embeds"]}
                progress_bar.update()

        if return_source:
            source = inverted.latents[0] if source is None else source
            latents = torch.cat([source, latents])
        latents, has_nsfw_concept = latents.to(self.unet.dtype), None
        images: Any = latents
        if output_type != "latent":
            images, has_nsfw_concept = self._decode(latents, inversion.config["image_size"], generator, output_type)
        self.maybe_free_model_hooks()
        passes = (network.passes, 0)
        if made_here:
            passes = (network.passes + inversion.network_evaluations, inversion.backward_passes)
        if not return_dict:
            return images, has_nsfw_concept, *passes
        return NullTextInversionPipelineOutput(images, has_nsfw_concept, *passes)

    def check_inputs(
        self,
        *,
        prompt: Any,
        inversion: Any,
        controller: Any,
        guidance_scale: Any,
        negative_prompt: Any,
        image: Any,
        source_prompt: Any,
        inversion_method: Any,
        num_inference_steps: Any,
        timesteps: Any,
        skip: Any,
        height: Any,
        width: Any,
        return_source: Any,
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
        if isinstance(controller, (list, tuple)):
            ControllerGroup(controller, "controller")
        elif controller is not None and not isinstance(controller, AttentionController):
            raise TypeError(
                f"controller={controller!r} is not a controller of attention; give an AttentionReplace, AttentionRefine or "
                "AttentionReweight, a list with one for each picture, or None"
            )
        checked_number(guidance_scale, "guidance_scale", 0.0, float("inf"))
        checked_choice(inversion_method, "inversion_method", tuple(INVERSIONS))
        if num_inference_steps is not None:
            checked_steps(num_inference_steps)
        if checked_timesteps(timesteps) is not None and inversion is not None:
            raise ValueError(f"timesteps={timesteps!r} has no effect on an inversion; give it to `invert`")
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ValueError(f"skip={skip!r} is not a whole number of at least 0")
        check_size(height, width)
        if not isinstance(return_source, bool):
            raise ValueError(f"return_source={return_source!r} is not True or False")
        checked_choice(output_type, "output_type", OUTPUT_TYPES)
        check_kwargs(cross_attention_kwargs)
        check_step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def _ladder_of(
        self, inversion: InversionOutput, num_inference_steps: Any, source_prompt: Any, guidance_scale: float
    ) -> DDIMLadder:
        """The steps of an inversion, laid by this model's scheduler; raises where the inversion does not fit."""
        config = inversion.config
        checked_choice(config["method"], "method of the inversion", tuple(INVERSIONS))
        steps = config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        # An inversion at timesteps of its own says so beside the settings of its scheduler.
        ladder = self._ladder(steps, config["scheduler"].get("timesteps"))
        said = self._source_prompts(source_prompt, len(inversion.prompt))
        scale = guidance_scale if config["method"] == "null_text" else None
        ours = self._inversion_config(ladder, config["alignment"], config["image_size"], config["method"])
        inversion.check_fits({**ours, "num_inference_steps": steps}, said, scale)
        if inversion.latents.shape[2] != self.unet.config.in_channels:
            raise ValueError(
                f"inversion has latents of {inversion.latents.shape[2]} channels, the UNet takes "
                f"{self.unet.config.in_channels}; invert again"
            )
        return ladder

    def _check_run(
        self,
        controller: AttentionController | list[AttentionController] | None,
        sources: list[str],
        prompts: list[str],
        method: str,
        skip: int,
        steps: int,
        latents: Any,
    ) -> AttentionController | ControllerGroup | None:
        """What can be said once pictures, prompts and steps are known. Gives what is to be attached."""
        attached = _attached(controller, sources, prompts)
        if not skip < steps:
            raise ValueError(f"skip={skip} leaves none of the {steps} steps; use at most {steps - 1}")
        if method == "bdia" and (skip or latents is not None):
            name, value = ("skip", skip) if skip else ("latents", "a tensor")
            raise ValueError(
                f"{name}={value} is not possible with method='bdia', which starts from its own pair of states; leave it out"
            )
        return attached


def _attached(
    controller: AttentionController | list[AttentionController] | None, sources: list[str], prompts: list[str]
) -> AttentionController | ControllerGroup | None:
    """A controller, or one for each picture as one, that was made for these prompts."""
    if controller is None:
        return None
    several = isinstance(controller, (list, tuple))
    each = list(controller) if isinstance(controller, (list, tuple)) else [controller]
    pictures = len(sources)
    if not several and pictures > 1:
        raise ValueError(f"controller belongs to one picture, the call has {pictures}; give a list with one for each")
    if len(each) != pictures:
        raise ValueError(f"controller holds {len(each)} controllers for {pictures} pictures; give one for each")
    for number, (one, source) in enumerate(zip(each, sources, strict=True)):
        wanted = [source, *prompts[number::pictures]]
        if one.prompts != wanted:
            name = f"controller[{number}]" if several else "controller"
            raise ValueError(
                f"{name} was made for the prompts {one.prompts}, the call has {wanted}, the source's first; make it for "
                "these"
            )
    return ControllerGroup(each, "controller") if pictures > 1 else each[0]


class _NullText:
    """The embeddings in place of those of the empty prompt, where an inversion has found some."""

    def __init__(self, inverted: Inverted, null: Condition) -> None:
        self.inverted = inverted
        wanted, found = null["encoder_hidden_states"], inverted.null_embeddings
        if found is not None and found.shape[2:] != wanted.shape[1:]:
            raise ValueError(
                f"inversion has null_embeddings of shape {tuple(found.shape)}, the text encoder gives "
                f"{tuple(wanted.shape[1:])} for each prompt; invert again"
            )

    def at(self, condition: Condition, step: int, repeats: int = 1) -> Condition:
        """A condition with the embeddings of a step."""
        found = self.inverted.null_embeddings_at(step)
        if found is None:
            return condition
        embeds = found.to(condition["encoder_hidden_states"]).repeat(repeats, 1, 1)
        return {**condition, "encoder_hidden_states": embeds}


def _on(inverted: Inverted, device: torch.device) -> Inverted:
    """An inversion on a device, in float32."""
    fields = ("latents", "null_embeddings", "noise_maps", "offsets")
    moved = {name: getattr(inverted, name) for name in fields}
    return replace(
        inverted, **{name: value.to(device, torch.float32) for name, value in moved.items() if value is not None}
    )
