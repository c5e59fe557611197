"""`invert()` by any method of `diffusers_ext.inversion`, for pipelines of Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..guidance import part_of_condition
from ..guidance.guided_step import frozen
from ..inversion import (
    DEFAULT_INVERSION,
    INVERSIONS,
    DDIMLadder,
    Denoiser,
    InversionOutput,
    InversionProgress,
    InversionStoppedError,
    Inverted,
    invert,
)
from ..schedulers.noise import check_generator
from .editing import EditingMixin, PipelineImage
from .inputs import (
    check_finite,
    check_kwargs,
    check_size,
    check_step_callback,
    checked_choice,
    checked_number,
    checked_prompts,
    images_to_tensor,
    spread,
)
from .one_at_a_time import one_at_a_time


# Settings of a method's function that `invert` has as arguments of its own.
OWN_ARGUMENTS = ("guidance_scale", "generator", "callback")


class PictureInversionMixin(EditingMixin):
    """Inverts pictures by seven methods; put it before the pipeline class that has the components."""

    @one_at_a_time("unet")
    @torch.no_grad()
    def invert(
        self,
        image: PipelineImage,
        prompt: str | list[str],
        method: str = DEFAULT_INVERSION,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        settings: Mapping[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        gradient_checkpointing: bool = False,
        timesteps: list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
    ) -> InversionOutput:
        """Finds the latents from which the model would have drawn pictures.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                The picture or pictures, of any size; see [`images_to_tensor`] for the accepted forms.
            prompt (`str` or `list[str]`):
                What they show; one for all or one each. `""` is allowed.
            method (`str`, *optional*, defaults to `"direct"`):
                `"direct"`, `"null_text"`, `"negative_prompt"`, `"edit_friendly"`, `"bdia"`, `"fixed_point"` or `"ddim"`; see
                the page on inversion for what each costs and how exact it is.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps, those that the edits will have.
            guidance_scale (`float`, *optional*):
                What the method prepares for, where it does: `"null_text"` 7.5 by default, and edits must have the same;
                `"edit_friendly"` 3.5 and `"bdia"` 1, for the source alone; `"direct"` then stores offsets, of which the
                pipeline itself has no need.
            settings (`dict`, *optional*):
                Further keyword arguments of the method's function, such as `{"inner_steps": 10}` for `"null_text"`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws the noise of `"edit_friendly"`; one, or one for each picture.
            gradient_checkpointing (`bool`, *optional*, defaults to `False`):
                Whether the network computes its activations anew for gradients instead of keeping them: less memory, more
                time, the same result. Only `"null_text"`, and `"fixed_point"` by gradients, need any.
            timesteps (`list[int]`, *optional*):
                Descending timesteps instead of evenly spaced ones; `num_inference_steps` has no effect then.
            height (`int`, *optional*): Scale the picture to this height in pixels. Defaults to its own.
            width (`int`, *optional*): Scale the picture to this width in pixels. Defaults to its own.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                With an IP-Adapter but no image encoder: one tensor `(2, 1, width)` for each adapter, of which the first half
                stands for no picture prompt.
            cross_attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is that of LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, report)` after every step and every round of an optimisation, with a
                dict of `stage`, `picture`, `round` and `loss`. What it returns has no effect.

        Returns:
            [`InversionOutput`]: For the `inversion` argument of any number of calls; it can be saved.

        Raises:
            InversionStoppedError: If an optimisation left the finite numbers; `best` is an [`InversionOutput`] of what it had
                found by then.
            ValueError: If an argument is wrong (also [`ImageError`]), or values become infinite or NaN on the way.
            TypeError: If `image`, `generator` or a callback is of a wrong type.
        """
        self._check_model()
        chosen = self._method_settings(method, guidance_scale, settings)
        check_size(height, width)
        check_kwargs(cross_attention_kwargs)
        check_step_callback(callback_on_step_end)
        if not isinstance(gradient_checkpointing, bool):
            raise ValueError(f"gradient_checkpointing={gradient_checkpointing!r} is not True or False")
        ladder = self._ladder(num_inference_steps, timesteps)
        prompts = checked_prompts(prompt, "prompt")
        pixels = images_to_tensor(image, height, width)
        output = self._invert(
            pixels,
            spread(prompts, len(pixels), "prompt", "pictures"),
            ladder,
            method,
            chosen,
            generator,
            gradient_checkpointing,
            cross_attention_kwargs,
            (None, ip_adapter_image_embeds),
            callback_on_step_end,
        )
        self.maybe_free_model_hooks()
        return output

    def _check_model(self) -> None:
        super()._check_model()
        if self._is_guidance_distilled:
            raise ValueError(
                f"the UNet takes the guidance scale as an input (time_cond_proj_dim={self.unet.config.time_cond_proj_dim}) and "
                "has no use for an empty prompt; use a network that was not distilled, or GuideAndRescalePipeline"
            )

    def _method_settings(
        self, method: Any, guidance_scale: Any, settings: Any, name_of_settings: str = "settings"
    ) -> dict[str, Any]:
        """Keyword arguments of the method's function."""
        checked_choice(method, "method", tuple(INVERSIONS))
        known = INVERSIONS[method].settings
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"{name_of_settings}={settings!r} is not a dict; give settings of the method by name")
        chosen = dict(settings or {})
        allowed = [name for name in known if name not in OWN_ARGUMENTS]
        for name in chosen:
            if name not in allowed:
                raise ValueError(
                    f"{name_of_settings} has {name!r}, which method={method!r} does not know; it knows "
                    f"{', '.join(allowed) or 'none'}"
                )
        if guidance_scale is not None:
            checked_number(guidance_scale, "guidance_scale", 0.0, float("inf"))
            if "guidance_scale" not in known:
                raise ValueError(
                    f"guidance_scale={guidance_scale!r} has no effect on method={method!r}, which inverts without guidance; "
                    "leave it out here and give it to the call"
                )
            if method == "null_text" and guidance_scale <= 1:
                raise ValueError(
                    f"guidance_scale={guidance_scale!r} uses no null embeddings; give that of the edits, above 1, or "
                    "method='ddim'"
                )
            chosen["guidance_scale"] = float(guidance_scale)
        elif method == "direct":
            # The pipeline puts the source on its trajectory, at any scale, and needs no offsets.
            chosen["guidance_scale"] = None
        if method == "null_text" or chosen.get("solver") == "gradient":
            self._check_gradients(f"method={method!r}", "use method='direct'")
        return chosen

    def _invert(
        self,
        pixels: torch.Tensor,
        prompts: list[str],
        ladder: DDIMLadder,
        method: str,
        settings: Mapping[str, Any],
        generator: Any = None,
        gradient_checkpointing: bool = False,
        cross_attention_kwargs: dict[str, Any] | None = None,
        image_prompt: tuple[Any, Any] = (None, None),
        callback: Callable[..., Any] | None = None,
    ) -> InversionOutput:
        """[`invert`] of checked arguments."""
        check_generator(generator, len(prompts))
        if method == "bdia" and len(ladder) < 2:
            raise ValueError(
                f"method='bdia' begins with a pair of states, which num_inference_steps={len(ladder)} leaves out; use at least 2"
            )
        image_size = list(pixels.shape[-2:])
        _, no_image = self._image_prompts(*image_prompt, len(prompts))
        about = (image_size, (cross_attention_kwargs or {}).get("scale"), no_image)
        start = self._encode(pixels).float()
        check_finite(start, "the encoded picture", self.vae.dtype)
        source = self._condition(prompts, *about)
        null = self._condition([""] * len(prompts), *about, no_words=True)
        config = self._inversion_config(ladder, "matched", image_size, method)

        def output(inverted: Inverted) -> InversionOutput:
            # The alignment is that of the method; the rest of the config is known only here.
            about = {name: config[name] for name in ("image_size", "scheduler", "model")}
            return InversionOutput.of(inverted, prompts, about)

        denoiser = self._denoiser(source, null, cross_attention_kwargs)
        settings = {**settings, "generator": generator} if method == "edit_friendly" else settings
        network = getattr(self.unet, "_orig_mod", self.unet)
        with _Reports(self, len(prompts), callback) as report, frozen(network):
            with checkpointing(network, gradient_checkpointing):
                try:
                    return output(invert(denoiser, start, ladder, method, callback=report, **settings))
                except InversionStoppedError as error:
                    best = None if error.best is None else output(error.best)
                    raise InversionStoppedError(str(error), best) from error

    def _denoiser(
        self, source: Mapping[str, Any], null: Mapping[str, Any], cross_attention_kwargs: dict[str, Any] | None
    ) -> Denoiser:
        """The UNet with the conditions of a batch of pictures, which go through it one by one.

        A batch rounds differently from a picture alone, and an optimisation enlarges that.
        """

        def network(
            latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor, **extra: Any
        ) -> torch.Tensor:
            condition = {"encoder_hidden_states": embeddings, **extra}
            outputs = []
            for row in range(len(latents)):
                rows = slice(row, row + 1)
                part = part_of_condition(condition, rows)
                outputs.append(
                    self.unet(
                        latents[rows], timestep, return_dict=False, cross_attention_kwargs=cross_attention_kwargs, **part
                    )[0]
                )  # fmt: skip
            return torch.cat(outputs)

        source_embeddings, source_extra = _split(source)
        null_embeddings, null_extra = _split(null)
        return Denoiser(network, source_embeddings, null_embeddings, self.unet.dtype, source_extra, null_extra)


class _Reports:
    """Shows what a method reports as progress bars, the loss beside them, and hands it on to a callback."""

    def __init__(self, pipe: Any, pictures: int, callback: Callable[..., Any] | None) -> None:
        self.pipe, self.pictures, self.callback = pipe, pictures, callback
        self.bar: Any = None
        self.stage, self.done, self.total = "", 0, 0

    def __enter__(self) -> "_Reports":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._close(whole=kind is None)

    def __call__(self, report: InversionProgress) -> None:
        if report.stage != self.stage:
            self._close(whole=True)
            self.stage, self.done = report.stage, 0
            self.total = report.steps * (1 if report.picture is None else self.pictures)
            self.bar = self.pipe.progress_bar(total=self.total)
            self.bar.set_description(report.stage, refresh=False)
        if report.loss is not None:
            self.bar.set_postfix(loss=f"{report.loss:.2e}", refresh=False)
        # A report with a loss comes from inside its step, one without at its end.
        self._advance((report.picture or 0) * report.steps + report.step + (report.loss is None))
        if self.callback is not None:
            told = {name: getattr(report, name) for name in ("stage", "picture", "round", "loss")}
            self.callback(self.pipe, report.step, report.timestep, told)

    def _advance(self, done: int) -> None:
        self.bar.update(done - self.done)
        self.done = done

    def _close(self, whole: bool) -> None:
        if self.bar is not None:
            if whole:
                self._advance(self.total)
            self.bar.close()
            self.bar = None


@contextmanager
def checkpointing(network: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing for the time of a `with` block, if it is wanted and not on already.

    Args:
        network (`UNet2DConditionModel`): The network.
        wanted (`bool`): Whether to switch it on.
    """
    if not wanted or network.is_gradient_checkpointing:
        yield
        return
    network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


def _split(condition: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Text embeddings, and all else."""
    extra = dict(condition)
    return extra.pop("encoder_hidden_states"), extra
