"""Conditions that arrive frame by frame: from a tensor, a file, a queue or a microphone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .frame_units import ChannelUnits


class ConditionSource:
    """Pulls the conditions of frames from an iterator, no further than asked, and checks each.

    Whatever ends the iterator, its end, an exception of its own or a condition that does not fit, the conditions before it are still
    handed out; `error` then holds what is to be raised once their frames are delivered.

    Args:
        conditions (iterable): One condition a frame: tensors, arrays or lists of numbers of shape `(width,)`, for the whole batch,
            or `(batch, width)`.
        batch_size (`int`): Number of samples.
        width (`int`): Numbers of a condition.
        device (`torch.device`), dtype (`torch.dtype`): Where and as what they are wanted.
        units ([`ChannelUnits`], *optional*): Those that the conditions come in.
    """

    def __init__(
        self,
        conditions: Iterable[Any],
        batch_size: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        units: ChannelUnits | None = None,
    ) -> None:
        self._iterator: Iterator[Any] | None = iter(conditions)
        self._batch_size, self._width = batch_size, width
        self._device, self._dtype = device, dtype
        self._units = units or ChannelUnits()
        self.pulled = 0
        self.error: ValueError | None = None
        self._waiting: list[torch.Tensor] = []

    def pull(self, count: int) -> torch.Tensor:
        """The next conditions, `(batch, up to count, width)`: fewer only at the end."""
        taken, self._waiting = self._waiting, []
        while self._iterator is not None and len(taken) < count:
            try:
                taken.append(self._checked(next(self._iterator)))
                self.pulled += 1
            except StopIteration:
                self._iterator = None
            except _WrongCondition as error:
                self._stop(str(error), None)
            except Exception as error:
                self._stop(f"cond raised {type(error).__name__} ({error}) at frame {self.pulled}", error)
        if not taken:
            return torch.zeros(self._batch_size, 0, self._width, device=self._device, dtype=self._dtype)
        return torch.stack(taken, 1)

    def peek(self) -> torch.Tensor:
        """The next condition, `(batch, 1, width)`, which stays the next; none at the end."""
        following = self.pull(1)
        self._waiting = list(following.unbind(1))
        return following

    def _stop(self, what: str, cause: Exception | None) -> None:
        self._iterator = None
        self.error = ValueError(f"{what}; the {self.pulled} frames before it were delivered, give a new cond to go on")
        self.error.__cause__ = cause

    def _checked(self, item: Any) -> torch.Tensor:
        wanted = f"({self._width},) or ({self._batch_size}, {self._width})"
        try:
            numbers = item if isinstance(item, torch.Tensor) else torch.as_tensor(np.asarray(item, dtype=np.float64))
            condition = numbers.to(self._device, self._dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _WrongCondition(
                f"cond yielded {type(item).__name__} at frame {self.pulled} instead of numbers of shape {wanted}"
            ) from error
        shape = tuple(condition.shape)
        if shape not in ((self._width,), (self._batch_size, self._width)):
            raise _WrongCondition(f"cond yielded the shape {shape} at frame {self.pulled} instead of {wanted}")
        condition = self._units.inward(condition)
        if not bool(torch.isfinite(condition).all()):
            raise _WrongCondition(f"cond yielded values at frame {self.pulled} that are infinite or not a number")
        # Copied: a live source may fill the same memory again.
        return condition.expand(self._batch_size, self._width).clone()


class _WrongCondition(Exception):
    """A condition that cannot be used; never leaves this module."""


def checked_conditions(cond: Any, width: int) -> tuple[Iterable[Any], int | None]:
    """The conditions as an iterable over frames, and the batch size if they tell it.

    Args:
        cond: A tensor or array of shape `(batch, frames, width)`, or any iterable over frames.
        width (`int`): Numbers of a condition of this network; 0 for none.

    Raises:
        TypeError: If it cannot be iterated over.
        ValueError: If the network takes no condition, or the shape does not fit.
    """
    shown = f"a {type(cond).__name__}"
    if not width:
        raise ValueError(f"cond={shown} is given to a network without condition_channels; leave it out")
    if isinstance(cond, (torch.Tensor, np.ndarray)):
        if cond.ndim != 3 or cond.shape[2] != width or 0 in cond.shape[:1]:
            raise ValueError(f"cond has the shape {tuple(cond.shape)}; give (batch, frames, {width}), or an iterator")
        return (cond[:, frame] for frame in range(cond.shape[1])), cond.shape[0]
    if isinstance(cond, (str, bytes, Mapping)) or not isinstance(cond, Iterable):
        raise TypeError(f"cond={shown} is not a tensor or an iterable of conditions, one a frame; give one of them")
    return cond, None
