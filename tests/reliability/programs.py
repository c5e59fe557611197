"""Probes that need a process of their own, because they fork, limit it, or measure it from its start."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from .registry import ROOT


def run_probe(name: str, *arguments: str, timeout: float = 600) -> Any:
    """Runs `python -m tests.reliability.<name>` in an empty folder, with one thread, and returns the JSON that it prints last.

    Raises:
        AssertionError: If it failed; the message ends with its error.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory(prefix="reliability-") as working:
        result = subprocess.run(
            [sys.executable, "-m", f"tests.reliability.{name}", *arguments],
            cwd=working, env=variables, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    if result.returncode != 0:
        raise AssertionError(f"the probe {name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])
