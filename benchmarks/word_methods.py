"""Prompt-to-prompt on inverted pictures, as `editing.py` runs it: which inversions, and what a controller does there.

A caption reads "a red guitar on a white dotted background". An edit of the thing is blended in where the thing is, an edit of the
place everywhere but there: both are read off the two captions, not off the label of the pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from editors import Batch, Editors

from diffusers_ext import LocalBlend
from diffusers_ext.attention import AttentionController, controller_for


@dataclass(frozen=True)
class Blend:
    """How a local blend finds what may change.

    Args:
        threshold: Of the thing, where it changes.
        subtract_threshold: Of the thing, where the place around it changes.
        start: Share of the steps before the first blend.
        resolution: Of the maps, as a share of the latents' side.
    """

    threshold: float
    subtract_threshold: float
    start: float = 0.2
    resolution: float = 0.25

    def of(self, tokenizer: Any, source: str, target: str) -> LocalBlend:
        prompts = [source, target]
        (thing, place), (other, ground) = (parts(caption) for caption in prompts)
        options: dict[str, Any] = {"start": self.start, "resolution": self.resolution}
        if sort_of(source, target) != "place":
            nouns = [last_word(thing), last_word(other)]
            return LocalBlend(tokenizer, prompts, nouns, threshold=self.threshold, **options)
        # Attention is never 0, so a threshold of 0 is the whole picture, of which the thing is left out.
        return LocalBlend(
            tokenizer, prompts, [place, ground], subtract_words=[last_word(thing), last_word(other)], threshold=0.0,
            subtract_threshold=self.subtract_threshold, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """Of the steps, with the source's attention.

    Args:
        cross: To the words.
        own: Of the picture to itself.
    """

    cross: float
    own: float


@dataclass(frozen=True)
class WordEdit:
    """One way to invert and edit; called with the editors and a batch of edits of one sort.

    Args:
        inversion: The method of inversion.
        guidance_scale: Of the edit.
        shares: By sort of edit, see [`sort_of`].
        blend: Keeps the picture outside of what changes.
        skip: Steps that are left out at the noisy end.
        settings: Of the inversion, as pairs of name and value.
    """

    inversion: str
    guidance_scale: float
    shares: Mapping[str, Shares]
    blend: Blend | None = None
    skip: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    def controller(self, tokenizer: Any, source: str, target: str) -> AttentionController:
        shares = self.shares[sort_of(source, target)]
        return controller_for(
            tokenizer, [source, target], cross_replace_steps=shares.cross, self_replace_steps=shares.own,
            local_blend=None if self.blend is None else self.blend.of(tokenizer, source, target),
        )  # fmt: skip

    def __call__(self, editors: Editors, batch: Batch) -> torch.Tensor:
        pipe = editors.words
        inversion = editors.inverted(batch, self.inversion, self.guidance_scale, dict(self.settings))
        controllers = [self.controller(pipe.tokenizer, *pair) for pair in zip(batch.source, batch.target, strict=True)]
        edited = pipe(
            batch.target, inversion=inversion, guidance_scale=self.guidance_scale, skip=self.skip, output_type="pt",
            controller=controllers,
        )  # fmt: skip
        return edited.images.cpu() * 2.0 - 1.0


def parts(caption: str) -> tuple[str, str]:
    """The thing and the place of a caption; a caption without a place has one that is empty."""
    thing, _, place = caption.partition(" on ")
    return thing, place


def sort_of(source: str, target: str) -> str:
    """What an edit changes: `"place"`, the `"look"` of the thing, or the `"thing"`, and with it the outline."""
    (thing, _), (other, _) = parts(source), parts(target)
    return "place" if thing == other else "look" if last_word(thing) == last_word(other) else "thing"


def last_word(words: str) -> str:
    return words.split()[-1]


@dataclass(frozen=True)
class WordSetting:
    """A row of the benchmark; see `editing_methods.Setting`."""

    method: str
    knob: str
    edit: WordEdit
    main: bool = False
    pairs: int | None = None


DDIM_WORDS, NULL_WORDS = "DDIM + P2P", "Null-text + P2P"
WORDS, BLENDED = "Direct + P2P", "Direct + P2P + blend"
NEGATIVE, BDIA, FIXED, FRIENDLY = (
    f"{name} + P2P + blend" for name in ("Negative-prompt", "BDIA", "Fixed-point", "Edit-friendly")
)
WORD_PEERS = (DDIM_WORDS, NULL_WORDS)
WORD_METHODS = (*WORD_PEERS, WORDS, BLENDED, NEGATIVE, BDIA, FIXED, FRIENDLY)
FEW = 10  # pairs of the inversions that take part in few

# Chosen on eight pairs of each kind, seed 10 000, among the configurations that docs/editing_benchmark.md counts.
SHARES = {"look": Shares(0.8, 0.5), "thing": Shares(0.2, 0.0), "place": Shares(0.6, 0.2)}
BLEND = Blend(0.2, 0.5, resolution=1.0)
SCALE = 1.5


def _edit(inversion: str, guidance_scale: float = SCALE, blend: Blend | None = BLEND, **more: Any) -> WordEdit:
    return WordEdit(inversion, guidance_scale, SHARES, blend, **more)


def _settings() -> list[WordSetting]:
    rows = [
        WordSetting(BLENDED, f"scale {scale}", _edit("direct", scale), scale == SCALE)
        for scale in (1.0, SCALE, 2.0, 3.5)
    ]
    rows += [WordSetting(WORDS, f"scale {SCALE}", _edit("direct", blend=None), True)]
    rows += [
        WordSetting(DDIM_WORDS, f"scale {scale}", _edit("ddim", scale, blend=None), scale == SCALE)
        for scale in (SCALE, 2.0)
    ]
    rows += [
        WordSetting(DDIM_WORDS, f"scale {SCALE}, blend", _edit("ddim"), pairs=FEW),
        WordSetting(NULL_WORDS, f"scale {SCALE}", _edit("null_text", blend=None), pairs=FEW),
        WordSetting(NULL_WORDS, f"scale {SCALE}, blend", _edit("null_text"), pairs=FEW),
        WordSetting(NEGATIVE, f"scale {SCALE}", _edit("negative_prompt"), pairs=FEW),
        WordSetting(BDIA, f"scale {SCALE}", _edit("bdia"), pairs=FEW),
        WordSetting(FIXED, f"scale {SCALE}", _edit("fixed_point", settings=(("iterations", 5),)), pairs=FEW),
        # Its authors skip 12 of 100 steps beside a controller.
        WordSetting(FRIENDLY, f"scale {SCALE}", _edit("edit_friendly", skip=4), pairs=FEW),
    ]
    return rows


WORD_SETTINGS = tuple(_settings())
