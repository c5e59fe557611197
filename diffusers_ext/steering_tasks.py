"""What a flow pipeline is asked for by the command line and the demo sheet: a picture and a task become arguments of a call."""

from typing import Any

import numpy as np
from PIL import Image

from .imaging import fit_square


# Also in `cli`, so that `--help` does not have to import torch.
TASKS = ("inpaint", "edit", "upscale", "deblur")
GUIDANCE_SCALE = 3.0
EDIT_GUIDANCE_SCALE = 1.5  # an edit is led away from the source as well, and burns out at what suits the others


def task_arguments(
    task: str,
    picture: Image.Image,
    size: int,
    *,
    mask: Image.Image | None = None,
    source: str | None = None,
    factor: int = 4,
    blur: float = 2.0,
    noise_std: float = 0.05,
    source_stop: float = 0.0,
) -> dict[str, Any]:
    """Arguments of [`FlowChefPipeline`] for a task.

    Args:
        task (`str`): `"inpaint"` and `"edit"` paint the white part of a mask, the first without a look at what is there; `"upscale"` takes the picture for one whose sides were
            divided by `factor`, and `"deblur"` for a blurred one.
        picture (`PIL.Image.Image`): The largest centred square of it is used.
        size (`int`): Side of the result in pixels.
        mask (`PIL.Image.Image`, *optional*): Of the picture's proportions; white is painted.
        source (`str`, *optional*): What the picture shows, for `"edit"`.
        factor (`int`, *optional*, defaults to 4): Of `"upscale"`; it divides `size`.
        blur (`float`, *optional*, defaults to 2.0): Standard deviation of the blur in pixels.
        noise_std (`float`, *optional*, defaults to 0.05): Noise of the picture, for `"upscale"` and `"deblur"`.
        source_stop (`float`, *optional*, defaults to 0.0): Share of the run that holds the whole picture, for `"edit"`.

    Returns:
        `dict[str, Any]`: Without the prompt.

    Raises:
        ValueError: If something is missing, or does not fit.

    Example:
        ```python
        from PIL import Image
        from diffusers_ext.steering_tasks import task_arguments

        arguments = task_arguments("upscale", Image.new("RGB", (16, 16)), 64)
        assert arguments["measurement"].size == (16, 16)
        ```
    """
    from .steering import GaussianBlur, SuperResolution

    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; use one of {', '.join(TASKS)}")
    if task in ("inpaint", "edit"):
        if mask is None:
            raise ValueError(f"mask is missing; {task} needs a picture that is white where it is to be painted")
        if abs(mask.width / mask.height - picture.width / picture.height) > 0.02:
            raise ValueError(
                f"mask is {mask.width}x{mask.height} pixels and the picture {picture.width}x{picture.height}; give one of the same "
                "proportions"
            )
        if (source is None) == (task == "edit"):
            cure = (
                "edit needs what the picture shows"
                if task == "edit"
                else "inpaint does not use it; leave it out, or use edit"
            )
            raise ValueError(f"source={source!r}: {cure}")
        # what is grey at an edge after scaling is painted too
        white = np.asarray(fit_square(mask.convert("RGB"), size).convert("L")) > 127
        mask_image, fitted = Image.fromarray(white.astype(np.uint8) * 255), fit_square(picture, size)
        if task == "inpaint":
            return {"image": _without(fitted, white), "mask_image": mask_image}
        return {"image": fitted, "mask_image": mask_image, "source_prompt": source, "source_stop": source_stop}
    for name, given in (("mask", mask), ("source", source)):
        if given is not None:
            raise ValueError(f"{name} has no effect on {task}; leave it out")
    if task == "upscale":
        if not isinstance(factor, int) or factor < 2 or size % factor:
            raise ValueError(f"factor={factor!r} does not divide {size} pixels; use 2 or 4")
        return {
            "measurement": fit_square(picture, size // factor),
            "operator": SuperResolution(factor),
            "noise_std": noise_std,
        }
    width = 2 * round(3 * blur) + 1 if 0 < blur < size / 6 else 0
    if not width:
        raise ValueError(f"blur={blur!r} is out of range; give pixels above 0 and below {size / 6:g}")
    return {"measurement": fit_square(picture, size), "operator": GaussianBlur(width, blur), "noise_std": noise_std}


def _without(picture: Image.Image, hole: np.ndarray) -> Image.Image:
    """The mean colour of the rest where there is a hole, since an encoder spreads what it sees there beyond it."""
    pixels = np.array(picture.convert("RGB"))
    if not hole.all():
        pixels[hole] = pixels[~hole].mean(0).round()
    return Image.fromarray(pixels)
