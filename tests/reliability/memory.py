"""Whether the memory grows with the number of calls."""

import ctypes
import gc
import json
import sys

import psutil

from .registry import PIPELINES


def trim() -> None:
    """Has the C library give free memory back to the system, where it can (glibc)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def slope(name: str, calls: int, warm_up: int = 20) -> dict[str, float]:
    """Megabytes that the resident set grew over `calls` calls, after a warm-up.

    Both ends are the smallest of a few readings, each after the C library was asked to give back what is free: left to
    itself it does so when it likes, and the readings scatter by two megabytes.
    """
    subject = next(subject for subject in PIPELINES if subject.name == name)
    pipeline = subject.build()
    process = psutil.Process()
    arguments = {**subject.good(), "num_inference_steps": 2}  # the first step of an edit is not guided

    def lowest(times: int) -> int:
        readings = []
        for _ in range(times):
            pipeline(**arguments)
            gc.collect()
            trim()
            readings.append(process.memory_info().rss)
        return min(readings)

    for _ in range(warm_up):
        pipeline(**arguments)
    first = lowest(10)
    for _ in range(calls - 20):
        pipeline(**arguments)
    return {"calls": calls, "megabytes": (lowest(10) - first) / 2**20}


if __name__ == "__main__":
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    json.dump({subject.name: slope(subject.name, calls) for subject in PIPELINES}, sys.stdout)
