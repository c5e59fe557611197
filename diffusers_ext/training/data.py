"""Where training pictures and captions come from, as pure functions of (seed, step).

A source answers three questions: which items belong to the global batch of a step (`draw`), what do they look like
(`images`), what do they say (`captions`). The trainer draws for the global batch and renders only its own slice.
"""

import json
import logging
import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..data import EmojiScenes
from ..data.sprites import SHEETS
from ..data.words import BACKGROUNDS, OBJECT_COLOURS, OBJECTS, PATTERNS
from ..imaging import open_image
from .pictures import unreadable_pictures
from .streams import epoch_rows, stream_seed


logger = logging.getLogger(__name__)

NAMED_PICTURES = 3  # of those that cannot be read, in a message


class Source(Protocol):
    """What the training scripts need to know of a picture set."""

    def draw(self, step: int, count: int, split: str = "train") -> Any:
        """Items of the global batch of a step; can be indexed with a slice."""

    def images(self, items: Any) -> torch.Tensor:
        """Pictures (n, 3, R, R) in [-1, 1]."""

    def captions(self, items: Any, step: int | None = None) -> list[str]:
        """One caption an item; with a step, words may be dropped at random as training wants."""

    def vocabulary(self) -> list[str]:
        """Sentences that hold every word the captions use."""


class EmojiSource:
    """Emoji scenes drawn on the fly: unlimited data, nothing on disk.

    Args:
        seed: Seed of the run.
        resolution: Side of the pictures in pixels.
        vendors: Hands to draw with; default the one shipped as standard.
        objects: Words of the objects; default all that every vendor drew.
        device: Where pictures are composed.
    """

    def __init__(
        self,
        seed: int,
        resolution: int = 64,
        vendors: Sequence[str] | None = None,
        objects: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ):
        self.scenes = EmojiScenes(list(vendors) if vendors else None, resolution, objects)
        self.seed = seed
        self.device = device

    def draw(self, step: int, count: int, split: str = "train") -> Any:
        return self.scenes.sample(count, stream_seed(self.seed, step, f"scenes-{split}"), split)

    def images(self, items: Any) -> torch.Tensor:
        return self.scenes.render(items, self.device)[0]

    def captions(self, items: Any, step: int | None = None) -> list[str]:
        if step is None:
            return self.scenes.captions(items)
        return self.scenes.captions(items, drop=True, seed=stream_seed(self.seed, step, "caption-words"))

    def vocabulary(self) -> list[str]:
        # of the whole domain, so that objects and hands can be added to a trained model
        hands = [path.stem for path in sorted(SHEETS.glob("*.json"))]
        words = [*OBJECTS.values(), *OBJECT_COLOURS, *BACKGROUNDS, *PATTERNS, *hands]
        return [*words, "a", "an", "on", "in", "style", "background"]


