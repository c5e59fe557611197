"""SHA-256 digests of a model folder's files, and JSON files read with suspicion.

A manifest detects damage. It is no signature: whoever can replace a weight file can replace the manifest beside it.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .atomic import atomic_write


MANIFEST_NAME = "manifest.sha256.json"
INDEX_NAME = "model_index.json"


class DamagedFileError(OSError):
    """A file that is incomplete, altered, or not what its folder says; the message names it and the cure."""


class UnsafeFileError(OSError):
    """A file that could only be read by unpickling it, which runs code that the file contains."""


def write_manifest(folder: str | os.PathLike[str]) -> Path:
    """Writes the SHA-256 digests of a folder's files to `manifest.sha256.json` in it.

    In a pipeline folder `model_index.json` and the folders of its components are covered; a card or sample pictures beside
    them may change freely. In any other folder every file is covered.

    Args:
        folder (`str` or `os.PathLike`): The folder, complete.

    Returns:
        `pathlib.Path`: The manifest.

    Raises:
        OSError: If a file cannot be read or the manifest not be written.
    """
    folder = Path(folder)
    return write_digests(folder, {name: digest_of(folder / name) for name in covered_files(folder)})


def verify_manifest(folder: str | os.PathLike[str], *, complete: bool = True) -> bool:
    """Compares a folder with its manifest.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        complete (`bool`, *optional*, defaults to `True`):
            Whether a listed file that is absent counts as damage. A snapshot of the Hub holds only the files that were
            asked for, so there it does not.

    Returns:
        `bool`: `True` if all is as listed, `False` if the folder has no manifest.

    Raises:
        DamagedFileError: If a file is absent or differs, or the manifest itself cannot be read. The message names it.

    Example:
        ```python
        from pathlib import Path
        from diffusers_ext.integrity import verify_manifest, write_manifest

        folder = Path("my-pipeline")
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text("{}")
        write_manifest(folder)
        assert verify_manifest(folder)
        ```
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).is_file():
        return False
    for name, expected in read_digests(folder).items():
        path = folder / name
        if not path.is_file():
            if complete:
                raise DamagedFileError(
                    f"{path} is missing, though {MANIFEST_NAME} lists it; save or fetch {folder} again"
                )
        elif digest_of(path) != expected:
            raise DamagedFileError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}; save or fetch it again, or, if the "
                f"change is wanted, call diffusers_ext.integrity.write_manifest({str(folder)!r})"
            )
    return True


def covered_files(folder: Path) -> list[str]:
    """The files, relative to the folder, that its manifest lists."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    names = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    if INDEX_NAME not in names:
        return names
    components = {key for key, value in read_json_object(folder / INDEX_NAME).items() if isinstance(value, list)}
    return [name for name in names if name == INDEX_NAME or name.split("/")[0] in components]


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path, digests: Mapping[str, str]) -> Path:
    """Writes a manifest with these digests."""
    text = json.dumps({"algorithm": "sha256", "files": dict(sorted(digests.items()))}, indent=2)
    return atomic_write(folder / MANIFEST_NAME, text.encode() + b"\n")


def read_digests(folder: Path) -> dict[str, str]:
    """Reads a manifest: file, relative to the folder, to digest."""
    path = folder / MANIFEST_NAME
    files = read_json_object(path).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(digest, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        for name, digest in files.items()
    ):
        raise DamagedFileError(f"{path} is damaged: it has no table of files; save or fetch {folder} again")
    return files


# What diffusers itself writes for the absence of a bound.
_NO_BOUNDS = (("lambda_min_clipped", -math.inf),)


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that must hold an object with finite numbers, but for bounds that diffusers writes as infinite.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `dict`: Its content.

    Raises:
        DamagedFileError: If it cannot be read as that; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is not JSON ({first_line(error)}); fetch it again") from error
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(
            f"{path} is damaged: it holds a {type(content).__name__}, not an object; fetch it again"
        )
    for key, value in _leaves(content):
        if isinstance(value, float) and not math.isfinite(value) and (key, value) not in _NO_BOUNDS:
            raise DamagedFileError(f"{path} is damaged: {key}={value} is not a finite number; fetch it again")
    return content


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, item in items:
        yield from _leaves(item, f"{key}.{name}" if key else str(name))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without its full stop, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
