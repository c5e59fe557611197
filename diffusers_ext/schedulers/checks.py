"""Checks that schedulers of every kind make."""

import math
from collections.abc import Sequence
from typing import Any

import torch


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number strictly between two bounds.

    Raises:
        ValueError: If it is not one.
    """
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not low < value < high:
        wanted = f"above {low:g}" + ("" if math.isinf(high) else f" and below {high:g}")
        raise ValueError(f"{name}={value!r} is out of range; give a number {wanted}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(choices)}")


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite. One number leaves the device."""
    # A sum may overflow where its terms do not, so it is only grounds for suspicion.
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())
