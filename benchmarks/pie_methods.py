"""What `pie_bench.py` compares: a way to invert a picture, and a way to edit it, with the settings of PIE-Bench.

Prompt-to-prompt has the settings of the benchmark's own code for every picture: guidance 7.5, cross-attention of the source over
.4 of the steps and self-attention over .6; where an entry names the word of its change, a local blend around it, and twice
its weight in the edit. Edit-friendly inversion is without the last two there, and with guidance 1 of the source.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from pie_data import Entry
from PIL import Image

from diffusers_ext import (
    AttentionRefine,
    AttentionReweight,
    GuideAndRescalePipeline,
    LocalBlend,
    NullTextInversionPipeline,
)
from diffusers_ext.attention import AttentionController, controller_for, word_indices
from diffusers_ext.hub import load_pipeline, native_size


CROSS_REPLACE_STEPS, SELF_REPLACE_STEPS, WEIGHT = 0.4, 0.6, 2.0
SEED = 1234  # of the noise of edit-friendly inversion, for every picture anew


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: On the command line.
        inversion: A method of `NullTextInversionPipeline.invert`; None for Guide-and-Rescale.
        settings: Of the inversion; for Guide-and-Rescale of its call.
        prompt_to_prompt: Whether the source's attention is carried over, and whether around and to the word of the change:
            "blended", "plain" or "".
        guidance_scale: Of the edit.
        source_guidance_scale: That the inversion prepares for, where it is another.
        skip: Share of the steps that are left out at the noisy end.
    """

    name: str
    inversion: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_to_prompt: str = "blended"
    guidance_scale: float = 7.5
    source_guidance_scale: float | None = None
    skip: float = 0.0


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("ddim", "ddim", prompt_to_prompt=""),
        Method("ddim+p2p", "ddim"),
        Method("negative-prompt+p2p", "negative_prompt"),
        Method("null-text+p2p", "null_text", source_guidance_scale=7.5),
        Method("null-text-official+p2p", "null_text", {"schedule": "official"}, source_guidance_scale=7.5),
        Method("direct+p2p", "direct"),
        Method("fixed-point+p2p", "fixed_point", {"iterations": 5}),
        Method("bdia+p2p", "bdia"),
        Method(
            "edit-friendly", "edit_friendly", prompt_to_prompt="", guidance_scale=15.0, source_guidance_scale=3.5, skip=0.36
        ),
        Method("edit-friendly+p2p", "edit_friendly", prompt_to_prompt="plain", source_guidance_scale=1.0, skip=0.24),
        Method("guide-and-rescale", None),
        Method("guide-and-rescale-stylize", None, {"preset": "stylize"}),
    )
}  # fmt: skip


@dataclass
class Edited:
    """A result, and what it cost."""

    image: Image.Image
    forward_passes: int
    backward_passes: int
    seconds: float
    blended: bool


class Editors:
    """Every method on one set of weights.

    Args:
        model: Folder or Hub id of a Stable Diffusion 1.x or 2.x model; None for the demo model.
        steps: Of the inversion and of the sampling.
        device: Where it runs; None for a GPU if there is one.
        dtype: Of the weights.
    """

    def __init__(
        self,
        model: str | None,
        steps: int,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.steps = steps
        self.pipe: Any = load_pipeline(
            NullTextInversionPipeline, model, device=device, dtype=dtype, safety_checker=None
        )
        self.guide: Any = GuideAndRescalePipeline(**self.pipe.components, requires_safety_checker=False)
        for pipe in (self.pipe, self.guide):
            pipe.set_progress_bar_config(disable=True)
        self.side = native_size(self.pipe)

    def controller(self, method: Method, entry: Entry) -> tuple[AttentionController | None, bool]:
        """Prompt-to-prompt for an entry, and whether it looks at the word of the change."""
        if not method.prompt_to_prompt:
            return None, False
        tokenizer, prompts = self.pipe.tokenizer, [entry.source_prompt, entry.prompt]
        windows = {"cross_replace_steps": CROSS_REPLACE_STEPS, "self_replace_steps": SELF_REPLACE_STEPS}
        if method.prompt_to_prompt == "plain":
            return controller_for(tokenizer, prompts, **windows), False
        words = entry.blended_words
        if words is None or not all(self._has(*pair) for pair in zip(prompts, words, strict=True)):
            return AttentionRefine(tokenizer, prompts, **windows), False
        refine = AttentionRefine(
            tokenizer, prompts, local_blend=LocalBlend(tokenizer, prompts, list(words)), **windows
        )
        return AttentionReweight(tokenizer, prompts, {words[1]: WEIGHT}, controller=refine), True

    def __call__(self, method: Method, entry: Entry, picture: Image.Image) -> Edited:
        """Edits a picture at the model's own size; the result has the size of the picture.

        Raises:
            ValueError: If values become infinite or NaN on the way, or a prompt cannot be used.
        """
        began = time.perf_counter()
        size = {"height": self.side, "width": self.side}
        if method.inversion is None:
            found = self.guide(
                picture, entry.source_prompt, entry.prompt, num_inference_steps=self.steps,
                guidance_scale=method.guidance_scale, **size, **method.settings,
            )  # fmt: skip
            passes, blended = (found.network_evaluations, found.backward_passes), False
        else:
            noise = torch.Generator().manual_seed(SEED) if method.inversion == "edit_friendly" else None
            inversion = self.pipe.invert(
                picture, entry.source_prompt, method.inversion, self.steps, method.source_guidance_scale,
                method.settings, noise, **size,
            )  # fmt: skip
            controller, blended = self.controller(method, entry)
            found = self.pipe(
                entry.prompt, inversion=inversion, controller=controller, guidance_scale=method.guidance_scale,
                skip=round(method.skip * self.steps),
            )  # fmt: skip
            passes = (
                found.network_evaluations + inversion.network_evaluations,
                found.backward_passes + inversion.backward_passes,
            )
        image = found.images[0]
        seconds = time.perf_counter() - began
        if image.size != picture.size:
            image = image.resize(picture.size, Image.Resampling.LANCZOS)
        return Edited(image, *passes, seconds, blended)

    def _has(self, prompt: str, word: str) -> bool:
        try:
            return bool(word_indices(self.pipe.tokenizer, prompt, word))
        except ValueError:
            return False
