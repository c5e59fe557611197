"""Recorded sequences to train on: a folder with recordings and a `sequences.json` that says what is in them.

    {
      "frames": ["leg_x", "leg_y"],              columns that are generated
      "condition": ["ankle_x"],                  columns that they are generated from; may be left out
      "frame_rate": 64.0,                        frames a second; may be left out
      "recordings": [{"file": "walk.csv", "train": [[0, 5000]], "test": [[5000, 7040]]}]
    }

A recording is CSV with a line of names, or safetensors with tensors `frames (rows, channels)` and `condition (rows, channels)`. Rows are
counted from 0, ends are not included, and no row may be in both splits. Other keys, such as `licence`, are kept and not read.
"""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..integrity import read_json_object
from .objectives import stratified_uniform
from .streams import stream


INDEX_NAME = "sequences.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Segment:
    """Rows without a gap: `frames (rows, channels)`, and `condition` or None."""

    frames: torch.Tensor
    condition: torch.Tensor | None


class SequenceFolder:
    """Recorded sequences of a folder, float32, in the units of the recording.

    Args:
        folder (`str` or `Path`): Folder with `sequences.json`.

    Raises:
        OSError: If the folder, the index or a recording cannot be read.
        ValueError: If they do not fit each other; the message names file and place.

    Example:
        ```python
        import json, tempfile
        from pathlib import Path
        from diffusers_ext.training.sequences import SequenceFolder

        with tempfile.TemporaryDirectory() as name:
            rows = [f"{t},{2 * t}" for t in range(10)]
            Path(name, "walk.csv").write_text("leg,ankle\\n" + "\\n".join(rows))
            recording = {"file": "walk.csv", "train": [[0, 8]], "test": [[8, 10]]}
            index = {"frames": ["leg"], "condition": ["ankle"], "recordings": [recording]}
            Path(name, "sequences.json").write_text(json.dumps(index))
            data = SequenceFolder(name)
        assert data.segments["test"][0].condition.tolist() == [[16.0], [18.0]]
        ```
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; describe the recordings there, as training/README.md shows"
            )
        self.index = read_json_object(path)
        self.frame_names = _names(self.index, "frames", path)
        self.condition_names = _names(self.index, "condition", path) if self.index.get("condition") else []
        rate = self.index.get("frame_rate")
        if rate is not None and not (_is_number(rate) and rate > 0):
            raise ValueError(f"{path}: frame_rate={rate!r} is not usable; give a number above 0, or leave it out")
        self.frame_rate = None if rate is None else float(rate)
        self.segments: dict[str, list[Segment]] = {split: [] for split in SPLITS}
        recordings = self.index.get("recordings")
        if not isinstance(recordings, list) or not recordings:
            raise ValueError(f"{path}: recordings={recordings!r} is not usable; give a list with one object a file")
        for recording in recordings:
            self._read(recording, path)
        if not self.segments["train"]:
            raise ValueError(f"{path} gives no rows to train on; give a recording with 'train': [[first, end]]")

    def _read(self, recording: Any, path: Path) -> None:
        name = recording.get("file") if isinstance(recording, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{path}: {recording!r} is no recording; give an object with 'file', 'train' and 'test'")
        frames, condition = self._tensors(self.folder / name)
        taken: list[tuple[int, int, str]] = []
        for split in SPLITS:
            for first, end in _ranges(recording.get(split, []), split, len(frames), self.folder / name):
                clash = next((other for a, b, other in taken if first < b and a < end), None)
                if clash is not None:
                    raise ValueError(f"{path}: rows [{first}, {end}] of {name} are in {split} and, partly, in {clash}")
                taken.append((first, end, split))
                part = Segment(frames[first:end], None if condition is None else condition[first:end])
                self.segments[split].append(part)

    def _tensors(self, file: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {INDEX_NAME} names it")
        read = {".csv": self._from_csv, ".safetensors": self._from_safetensors}.get(file.suffix)
        if read is None:
            raise ValueError(f"{file} has an unknown format; use .csv or .safetensors")
        frames, condition = read(file)
        for name, value in (("frames", frames), ("condition", condition)):
            if value is not None and not bool(torch.isfinite(value).all()):
                row = int((~torch.isfinite(value)).any(1).nonzero()[0])
                raise ValueError(f"{file}: {name} of row {row} is infinite or not a number; leave such rows out")
        return frames, condition

    def _from_csv(self, file: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            header = [name.strip() for name in next(rows, [])]
            wanted = [*self.frame_names, *self.condition_names]
            if missing := [name for name in wanted if name not in header]:
                raise ValueError(f"{file} has no column {missing[0]!r}; it has {', '.join(header) or 'no line'}")
            places = [header.index(name) for name in wanted]
            values = []
            for number, row in enumerate(rows):
                try:
                    values.append([float(row[place]) for place in places])
                except (IndexError, ValueError) as error:
                    raise ValueError(f"{file}, row {number}: {error}; give a number in each column") from error
        if not values:
            raise ValueError(f"{file} has no rows; give at least as many as a window has frames")
        table = torch.tensor(values)
        count = len(self.frame_names)
        return table[:, :count], table[:, count:] if self.condition_names else None

    def _from_safetensors(self, file: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
        wanted = {"frames": len(self.frame_names)}
        if self.condition_names:
            wanted["condition"] = len(self.condition_names)
        rows = None
        for name, channels in wanted.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            rows = found[0] if rows is None and found else rows
            if found != (rows, channels) or not rows:
                raise ValueError(
                    f"{file}: {name} has the shape {found}; give a tensor of ({rows or 'rows'}, {channels})"
                )
        return tensors["frames"].float(), tensors["condition"].float() if self.condition_names else None

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel over the training rows, as a network's config takes them.

        Raises:
            ValueError: If a channel never changes.
        """
        result: dict[str, list[float]] = {}
        for kind, names in (("frame", self.frame_names), ("condition", self.condition_names)):
            if not names:
                continue
            parts = [part.frames if kind == "frame" else part.condition for part in self.segments["train"]]
            values = torch.cat([part for part in parts if part is not None]).double()
            deviation = values.std(0, correction=0)
            if bool((deviation == 0).any()):
                still = names[int((deviation == 0).nonzero()[0])]
                raise ValueError(f"channel {still!r} never changes in the training rows; leave it out of {INDEX_NAME}")
            result[f"{kind}_mean"], result[f"{kind}_std"] = values.mean(0).tolist(), deviation.tolist()
        return result


