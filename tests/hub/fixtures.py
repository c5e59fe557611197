"""The loopback Hub as a fixture; `tests/conftest.py` makes it known to every test."""

from collections.abc import Iterator

import pytest

from .loopback import LoopbackHub


@pytest.fixture(scope="module")
def loopback_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub on 127.0.0.1 that starts empty; clients run in processes with `env=loopback_hub.client_environment()`."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
