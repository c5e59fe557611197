#!/usr/bin/env python
"""What the package costs somebody who has diffusers already: distributions, size, time of an import, and types.

    python benchmarks/ecosystem.py

Imports are timed in processes of their own: first that of diffusers, then what ours takes on top of it.
"""

import ast
import importlib.metadata
import re
import shutil
import statistics
import subprocess  # nosec B404
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import ROOT, write_result
from packaging.requirements import Requirement
from page import table, write_between


PAGE, BEGIN, END = ROOT / "docs" / "reliability.md", "<!-- ecosystem: begin -->", "<!-- ecosystem: end -->"
RUNS = 11
STOCK = ("torch", "diffusers", "transformers", "accelerate")
TIMED = """
import time, torch
start = time.perf_counter()
{}
middle = time.perf_counter()
{}
print(middle - start, time.perf_counter() - middle)
"""
# what a user has imported already, and what is imported on top of it; torch is there before
IMPORTS = {
    "the package, over three base classes of diffusers": (
        "from diffusers import DPMSolverMultistepScheduler, ModelMixin, SchedulerMixin, UniPCMultistepScheduler",
        "import diffusers_ext",
    ),
    "an editing pipeline, over `StableDiffusionPipeline`": (
        "from diffusers import StableDiffusionPipeline",
        "from diffusers_ext import GuideAndRescalePipeline",
    ),
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(*names: str) -> set[str]:
    """All distributions that these need, as they are installed here."""
    found: set[str] = set()
    waiting = [plain(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on another platform only
        found.add(name)
        for line in requirements:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(plain(requirement.name))
    return found


def wheel_megabytes() -> tuple[float, float]:
    """Of the wheel, and of its files when they are installed."""
    with tempfile.TemporaryDirectory() as folder:
        # a copy, because a build leaves folders behind
        source = Path(folder) / "source"
        shutil.copytree(ROOT / "diffusers_ext", source / "diffusers_ext", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
            shutil.copy(ROOT / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(source)]
        subprocess.run(command, check=True)  # nosec B603
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            installed = sum(entry.file_size for entry in archive.infolist())
        return wheel.stat().st_size / 1e6, installed / 1e6


def import_seconds(base: str, ours: str) -> dict[str, float]:
    """Seconds of what is there already, and what ours adds: median, least and most; the first run is not counted."""
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(base, ours)]
    found = []
    for _ in range(RUNS + 1):
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)  # nosec B603
        found.append([float(value) for value in done.stdout.split()])
    stock, added = zip(*found[1:])
    return {
        "stock": round(statistics.median(stock), 2),
        "added": round(statistics.median(added), 2),
        "least": round(min(added), 2),
        "most": round(max(added), 2),
    }


def annotated() -> tuple[int, int]:
    """Functions of the library whose arguments and result all have a type, and all functions."""
    whole = total = 0
    for file in sorted((ROOT / "diffusers_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = node.args
                named = [
                    *given.posonlyargs,
                    *given.args,
                    *given.kwonlyargs,
                    *filter(None, (given.vararg, given.kwarg)),
                ]
                named = [arg for arg in named if arg.arg not in ("self", "cls")]
                # what __init__ returns is known
                typed = node.returns is not None or node.name == "__init__"
                whole += typed and all(arg.annotation is not None for arg in named)
                total += 1
    return whole, total


def measure() -> dict[str, Any]:
    """All figures."""
    wheel, installed = wheel_megabytes()
    whole, total = annotated()
    return {
        "distributions": {"stock": len(closure(*STOCK)), "added": sorted(closure("diffusers-ext") - closure(*STOCK) - {"diffusers-ext"})},
        "wheel_megabytes": round(wheel, 2),
        "installed_megabytes": round(installed, 2),
        "imports": {name: import_seconds(*lines) for name, lines in IMPORTS.items()},
        "annotated": whole,
        "functions": total,
    }  # fmt: skip


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Figure, value, goal."""
    added = found["distributions"]["added"]
    lines = [
        ["distributions over torch, diffusers, transformers and accelerate", f"{len(added)}{' (' + ', '.join(added) + ')' if added else ''}", "0"],
        ["files of the package", f"{found['installed_megabytes']:.1f} MB; the wheel {found['wheel_megabytes']:.1f} MB", "<= 5 MB"],
    ]  # fmt: skip
    lines += [
        [f"import of {name}", f"+{row['added']:.2f} s ({row['least']:.2f} to {row['most']:.2f}) on {row['stock']:.2f} s", "<= +0.3 s"]
        for name, row in found["imports"].items()
    ]  # fmt: skip
    share = found["annotated"] / found["functions"]
    return [
        *lines,
        ["functions with a type for every argument and the result", f"{share:.1%} of {found['functions']}", "100 %"],
    ]


def main() -> None:
    found = measure()
    write_result("ecosystem", found)
    write_between(PAGE, BEGIN, END, table(("figure", "here", "goal"), rows(found)))


if __name__ == "__main__":
    main()