class WindowSource:
    """Windows of recorded sequences, as pure functions of (seed, step): every start is equally likely, and a batch covers them evenly.

    Args:
        segments (`list[Segment]`): Rows to draw from.
        seed (`int`): Seed of the run.
        length (`int`): Frames of a window.

    Raises:
        ValueError: If no segment is that long.
    """

    def __init__(self, segments: Sequence[Segment], seed: int, length: int) -> None:
        self.segments, self.seed, self.length = list(segments), seed, length
        counts = [max(0, len(segment.frames) - length + 1) for segment in self.segments]
        if not sum(counts):
            longest = max((len(segment.frames) for segment in self.segments), default=0)
            raise ValueError(
                f"a window with context has {length} frames, but the longest of the segments has {longest} rows; use a shorter "
                "window_length or context_length"
            )
        self._ends = torch.tensor(counts).cumsum(0)

    def draw(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The windows of a step: `(count, length, channels)` of frames, and of conditions or None."""
        uniform = stratified_uniform(count, stream(self.seed, step, "windows"))
        starts = (uniform.double() * int(self._ends[-1])).long()
        places = torch.searchsorted(self._ends, starts, right=True).tolist()
        frames, conditions = [], []
        for start, place in zip(starts.tolist(), places, strict=True):
            first = start - (int(self._ends[place - 1]) if place else 0)
            rows, segment = slice(first, first + self.length), self.segments[place]
            frames.append(segment.frames[rows])
            if segment.condition is not None:
                conditions.append(segment.condition[rows])
        return torch.stack(frames), torch.stack(conditions) if conditions else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _names(index: Mapping[str, Any], key: str, path: Path) -> list[str]:
    names = index.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {key}={names!r} is not usable; give a list of names of channels")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: {key}={names!r} names a channel twice; name each once")
    return list(names)


def _ranges(value: Any, split: str, rows: int, file: Path) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        raise ValueError(f"{split}={value!r} of {file} is not usable; give a list of [first, end]")
    for pair in value:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= rows:
            raise ValueError(
                f"{split} row range {pair!r} of {file} is not usable; give [first, end] within 0 and {rows}"
            )
    return [(first, end) for first, end in value]
