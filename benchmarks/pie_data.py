"""The files of PIE-Bench: `mapping_file.json` and `annotation_images/`, read and checked.

PIE-Bench (Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code, 2023, arXiv 2310.01506) has 700 pictures of
512 x 512 pixels with a prompt of each, a prompt of its edit, and a mask of what the edit may change. One entry:

    "000000000000": {
        "image_path": "0_random_140/000000000000.jpg",          below annotation_images/
        "original_prompt": "a bicycle on the road",
        "editing_prompt": "a [rusty] bicycle on the road",      brackets mark what differs
        "editing_instruction": "make the bicycle rusty",
        "editing_type_id": "0",
        "blended_word": "bicycle bicycle",                      the word of the change in either prompt, or ""
        "mask": [5130, 12, 5642, 14, ...]                       runs of ones: start, length, start, length, ...
    }

Masks count pixels row by row. The authors set the outermost pixels of every mask to one, against errors of annotation, and cut
off what a run has beyond the last pixel.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ext.imaging import open_image


MAPPING, PICTURES = "mapping_file.json", "annotation_images"
EDITING_TYPES = {
    "0": "random",
    "1": "change object",
    "2": "add object",
    "3": "delete object",
    "4": "change content",
    "5": "change pose",
    "6": "change colour",
    "7": "change material",
    "8": "change background",
    "9": "change style",
}
SMALLEST = 11  # pixels; the window of SSIM
_TEXTS = ("image_path", "original_prompt", "editing_prompt", "editing_type_id")


@dataclass(frozen=True)
class Entry:
    """One edit.

    Attributes:
        key: Its name in the mapping file.
        path: The picture.
        source_prompt: What it shows.
        prompt: What the edit shall show.
        editing_type: A key of `EDITING_TYPES`.
        blended_words: The word of the change in either prompt; None where none is given.
        runs: The mask as it stands in the file, see `decode_mask`.
    """

    key: str
    path: Path
    source_prompt: str
    prompt: str
    editing_type: str
    blended_words: tuple[str, str] | None
    runs: tuple[int, ...]

    def mask(self, width: int, height: int) -> np.ndarray:
        """Where the edit may change a picture of this size.

        Raises:
            ValueError: If the mask does not fit the picture; the message names the entry.
        """
        try:
            return decode_mask(self.runs, width, height)
        except ValueError as error:
            raise ValueError(f"the mask of {self.key} does not fit {self.path.name}: {error}") from error


def decode_mask(runs: Sequence[int], width: int = 512, height: int = 512, border: bool = True) -> np.ndarray:
    """A mask from its runs of ones.

    Args:
        runs: Start and length of each run by turns, in pixels counted row by row from 0.
        width: Of the picture.
        height: Of the picture.
        border: Whether the outermost pixels become ones, as the authors have it.

    Returns:
        (height, width) of bool.

    Raises:
        ValueError: If there is half a run, or one that begins outside of the picture.
    """
    if len(runs) % 2:
        raise ValueError(f"{len(runs)} numbers are no pairs of start and length")
    size = width * height
    mask = np.zeros(size, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if not 0 <= start < size or length < 0:
            raise ValueError(
                f"the run of {length} pixels from {start} is not in a picture of {width} x {height} pixels, {size} in all"
            )
        mask[start : start + length] = True
    mask = mask.reshape(height, width)
    if border:
        mask[[0, -1], :] = True
        mask[:, [0, -1]] = True
    return mask


def without_brackets(prompt: str) -> str:
    """A prompt without the brackets around what changes, and without the spaces that this leaves doubled."""
    return " ".join(prompt.replace("[", "").replace("]", "").split())


def read_entries(folder: str | Path, categories: Sequence[str] | None = None, limit: int | None = None) -> list[Entry]:
    """The edits of a folder in the layout of PIE-Bench, in the order of its mapping file, each with its picture looked at.

    Args:
        folder: Holds `mapping_file.json` and `annotation_images/`.
        categories: Only these types of edits, by number ("0" to "9") or name ("change object").
        limit: At most so many of each type.

    Raises:
        FileNotFoundError: If the folder lacks one of the two, or a picture is not there.
        ValueError: If an entry, its picture or its mask cannot be used; the message names it and says what is wrong. Or if
            nothing is left.
    """
    folder = Path(folder)
    mapping = folder / MAPPING
    if not mapping.is_file() or not (folder / PICTURES).is_dir():
        raise FileNotFoundError(f"{folder} is no folder of PIE-Bench; it must hold {MAPPING} and {PICTURES}/")
    wanted = checked_categories(categories)
    try:
        content = json.loads(mapping.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{mapping} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{mapping} holds no entries; it must be an object with one for each picture")
    entries: list[Entry] = []
    counts = dict.fromkeys(wanted, 0)
    for key, item in content.items():
        entry = _entry(key, item, folder / PICTURES, mapping)
        if entry.editing_type not in counts or (limit is not None and counts[entry.editing_type] >= limit):
            continue
        if not entry.path.is_file():
            raise FileNotFoundError(f"the picture of {key} is not there: {entry.path}")
        size = open_image(entry.path).size
        if min(size) < SMALLEST:
            raise ValueError(
                f"the picture of {key} has {size[0]} x {size[1]} pixels; {SMALLEST} on each side are the least"
            )
        entry.mask(*size)
        counts[entry.editing_type] += 1
        entries.append(entry)
    if not entries:
        chosen = ", ".join(f"{number} ({EDITING_TYPES[number]})" for number in wanted)
        raise ValueError(f"{mapping} has no edit of the types {chosen}")
    return entries


def checked_categories(categories: Sequence[str] | None) -> list[str]:
    """Types of edits by number or name, as their numbers; all for None.

    Raises:
        ValueError: If there is no such type.
    """
    if categories is None:
        return list(EDITING_TYPES)
    numbers = {name: number for number, name in EDITING_TYPES.items()} | {number: number for number in EDITING_TYPES}
    unknown = [category for category in categories if category not in numbers]
    if unknown:
        listed = ", ".join(f"{number} ({name})" for number, name in EDITING_TYPES.items())
        raise ValueError(f"there is no type of edits {unknown[0]!r}; use {listed}")
    return sorted({numbers[category] for category in categories})


def _entry(key: str, item: Any, pictures: Path, mapping: Path) -> Entry:
    where = f"entry {key!r} of {mapping}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is no object with {', '.join(_TEXTS)} and mask")
    for name in _TEXTS:
        if not isinstance(item.get(name), str):
            raise ValueError(f"{where} has {name}={item.get(name)!r}; it must be a text")
    if item["editing_type_id"] not in EDITING_TYPES:
        raise ValueError(f"{where} has editing_type_id={item['editing_type_id']!r}; it must be '0' to '9'")
    # The name of its results; what leads out of the folder of the results is no key.
    if key in ("", ".", "..") or any(sign in key for sign in "/\\"):
        raise ValueError(f"{where} has a name that cannot be that of a file")
    path = pictures / item["image_path"]
    if not path.resolve().is_relative_to(pictures.resolve()):
        raise ValueError(f"{where} has image_path={item['image_path']!r}, which leads out of {PICTURES}/")
    runs = item.get("mask")
    if not isinstance(runs, list) or not all(isinstance(number, int) for number in runs):
        raise ValueError(f"{where} has a mask that is no list of whole numbers")
    words = item.get("blended_word", "")
    if not isinstance(words, str) or len(words.split()) == 1:
        raise ValueError(f"{where} has blended_word={words!r}; it must be two words, one of each prompt, or ''")
    return Entry(
        key=key,
        path=path,
        source_prompt=without_brackets(item["original_prompt"]),
        prompt=without_brackets(item["editing_prompt"]),
        editing_type=item["editing_type_id"],
        blended_words=(words.split()[0], words.split()[1]) if words.split() else None,
        runs=tuple(runs),
    )
