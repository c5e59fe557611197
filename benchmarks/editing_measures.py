"""What an edit is judged by, picture by picture: arithmetic on pictures and readings, apart from any model.

Success needs two things of a judge: it reads the wanted value (*reached*), and everything else as it was (*kept*).
Preservation is measured against the source outside the mask of the edit, nearness to the truth over the whole picture.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from common import ATTRIBUTES

from diffusers_ext.data import EditPairs, EmojiScenes, Scenes, vendor_pairs
from diffusers_ext.data.words import BACKGROUNDS, OBJECT_COLOURS
from diffusers_ext.metrics import psnr, ssim


Labels = dict[str, torch.Tensor]


class Judge(Protocol):
    def read(self, images: torch.Tensor) -> Labels: ...


@dataclass(frozen=True)
class Task:
    """Pairs of one kind, and what a judge should read of the true edit.

    Args:
        hand: Whose drawings.
        kind: Which label changes.
        pairs: The pictures.
        wanted: Attribute -> label (n,) in the common vocabulary.
    """

    hand: str
    kind: str
    pairs: EditPairs
    wanted: Labels

    @property
    def name(self) -> str:
        return f"{self.hand} {self.kind}"

    @property
    def changes(self) -> str:
        return "colour" if self.kind == "hearts" else self.kind

    def first(self, count: int) -> "Task":
        """Its first pairs."""
        rows, pairs = slice(count), self.pairs
        kept = EditPairs(
            pairs.kind, pairs.source[rows], pairs.target[rows], pairs.mask[rows], pairs.source_prompts[rows],
            pairs.target_prompts[rows], pairs.source_scenes[rows], pairs.target_scenes[rows],
        )  # fmt: skip
        return Task(self.hand, self.kind, kept, {name: labels[rows] for name, labels in self.wanted.items()})


def places(scenes: EmojiScenes, common: EmojiScenes) -> torch.Tensor:
    """Where each object of `scenes` stands in the vocabulary of `common`."""
    return torch.tensor([common.object_names.index(word) for word in scenes.object_names])


def labels_of(scenes: Scenes, own: EmojiScenes, common: EmojiScenes) -> Labels:
    labels = {name: getattr(scenes, name) for name in ATTRIBUTES}
    return {**labels, "object": places(own, common)[scenes.object]}


def named_colours(labels: Labels, common: EmojiScenes) -> Labels:
    """The same labels, with "in its own colours" replaced by the name of the colour that the vendor painted.

    A red heart and a heart in its own red are one picture in two words; neither an edit nor a judge is wrong about it.
    """
    own = torch.tensor([common.colour_names.index(name) for name in common.native_colours])
    return {**labels, "colour": torch.where(labels["colour"] == 0, own[labels["object"]], labels["colour"])}


def hearts(count: int, seed: int, hand: str, common: EmojiScenes) -> Task:
    """Hearts whose other colour the vendor drew, of the colours that the vocabulary has."""
    pairs = vendor_pairs("hearts", 6 * count + 60, hand, common.resolution, seed)
    colours, grounds = list(OBJECT_COLOURS), list(BACKGROUNDS)
    rows, wanted = [], []
    for row, (before, after) in enumerate(zip(pairs.source_prompts, pairs.target_prompts, strict=True)):
        old, new = before.split()[1], after.split()[1]
        scene = pairs.source_scenes[slice(row, row + 1)]
        ground = int(scene.background)
        if old in colours and new in colours and grounds[ground] not in (old, new) and len(rows) < count:
            rows.append(row)
            wanted.append((common.object_names.index("heart"), 1 + colours.index(new), ground, int(scene.pattern)))
    if len(rows) < count:
        raise ValueError(f"count={count} hearts could not be drawn; ask for fewer")
    chosen = torch.tensor(rows)
    kept = EditPairs(
        "hearts", pairs.source[chosen], pairs.target[chosen], pairs.mask[chosen],
        [pairs.source_prompts[row] for row in rows], [pairs.target_prompts[row] for row in rows],
        pairs.source_scenes[chosen], pairs.target_scenes[chosen],
    )  # fmt: skip
    return Task(hand, "hearts", kept, dict(zip(ATTRIBUTES, torch.tensor(wanted).T, strict=True)))


def verdict(read: Labels, wanted: Labels, changed: str, common: EmojiScenes) -> dict[str, list[bool]]:
    """Whether each picture shows the wanted value, and whether it shows everything else as before, too."""
    # The colour that a drawing has by itself is that of the object it should be, so that a misread object counts once.
    read = {**read, "colour": named_colours({**read, "object": wanted["object"]}, common)["colour"]}
    wanted = named_colours(wanted, common)
    right = {name: read[name].cpu() == wanted[name] for name in ATTRIBUTES}
    return {
        "reached": right[changed].tolist(),
        "success": torch.stack(list(right.values())).all(0).tolist(),
    }


def outside_only(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`edited` where the mask is 0, `source` elsewhere: what is left of the picture once the edit itself is taken
    out."""
    return torch.where(mask == 0, edited, source)


def against_source(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> dict[str, list[float]]:
    """PSNR of the pixels outside the mask, and SSIM of the windows centred there, with the edit itself taken out."""
    outside = (mask == 0).float()
    bare = outside_only(edited, source, mask)
    return {
        "psnr_outside": psnr(edited, source, outside).tolist(),
        "ssim_outside": ssim(bare, source, outside).tolist(),
    }


def against_truth(edited: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
    return {"psnr": psnr(edited, truth).tolist(), "ssim": ssim(edited, truth).tolist()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, over what is finite: a mask that covers everything leaves nothing outside."""
    data = [float(value) for value in values if math.isfinite(value)]
    if not data:
        return math.nan, math.nan
    spread = statistics.stdev(data) if len(data) > 1 else math.nan
    return statistics.fmean(data), spread / math.sqrt(len(data))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of first - second, picture by picture."""
    return mean_and_error([a - b for a, b in zip(first, second, strict=True)])


def best_mixture(points: Sequence[tuple[float, float]], success: float) -> float | None:
    """The most preservation that a method reaches at a given success.

    Args:
        points: (success, preservation) of its settings.
        success: The least that is asked for.

    Returns:
        The height of the upper hull of the points at or right of `success`, or None if the method never gets there.
        The hull
        is what the method attains by choosing between two of its settings at random, so no smoothness is assumed.
    """
    best = None
    for s, p in points:
        if s >= success and (best is None or p > best):
            best = p
    for s, p in points:
        for other, q in points:
            if s < success <= other:
                height = p + (q - p) * (success - s) / (other - s)
                best = height if best is None else max(best, height)
    return best


def summary_of(records: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard error of every measure."""
    out = {}
    for name, values in records.items():
        mean, error = mean_and_error(values)
        out[name] = {"mean": round(mean, 4), "error": round(error, 4)}
    return out


def swapped(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(preservation, success) of (success, preservation): with [`best_mixture`], the success at a given preservation."""
    return [(second, first) for first, second in points]


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is at least as good as in both and better in one, by success, then by name."""

    def beaten(one: tuple[float, float]) -> bool:
        return any(s >= one[0] and p >= one[1] and (s, p) != one for s, p in points.values())

    kept = [name for name, point in points.items() if not beaten(point)]
    return sorted(kept, key=lambda name: (points[name], name))
