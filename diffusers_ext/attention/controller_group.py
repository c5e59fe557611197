"""Controllers of several pictures as one: each edits its own picture, and all go through the UNet in one batch.

The rows of n pictures with k targets each are the n sources, then the first target of each picture, then the second
of each. So the rows of picture i are every n-th one from i on, its source first: what its controller would get alone.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .attached_edit import AttachedEdit
from .edit_run import EditRun
from .prompt_to_prompt import AttentionController


# What all pictures of a batch have in common, since a layer is edited for all of them or for none.
COMMON = ("self_replace_steps", "max_self_attention_resolution")


class GroupRun:
    """The runs of several controllers over one batch; an [`AttentionEdit`].

    Args:
        runs (`Sequence[EditRun]`): One for each picture, of the same number of prompts.
    """

    def __init__(self, runs: Sequence[EditRun]) -> None:
        self.runs = list(runs)
        self.sources = len(self.runs)
        self.paused = False
        self.num_steps, self.sizes = self.runs[0].num_steps, self.runs[0].sizes

    def conditional_rows(self, rows: int) -> int:
        if self.paused:
            return -1
        each = len(self.runs[0].controller.prompts)
        prompts = self.sources * each
        if rows not in (prompts, 2 * prompts):
            raise ValueError(
                f"the UNet got a batch of {rows}; {self.sources} controllers of {each} prompts each need {prompts}, or "
                f"{2 * prompts} with the unconditional half first"
            )
        return rows - prompts

    def halvings(self, positions: int, name: str) -> int:
        return self.runs[0].halvings(positions, name)

    def reads_cross(self) -> bool:
        return any(run.reads_cross() for run in self.runs)

    def replaces_self(self, halvings: int) -> bool:
        return self.runs[0].replaces_self(halvings)

    def edit_cross(self, name: str, halvings: int, maps: torch.Tensor) -> torch.Tensor:
        edited = [
            run.edit_cross(name, halvings, maps[picture :: self.sources]) for picture, run in enumerate(self.runs)
        ]
        return torch.stack(edited, dim=1).flatten(0, 1)


class ControllerGroup(AttachedEdit[GroupRun]):
    """One controller for each of several pictures that are edited in one batch.

    It is attached, paused and told of steps as one controller is. The pipelines of this package make it of a list;
    in a loop of one's own the batch is `group.prompts`: the sources, then the first target of each, then the second.

    Args:
        controllers (`list[AttentionController]`):
            Of each picture, with its prompts, words, windows of cross-attention and local blend. Of the same number of
            prompts, and alike in `self_replace_steps` and `max_self_attention_resolution`.
        name (`str`, *optional*, defaults to `"controllers"`): What messages call the list.

    Attributes:
        prompts (`list[str]`): Of the rows of a batch.

    Raises:
        TypeError: If `controllers` is no list of controllers.
        ValueError: If it is empty, one stands in it twice or shares its local blend with another, or they do not agree.

    Example:
        ```python
        from transformers import CLIPTokenizer
        from diffusers_ext import AttentionReplace
        from diffusers_ext.attention import ControllerGroup

        tokenizer = CLIPTokenizer.from_pretrained("pipelines/emoji-scenes-64/tokenizer")
        pairs = [["a red star", "a blue star"], ["a green bell", "a green drum"]]
        group = ControllerGroup([AttentionReplace(tokenizer, pair) for pair in pairs])
        assert group.prompts == ["a red star", "a green bell", "a blue star", "a green drum"]
        ```
    """

    def __init__(self, controllers: Sequence[AttentionController], name: str = "controllers") -> None:
        self.controllers = _checked(controllers, name)
        each = [controller.prompts for controller in self.controllers]
        self.prompts = [prompt for row in zip(*each, strict=True) for prompt in row]

    def _check_free(self) -> None:
        for controller in self.controllers:
            controller._check_free()

    def _begin(self, size: tuple[int, int], num_steps: int) -> GroupRun:
        self._run = GroupRun([controller._begin(size, num_steps) for controller in self.controllers])
        return self._run

    def _end(self) -> None:
        super()._end()
        for controller in self.controllers:
            controller._end()

    def _end_step(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        pictures = len(self.controllers)
        parts = [
            controller._end_step(step, latents[picture::pictures])
            for picture, controller in enumerate(self.controllers)
        ]
        return torch.stack(parts, dim=1).flatten(0, 1)


def _checked(controllers: Any, name: str) -> list[AttentionController]:
    if not isinstance(controllers, (list, tuple)):
        raise TypeError(f"{name}={controllers!r} is not a list of controllers")
    if not controllers:
        raise ValueError(f"{name}={controllers!r} holds no controller; give one for each picture")
    first = controllers[0]
    for number, controller in enumerate(controllers):
        if not isinstance(controller, AttentionController):
            raise TypeError(
                f"{name}[{number}]={controller!r} is not a controller of attention; give an AttentionReplace, "
                "AttentionRefine or AttentionReweight for each picture"
            )
        for before, other in enumerate(controllers[:number]):
            if other is controller:
                raise ValueError(f"{name}[{number}] is {name}[{before}] again; make one for each picture")
            if controller.local_blend is not None and other.local_blend is controller.local_blend:
                raise ValueError(
                    f"{name}[{number}] has the local_blend of {name}[{before}], whose mask is that of one picture; make "
                    "one for each"
                )
        if len(controller.prompts) != len(first.prompts):
            raise ValueError(
                f"{name}[{number}] has {len(controller.prompts)} prompts, {name}[0] has {len(first.prompts)}; give "
                "each picture as many targets"
            )
        for common in COMMON:
            found, wanted = getattr(controller, common), getattr(first, common)
            if found != wanted:
                raise ValueError(
                    f"{name}[{number}] has {common}={found}, {name}[0] has {wanted}; pictures of one batch need the "
                    "same, edit them in a call each"
                )
    return list(controllers)
