"""The run of a batch: which jobs are left, each of them on one of the processes, one call a picture.

Accelerate says which process this is and which jobs are its own (`PartialState.split_between_processes`), with one
process or many, on one node or several. Pictures are never put together into one call: what shares a batch would
depend on the number of processes, and the last bits of a picture on what shares its batch.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ..atomic import remove_unfinished
from ..hub import resolve_device
from ..manifest import MANIFEST_NAME, covered_files, digest_of, read_digests
from ..serving.checks import still_picture
from .capabilities import GUIDED, Capability, find_capability
from .jobs import Job, SpecError, folder_jobs, inside, read_spec
from .records import append_failure, failure, is_done, prepare_folder, replace_failures, write_output


T = TypeVar("T")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Processes wait for the slowest one at the end, which may have hours of work left. The default is ten minutes.
PATIENCE = timedelta(days=365)
LOG_INTERVAL = 30.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class BatchReport:
    """What a run did, on all processes together.

    Attributes:
        jobs (`int`): Jobs of the list.
        done (`int`): Outputs that this run made.
        skipped (`int`): Outputs that were there already.
        failed (`list[dict]`): The lines of `failures.jsonl`, in the order of the jobs.
        is_main (`bool`): Whether this is the process that should speak of it.
    """

    jobs: int
    done: int
    skipped: int
    failed: list[dict[str, Any]]
    is_main: bool


def run_batch(
    capability: str,
    output: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    spec: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    method: str = GUIDED,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    threads: int = 1,
) -> BatchReport:
    """Runs the jobs that are not done yet, and writes each output with its settings.

    Called by every process of a launch alike; each does its share.

    Args:
        capability (`str`): `"edit"`, `"restore"`, `"steer"` or `"sample"`.
        output (`str` or `os.PathLike`): Folder of the outputs: new, empty, or of an earlier run.
        folder (`str` or `os.PathLike`, *optional*): Folder of the input pictures; `"sample"` has none.
        spec (`str` or `os.PathLike`, *optional*): JSON lines, a job each; see [`read_spec`]. Without it every picture
            of `folder` is a job.
        settings (`Mapping[str, Any]`, *optional*): Arguments of the pipeline's call for all jobs that do not say
            otherwise.
        model (`str` or `os.PathLike`, *optional*): Folder or Hub id; a model of this project by default.
        revision (`str`, *optional*): Branch, tag or commit of a Hub model.
        method (`str`, *optional*, defaults to `"guide-and-rescale"`): How pictures are edited.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision: that, `"float16"` or `"bfloat16"`.
        device (`str`, *optional*): Such as `"cpu"` or `"cuda"`; the best one that is present by default.
        seed (`int`, *optional*, defaults to 0): From which the seeds of jobs without one are drawn.
        threads (`int`, *optional*, defaults to 1): Threads of a process on a CPU. The number changes the last bits of
            a result.

    Returns:
        [`BatchReport`]: The same on all processes.

    Raises:
        SpecError: If the list of jobs is wrong; nothing has been run then.
        ValueError: If an argument is wrong, or a folder cannot be used.
        OSError: If there is no such model, or an output cannot be written.
        SystemExit: On all processes but the main one, if that one raised one of these.

    Example:
        ```python
        from pathlib import Path
        from diffusers_ext.batching import run_batch

        Path("stars.jsonl").write_text('{"name": "red", "prompt": "a red star on a blue background"}')
        report = run_batch("sample", "stars", spec="stars.jsonl", settings={"num_inference_steps": 2})
        assert report.done + report.skipped == 1 and Path("stars/red.png").is_file()
        ```
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads={threads!r} is not a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not a whole number")
    state = _processes(device)
    place = _place(state, device)
    target, source = Path(output), None if folder is None else Path(folder)

    def plan() -> tuple[list[Job], dict[str, Any]]:
        kind = find_capability(capability, model=model, revision=revision, method=method)
        jobs = _jobs(kind, target, source, spec, settings, seed)
        prepare_folder(target)
        replace_failures(target, [])
        shared = {
            "command": f"batch {kind.name}", "model": kind.model, "model_sha256": _model_digest(kind.model),
            "revision": kind.revision, "method": kind.method, "dtype": dtype,
        }  # fmt: skip
        return jobs, shared

    # Read once, by one process: files that come and go meanwhile would give each process another list.
    jobs, shared = _from_main(state, plan)
    # A folder may be called by another path from elsewhere; what counts is what it holds.
    setup = {key: value for key, value in shared.items() if key != "model" or shared["model_sha256"] is None}
    for written in {target, *((target / job.name).parent for job in jobs)}:
        if written.is_dir():
            remove_unfinished(written)
    with state.split_between_processes(jobs) as mine:
        left = [job for job in mine if not is_done(target, setup, job, source)]
    todo: list[Job] = gather_object(left)

    done, failed = 0, []
    if todo:
        kind = find_capability(capability, model=model, revision=revision, method=method)
        with _threads(threads if place.type == "cpu" else None), state.split_between_processes(todo) as mine:
            pipe = _load(state, kind, place, DTYPES[dtype], needed=bool(mine))
            for job in _with_progress(mine, state):
                try:
                    pictures, inputs = _open(job, source)
                    picture, more = kind.run(pipe, job.settings, pictures, job.seed)
                except Exception as error:
                    failed.append(failure(job, error))
                    append_failure(target, failed[-1])
                    tqdm.write(f"{job.name} failed: {failed[-1]['error']}", file=sys.stderr)
                    continue
                more = {"model": shared["model"], "device": place.type, **more}
                # A disk that is full is no fault of the picture: from here on an error ends the run.
                write_output(target, setup, job, inputs, picture, more)
                done += 1
    # Also the wait for the slowest process.
    done = sum(gather_object([done]))
    failed = gather_object(failed)

    def finish() -> None:
        replace_failures(target, failed)

    _from_main(state, finish)
    return BatchReport(len(jobs), done, len(jobs) - len(todo), failed, state.is_main_process)


