"""What every test gets: no network, quiet libraries, few threads, hypothesis profiles and the shared fixtures.

The profile of hypothesis is `ci` (the same examples in every run) unless `HYPOTHESIS_PROFILE` or
`--hypothesis-profile` names `dev` (few, fresh examples) or `nightly` (many, fresh examples).
"""

import os


# Read by the libraries when they are imported, so these come before any of them; subprocesses inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import golden as golden_files
from tests.helpers.golden import GoldenFile
from tests.helpers.network import network_blocked


# Examples that build tensors or models take longer than the 200 ms that hypothesis expects of one.
settings.register_profile("dev", max_examples=20, deadline=None, print_blob=True, derandomize=False)
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

pytest_plugins = ["tests.hub.fixtures"]


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Any connection that leaves the machine raises `NetworkAccessError` for the whole session."""
    with network_blocked():
        yield


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Sums come out in the same order everywhere: the number of threads does not depend on the machine."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], GoldenFile]:
    """`golden("editing/file.npz")["key"]` reads a reference array of `tests/golden/`."""
    return golden_files.golden


@pytest.fixture(scope="session")
def tiny_sd_path() -> Path:
    """Folder of the small trained Stable Diffusion pipeline (128 px, f=8, four channels) that the vectors were made with."""
    return golden_files.golden_path("editing/tiny_sd")
