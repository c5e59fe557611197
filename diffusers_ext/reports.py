"""What a command writes: pictures, and beside them the settings and versions they depend on.

Each file is there whole or not at all.
"""

import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from . import __version__
from .atomic import atomic_write


IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Writes a picture.

    Args:
        image (`PIL.Image.Image`): The picture.
        path (`str` or `os.PathLike`): Where to; the ending decides the format. Folders are made.

    Returns:
        `pathlib.Path`: The path written.

    Raises:
        ValueError: If the ending is not one of .png, .jpg, .jpeg and .webp.
        OSError: If the place cannot be written; an earlier file of that name is then still intact.
    """
    path = Path(path)
    check_image_suffix(path)
    content = io.BytesIO()
    image.save(content, format=IMAGE_SUFFIXES[path.suffix.lower()], quality=95)
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, content.getvalue())


def check_image_suffix(path: Path, name: str = "path") -> None:
    """Raises a ValueError unless a path ends as a picture that [`save_image`] can write; `name` is for the message."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        found = repr(path.suffix) if path.suffix else "no ending"
        raise ValueError(f"{name}={str(path)!r} has {found}; give a name that ends in {', '.join(IMAGE_SUFFIXES)}")


def check_output_folder(output: str | os.PathLike[str]) -> Path:
    """The folder that a command writes into, which need not be there; a ValueError if it is a file."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; name a folder")
    return folder


def write_json(content: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a JSON file.

    Args:
        content (`dict`): What to write; JSON types and finite numbers only.
        path (`str` or `os.PathLike`): Where to; folders are made.

    Returns:
        `pathlib.Path`: The path written.

    Raises:
        OSError: If the place cannot be written; an earlier file of that name is then still intact.
    """
    path = Path(path)
    data = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, data)


def write_sheet(sheet: Image.Image, picture: Path, file: Path, **facts: Any) -> dict[str, Any]:
    """Writes a sheet of pictures and the report beside it.

    Args:
        sheet (`PIL.Image.Image`): The sheet.
        picture (`pathlib.Path`): Where to.
        file (`pathlib.Path`): Where the report goes, a JSON file.
        facts: Its content, between the sheet's path and the versions.

    Returns:
        `dict`: The report.
    """
    report = {"sheet": str(save_image(sheet, picture)), **facts, "versions": versions()}
    write_json(report, file)
    return report


def versions() -> dict[str, str]:
    """The versions a result depends on besides its settings: of this package, diffusers, torch and Python."""
    return {
        "diffusers_ext": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
