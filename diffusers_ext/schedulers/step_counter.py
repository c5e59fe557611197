"""Which step of a run comes next, found once by its timestep and counted from then on."""

from typing import Any

import numpy as np


class StepCounterMixin:
    """Counting as in diffusers, with errors that name the cure.

    A scheduler calls `_count_from_start` with the timesteps of a run when it lays them, `_index` in a step, and sets `_step_index`
    after it.
    """

    config: Any
    num_inference_steps: int | None
    _times: list[float]
    _step_index: int | None = None
    _begin_index: int | None = None

    def _count_from_start(self, times: list[float]) -> None:
        self._times, self._step_index, self._begin_index = times, None, None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        """Number of the step that comes next; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the step that a run begins with, where a pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says with which step the run begins (image-to-image starts in the middle)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Any) -> int:
        """Number of the first step that starts at a timestep.

        Raises:
            ValueError: If none does.
        """
        value = float(timestep)
        for candidate in (value, float(np.float32(value))):
            if candidate in self._times:
                return self._times.index(candidate)
        raise ValueError(
            f"timestep={value:g} is not one of the {len(self._times)} of this run; give one of .timesteps"
        )

    def _index(self, timestep: Any) -> int:
        if self.num_inference_steps is None:
            raise ValueError(f"timestep={timestep!r}: no steps are laid yet; call set_timesteps first")
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if not 0 <= index < len(self._times):
            raise ValueError(f"timestep={timestep!r}: all {len(self._times)} steps are done; call set_timesteps first")
        return index
