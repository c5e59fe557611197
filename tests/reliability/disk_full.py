"""A disk that is full while something is saved, simulated by a limit on the size of files in a process of its own."""

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_ext.integrity import atomic_write, verify_manifest

from .registry import PIPELINES, sample_picture


def snapshot(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def attempt(save: Callable[[], Any], folder: Path, path: Path, limit: int) -> dict[str, Any]:
    """Saves under the limit; what was answered, and whether everything else is as before."""
    before = snapshot(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save()
        message, kind = "", "none"
    except OSError as error:
        message, kind = str(error), "sentence" if str(path) in str(error) and "unchanged" in str(error) else "vague"
    except Exception as error:
        message, kind = f"{type(error).__name__}: {error}", "raw"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return {"error": kind, "message": message, "as before": snapshot(folder) == before}


def main() -> None:
    # The default action for a file that grows too large is to end the process; a full disk raises an error instead.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    results = {}
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        for subject in PIPELINES:
            folder = Path(scratch) / subject.name
            folder.mkdir()
            pipeline: Any = subject.build()
            pipeline.save_pretrained(folder / "model")
            for name, limit in (("model", 4000), ("model", 200), ("new", 4000)):
                target = folder / name
                result = attempt(lambda: pipeline.save_pretrained(target), folder, target, limit)
                result["former loads"] = verify_manifest(folder / "model") and bool(
                    subject.load(str(folder / "model"))
                )
                results[f"{subject.name}, {name}, {limit} bytes"] = result
            if not hasattr(pipeline, "invert"):
                continue
            inversion = pipeline.invert(sample_picture(), "a", num_inference_steps=2)
            inversion.save_pretrained(folder / "inversion")
            inversion.prompt = ["b"]
            inversion.latents = inversion.latents + 1
            place = folder / "inversion"
            result = attempt(lambda: inversion.save_pretrained(place), folder, place, 4000)
            result["former loads"] = type(inversion).from_pretrained(place).prompt == ["a"]
            results[f"{subject.name}, inversion"] = result
        file = Path(scratch) / "one.bin"
        file.write_bytes(b"old")
        result = attempt(lambda: atomic_write(file, os.urandom(10000)), Path(scratch), file, 1000)
        results["atomic_write"] = result | {"former loads": file.read_bytes() == b"old"}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
