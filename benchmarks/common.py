"""What the benchmarks share: where models and results live, the judge, and how a table of figures is made."""

import json
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_ext.atomic import atomic_write
from diffusers_ext.data import EmojiScenes, Scenes
from diffusers_ext.models import AttributeJudge


ROOT = Path(__file__).parents[1]
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
