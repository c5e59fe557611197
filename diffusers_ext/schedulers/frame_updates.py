"""Updates of frames at levels of their own: coefficients, the history of order 2, and checks of what is given per frame.

The formulas are those at the head of `scheduling_rolling_ladder.py`. Levels and coefficients are float64 arrays of shape
(batch or 1, frames or 1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def update_coefficients(
    alpha: np.ndarray, sigma: np.ndarray, next_alpha: np.ndarray, next_sigma: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of z, D and n' in an update from (a, s) to (a', s'), all float64 arrays of one shape.

    Where s = 0, which is data, the update is z' = z.
    """
    held = sigma == 0
    sigma = np.where(held, 1.0, sigma)
    k = alpha * next_sigma / np.where(next_alpha == 0, 1.0, next_alpha) / sigma
    noise = eta * next_sigma * np.sqrt(np.maximum(1.0 - k**2, 0.0))
    direction = np.sqrt(np.maximum(next_sigma**2 - noise**2, 0.0))
    of_sample = direction / sigma
    of_data = next_alpha - of_sample * alpha
    return np.where(held, 1.0, of_sample), np.where(held, 0.0, of_data), np.where(held, 0.0, noise)


def second_order_weight(before: np.ndarray, now: np.ndarray, following: np.ndarray) -> np.ndarray:
    """1 / (2 r) of three log-SNRs; 0, which is order 1, where one of them is not finite."""
    usable = np.isfinite(before) & np.isfinite(now) & np.isfinite(following) & (before < now)
    before, now, following = (np.where(usable, value, place) for place, value in enumerate((before, now, following)))
    return np.where(usable, 0.5 * (following - now) / (now - before), 0.0)


@dataclass(frozen=True)
class FrameHistory:
    """The last update of every frame: the predicted data, the level it led from, and the level it led to (-1: there was none)."""

    data: torch.Tensor
    before: np.ndarray
    reached: np.ndarray

    def weight(self, levels: np.ndarray, following: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
        """1 / (2 r) of the update from `levels` to `following`; 0 for frames that were left at another level."""
        before = np.where(self.reached == levels, log_snr[self.before], -np.inf)
        return second_order_weight(before, log_snr[levels], log_snr[following])

    def rolled(self, axis: int, dropped: int, added: int) -> "FrameHistory":
        """Without the first frames, and with new ones, which have no history, at the end."""
        frames = self.data.shape[axis]
        kept = self.data.narrow(axis, dropped, frames - dropped)
        blank = torch.zeros_like(self.data.narrow(axis, 0, 1)).expand(_with(self.data.shape, axis, added))

        def moved(levels: np.ndarray, value: int) -> np.ndarray:
            rest = np.broadcast_to(levels, (len(levels), frames))[:, dropped:]
            return np.concatenate([rest, np.full((len(rest), added), value)], axis=1)

        return FrameHistory(torch.cat([kept, blank], axis), moved(self.before, 0), moved(self.reached, -1))


def _with(shape: torch.Size, axis: int, length: int) -> list[int]:
    return [length if place == axis else size for place, size in enumerate(shape)]


def numbers(values: Any, name: str) -> np.ndarray:
    """Finite numbers of any shape as float64.

    Raises:
        ValueError: If they are something else.
    """
    try:
        array = (
            values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, float)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={shown(values)} is not a number or a tensor of numbers; give timesteps") from error
    if isinstance(values, (bool, str)) or not np.isfinite(array).all():
        raise ValueError(f"{name}={shown(values)} is not a finite number; give timesteps")
    return np.asarray(array, dtype=np.float64)


def whole(values: Any, name: str) -> np.ndarray:
    """Whole numbers from 0, of any shape, as int64.

    Raises:
        ValueError: If they are something else.
    """
    array = numbers(values, name)
    if (array != array.round()).any() or (array < 0).any() or (array > 2.0**53).any():
        raise ValueError(f"{name}={shown(values)} is not whole or is negative; count from 0")
    return array.astype(np.int64)


def shown(values: Any) -> str:
    """A value as messages show it: short."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    text = repr(values)
    return text if len(text) <= 80 else f"{text[:77]}..."
