"""Checks of what a visitor sends. A browser's own limits bind only the browser, so each is repeated here, on the server."""

import math
import os
from typing import Any

from PIL import Image

from ..imaging import FORMATS, ImageError, open_image


_ANIMATED = ("GIF", "PNG", "WEBP")


class VisitorError(ValueError):
    """What a visitor can cure; the message is shown as it is, so it never holds a path or a name of this machine."""


def still_picture(path: Any, name: str = "upload", *, max_pixels: int = 2**24) -> Image.Image:
    """Opens an uploaded picture.

    Args:
        path (`str`, *optional*): Where the upload lies; None if there is none.
        name (`str`, *optional*, defaults to `"upload"`): What it is called in messages.
        max_pixels (`int`, *optional*, defaults to 16 777 216): Most pixels; the header is asked before anything is decoded.

    Returns:
        `PIL.Image.Image`: The picture upright and in RGB.

    Raises:
        VisitorError: If there is none, it is no picture, animated, empty, damaged or too large.
    """
    if not path:
        raise VisitorError("There is no picture yet: upload one, or click on an example.")
    if not isinstance(path, (str, os.PathLike)):
        raise VisitorError(f"The {name} is not an uploaded file.")
    try:
        picture = open_image(path, max_pixels=max_pixels)
    except ImageError as error:
        raise VisitorError(f"The {name}{str(error).removeprefix(os.fspath(path))}.") from error
    with Image.open(path, formats=FORMATS) as image:
        # Phones keep a second picture in a JPEG, scanners several pages in a TIFF; neither is an animation.
        if image.format in _ANIMATED and getattr(image, "is_animated", False):
            raise VisitorError(f"The {name} is animated: upload a still one.")
    return picture


def painted(path: Any, name: str = "mask", *, max_pixels: int = 2**24) -> Image.Image:
    """Opens the layer of an editor, or a mask from a file.

    Args:
        path (`str`): Where it lies.
        name (`str`, *optional*, defaults to `"mask"`): What it is called in messages.
        max_pixels (`int`, *optional*, defaults to 16 777 216): As for [`still_picture`].

    Returns:
        `PIL.Image.Image`: In mode `"L"`: 255 where something was painted, which is where a layer is not transparent,
        and where a mask without transparency is bright; 0 elsewhere.

    Raises:
        VisitorError: As [`still_picture`].
    """
    picture = still_picture(path, name, max_pixels=max_pixels)
    with Image.open(path, formats=FORMATS) as layer:
        if layer.has_transparency_data:
            # A brush that shows what lies beneath is itself transparent in part, and its edges more so.
            return layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 63))
    return picture.convert("L").point(lambda value: 255 * (value > 127))


def within_margins(path: Any, *, max_pixels: int = 2**24) -> tuple[int, int, int, int]:
    """Where the picture of an editor lies on its canvas, whose margins are transparent.

    Args:
        path (`str`): Of a picture that [`still_picture`] has opened.
        max_pixels (`int`, *optional*, defaults to 16 777 216): As for [`still_picture`].

    Returns:
        `tuple[int, int, int, int]`: Left, top, right and bottom in pixels, as `PIL.Image.Image.crop` takes them: all of a
        picture that has no transparency, or has it elsewhere than in margins.
    """
    picture = still_picture(path, max_pixels=max_pixels)
    whole = (0, 0, *picture.size)
    with Image.open(path, formats=FORMATS) as image:
        if not image.has_transparency_data or image.size != picture.size:
            return whole
        alpha = image.convert("RGBA").getchannel("A")
    box = alpha.getbbox()
    return box if box is not None and alpha.crop(box).getextrema()[0] == 255 else whole


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """Scales a picture down, if need be, so that neither side is longer than `side` pixels."""
    if max(picture.size) <= side:
        return picture
    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def words(text: Any, name: str, *, longest: int = 300, empty: bool = False) -> str:
    """Returns the text of a field without spaces around it.

    Args:
        text (`str`): What was sent.
        name (`str`): What the field is called in messages.
        longest (`int`, *optional*, defaults to 300): Most characters.
        empty (`bool`, *optional*, defaults to `False`): Whether it may be empty.

    Returns:
        `str`: The text.

    Raises:
        VisitorError: If it is no text, too long, or empty.
    """
    if not isinstance(text, str):
        raise VisitorError(f"The {name} is not text.")
    text = text.strip()
    if not text and not empty:
        raise VisitorError(f"The {name} is empty: write a few words.")
    if len(text) > longest:
        raise VisitorError(f"The {name} has {len(text)} characters: use at most {longest}.")
    return text


def number(value: Any, name: str, low: float, high: float) -> float:
    """Returns a finite number from `low` to `high`, or raises a [`VisitorError`] that names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise VisitorError(f"The {name} is not a number: choose one from {low:g} to {high:g}.")
    if not low <= value <= high:
        raise VisitorError(f"The {name} of {value:g} is out of range: choose one from {low:g} to {high:g}.")
    return float(value)


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """Returns a whole number from `low` to `high`, or raises a [`VisitorError`] that names the field."""
    if number(value, name, low, high) % 1:
        raise VisitorError(f"The {name} of {value:g} is not a whole number: choose one from {low} to {high}.")
    return int(value)


def seed_number(value: Any) -> int:
    """Returns a seed, or raises a [`VisitorError`] that says which ones there are."""
    return whole_number(value, "seed", 0, 2**31 - 1)


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """Returns one of `allowed`, or raises a [`VisitorError`] that lists them."""
    if not isinstance(value, str) or value not in allowed:
        raise VisitorError(f"The {name} is not one of {', '.join(allowed)}.")
    return value
