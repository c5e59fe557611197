"""Which pictures of a training set can be read: found once, before a run begins, so that no damaged file ends it."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..imaging import MAX_FILE_BYTES, MAX_PIXELS, ImageError, open_image


# of what follows the picture in a JPEG file, if anything does
_TAIL_BYTES = 4096
_END_OF_JPEG = b"\xff\xd9"


def seems_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a picture file looks complete, without decoding it.

    It reads headers and ends: of a PNG the checksum of every chunk, of a JPEG the header and the marker at its end.
    That finds files that are empty, cut off or no pictures at all. It does not find a JPEG with damaged data between
    intact ends.

    Returns:
        `False` also where this cannot be told cheaply (other formats, data behind a JPEG's end): decode it to be sure.
    """
    try:
        if not os.path.isfile(path) or not 0 < os.path.getsize(path) <= MAX_FILE_BYTES:
            return False
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken tags and of size; the size is looked at below
            picture = Image.open(file, formats=("PNG", "JPEG"))
            if picture.width * picture.height > MAX_PIXELS:
                return False
            if picture.format == "PNG":
                picture.verify()
                return True
            file.seek(-min(_TAIL_BYTES, os.path.getsize(path)), os.SEEK_END)
            return _END_OF_JPEG in file.read()
    except Exception:
        # what a decoder raises on damaged bytes is not documented; whoever decodes the file says what is wrong with it
        return False


def unreadable_pictures(paths: Sequence[Path]) -> dict[int, str]:
    """The pictures that cannot be read, and why.

    Files that do not seem whole are decoded, and count if that fails; a file that seems whole may still fail later.
    Under `torch.distributed` each process looks at its share and all learn of all: the answer is the same everywhere,
    so that all processes draw the same rows.

    Args:
        paths: Picture files; the same on all processes, which must call this together.

    Returns:
        Number of the path -> one sentence, in the order of the numbers.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    found: dict[int, str] = {}
    for row in range(rank, len(paths), world):
        if not seems_whole(paths[row]):
            try:
                open_image(paths[row])
            except ImageError as error:
                found[row] = str(error)
    shares: list[dict[int, str] | None] = [None] * world
    if distributed:
        torch.distributed.all_gather_object(shares, found)
    else:
        shares = [found]
    return dict(sorted(pair for share in shares for pair in (share or {}).items()))