class FolderSource:
    """A folder of pictures with `metadata.jsonl`, the layout that `datasets` calls imagefolder.

    The pictures are resized (shorter side) and cropped to the centre. Every twentieth line is held out for
    validation when there are 20 or more. Pictures that cannot be read are found once, here, and never drawn; the
    others stay in their split. `unreadable_pictures` says what counts as readable: it is a look, not a decoding.

    Args:
        folder: Folder with `metadata.jsonl`.
        seed: Seed of the run.
        resolution: Side of the pictures in pixels.
        image_column: Key of the picture's path relative to the folder.
        caption_column: Key of the caption; `None` if captions are not needed.
        device: Where pictures are put.
        strict: Whether a picture that cannot be read is an error, instead of a warning.

    Raises:
        ValueError: If the metadata is missing, empty or lacks a column or a caption, no training picture can be
            read, or, with `strict`, one cannot.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int,
        resolution: int = 64,
        image_column: str = "file_name",
        caption_column: str | None = "text",
        device: str | torch.device = "cpu",
        strict: bool = False,
    ):
        self.folder = Path(folder)
        self.seed = seed
        self.resolution = resolution
        self.device = device
        self._files, self._texts = _read_metadata(self.folder, image_column, caption_column)
        self.unreadable = unreadable_pictures([self.folder / name for name in self._files])
        if self.unreadable:
            reasons = list(self.unreadable.values())
            more = len(reasons) - NAMED_PICTURES
            which = "; ".join(reasons[:NAMED_PICTURES]) + (f"; and {more} more" if more > 0 else "")
            which = f"{len(reasons)} of {len(self._files)} pictures of {self.folder} cannot be read: {which}"
            if strict:
                raise ValueError(
                    f"{which}. Repair them or remove their lines, or leave out --strict to train without them"
                )
            logger.warning("%s. They are left out; --strict makes this an error", which)
        self.leave_out(self.unreadable)

    def leave_out(self, rows: Iterable[int]) -> None:
        """Draws none of these lines of the metadata (numbers from 0) from now on, besides those that cannot be read.

        Raises:
            ValueError: If no training picture is left.
        """
        lines = np.arange(len(self._files))
        usable = ~np.isin(lines, [*self.unreadable, *rows])
        held_out = lines % 20 == 19
        train = np.flatnonzero(usable & ~held_out)
        if not len(train):
            first = next(iter(self.unreadable.values()), "each is left out")
            raise ValueError(
                f"train_data_dir={str(self.folder)!r} has no training picture that can be read, of {len(lines)} in "
                f"its metadata.jsonl ({first}); check that its names are relative to the folder and the files whole"
            )
        kept = np.flatnonzero(usable & held_out)
        self._rows = {"train": torch.from_numpy(train), "held_out": torch.from_numpy(kept if len(kept) else train)}

    def draw(self, step: int, count: int, split: str = "train") -> Any:
        rows = self._rows[split]
        return rows[epoch_rows(self.seed, step * count, count, len(rows), f"epoch-{split}")]

    def images(self, items: Any) -> torch.Tensor:
        pictures = [self._load(self._files[i]) for i in items.tolist()]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1.0

    def captions(self, items: Any, step: int | None = None) -> list[str]:
        return [self._texts[i] for i in items.tolist()]

    def vocabulary(self) -> list[str]:
        return list(self._texts)

    def _load(self, name: str) -> np.ndarray:
        picture = open_image(self.folder / name)
        side = self.resolution
        scale = side / min(picture.size)
        size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return np.asarray(picture.crop((left, top, left + side, top + side)))


def make_source(args: Namespace, device: torch.device, captions: bool = True) -> Source:
    """The source that `--dataset_name` or `--train_data_dir` names."""
    if args.train_data_dir:
        column = args.caption_column if captions else None
        return FolderSource(
            args.train_data_dir, args.seed, args.resolution, args.image_column, column, device, args.strict
        )
    return EmojiSource(args.seed, args.resolution, args.vendors, args.objects, device)


def _read_metadata(folder: Path, image_column: str, caption_column: str | None) -> tuple[list[str], list[str]]:
    index = folder / "metadata.jsonl"
    if not index.is_file():
        raise ValueError(
            f"train_data_dir={str(folder)!r} holds no metadata.jsonl; write one line of JSON a picture there"
        )
    files, texts = [], []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry[image_column], entry[caption_column] if caption_column else ""
        except json.JSONDecodeError as error:
            raise ValueError(f"{index}, line {number} is not JSON: {error}") from error
        except (KeyError, TypeError) as error:
            found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(
                f"{index}, line {number} has no column {error}; it has {found}: add it to that line, or set "
                f"image_column and caption_column"
            ) from error
        if not isinstance(name, str) or not name:
            raise ValueError(f"{index}, line {number} names no picture: {image_column}={name!r}; give its path")
        if caption_column and (not isinstance(text, str) or not text.strip()):
            raise ValueError(
                f"{index}, line {number} has no caption: {caption_column}={text!r}; write one, or remove the line"
            )
        files.append(name)
        texts.append(text)
    if not files:
        raise ValueError(f"{index} is empty; write one line of JSON a picture there")
    return files, texts


def prefetched(make: Callable[[int], Any], steps: range, depth: int) -> Generator[Any, None, None]:
    """`make(step)` for every step, computed ahead in a background thread.

    Args:
        make: Pure function of the step, so that the thread changes when a batch is made and never which.
        steps: Steps in order.
        depth: Batches to keep ready; 0 computes each when it is asked for, in this thread.

    Yields:
        The batches in order. An exception inside `make` is raised here.
    """
    if depth < 1:
        yield from map(make, steps)
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    num_threads = torch.get_num_threads()

    def offer(entry: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        # OpenMP starts a new thread with the number of the environment, not the one that was set in this process
        torch.set_num_threads(num_threads)
        try:
            for step in steps:
                if stopped.is_set():
                    return
                offer((make(step), None))
        except BaseException as error:  # handed to the thread that waits for it
            offer((None, error))

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    try:
        for _ in steps:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        stopped.set()
        worker.join()
