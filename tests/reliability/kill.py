"""kill -9 at random moments, half of them aimed inside a save: what is on the disk afterwards must be whole.

Processes are forked from one that has imported everything already, since twenty imports of torch would be most of the time.
Run it as a program (`python -m tests.reliability.kill pipeline --kills 20`): a process that is to fork must not have threads.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.integrity import MANIFEST_NAME, verify_manifest
from diffusers_ext.manifest import digest_of

from .registry import PIPELINES, SCRIPTS, PipelineSubject, Script


LONGEST_SAVE = 60.0  # seconds after which a process that should be saving is taken to hang


def kill_during(work: Callable[[], None], is_saving: Callable[[], bool] | None, delay: float) -> bool:
    """Forks a process that does `work`, and kills it; returns whether it was still running.

    Args:
        work: What the process does.
        is_saving: If given, the clock starts once this is true.
        delay: Seconds from the start, or from then on, to the kill.
    """
    pid = _fork(work)
    deadline = time.monotonic() + LONGEST_SAVE
    while is_saving is not None and not is_saving() and time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def _fork(work: Callable[[], None]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    # Nothing of the parent's may run in the child: no handlers, no clean-up of its temporary folders.
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def half_written(folder: Path) -> bool:
    """Whether a save into `folder`, or of `folder`, is under way right now."""
    places = [folder, folder.parent] if folder.is_dir() else [folder.parent]
    return any(path.name.endswith(".tmp") for place in places if place.is_dir() for path in place.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


def kill_pipeline_saves(subject: PipelineSubject, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Overwrites one folder again and again with other weights; after each kill it must load, with weights of one save."""
    rng = random.Random(seed)
    pipeline: Any = subject.build()
    target = folder / "model"
    log = folder / "log"
    _fill(pipeline, 0.0)
    pipeline.save_pretrained(target)
    log.write_text("0\n")
    sound, aimed, faults = 0, 0, []
    for number in range(kills):
        aim = number % 2 == 0
        started = int(log.read_text().splitlines()[-1])
        delay = rng.uniform(0.0, 0.08) if aim else rng.uniform(0.0, 0.4)
        running = kill_during(
            lambda: _save_for_ever(pipeline, target, log, started + 1),
            (lambda: half_written(target)) if aim else None,
            delay,
        )
        inside = half_written(target)
        aimed += inside
        acknowledged = int(log.read_text().splitlines()[-1])
        try:
            loaded = subject.load(str(target))
            values = {float(p.detach().flatten()[0]) for part in _networks(loaded) for p in part.parameters()}
            assert verify_manifest(target), "no manifest"
            assert len(values) == 1, f"weights of several saves: {values}"
            # The save that was under way may have got through, an acknowledged one may not be lost.
            assert values <= {float(acknowledged), float(acknowledged + 1)}, f"{values} after save {acknowledged}"
            assert running, "the process ended by itself"
            sound += 1
        except Exception as error:
            faults.append(f"kill {number}: {type(error).__name__}: {error}")
    pipeline.save_pretrained(target)
    left = [path.name for path in target.iterdir() if path.name.endswith((".tmp", ".complete"))]
    if left:
        faults.append(f"left behind after the next save: {left}")
    return {"kills": kills, "sound": sound, "inside a save": aimed, "faults": faults}


def _save_for_ever(pipeline: Any, target: Path, log: Path, number: int) -> None:
    # A number beyond any real count: the process is killed long before.
    while number < 10**6:
        _fill(pipeline, float(number))
        pipeline.save_pretrained(target)
        with open(log, "a") as file:
            file.write(f"{number}\n")
        number += 1


@torch.no_grad()
def _fill(pipeline: Any, value: float) -> None:
    for module in _networks(pipeline):
        for parameter in module.parameters():
            parameter.fill_(value)


def _networks(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


# ---------------------------------------------------------------------------------------------------------------------
# Training scripts
# ---------------------------------------------------------------------------------------------------------------------


def kill_training(script: Script, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kills and resumes a run again and again.

    Every checkpoint that is found after a kill, and the model at the end, must be bit-equal to those of a run that nobody
    killed.
    """
    rng = random.Random(seed)
    module = importlib.import_module(script.module)

    def work(run: Path, *more: str) -> Callable[[], None]:
        return lambda: _quiet(lambda: module.main(module.parse_args([*script.arguments(run), *more])))

    script.prepare(folder)
    reference = folder / "reference"
    started = time.monotonic()
    _finish(work(reference))
    duration = time.monotonic() - started
    expected = _digests(reference)
    if len(expected) < script.steps:
        raise RuntimeError(f"the reference run left {len(expected)} of {script.steps} checkpoints")
    runs = [folder / "run-0"]
    sound, aimed, faults = 0, 0, []
    for number in range(kills):
        if len(_digests(runs[-1])) >= script.steps - 2:
            # Near its end there is little of a run left to interrupt.
            runs.append(folder / f"run-{number}")
        run = runs[-1]
        aim = number % 2 == 0
        delay = rng.uniform(0.0, 0.03) if aim else rng.uniform(0.1, 0.7) * duration
        is_saving = (lambda: half_written(run / "checkpoint")) if aim else None
        running = kill_during(work(run, "--resume_from_checkpoint", "latest"), is_saving, delay)
        aimed += half_written(run / "checkpoint")
        found = _digests(run)
        wrong = [name for name, digest in found.items() if digest != expected.get(name)]
        if wrong:
            faults.append(f"kill {number}: {wrong} differ from the run that nobody killed")
        elif not running and len(found) < script.steps:
            faults.append(f"kill {number}: the run ended by itself after {len(found)} checkpoints")
        else:
            sound += 1
    _finish(work(runs[-1], "--resume_from_checkpoint", "latest"))
    if _digests(runs[-1]) != expected or _exported(runs[-1]) != _exported(reference):
        faults.append("the run that was resumed to its end differs from the one that nobody killed")
    return {"kills": kills, "sound": sound, "inside a save": aimed, "checkpoints": len(expected), "faults": faults}


def _finish(work: Callable[[], None]) -> None:
    pid = _fork(work)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a training run ended with status {os.waitstatus_to_exitcode(status)}")


def _quiet(work: Callable[[], Any]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    work()


def _digests(run: Path) -> dict[str, str]:
    """Checkpoint -> digests of its weights, averages and optimiser states; raises if a file does not agree with them."""
    digests = {}
    for path in sorted(run.glob("checkpoint-*")):
        verify_manifest(path)
        files = json.loads((path / MANIFEST_NAME).read_text())["files"]
        # The state also notes how long the run took, which differs.
        digests[path.name] = json.dumps({name: files[name] for name in sorted(files) if name.endswith(".safetensors")})
    return digests


def _exported(run: Path) -> dict[str, str]:
    """Digests of the model that the run leaves beside its checkpoints."""
    paths = (
        path for path in run.rglob("*.safetensors") if not path.relative_to(run).parts[0].startswith("checkpoint-")
    )
    found = {path.relative_to(run).as_posix(): digest_of(path) for path in paths}
    if not found:
        raise RuntimeError(f"{run.name} left no model")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pipeline", "training"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", help="name of one pipeline or script")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        for subject in PIPELINES if args.what == "pipeline" else SCRIPTS:
            if args.only in (None, subject.name):
                place = Path(scratch) / subject.name
                place.mkdir()
                probe = kill_training if isinstance(subject, Script) else kill_pipeline_saves
                results[subject.name] = probe(subject, args.kills, place, args.seed)  # type: ignore[arg-type,operator]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
