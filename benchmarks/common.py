"""What the benchmarks share: where models and results live, the judge, and how a table of figures is made."""

import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the problems with known answers are those of the tests

from diffusers_ext.atomic import atomic_write  # noqa: E402
from diffusers_ext.data import EmojiScenes, Scenes  # noqa: E402
from diffusers_ext.models import AttributeJudge  # noqa: E402


MODEL = ROOT / "pipelines" / "emoji-scenes-64"
JUDGE = ROOT / "pipelines" / "emoji-scenes-judge"
RESULTS = ROOT / "benchmarks" / "results"
ATTRIBUTES = ("object", "colour", "background", "pattern")


def load_judge(scenes: EmojiScenes, folder: Path = JUDGE) -> AttributeJudge:
    """The judge, refused if its labels are not those of `scenes`."""
    judge = AttributeJudge.from_pretrained(folder).float().eval()
    labels = {name: list(getattr(scenes, f"{name}_names")) for name in ATTRIBUTES}
    if judge.config.labels != labels:
        raise ValueError(f"the judge in {folder} was trained for other labels; train it again for these scenes")
    return judge


def right(judge: AttributeJudge, images: torch.Tensor, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Whether each attribute of `images` (n, 3, R, R) in [-1, 1] is read as `scenes` say: (n,) bool each."""
    return {name: value == getattr(scenes, name) for name, value in judge.read(images).items()}


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, median, 5 % and 95 % quantile."""
    data = [float(value) for value in values]
    low, high = np.quantile(data, [0.05, 0.95])
    return {
        "mean": round(statistics.fmean(data), 4),
        "median": round(statistics.median(data), 4),
        "q05": round(float(low), 4),
        "q95": round(float(high), 4),
    }


def share(flags: torch.Tensor) -> float:
    return round(float(flags.double().mean()), 4)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call: of the processor on a CPU, where others may be at work beside it, of the clock on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def peak_memory(call: Callable[[], object]) -> float | None:
    """Megabytes that a call needs at its peak, beyond what was there before it; None where the system does not tell.

    On a CPU this is the growth of the resident set, which Linux alone can be asked for; on a GPU what torch has allocated.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Memory that the C library keeps for later would hide what the call takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset.write_text("5")
    before = _high_water_mark()
    call()
    return round((_high_water_mark() - before) / 2**10, 1)


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def read_result(name: str) -> dict[str, Any]:
    """What `write_result` wrote of a benchmark, to go on from; empty where there is nothing yet."""
    path = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result.pop("environment", None)
    return result


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/<name>.json` with the versions that the figures belong to."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    text = json.dumps({**result, "environment": machine}, indent=1) + "\n"
    return atomic_write(RESULTS / f"{name}.json", text.encode())