def _processes(device: str | None) -> PartialState:
    """Accelerate's view of the launch; a single process needs no launch."""
    cpu = resolve_device(device if device is None else device.split(":")[0]).type == "cpu"
    state = PartialState(
        cpu=cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"), timeout=PATIENCE
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > state.num_processes:
        raise ValueError(
            f"device={device!r}: {started} processes were started, and Accelerate cannot join them there; give "
            "--device cpu or cuda, or start one"
        )
    return state


def _place(state: PartialState, device: str | None) -> torch.device:
    if state.num_processes == 1:
        return resolve_device(device)
    if device is not None and torch.device(device).index is not None:
        raise ValueError(
            f"device={device!r} would put all {state.num_processes} processes on one device; leave its number out"
        )
    return state.device


def _jobs(
    kind: Capability,
    target: Path,
    source: Path | None,
    spec: str | os.PathLike[str] | None,
    settings: Mapping[str, Any] | None,
    seed: int,
) -> list[Job]:
    if not kind.fields.files:
        if source is not None:
            raise ValueError(f"folder={str(source)!r}: {kind.name} takes no pictures; leave it out")
        if spec is None:
            raise SpecError(f"spec is missing; {kind.name} needs jobs with a name")
        return read_spec(spec, kind.fields, settings=settings, seed=seed)
    if source is None or not source.is_dir():
        raise ValueError(f"INPUT_FOLDER={str(source or '')!r} is not a folder; name the one that holds the pictures")
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"OUTPUT_FOLDER={str(target)!r} holds the pictures that are read; give a folder of its own")
    if spec is None:
        return folder_jobs(source, kind.fields, settings=settings, seed=seed, without=[target])
    return read_spec(spec, kind.fields, source, settings=settings, seed=seed)


def _model_digest(model: str) -> str | None:
    """A digest of a model folder, by which a later run knows it again; a Hub model is known by its name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    listed = (folder / MANIFEST_NAME).is_file()
    digests = read_digests(folder) if listed else {name: digest_of(folder / name) for name in covered_files(folder)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _load(state: PartialState, kind: Capability, place: torch.device, dtype: torch.dtype, *, needed: bool) -> Any:
    """The main process goes first: what it fetches the others find, and what is wrong is said once."""
    own: list[Any] = []

    def load() -> None:
        own.append(kind.load(place, dtype))

    _from_main(state, load)
    if not own and needed:
        load()
    return own[0] if own else None


def _from_main(state: PartialState, work: Callable[[], T]) -> T:
    """What the main process computes, on all of them; if it cannot, it raises and the others leave without a word."""
    error: Exception | None = None
    box: list[Any] = [None, False]
    if state.is_main_process:
        try:
            box = [work(), False]
        except Exception as problem:
            error, box = problem, [None, True]
    result, is_wrong = broadcast_object_list(box)
    if error is not None:
        raise error
    if is_wrong:
        raise SystemExit(2)
    return result


def _open(job: Job, folder: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The pictures of a job and their SHA-256."""
    pictures, digests = {}, {}
    for key, name in job.files.items():
        path = inside(folder or "", name)
        pictures[key] = still_picture(path, f"{key} {name}")
        digests[key] = digest_of(path)
    return pictures, digests


def _with_progress(jobs: list[Job], state: PartialState) -> Iterator[Job]:
    """A bar with the time that is left, of the main process, whose share is as large as any."""
    share = f" (1 of {state.num_processes} shares)" if state.num_processes > 1 else ""
    return tqdm(
        jobs,
        desc=f"batch{share}",
        unit="picture",
        file=sys.stderr,
        disable=not state.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else LOG_INTERVAL,
        maxinterval=LOG_INTERVAL,
        smoothing=0.1,
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
