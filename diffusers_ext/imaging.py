"""Pictures from files and from callers, checked before anything is computed from them.

A picture file is hostile until shown otherwise: a PNG of 12 kB can ask for 100 megapixels. So the size is read from the
header and compared with a limit before a single pixel is decoded, only formats with a decoder of their own are admitted
(no PostScript, no SVG), only the first frame is ever looked at, and what is not a regular file is not opened at all.
"""

import os
import stat
import warnings
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 2**24
MAX_SIDE = 2**12  # pixels on a side of a square that is asked for
# Encoders write pixel data in chunks of 8 kB and more, so a PNG under both limits above stays below this number.
MAX_PNG_CHUNKS = 2**14

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


class ImageError(ValueError):
    """A picture that cannot be used; the message is one sentence that says which and why."""


def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens a picture file safely and returns it upright, in RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit, grayscale, palette and CMYK pictures are
    converted, and of an animation the first frame is taken. The returned picture holds no reference to the file and none
    of its metadata.

    Args:
        path (`str` or `os.PathLike`):
            A PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file of at most 64 MiB.
        max_pixels (`int`, *optional*, defaults to 16 777 216):
            Most pixels (width times height) that are decoded. The header is asked first.

    Returns:
        `PIL.Image.Image`: The picture in mode `"RGB"`.

    Raises:
        ImageError: If there is no such file, it is not a regular file, not a picture, too large, or damaged.
        TypeError: If `path` is not a path or `max_pixels` not a whole number.

    Example:
        ```python
        from diffusers_ext.imaging import open_image

        picture = open_image("docs/images/star.png")
        print(picture.size)
        ```
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} is of type {type(path).__name__}; give a str or a pathlib.Path")
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise TypeError(f"max_pixels={max_pixels!r} is not a whole number of at least 1")
    name = os.fspath(path)
    _check_file(name)
    try:
        with open(name, "rb") as file, warnings.catch_warnings():
            # Pillow warns of broken tags and, above 89 megapixels, of size; here a picture is usable or refused.
            warnings.simplefilter("ignore")
            return _decode(file, name, max_pixels)
    except ImageError:
        raise
    except OSError as error:
        # Without an errno it is the decoder that speaks, with one the operating system.
        reason = error.strerror or f"the file is damaged ({_sentence(error)})"
        raise ImageError(f"{name} cannot be read: {reason}") from error
    except Exception as error:
        # What a decoder raises on hostile bytes is not documented and differs between formats and releases.
        raise ImageError(f"{name} cannot be read: the file is damaged ({_sentence(error)})") from error


