"""The jobs of a batch, from a file of JSON lines or from the pictures of a folder, checked before anything runs.

What is wrong with the list itself (a misspelt argument, two jobs with one output, a path that leads out of the folder)
is an error here. What is wrong with a picture is found when its turn comes, and concerns that job alone.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..imaging import FORMATS


FAILURES = "failures.jsonl"
OUTPUT_SUFFIXES = (".png", ".json")
LARGEST_SEED = 2**63 - 1
# A file is written under a longer, hidden name first, and file systems take 255 bytes.
LONGEST_NAME = 120
SHOWN_ERRORS = 5
# Lists of these would make several pictures of a job.
TEXTS = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
    "source_prompt",
    "task",
)


class SpecError(ValueError):
    """A list of jobs that cannot be run; the message is one sentence that says which lines are wrong and why."""


@dataclass(frozen=True)
class Fields:
    """What a job may say.

    Attributes:
        owner (`str`): Whose arguments they are, for messages.
        arguments (`frozenset[str]`): Names of settings.
        files (`tuple[str, ...]`): Keys that name a picture of the input folder; the first one makes the job, and may
            not be missing.
        required (`tuple[str, ...]`): Settings that may not be missing.
        defaults (`Mapping[str, Any]`): Settings of jobs that do not say otherwise.
    """

    owner: str
    arguments: frozenset[str]
    files: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One output.

    Attributes:
        name (`str`): The output without its ending, relative to the output folder, with `/` between folders.
        seed (`int`): Of its noise.
        files (`Mapping[str, str]`): Key (`"file"`, `"mask"`) to a path relative to the input folder.
        settings (`Mapping[str, Any]`): Arguments, of JSON types.
    """

    name: str
    seed: int
    files: Mapping[str, str]
    settings: Mapping[str, Any]


def seed_for(seed: int, name: str) -> int:
    """The seed of a job that has none, drawn from the seed of the run and the job's own name, whatever its place.

    Args:
        seed (`int`): Of the run.
        name (`str`): The job's input file, or its name if it has none.

    Returns:
        `int`: From 0 to 2^48 - 1, which every reader of JSON keeps exactly.

    Example:
        ```python
        from diffusers_ext.batching import seed_for

        assert seed_for(0, "a.png") == seed_for(0, "a.png") != seed_for(0, "b.png")
        ```
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def read_spec(
    path: str | os.PathLike[str],
    fields: Fields,
    folder: str | os.PathLike[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Job]:
    """Reads jobs from JSON lines.

    Args:
        path (`str` or `os.PathLike`): A text file (UTF-8) with one JSON object a line; empty lines are passed over.
        fields ([`Fields`]): What a job may say.
        folder (`str` or `os.PathLike`, *optional*): Where its pictures are; not needed by jobs without pictures.
        settings (`Mapping[str, Any]`, *optional*): For all jobs, unless they say otherwise.
        seed (`int`, *optional*, defaults to 0): From which the seeds of jobs without one are drawn; see [`seed_for`].

    Returns:
        `list[Job]`: In the order of the lines.

    Raises:
        SpecError: If a line is wrong, there is none, or two would write the same file.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not text in UTF-8; save it as JSON lines, one object a line") from error
    except OSError as error:
        raise OSError(f"the jobs {path} cannot be read: {error.strerror}; name a file of JSON lines") from error
    shared = _shared(settings or {}, fields)
    jobs: list[tuple[str, Job]] = []
    wrong = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            jobs.append((f"line {number}", _job(_object(line), fields, shared, seed, folder)))
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if not wrong:
        wrong = _clashes(jobs)
    if wrong:
        more = f"; and {len(wrong) - SHOWN_ERRORS} more" if len(wrong) > SHOWN_ERRORS else ""
        raise SpecError(f"{path}, {'; '.join(wrong[:SHOWN_ERRORS])}{more}")
    if not jobs:
        raise SpecError(f"{path} holds no job; write one JSON object a line")
    return [job for _, job in jobs]


