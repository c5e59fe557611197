"""The output folder of a batch: each picture with its settings beside it, and the list of what failed.

`NAME.json` is written after `NAME.png` and holds the digests of the picture and of all that it was made from. So it is
the sign that the output is complete, and tells a later run whether it would make the same one.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..atomic import atomic_write
from ..manifest import digest_of
from ..reports import save_image, versions, write_json
from .jobs import FAILURES, Job


# Hidden, because any other name can be that of an output.
MARK = ".batch.json"


def prepare_folder(output: Path) -> None:
    """Makes the output folder, or checks that it is one of an earlier batch, since a batch replaces what is there.

    Raises:
        ValueError: If it is a file, or a folder with files of someone else.
        OSError: If it cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT_FOLDER={str(output)!r} is a file; name a folder")
    output.mkdir(parents=True, exist_ok=True)
    if not (output / MARK).is_file() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise ValueError(
            f"OUTPUT_FOLDER={str(output)!r} holds files that no batch wrote, and nothing shall be written over; give "
            "a new or an empty folder"
        )
    write_json({"made_by": "diffusers-ext batch"}, output / MARK)


def digest(setup: Mapping[str, Any], job: Job, inputs: Mapping[str, str]) -> str:
    """SHA-256 of all that decides what a job gives, but for the versions of the libraries and the kind of device.

    Args:
        setup (`Mapping[str, Any]`): What all jobs of the run share: capability, model, method, precision.
        job ([`Job`]): The job. Names of files do not count, only what they hold.
        inputs (`Mapping[str, str]`): Key to SHA-256 of each input file.
    """
    everything = {"setup": setup, "seed": job.seed, "settings": job.settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def is_done(output: Path, setup: Mapping[str, Any], job: Job, folder: Path | None) -> bool:
    """Whether the output of a job is there, whole, and what the job would give.

    Args:
        output (`Path`): The output folder.
        setup (`Mapping[str, Any]`): As for [`digest`].
        job ([`Job`]): The job.
        folder (`Path`, *optional*): The input folder.
    """
    try:
        record = json.loads((output / f"{job.name}.json").read_text(encoding="utf-8"))
        # Looked at first, because it costs nothing: most outputs that are not done are not there at all.
        if not isinstance(record, dict) or record.get("picture_sha256") != digest_of(output / f"{job.name}.png"):
            return False
        files = {key: (folder or output) / path for key, path in job.files.items()}
        # A pipe in the place of a picture would never end.
        if not all(path.is_file() for path in files.values()):
            return False
        inputs = {key: digest_of(path) for key, path in files.items()}
    except (OSError, ValueError, RecursionError):
        # Not there, or not readable: done again, and if it is the input that is gone the job says so.
        return False
    return record.get("settings_sha256") == digest(setup, job, inputs)


def write_output(
    output: Path,
    setup: Mapping[str, Any],
    job: Job,
    inputs: Mapping[str, str],
    picture: Image.Image,
    more: Mapping[str, Any],
) -> None:
    """Writes a picture, then its settings.

    Nothing of the moment goes in (times, the number of processes), so that runs that give the same pictures give the
    same files.

    Args:
        output (`Path`): The output folder.
        setup (`Mapping[str, Any]`): As for [`digest`].
        job ([`Job`]): The job.
        inputs (`Mapping[str, str]`): Key to SHA-256 of each input file, as it was when it was opened.
        picture (`PIL.Image.Image`): What the job gave.
        more (`Mapping[str, Any]`): What is worth knowing besides.

    Raises:
        OSError: If it cannot be written.
    """
    path = save_image(picture, output / f"{job.name}.png")
    record = {
        "picture": path.name,
        "picture_size": list(picture.size),
        **job.files,
        **setup,
        "settings": dict(job.settings),
        "seed": job.seed,
        **more,
        "inputs_sha256": dict(inputs),
        "picture_sha256": digest_of(path),
        "settings_sha256": digest(setup, job, inputs),
        "versions": versions(),
    }
    write_json(record, output / f"{job.name}.json")


def failure(job: Job, error: BaseException) -> dict[str, Any]:
    """The line of a job that failed: its name, its files, and one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentence = " ".join(lines) or type(error).__name__
    if not isinstance(error, (ValueError, TypeError, OSError)):
        sentence = f"{type(error).__name__}: {sentence}"
    return {"name": job.name, **job.files, "error": sentence}


def append_failure(output: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to the list while the run goes on, in one write, so that several processes can do it."""
    descriptor = os.open(output / FAILURES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, _lines([line]))
    finally:
        os.close(descriptor)


def replace_failures(output: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the list anew; without a line there is none."""
    if lines:
        atomic_write(output / FAILURES, _lines(lines))
    else:
        (output / FAILURES).unlink(missing_ok=True)


def _lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode("utf-8", "backslashreplace")
