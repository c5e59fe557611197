"""Files and folders that are written whole or not at all.

Everything is written into a folder of its own, flushed to the disk, and only then moved into place file by file or, if there
is nothing in its place yet, by one rename. A kill, a crash or a full disk at any moment leaves what was there before or what
was meant to be there.

A folder that was there before is never renamed and never removed as a whole: the only folders that are ever removed are those
that this module made itself, and they carry a name that nothing else has.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError


# An update of a folder that is on the disk completely and only has to be moved over the folder's own files.
_COMMITTED = ".update.complete"
_PLAN = ".plan.json"


def atomic_write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file so that after a crash, a kill or a full disk it is either the old one or the new one.

    Args:
        path (`str` or `os.PathLike`): The file; its folder must exist.
        data (`bytes`): The whole content.

    Returns:
        `pathlib.Path`: The path.

    Raises:
        OSError: If it cannot be written. An earlier file of that name is then unchanged.
        ValueError: If `path` cannot name a file.

    Example:
        ```python
        from diffusers_ext.integrity import atomic_write

        atomic_write("settings.json", b"{}")
        ```
    """
    path = _checked(path, "path")
    temporary = path.with_name(_temporary_name(path.name))
    try:
        with _explained(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush_folder(path.parent)
    finally:
        _unlink(temporary)
    return path


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes the target's name when the block ends without an error.

    This is the one primitive behind saved pipelines and training checkpoints: a kill at any moment leaves either no `target`
    or a complete one, and what an earlier, killed process left half-written beside it is removed.

    A `target` that exists already is replaced file by file as in [`atomic_update`], and only if it is empty or made by an
    earlier call: every file in it must be listed in its `manifest.sha256.json`. Anything else is refused and left alone.

    Args:
        target (`str` or `os.PathLike`): The folder to make. Its parents are made too.

    Yields:
        `pathlib.Path`: An empty folder on the same file system.

    Raises:
        OSError: If something cannot be written (disk full, no permission), or the target holds files that are not ours. The
            target is then as before.
        ValueError: If `target` is the working folder, one above it, the home folder, a mount point or a git checkout.

    Example:
        ```python
        from diffusers_ext.integrity import atomic_folder

        with atomic_folder("run/checkpoint-100") as folder:
            (folder / "state.json").write_text("{}")
        ```
    """
    target = _checked_folder(target)
    if target.is_dir():
        former = _files_of_former_save(target)
        with atomic_update(target) as staging:
            yield staging
            remove_with_update(staging, [name for name in former if not (staging / name).exists()])
        return
    staging = target.with_name(_temporary_name(target.name))
    try:
        with _explained(target):
            if os.path.lexists(target):
                raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent, target.name)
            staging.mkdir()
            yield staging
            _flush(staging)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "another process has made it meanwhile")
            os.rename(staging, target)
            _flush_folder(target.parent)
    finally:
        _remove_own(staging)


@contextmanager
def atomic_update(target: str | os.PathLike[str], last: Iterable[str] = ()) -> Iterator[Path]:
    """Gives an empty folder to write into, whose files replace those of an existing folder when the block ends.

    Files that only the old folder has (a card, weights of another variant, checkpoints) stay. The update is complete on the
    disk before the first file is replaced, so a kill in between loses nothing: [`finish_update`] moves the rest.

    Args:
        target (`str` or `os.PathLike`): A folder that exists.
        last (`Iterable[str]`, *optional*): Files, relative to the folder, to replace after all others, in this order.

    Yields:
        `pathlib.Path`: An empty folder inside the target. Call [`remove_with_update`] on it for files that must go.

    Raises:
        OSError: If something cannot be written. The folder is then as before.
        ValueError: As for [`atomic_folder`], but a mount point may be updated.
    """
    target = _checked_folder(target, may_be_mount=True)
    staging = target / _temporary_name("update")
    order = list(last)
    try:
        with _explained(target):
            if not target.is_dir():
                raise FileNotFoundError(errno.ENOENT, "it is not a folder that exists")
            finish_update(target)
            _remove_leftovers(target, "update")
            staging.mkdir()
            yield staging
            removed = _read_plan(staging)["remove"]
            (staging / _PLAN).write_text(json.dumps({"remove": removed, "last": order}), encoding="utf-8")
            _flush(staging)
            os.rename(staging, target / _COMMITTED)
            _flush_folder(target)
            finish_update(target)
    finally:
        _remove_own(staging)


def remove_with_update(staging: Path, names: Iterable[str]) -> None:
    """Notes files of the target, relative to it, that the update of [`atomic_update`] shall remove."""
    (staging / _PLAN).write_text(json.dumps({"remove": sorted(names), "last": []}), encoding="utf-8")


def has_update(target: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an update that was interrupted after it had been written."""
    return (Path(target) / _COMMITTED).is_dir()


def finish_update(target: str | os.PathLike[str]) -> bool:
    """Completes an update that was interrupted after it had been written.

    Args:
        target (`str` or `os.PathLike`): The folder.

    Returns:
        `bool`: Whether there was one.

    Raises:
        OSError: If the folder may not be written, or the update would reach out of it.
    """
    target = Path(target)
    update = target / _COMMITTED
    if not has_update(target):
        return False
    with _explained(target):
        # A file already moved by a killed run, or by another process that does the same right now, is no error here.
        plan = _read_plan(update)
        files = [path for path in sorted(update.rglob("*")) if path.is_file() and path != update / _PLAN]
        last = [update / name for name in plan["last"]]
        for path in (path for path in files if path not in last):
            _move(path, target / path.relative_to(update), target)
        for name in plan["remove"]:
            _unlink(_inside(target / name, target))
        for path in last:
            _move(path, target / path.relative_to(update), target)
        _flush_folder(target)
        _remove_emptied(update)
    return True


def _read_plan(update: Path) -> dict[str, list[str]]:
    plan: dict[str, list[str]] = {"remove": [], "last": []}
    if (update / _PLAN).is_file():
        try:
            plan |= json.loads((update / _PLAN).read_text(encoding="utf-8"))
            names = [PurePosixPath(name) for name in [*plan["remove"], *plan["last"]]]
        except (ValueError, TypeError) as error:
            raise OSError(f"{update / _PLAN} is damaged; remove {update} and save again") from error
        if any(name.is_absolute() or ".." in name.parts or not name.parts for name in names):
            raise OSError(f"{update / _PLAN} leads out of its folder; remove {update} and save again")
    return plan


def _inside(path: Path, folder: Path) -> Path:
    """A folder may come from elsewhere, so neither a name nor a link in it may lead our moves out of it."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path} leads out of {folder}; replace the link by a folder")
    return path


def _move(source: Path, path: Path, folder: Path) -> None:
    _inside(path, folder).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, path)
    except FileNotFoundError:
        if source.exists():
            raise
    else:
        _flush_folder(path.parent)


def _files_of_former_save(target: Path) -> list[str]:
    """The files of a folder of ours, relative to it; raises if there is a single one that is not."""
    # Read here and not with the functions of `manifest.py`, which is built on this module.
    manifest = target / "manifest.sha256.json"
    found = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    found = [
        name for name in found if PurePosixPath(name).parts[0] != _COMMITTED and not _OWN.fullmatch(name.split("/")[0])
    ]
    if not found:
        return []
    try:
        listed = set(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    foreign = [name for name in found if name not in listed and name != manifest.name]
    if foreign or not listed:
        raise OSError(
            f"{target} exists and is left as it is: {foreign[0] if foreign else 'its manifest'} is not of an earlier save; "
            "give a new name or an empty folder"
        )
    return found


def _checked(path: str | os.PathLike[str], name: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}={path!r} is of type {type(path).__name__}; give a str or a pathlib.Path")
    if not Path(path).name or Path(path).name == ".." or "\0" in str(path):
        raise ValueError(f"{name}={str(path)!r} cannot name a file or folder to make; give one that can")
    return Path(path)


def _checked_folder(target: str | os.PathLike[str], may_be_mount: bool = False) -> Path:
    """Refuses places that belong to someone else, whatever is meant to be written there."""
    path = Path(os.path.abspath(_checked(target, "target")))
    real = path.resolve()
    try:
        working = Path.cwd().resolve()
    except FileNotFoundError as error:
        raise ValueError(
            f"target={str(target)!r}: the working folder no longer exists; change to one that does"
        ) from error
    if working.is_relative_to(real):
        what = "the working folder" if working == real else "above the working folder"
    elif Path.home().resolve().is_relative_to(real):
        what = "the home folder, or above it"
    elif os.path.ismount(real) and not may_be_mount:
        what = "a mount point"
    elif os.path.lexists(real / ".git"):
        what = "a git checkout"
    else:
        return path
    raise ValueError(f"target={str(target)!r} is {what}; give a folder of its own")


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turns what writers raise when the disk is full or closed to us into one sentence that names the target."""
    try:
        yield
    except SafetensorError as error:
        raise _not_saved(target, error) from error
    except OSError as error:
        # Without an errno it is not the operating system that speaks, but a sentence of ours or of diffusers.
        if error.errno is None:
            raise
        raise _not_saved(target, error) from error


def _not_saved(target: Path, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    return OSError(f"{target} cannot be saved: {reason}; what was there before is unchanged")


_OWN = re.compile(r"\..+\.[A-Za-z0-9_]+-(?P<pid>\d+)-[0-9a-f]{16}\.tmp")


def _temporary_name(name: str) -> str:
    # The host is part of it because the folder may lie on a network drive, where a process number alone says nothing.
    return f".{name}.{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _remove_leftovers(parent: Path, name: str) -> None:
    """Removes half-written folders that this module made in processes of this machine that no longer run."""
    start = f".{name}.{_host()}-"
    for path in parent.iterdir():
        match = _OWN.fullmatch(path.name)
        if match and path.name.startswith(start) and not _is_running(int(match["pid"])):
            _remove_own(path)


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Removes files that killed processes of this machine had not finished writing into a folder; see [`atomic_write`].

    Call it before this process writes into the folder: what carries its own number is of an earlier process that had the same.

    Args:
        folder (`str` or `os.PathLike`): A folder that exists. Folders in it are not looked into.

    Raises:
        OSError: If it cannot be read, or a file not be removed.
    """
    for path in Path(folder).iterdir():
        match = _OWN.fullmatch(path.name)
        if match is None or f".{_host()}-{match['pid']}-" not in path.name or path.is_dir() or path.is_symlink():
            continue
        if int(match["pid"]) == os.getpid() or not _is_running(int(match["pid"])):
            _unlink(path)


def _remove_own(path: Path) -> None:
    """The only place where a folder with content is removed: one whose name only this module gives."""
    if not _OWN.fullmatch(path.name):
        raise ValueError(f"{path} was not made here and is not removed")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def _remove_emptied(update: Path) -> None:
    """Removes a folder whose files have been moved away; a file that is still there keeps its folder."""
    _unlink(update / _PLAN)
    for folder in sorted((path for path in update.rglob("*") if path.is_dir()), reverse=True):
        _rmdir(folder)
    _rmdir(update)


def _rmdir(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        # Another process that finishes the same update was faster.
        return


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """A rename is only lasting once its folder is on the disk; Windows cannot open folders and needs none of it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse this for folders; the rename itself is atomic there all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
