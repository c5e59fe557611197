"""What can come of a call, told apart in the same way by every probe."""

import math
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_ext.integrity import DamagedFileError, UnsafeFileError


OK = "ok"
REFUSED = "refused"  # one of our sentences
VAGUE = "vague"  # raised where we could have said it better: it names neither argument nor value
RAW = "raw"  # an error from somewhere inside
NOT_FINITE = "not finite"  # returned a NaN or an infinity without a word
EMPTY = "empty"  # returned nothing without a word

LIBRARY = "diffusers_ext"
CURES = re.compile(
    r"\b(use|give|name|load|choose|lower|raise|leave|pass|call|save|fetch|invert|scale|open|add|ask|check|derive|try|train|"
    r"replace|one of|at least|at most|between|allows|needs|needed|must|did you mean|is not|understood|limit|is no|it has)\b|\bis \(3"
)


@dataclass
class Tally:
    """Counts of outcomes, with the first few calls that should not have ended so."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: str, description: str) -> None:
        self.counts[outcome] += 1
        if outcome not in (OK, REFUSED) and len(self.faults) < 40:
            self.faults.append(f"{outcome}: {description}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, int]:
        return {name: count for name, count in sorted(self.counts.items()) if count}

    def merge(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        self.faults.extend(other.faults)


def classify(call: Callable[[], Any], arguments: Mapping[str, Any], package: str = LIBRARY) -> tuple[str, str]:
    """Runs a call and says what came of it.

    An exception counts as a refusal only if it is of a kind meant for callers, was raised by a line of `package` itself (not
    somewhere below it), and names one of the arguments together with its value.

    Args:
        call: The call, with nothing left to pass.
        arguments: What was passed, by the names that messages use.
        package: Whose sentences count.

    Returns:
        The outcome, and the message or the kind of result.
    """
    try:
        result = call()
    except Exception as error:
        return _kind_of_error(error, arguments, package), f"{type(error).__name__}: {error}"
    return kind_of_result(result), type(result).__name__


def _kind_of_error(error: Exception, arguments: Mapping[str, Any], package: str) -> str:
    if not isinstance(error, (ValueError, TypeError, OSError)) or not _raised_by(error, package, set(arguments)):
        return RAW
    message = str(error)
    if package != LIBRARY:
        return REFUSED
    if isinstance(error, (DamagedFileError, UnsafeFileError)):
        return REFUSED if re.search(r"[\w-]+\.(json|safetensors|bin|png)\b|/\w", message) else VAGUE
    return REFUSED if any(_names(message, name, value) for name, value in arguments.items()) else VAGUE


def _raised_by(error: Exception, package: str, names: set[str]) -> bool:
    if f"/{package}/" in traceback.extract_tb(error.__traceback__)[-1].filename:
        return True
    # Python's own answer to a misspelt or missing argument is raised where the call is made, and names it.
    return isinstance(error, TypeError) and any(
        phrase in str(error) and any(name in str(error) for name in names)
        for phrase in ("unexpected keyword argument", "required positional argument", "required keyword-only argument")
    )


def _names(message: str, name: str, value: Any) -> bool:
    """Whether a message names an argument and shows enough of its value to recognise it."""
    if isinstance(value, (str, os.PathLike)):
        path = str(value)
        if repr(path) in message or (os.path.sep in path and path in message):
            return True
    return f"{name}=" in message or (
        bool(re.search(rf"\b{re.escape(name)}\b", message)) and any(part in message for part in _evidence(value))
    )


def _evidence(value: Any) -> Iterable[str]:
    yield from ("missing", "empty", "not finite", "infinite or not a number", "unexpected keyword")
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield from (str(tuple(value.shape)), str(value.dtype), "shape", "values from")
        if value.ndim > 2:
            yield from (f"{value.shape[-1]}x{value.shape[-2]}", f"{value.shape[-2]}x{value.shape[-3]}")
        return
    if isinstance(value, Image.Image):
        yield f"{value.size[0]}x{value.size[1]}"
        return
    yield from (repr(value)[:40], str(value)[:40], type(value).__name__)
    if callable(value):
        yield "returned"
    if isinstance(value, float) and math.isfinite(value):
        yield f"{value:g}"
    if isinstance(value, (list, tuple, dict)):
        yield from (f"{len(value)} entries", f"list of {len(value)}", "different")
        for item in value if not isinstance(value, dict) else value.values():
            yield from _evidence(item)


def kind_of_result(result: Any) -> str:
    """`OK`, `NOT_FINITE` or `EMPTY`, looking into containers and output objects."""
    if isinstance(result, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(result)
        if tensor.numel() == 0:
            return EMPTY
        finite = torch.isfinite(tensor).all() if tensor.is_floating_point() or tensor.is_complex() else True
        return OK if finite else NOT_FINITE
    if isinstance(result, float):
        return OK if math.isfinite(result) else NOT_FINITE
    if isinstance(result, Image.Image):
        return OK if 0 not in result.size else EMPTY
    if isinstance(result, Mapping):
        return _worst(result.values())
    if isinstance(result, (list, tuple)):
        return _worst(result) if len(result) else EMPTY
    return OK


def _worst(items: Iterable[Any]) -> str:
    kinds = [kind_of_result(item) for item in items]
    return next((kind for kind in (NOT_FINITE, EMPTY) if kind in kinds), OK)
