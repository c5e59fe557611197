"""One model for many visitors: loaded once, a scheduler for each request, and what was computed for a picture kept for the next words."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from .work import Report


T = TypeVar("T")


class SharedPipeline:
    """A pipeline whose weights many requests share and whose state none of them does.

    Args:
        pipeline (`DiffusionPipeline`):
            It is not changed and not called itself.
        exclusive (`bool`, *optional*, defaults to `True`):
            Whether one request waits for another. Needed where a call changes its network for a while, as everything does that
            reads or edits attention; a scheduler alone does not need it.
        beside ([`SharedPipeline`], *optional*): Another one with the same networks, whose requests are waited for too.
    """

    def __init__(self, pipeline: Any, *, exclusive: bool = True, beside: "SharedPipeline | None" = None) -> None:
        self.pipeline = pipeline
        self._lock: threading.Lock | None = threading.Lock() if exclusive else None
        if beside is not None:
            self._lock = beside._lock

    @property
    def busy(self) -> bool:
        """Whether the next request would wait for one that is at work."""
        return self._lock is not None and self._lock.locked()

    @contextmanager
    def request(self, report: Report, phase: str = "sampling") -> Iterator[Any]:
        """A copy of the pipeline for one request, with a scheduler of its own.

        Args:
            report (`Callable`): As [`in_steps`] hands it over; it is called at each step of the pipeline's progress bar.
            phase (`str`, *optional*, defaults to `"sampling"`): What is said beside the progress.

        Yields:
            The copy. It shares the networks, which are not copied.
        """
        own = copy.copy(self.pipeline)
        # Past the attribute's setter, which would register the copy in the configuration that both share.
        own.__dict__["scheduler"] = copy.deepcopy(self.pipeline.scheduler)
        own.__dict__["progress_bar"] = lambda iterable=None, total=None: _Bar(iterable, total, report, phase)
        while self._lock is not None and not self._lock.acquire(timeout=0.1):
            report(0.0, "waiting for the model")
        try:
            yield own
        finally:
            if self._lock is not None:
                self._lock.release()


class Kept(Generic[T]):
    """The last few results of costly work, by what they were made from.

    Args:
        count (`int`): How many are kept; the one that was not asked for longest goes first.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> tuple[T, bool]:
        """The result for `key`, made if it is not there, and whether it was there."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key], True
        made = make()
        with self._lock:
            self._results[key] = made
            while len(self._results) > self._count:
                self._results.popitem(last=False)
        return made, False


class _Bar:
    """What a pipeline takes for a progress bar."""

    def __init__(self, iterable: Any, total: float | None, report: Report, phase: str) -> None:
        self._iterable, self._report, self._phase = iterable, report, phase
        self._total: float = total if total is not None else len(iterable)
        self._count = 0

    def __enter__(self) -> "_Bar":
        self._report(0.0, self._phase)
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing is left open."""

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._count += count
        self._report(self._count / max(self._total, 1), self._phase)

    def set_description(self, text: str, **_: Any) -> None:
        self._phase = f"{self._phase.partition(':')[0]}: {text}"

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Figures beside the bar are not shown."""

    def close(self) -> None:
        """Nothing is left open."""
