"""One call at a time: a pipeline that is at work in one thread refuses calls from others.

A call changes its scheduler, and some calls change the network while they run. A second call in the middle of that would get
another picture without a word, or an error from deep inside; diffusers itself does not look.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast


CallT = TypeVar("CallT", bound=Callable[..., Any])

# id of what a call changes -> the thread that does it, and how many of its calls are under way
_claims: dict[int, tuple[int, int]] = {}
_guard = threading.Lock()


class PipelineBusyError(RuntimeError):
    """A call while another thread is in the middle of one that changes the same scheduler or network."""


def one_at_a_time(*parts: str) -> Callable[[CallT], CallT]:
    """Decorates a method of a pipeline that changes the pipeline and some of its components while it runs.

    Args:
        parts: Names of these components. Pipelines that share none of them may run at the same time.

    Raises:
        PipelineBusyError: By the decorated method, if another thread is at work with the pipeline or one of these components.

    Example:
        >>> class Counter:
        ...     @one_at_a_time()
        ...     def __call__(self):
        ...         return 1
        >>> Counter()()
        1
    """

    def decorate(call: CallT) -> CallT:
        @functools.wraps(call)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _claimed(self, parts):
                return call(self, *args, **kwargs)

        return cast(CallT, guarded)

    return decorate


@contextmanager
def _claimed(pipeline: Any, parts: tuple[str, ...]) -> Iterator[None]:
    # the objects live as long as the call, so that no other one gets their ids
    held = [pipeline, *(getattr(pipeline, name, None) for name in parts)]
    keys = {id(part) for part in held if part is not None}
    thread = threading.get_ident()
    with _guard:
        if any(_claims.get(key, (thread, 0))[0] != thread for key in keys):
            changed = " and ".join(parts) or "state"
            raise PipelineBusyError(
                f"{type(pipeline).__name__}, or its {changed}, is at work in another thread; wait until that call has ended, or give this "
                f"thread a pipeline whose {changed} no other one has"
            )
        for key in keys:
            _claims[key] = (thread, _claims.get(key, (thread, 0))[1] + 1)
    try:
        yield
    finally:
        with _guard:
            for key in keys:
                count = _claims[key][1] - 1
                if count:
                    _claims[key] = (thread, count)
                else:
                    del _claims[key]
