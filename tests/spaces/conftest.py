"""A Space, started in this process on loopback."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.fresh_process import ROOT


def load_app(name: str) -> ModuleType:
    """The module `spaces/NAME/app.py`."""
    spec = importlib.util.spec_from_file_location(f"space_{name}", ROOT / "spaces" / name / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def space() -> Iterator[Callable[[str], Any]]:
    """`space("edit")` gives the module and the address of a Space; it is started once."""
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "diffusers-ext[spaces]"')
    running: dict[str, tuple[Any, ModuleType, str]] = {}

    def start(name: str) -> tuple[ModuleType, str]:
        if name not in running:
            from diffusers_ext.serving.app import launch

            module = load_app(name)
            blocks = module.build()
            running[name] = blocks, module, launch(blocks, prevent_thread_lock=True, quiet=True)[1]
        return running[name][1:]

    yield start
    for blocks, _, _ in running.values():
        blocks.close()
