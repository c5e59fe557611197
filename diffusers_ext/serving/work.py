"""Work that reports its steps, and stops when nobody waits for it any more.

A web server learns that a visitor has left, or clicked on Stop, only where it hands something over. So the work runs
in a thread of its own, and a generator hands over how far it is several times a second. When the generator is closed
the work ends at its next step, and so it does when `gone` says that there is nobody left, though the generator was
forgotten instead of closed.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from .checks import VisitorError


T = TypeVar("T")
Report = Callable[[float, str], None]

THREAD_NAME = "work of a visitor"
_PULSE = 0.25  # seconds between two looks at the work
_PATIENCE = 20.0  # seconds without a look after which nobody waits any more, though nobody has said so


class StoppedError(RuntimeError):
    """Raised inside work that shall end. Not an error of the work: it is never shown."""


@dataclass(frozen=True)
class Step:
    """How far the work is: `fraction` from 0 to 1 of what `words` says."""

    fraction: float
    words: str


@dataclass(frozen=True)
class Done(Generic[T]):
    """The last thing handed over: what the work returned."""

    result: T


def in_steps(
    work: Callable[[Report], T], *, longest: float = 120.0, gone: Callable[[], bool] = lambda: False
) -> Iterator[Step | Done[T]]:
    """Runs work in a thread and hands over how far it is.

    Args:
        work (`Callable`):
            Called with a function `report(fraction, words)`, which it calls at each step. That function raises [`StoppedError`] when
            the work shall end; the work lets it pass.
        longest (`float`, *optional*, defaults to 120.0): Seconds after which it is stopped.
        gone (`Callable`, *optional*): Asked at each step, in the thread of the work, whether nobody waits any more;
            never by default.

    Returns:
        `Iterator`: Of [`Step`], several times a second, and at last one [`Done`]. Closing it ends the work and waits for that.

    Raises:
        VisitorError: If the work took too long.
        Exception: Whatever the work raised.

    Example:
        ```python
        from diffusers_ext.serving import Done, in_steps


        def work(report):
            for i in range(3):
                report(i / 3, "counting")
            return "three"


        *steps, last = in_steps(work)
        assert last == Done("three")
        ```
    """
    stop, ended = threading.Event(), threading.Event()
    begin = looked = time.monotonic()
    now = Step(0.0, "waiting for the model")
    result: list[T] = []
    errors: list[BaseException] = []

    def report(fraction: float, text: str) -> None:
        nonlocal now
        moment = time.monotonic()
        if stop.is_set() or gone() or moment - looked > _PATIENCE:
            raise StoppedError
        if moment - begin > longest:
            raise VisitorError(f"This took longer than {longest:.0f} seconds: use fewer steps or a smaller picture.")
        now = Step(min(max(fraction, 0.0), 1.0), text)

    def run() -> None:
        try:
            result.append(work(report))
        except BaseException as error:  # handed over to whoever waits, below
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while not ended.wait(_PULSE):
            looked = time.monotonic()
            yield now
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    yield Done(result[0])
