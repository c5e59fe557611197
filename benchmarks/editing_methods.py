"""The editing methods that `editing.py` compares, and every setting of each: fixed here before a test pair is drawn.

All walk 30 steps of the same model, and get the same pictures and captions. A method's *knob* trades the edit against
the rest of the picture; its main setting makes the table, the others the curve. Where the authors name no setting for
pictures of 64 pixels (LEDITS++), it was chosen among several on other pairs (seed 10 000), to the peer's advantage.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from editors import GUIDANCE_SCALE, Batch, Editors
from word_methods import WORD_METHODS, WORD_PEERS, WORD_SETTINGS


Run = Callable[[Editors, Batch], torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """One row: a method with its knob at one value.

    Args:
        method: One of `METHODS`, or a row that edits nothing.
        knob: What is set.
        main: Whether it is measured on every task.
        run: Edits a batch.
        pairs: How many pairs of a task it is measured on, None for all.
    """

    method: str
    knob: str
    main: bool
    run: Run = field(compare=False)
    pairs: int | None = None

    @property
    def name(self) -> str:
        few = "" if self.pairs is None else f"first {self.pairs} pairs"
        return ", ".join(part for part in (self.method, self.knob, few) if part)


NO_EDIT, UPPER_LIMIT = "No edit", "Truth through the autoencoder"
SDEDIT, DDIM, LEDITS, GUIDE = "SDEdit", "DDIM inversion + CFG", "LEDITS++", "Guide-and-Rescale"
METHODS = (SDEDIT, DDIM, LEDITS, GUIDE, *WORD_METHODS)
PEERS = (SDEDIT, DDIM, LEDITS, *WORD_PEERS)
OURS = tuple(method for method in METHODS if method not in PEERS)


def _guided(guidance_scale: float = GUIDANCE_SCALE, **settings: Any) -> Run:
    return lambda editors, batch: editors.guided(batch, guidance_scale, **settings)


def _redrawn(strength: float, guidance_scale: float = GUIDANCE_SCALE) -> Run:
    return lambda editors, batch: editors.sdedit(batch, strength, guidance_scale)


def _masked(edit_guidance_scale: float, threshold: float) -> Run:
    return lambda editors, batch: editors.ledits_pp(batch, edit_guidance_scale, threshold)


def _settings() -> list[Setting]:
    rows = [
        Setting(NO_EDIT, "", True, Editors.reconstruction),
        Setting(UPPER_LIMIT, "", True, Editors.truth),
    ]
    for scale in (1.0, 1.5, 2.0, 3.5, 5.0, 7.5):
        rows.append(Setting(DDIM, f"scale {scale}", scale == GUIDANCE_SCALE, _guided(scale, guiders=[])))
    for strength in (0.3, 0.45, 0.6, 0.75, 0.9):
        rows.append(Setting(SDEDIT, f"strength {strength}", strength == 0.75, _redrawn(strength)))
    for scale, threshold in ((2.0, 0.2), (3.0, 0.2), (5.0, 0.2), (3.0, 0.4), (3.0, 0.6)):
        knob = f"edit scale {scale}, threshold {threshold}"
        rows.append(Setting(LEDITS, knob, (scale, threshold) == (3.0, 0.2), _masked(scale, threshold)))
    for scale in (2.0, 3.5, 5.0):
        rows.append(Setting(GUIDE, f"scale {scale}", scale == GUIDANCE_SCALE, _guided(scale)))
    rows += [
        Setting(GUIDE, "guided .3 of the steps", False, _guided(guidance_end=0.3)),
        Setting(GUIDE, "guided .8 of the steps", False, _guided(guidance_end=0.8)),
        Setting(GUIDE, "upper bound 1", False, _guided(rescale_range=(0.33, 1.0))),
        Setting(GUIDE, "scale 2.0, guided .8 of the steps", False, _guided(2.0, guidance_end=0.8)),
    ]
    rows += [Setting(row.method, row.knob, row.main, row.edit, row.pairs) for row in WORD_SETTINGS]
    return rows


SETTINGS = _settings()
# What each method's authors or documentation name, for pictures and models of the usual size.
DOCUMENTED = (
    Setting(DDIM, "scale 7.5", True, _guided(7.5, guiders=[])),
    Setting(SDEDIT, "strength 0.75", True, _redrawn(0.75, 7.5)),
    Setting(LEDITS, "edit scale 5, threshold 0.9", True, _masked(5.0, 0.9)),
    Setting(GUIDE, "scale 7.5", True, _guided(7.5)),
)