def folder_jobs(
    folder: str | os.PathLike[str],
    fields: Fields,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    without: Iterable[Path] = (),
) -> list[Job]:
    """A job for every picture of a folder and of the folders in it, all with the same settings.

    A file is taken for a picture by its ending; whether it is one is found when its turn comes. Hidden files are left
    out.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        fields ([`Fields`]): What a job may say.
        settings (`Mapping[str, Any]`, *optional*): Of all jobs.
        seed (`int`, *optional*, defaults to 0): As for [`read_spec`].
        without (`Iterable[Path]`, *optional*): Folders in it that are not looked into.

    Returns:
        `list[Job]`: In the order of their names.

    Raises:
        SpecError: If a setting is wrong or missing, there is no picture, or two would write the same file.
    """
    shared = _shared(settings or {}, fields)
    if missing := [name for name in fields.required if name not in shared]:
        raise SpecError(
            f"{missing[0]} is missing; give it with --set {missing[0]}=... for all, or with --spec for each"
        )
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    root, apart = Path(folder), {path.resolve() for path in without}
    # A picture that is given for all jobs is not one of them.
    given = {shared[key] for key in fields.files if key in shared}
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() not in apart
        ]
        files += [
            (Path(place) / name).relative_to(root).as_posix()
            for name in names
            if Path(name).suffix.lower() in endings and not name.startswith(".")
        ]
    jobs, wrong = [], []
    for file in sorted(set(files) - given):
        try:
            # A link that leads out is found when its turn comes, like any other file that cannot be used.
            jobs.append((file, _job({fields.files[0]: file}, fields, shared, seed, None)))
        except ValueError as error:
            wrong.append(f"{file}: {error}")
    wrong = wrong or _clashes(jobs)
    if wrong:
        raise SpecError(f"{root}, {wrong[0]}; or name the outputs with --spec")
    if not jobs:
        raise SpecError(f"{root} holds no picture (a file that ends in {', '.join(sorted(endings)[:8])}, ...)")
    return [job for _, job in jobs]


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a file in a folder; a ValueError if links lead it out of there."""
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name} leads out of {folder}; replace the link by the file")
    return path


def _object(line: str) -> dict[str, Any]:
    def without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise SpecError(f"{repeated} is there twice; leave one out")
        return found

    def refused(constant: str) -> Any:
        raise SpecError(f"{constant} is not a number of JSON; give a finite one")

    try:
        content = json.loads(line, object_pairs_hook=without_repeats, parse_constant=refused)
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpecError(f"it is not JSON ({str(error) or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise SpecError(f"it holds a {type(content).__name__}, not an object like {{...}}")
    return content


def _shared(settings: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Settings for all jobs, which may be neither what makes one job nor unknown."""
    own = {"name", "seed", *fields.files[:1]}
    for key in settings:
        if key in own:
            cure = "give --seed" if key == "seed" else "give it in --spec"
            raise SpecError(f"--set {key}=... cannot be the same for all jobs; {cure}")
        try:
            _check_known(key, fields)
            _check_value(key, settings[key], fields)
        except SpecError as error:
            raise SpecError(f"--set {key}=...: {error}") from error
    return {**fields.defaults, **settings}


def _job(
    said: Mapping[str, Any],
    fields: Fields,
    shared: Mapping[str, Any],
    seed: int,
    folder: str | os.PathLike[str] | None,
) -> Job:
    for key in said:
        if key not in ("name", "seed"):
            _check_known(key, fields)
            _check_value(key, said[key], fields)
    everything = {**shared, **{key: value for key, value in said.items() if key not in ("name", "seed")}}
    needed = (*fields.files[:1], *fields.required)
    if missing := [key for key in needed if everything.get(key) is None]:
        raise SpecError(f"{missing[0]} is missing")
    files = {key: everything.pop(key) for key in fields.files if everything.get(key) is not None}
    for path in files.values() if folder is not None else ():
        inside(folder or "", path)
    name = said.get("name")
    if name is None:
        if not files:
            raise SpecError("name is missing; it says what the output is called")
        name = PurePosixPath(files[fields.files[0]]).with_suffix("").as_posix()
    _check_name(name)
    chosen = said.get("seed")
    if chosen is None:
        chosen = seed_for(seed, files.get(fields.files[0], name) if fields.files else name)
    elif isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen <= LARGEST_SEED:
        raise SpecError(f"seed={chosen!r} is not a whole number from 0 to 2^63 - 1")
    return Job(name=name, seed=chosen, files=files, settings=everything)


def _check_known(key: str, fields: Fields) -> None:
    known = {*fields.arguments, *fields.files, "name", "seed"}
    if key not in known:
        # `steps` is meant for `num_inference_steps`, though `timesteps` is spelt more like it.
        near = [name for name in sorted(known) if key in name] or difflib.get_close_matches(key, sorted(known), n=1)
        cure = f"use {near[0]}" if near else f"it takes {', '.join(sorted(known))}"
        raise SpecError(f"{key} is not an argument of {fields.owner} that a job can give; {cure}")


def _check_value(key: str, value: Any, fields: Fields) -> None:
    if key in fields.files:
        _check_relative(key, value)
    elif key in TEXTS and value is not None and not isinstance(value, str):
        raise SpecError(
            f"{key}={value!r} is not text; give one, in quotation marks, and a job for each picture you want"
        )


def _check_relative(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SpecError(f"{key}={value!r} is not the name of a file")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or Path(value).is_absolute() or not path.parts:
        raise SpecError(f"{key}={value!r} leads out of its folder; give a path inside of it, without ..")


def _check_name(name: Any) -> None:
    _check_relative("name", name)
    if PurePosixPath(name).as_posix() != name or "\\" in name or not name.isprintable():
        raise SpecError(f"name={name!r} is not a plain path; write it like folder/name")
    for part in PurePosixPath(name).parts:
        if part.startswith("."):
            raise SpecError(f"name={name!r} begins with a full stop, which hides files; give another one")
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise SpecError(f"name={name[:40]!r}... is longer than {LONGEST_NAME} bytes; give a shorter one")


def _clashes(jobs: Sequence[tuple[str, Job]]) -> list[str]:
    """Jobs that would write one file, also where the file system does not tell capital letters from small ones."""
    owners: dict[str, str] = {FAILURES: "the list of failures"}
    wrong = []
    for place, job in jobs:
        for suffix in OUTPUT_SUFFIXES:
            output = f"{job.name}{suffix}"
            owner = owners.setdefault(output.casefold(), place)
            if owner != place:
                wrong.append(f"{place}: it would write {output} like {owner}; give one of them another name")
                break
    for place, job in jobs:
        for parent in PurePosixPath(job.name.casefold()).parents:
            if parent.as_posix() in owners:
                wrong.append(
                    f"{place}: {job.name} needs a folder where {owners[parent.as_posix()]} writes a file; rename one"
                )
                break
    return wrong
