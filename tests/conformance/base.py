"""What the conformance suites share: failures and exceptions that a class declares, with the reason.

A suite is a class of tests without a subject. A subclass names the subject and inherits every check. A check that the
subject is known to fail stays in place as a strict expected failure, so that it is noticed when the subject is repaired.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest


class Conformance:
    """Base class of the suites.

    Args:
        known_failures (`dict[str, str]`):
            Name of a check -> why the subject fails it. Becomes a strict expected failure on `AssertionError`.
        not_applicable (`dict[str, str]`):
            Name of a check -> why it means nothing for the subject. Becomes a skip.
    """

    # Raised within diffusers by some of its schedulers, thousands of times a run.
    pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

    known_failures: ClassVar[dict[str, str]] = {}
    not_applicable: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        marks: dict[str, pytest.MarkDecorator] = {}
        for name, reason in vars(cls).get("not_applicable", {}).items():
            marks[name] = pytest.mark.skip(reason=reason)
        for name, reason in vars(cls).get("known_failures", {}).items():
            marks[name] = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
        for name, mark in marks.items():
            if not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} excuses {name!r}, which is not one of its checks")
            setattr(cls, name, mark(_copy(getattr(cls, name))))

    @classmethod
    def checks(cls) -> list[str]:
        """Names of all checks of the suite."""
        return sorted(name for name in dir(cls) if name.startswith("test_"))


def _copy(method: Callable[..., Any]) -> Callable[..., Any]:
    # Marks are stored on the function, and the function is shared with the other subclasses of the suite.
    @functools.wraps(method)
    def copied(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return copied


def attempt(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `call`; an exception in it becomes an `AssertionError` whose message starts with `what`."""
    try:
        return call(*args, **kwargs)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
