"""Checkpoints that are either complete or not there.

A checkpoint is written into a hidden folder beside its final place; the manifest with the SHA-256 of all other files comes
last, everything is flushed to the disk, and one rename makes it visible. Older checkpoints are removed only after that. A
process killed at any moment, a full disk or a power cut therefore leaves the previous checkpoint as it was.

Tensors are safetensors, everything else is JSON: nothing is ever unpickled.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..integrity import DamagedFileError, atomic_folder, read_json_object, verify_manifest, write_manifest


logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
STATE_NAME = "state.json"


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read."""


def save_checkpoint(
    output_dir: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-<step>`, then removes the oldest checkpoints beyond `total_limit`.

    Args:
        output_dir: Folder of the run; made if it is not there.
        step: Number of optimiser steps done, 0 or more.
        tensors: File stem -> tensors by name; each becomes one safetensors file.
        state: What else is needed to go on; must be JSON.
        total_limit: Number of checkpoints to keep, 1 or more; `None` keeps all.

    Returns:
        The folder of the new checkpoint. An already present one of the same step is replaced.

    Raises:
        CheckpointError: If it cannot be written (disk full, read-only, ...). Checkpoints of other steps are untouched and
            nothing of the new one is left.
    """
    final = Path(output_dir) / f"{PREFIX}{step}"
    try:
        if final.exists():  # left by a run that was resumed from an earlier step, or damaged
            shutil.rmtree(final)
        with atomic_folder(final) as folder:
            for stem, named in tensors.items():
                data = {name: value.detach().to("cpu").contiguous() for name, value in named.items()}
                save_file(data, folder / f"{stem}.safetensors")
            (folder / STATE_NAME).write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
            write_manifest(folder)
    except OSError as error:
        raise CheckpointError(
            f"{error}; the run can be resumed from the checkpoint before once this is cured"
        ) from error
    if total_limit is not None:
        for _, old in list_checkpoints(output_dir)[:-total_limit]:
            if old != final:
                shutil.rmtree(old)
    return final


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Reads a checkpoint after checking every file against the manifest.

    Returns:
        The tensors by file stem and name, and the state with its `step`.

    Raises:
        CheckpointError: If it is incomplete or damaged; the message names the file.
    """
    folder = Path(folder)
    try:
        if not verify_manifest(folder):
            raise DamagedFileError(f"{folder} has no manifest, so it is not a complete checkpoint")
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        state = read_json_object(folder / STATE_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    return tensors, state


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints in `output_dir`, oldest first; unfinished ones have another name."""
    pattern = re.compile(re.escape(PREFIX) + r"(\d+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path(output_dir).glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint whose files all agree with its manifest, or `None`; damaged ones are reported and skipped."""
    for _, folder in reversed(list_checkpoints(output_dir)):
        try:
            if verify_manifest(folder):
                return folder
            reason = "it has no manifest"
        except DamagedFileError as error:
            reason = str(error)
        logger.warning("checkpoint %s is passed over: %s", folder, reason)
    return None


def find_checkpoint(resume_from: str, output_dir: str | os.PathLike[str]) -> Path | None:
    """What `--resume_from_checkpoint` means: "latest", a path, or the name of a checkpoint in `output_dir`.

    Returns:
        The folder; `None` for "latest" where there is no checkpoint yet: the run starts from the beginning.

    Raises:
        CheckpointError: If a named checkpoint does not exist.
    """
    if resume_from == "latest":
        return latest_complete(output_dir)
    for folder in (Path(resume_from), Path(output_dir) / resume_from):
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"resume_from_checkpoint={resume_from!r} does not exist; give a checkpoint folder or 'latest'"
    )
