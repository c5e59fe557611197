"""How an edit of attention is put into a UNet and told of the steps; what is edited is said by who derives from it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from .edit_processor import AttentionEdit, PromptToPromptProcessor, check_editable
from .self_attention import installed_processors
from .word_steps import checked_count


class Run(AttentionEdit, Protocol):
    """What is asked of one run."""

    num_steps: int
    sizes: list[tuple[int, int]]
    paused: bool


OneRun = TypeVar("OneRun", bound=Run)


class AttachedEdit(ABC, Generic[OneRun]):
    """The protocol of whoever samples, see `prompt_to_prompt.py`.

    Attributes:
        prompts (`list[str]`): Of the rows of a batch, those of the sources first.
    """

    prompts: list[str]
    _run: OneRun | None = None

    @contextmanager
    def attach(self, unet: nn.Module, latents_shape: Sequence[int], num_inference_steps: int) -> Iterator[None]:
        """Puts the edit into a UNet for the time of a `with` block. Every run begins anew.

        The layers get their processors back at the end, also after an exception; an IP-Adapter's and LoRA act all the
        time.

        Args:
            unet (`torch.nn.Module`): A `UNet2DConditionModel`, also compiled.
            latents_shape (`Sequence[int]`): Shape of the latents, of which the last two sizes count.
            num_inference_steps (`int`): Sampling steps, the whole to which shares of steps refer.

        Raises:
            TypeError: If `unet` is no module.
            ValueError: If another argument is wrong, a processor's attention is not known, or a controller is attached
            already.
        """
        if not isinstance(unet, nn.Module):
            raise TypeError(f"unet={unet!r} is not a UNet; give `pipe.unet`")
        self._check_free()
        steps = checked_count(num_inference_steps, "num_inference_steps")
        size = _checked_size(latents_shape)
        layers = {
            name: module
            for name, module in getattr(unet, "_orig_mod", unet).named_modules()
            if isinstance(module, Attention)
        }
        check_editable(layers)
        try:
            run = self._begin(size, steps)
            with installed_processors(layers, lambda name, before: PromptToPromptProcessor(name, run, before)):
                yield
        finally:
            self._end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the network as it is for the time of a `with` block: for a pass of the unconditional half alone.

        Raises:
            ValueError: If the controller is not attached.
        """
        run = self._attached()
        before, run.paused = run.paused, True
        try:
            yield
        finally:
            run.paused = before

    def after_step(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Ends a sampling step: blends, and goes on to the next step's windows.

        Args:
            step (`int`): The step that ended, from 0.
            latents (`torch.Tensor` of shape `(prompts, channels, height, width)`): Latents after it, the source first.

        Returns:
            `torch.Tensor`: The latents to go on with, the same ones without a local blend.

        Raises:
            ValueError: If the controller is not attached, or an argument does not fit.
        """
        run = self._attached()
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < run.num_steps:
            raise ValueError(f"step={step!r} is not one of the {run.num_steps} steps, 0 to {run.num_steps - 1}")
        wanted = (len(self.prompts), *run.sizes[0])
        found = (
            (len(latents), *latents.shape[-2:]) if isinstance(latents, torch.Tensor) and latents.ndim == 4 else None
        )
        if found != wanted:
            shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(
                f"latents has the shape {shape}; it must be ({wanted[0]}, channels, {wanted[1]}, {wanted[2]})"
            )
        return self._end_step(step, latents)

    def callback_on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """[`after_step`] as the pipelines of diffusers call it; hand it over as their argument of this name.

        Args:
            pipe (`DiffusionPipeline`): The pipeline.
            step (`int`): The step that ended.
            timestep (`int` or `torch.Tensor`): Its timestep.
            tensors (`dict`): The pipeline's tensors, with `"latents"`.

        Returns:
            `dict`: `"latents"` to go on with.
        """
        return {"latents": self.after_step(step, tensors["latents"])}

    @abstractmethod
    def _begin(self, size: tuple[int, int], num_steps: int) -> OneRun:
        """Makes `_run`."""

    @abstractmethod
    def _end_step(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """[`after_step`] of checked arguments."""

    def _end(self) -> None:
        self._run = None

    def _check_free(self) -> None:
        if self._run is not None:
            raise ValueError("this controller is attached already; leave its `with` block first, or make a second one")

    def _attached(self) -> OneRun:
        if self._run is None:
            raise ValueError(
                "the controller is not attached; call it inside `with controller.attach(unet, shape, steps):`"
            )
        return self._run


def _checked_size(latents_shape: Any) -> tuple[int, int]:
    sizes = list(latents_shape)[-2:] if isinstance(latents_shape, (tuple, list)) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and 1 <= size <= 100_000 for size in sizes):
        raise ValueError(f"latents_shape={latents_shape!r} does not end in a height and a width; give `latents.shape`")
    return sizes[0], sizes[1]
