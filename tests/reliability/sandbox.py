"""A working folder of its own for whatever calls functions that write.

A fuzzer passes paths that nobody meant. They must land in a folder that holds nothing, so a probe changes into an empty
temporary folder first, and the ones that write refuse to start anywhere else.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sandbox() -> Iterator[Path]:
    """Changes into a new empty folder, with a home folder inside it, for the time of a `with` block."""
    before, home = os.getcwd(), os.environ.get("HOME")
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name).resolve()
        for part in ("work", "home", "scratch"):
            (folder / part).mkdir()
        os.chdir(folder / "work")
        os.environ["HOME"] = str(folder / "home")
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.pop("HOME") if home is None else os.environ.update(HOME=home)


def scratch() -> Path:
    """The folder for files of the sandbox that the process is in."""
    working = Path.cwd()
    if working.name != "work" or not working.parent.name.startswith("reliability-"):
        raise RuntimeError(f"cwd={str(working)!r} is not a sandbox; run this inside `with sandbox():`")
    return working.parent / "scratch"
