"""One run of a prompt-to-prompt controller: which layers of which rows are edited in the step that it is at."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .local_blend import LocalBlend
from .maps import in_window, map_sizes
from .word_steps import Share, window_bounds, word_schedule


class Edits(Protocol):
    """What a run reads of its controller."""

    tokenizer: Any
    prompts: list[str]
    text_length: int
    cross_replace_steps: Share | Mapping[str, Share]
    self_replace_steps: tuple[float, float]
    max_self_attention_resolution: float
    local_blend: LocalBlend | None

    def edit_cross_attention(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor: ...


class EditRun:
    """A controller's tables for a number of steps and a size of latents; an [`AttentionEdit`].

    Args:
        controller ([`AttentionController`]): Says what is edited.
        size (`tuple[int, int]`): Height and width of the latents.
        num_steps (`int`): Sampling steps.
    """

    sources = 1

    def __init__(self, controller: Edits, size: tuple[int, int], num_steps: int) -> None:
        self.controller = controller
        self.num_steps = num_steps
        self.step = 0
        self.paused = False
        self.sizes = map_sizes(*size)
        self._halvings = {height * width: number for number, (height, width) in enumerate(self.sizes)}
        self._schedule = word_schedule(
            controller.tokenizer, controller.prompts, num_steps, controller.cross_replace_steps
        )
        self._self_window = window_bounds(controller.self_replace_steps, num_steps)

    def conditional_rows(self, rows: int) -> int:
        if self.paused:
            return -1
        prompts = len(self.controller.prompts)
        if rows not in (prompts, 2 * prompts):
            raise ValueError(
                f"the UNet got a batch of {rows}; the controller's {prompts} prompts need {prompts}, or "
                f"{2 * prompts} with the unconditional half first"
            )
        return rows - prompts

    def halvings(self, positions: int, name: str) -> int:
        if positions not in self._halvings:
            height, width = self.sizes[0]
            raise ValueError(
                f"{name} has {positions} positions, which no halving of latents of {height}x{width} gives; hand `attach` "
                "the shape of the latents that the UNet gets"
            )
        return self._halvings[positions]

    def reads_cross(self) -> bool:
        return self.controller.local_blend is not None or bool(self._schedule[self.step].any())

    def replaces_self(self, halvings: int) -> bool:
        start, end = self._self_window
        return start <= self.step < end and 0.5**halvings <= self.controller.max_self_attention_resolution

    def edit_cross(self, name: str, halvings: int, maps: torch.Tensor) -> torch.Tensor:
        if maps.shape[-1] != self.controller.text_length:
            raise ValueError(
                f"the UNet attends to {maps.shape[-1]} text tokens, the controller's tokenizer has "
                f"{self.controller.text_length}; prompts in several parts cannot be edited"
            )
        source, own = maps[0], maps[1:]
        active = self._schedule[self.step]
        edited = own
        if bool(active.any()):
            edited = in_window(self.controller.edit_cross_attention(source, own).expand_as(own), own, active)
        if self.controller.local_blend is not None:
            self.controller.local_blend.read(name, halvings, torch.cat([maps[:1], edited]))
        return edited