def check_image(image: Any, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> Any:
    """Checks a picture, or a batch, that a caller passed as an object, and returns it ready for an image processor.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
            A PIL picture of any mode; an array `(height, width, 3)` or `(batch, height, width, 3)` of `uint8` or of
            floats in [0, 1]; a float tensor `(3, height, width)` or `(batch, 3, height, width)` in [0, 1] or [-1, 1].
        name (`str`, *optional*, defaults to `"image"`):
            The argument's name for messages.
        max_pixels (`int`, *optional*, defaults to 16 777 216):
            Most pixels one picture may have.

    Returns:
        The same kind: PIL pictures in RGB, arrays as floats in [0, 1], tensors unchanged.

    Raises:
        ImageError: If shape, range or size is wrong, or a value is not finite.
        TypeError: If it is none of these kinds; a path is answered with how to open it.

    Example:
        ```python
        from PIL import Image
        from diffusers_ext.imaging import check_image

        assert check_image(Image.new("L", (64, 64))).mode == "RGB"
        ```
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ImageError(f"{name} is an empty list; give at least one picture")
        checked = [check_image(item, name=f"{name}[{i}]", max_pixels=max_pixels) for i, item in enumerate(image)]
        if len({type(item) for item in checked}) > 1:
            raise TypeError(f"{name} mixes pictures of different types; give a list of one type")
        return checked
    if isinstance(image, Image.Image):
        _check_size(image.size, name, max_pixels)
        try:
            return _to_rgb(image, name)
        except ImageError:
            raise
        except Exception as error:
            # A PIL picture decodes on first use, so the same holds as in `open_image`.
            raise ImageError(f"{name} cannot be converted to RGB ({_sentence(error)})") from error
    if isinstance(image, np.ndarray):
        return _check_array(image, name, max_pixels)
    if isinstance(image, torch.Tensor):
        return _check_tensor(image, name, max_pixels)
    if isinstance(image, (str, os.PathLike)):
        raise TypeError(f"{name}={str(image)!r} is a path; open it first with diffusers_ext.imaging.open_image")
    raise TypeError(
        f"{name} is of type {type(image).__name__}; give a PIL picture, a numpy array, a torch tensor, or a list of one"
    )


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Cuts the largest centred square out of a picture and scales it.

    Args:
        image (`PIL.Image.Image`): A picture of any size.
        size (`int`): Wanted width and height in pixels, at least 1.

    Returns:
        `PIL.Image.Image`: The square in RGB; the picture itself if it already is one.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIDE:
        raise ValueError(f"size={size!r} must be a whole number of pixels from 1 to {MAX_SIDE}")
    image = check_image(image)
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turns a tensor into a picture.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): Floats in [-1, 1]; what is beyond is cut off.

    Returns:
        `PIL.Image.Image`: The picture in mode `"RGB"`, rounded to 8 bits.
    """
    array = ((image.detach() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turns a picture into a tensor (3, H, W) of floats in [-1, 1], the inverse of [`to_pil`].

    Args:
        image (`PIL.Image.Image`): A picture of any mode; it is converted to RGB.
    """
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.reshape(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def _check_file(name: str) -> None:
    """A device or a pipe would block or never end, so the kind and size of a file are asked before it is opened."""
    try:
        status = os.stat(name)
    except FileNotFoundError as error:
        raise ImageError(f"{name or repr(name)} does not exist; name a picture file") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder; name one picture file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is a device, pipe or socket; name a picture file")
    if status.st_size == 0:
        raise ImageError(f"{name} is empty")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"{name} has {status.st_size / 2**20:.0f} MiB; the limit is {MAX_FILE_BYTES // 2**20} MiB")


def _decode(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    _check_png_chunks(file, name)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, "more than 178 megapixels", max_pixels)) from error
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS[:-1])
        raise ImageError(f"{name} is not a picture in a known format ({formats} or {FORMATS[-1]})") from error
    with image:
        _check_size(image.size, name, max_pixels)
        turn = _UPRIGHT.get(_orientation(image))
        upright = _to_rgb(image, name)
        return upright if turn is None else upright.transpose(turn)


def _check_png_chunks(file: IO[bytes], name: str) -> None:
    """Pillow walks the chunks of a PNG in Python, so a file of nothing but tiny chunks costs minutes."""
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        chunks = 0
        while len(header := file.read(8)) == 8:
            chunks += 1
            if chunks > MAX_PNG_CHUNKS:
                raise ImageError(f"{name} has more than {MAX_PNG_CHUNKS} chunks, as no picture of its size needs")
            file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    file.seek(0)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has the size {width}x{height}; at least one pixel is needed")
    if width * height > max_pixels:
        raise ImageError(_too_large(name, f"{width}x{height} pixels", max_pixels))


def _too_large(name: str, found: str, max_pixels: int) -> str:
    return f"{name} has {found}; the limit is {max_pixels / 1e6:.1f} megapixels: scale it down first"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # EXIF is beside the picture: what cannot be parsed there is no reason to refuse sound pixels.
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep_grayscale(image, name)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    rgb = image.convert("RGB")
    # `convert` of an RGB picture is a copy that keeps the file's metadata; they must not travel into what we write.
    rgb.info = {}
    return rgb


def _from_deep_grayscale(image: Image.Image, name: str) -> Image.Image:
    """Pillow's own conversion clips 16 bits at 255, which turns most pictures white."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        expected = "floats from 0 to 1" if image.mode == "F" else "whole numbers from 0 to 65535"
        raise ImageError(f"{name} has values outside the {expected} that are understood; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8), mode="L").convert("RGB")


def _check_array(array: np.ndarray, name: str, max_pixels: int) -> np.ndarray:
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise ImageError(
            f"{name} has the shape {array.shape}; an array is (height, width, 3) or (batch, height, width, 3)"
        )
    _check_size((array.shape[-2], array.shape[-3]), name, max_pixels)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255.0
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{name} has the dtype {array.dtype}; give uint8, or floats in [0, 1]")
    _check_range(float(array.min()), float(array.max()), 0.0, name)
    return array


def _check_tensor(tensor: torch.Tensor, name: str, max_pixels: int) -> torch.Tensor:
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3 or tensor.numel() == 0:
        raise ImageError(
            f"{name} has the shape {tuple(tensor.shape)}; a tensor is (3, height, width) or (batch, 3, height, width)"
        )
    _check_size((tensor.shape[-1], tensor.shape[-2]), name, max_pixels)
    if not tensor.is_floating_point():
        raise ImageError(f"{name} has the dtype {tensor.dtype}; give floats in [-1, 1]")
    _check_range(float(tensor.min()), float(tensor.max()), -1.0, name)
    return tensor


def _check_range(low: float, high: float, floor: float, name: str) -> None:
    # NaN spreads through min and max, so looking at the two ends is enough.
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(f"{name} contains values that are not finite (NaN or infinity); give finite ones")
    slack = 1e-3
    if low < floor - slack or high > 1.0 + slack:
        raise ImageError(f"{name} has values from {low:.3g} to {high:.3g}; floats must lie in [{floor:g}, 1]")


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
