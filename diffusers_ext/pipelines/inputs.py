"""Checks and preparation of what a caller passes to an editing pipeline.

Every message names the argument, the value and the cure. Nothing here knows a method.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..imaging import ImageError, check_image


# of pipelines that make pictures
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def checked_steps(value: Any, name: str = "num_inference_steps") -> int:
    """Checks a number of steps; the model's own upper limit is checked where the timesteps are made."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1")
    return int(value)


def checked_timesteps(value: Any, name: str = "timesteps") -> list[int] | None:
    """Checks descending timesteps of one's own; None leaves the choice to the number of steps."""
    if value is None:
        return None
    items = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value
    whole = isinstance(items, (list, tuple)) and all(
        isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in items
    )
    if not whole or not items or any(a <= b for a, b in zip(items, items[1:], strict=False)):
        raise ValueError(f"{name}={value!r} is not a list of descending whole numbers, such as [999, 749, 499, 249]")
    return [int(item) for item in items]


def checked_number(value: Any, name: str, low: float, high: float) -> float:
    """Checks a finite number in a closed range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number")
    if not low <= value <= high:
        wanted = f"of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r} is out of range; give a number {wanted}")
    return float(value)


def checked_choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """Checks one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return str(value)


def checked_prompts(value: Any, name: str) -> list[str]:
    """Checks a prompt or a list of them; the empty string is a prompt."""
    prompts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f'{name}={value!r} is not a str or a list of str; use "" for no words')
    return prompts


def spread(items: list[str], count: int, name: str, of: str) -> list[str]:
    """Brings a list to a batch's length: one item serves all, else there must be one each."""
    if len(items) not in (1, count):
        wanted = "give one" if count == 1 else f"give 1 or {count}"
        raise ValueError(f"{name} has {len(items)} entries for {count} {of}; {wanted}")
    return items * (count // len(items))


def check_size(height: Any, width: Any) -> None:
    """Checks the size a picture shall be scaled to."""
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            checked_steps(value, name)
            checked_number(value, name, 1, 8192)


def check_kwargs(cross_attention_kwargs: Any) -> None:
    """Checks the arguments for attention processors."""
    if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
        raise TypeError(f"cross_attention_kwargs={cross_attention_kwargs!r} is not a dict")


def check_finite(tensor: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """Stops at the first value that is infinite or not a number, with what to do about it."""
    if not bool(torch.isfinite(tensor).all()):
        cure = "load the model in float32" if dtype != torch.float32 else "lower guidance_scale or rescale_range"
        raise ValueError(f"{what} holds values that are infinite or not a number; {cure}")


def same_shape(new: Any, old: torch.Tensor, name: str) -> torch.Tensor:
    """Checks a tensor that a callback returned in place of another."""
    if not isinstance(new, torch.Tensor) or new.shape != old.shape:
        found = tuple(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
        raise ValueError(f"callback_on_step_end returned {name} of shape {found}; it must stay {tuple(old.shape)}")
    return new


def given_latents(latents: Any, like: torch.Tensor) -> torch.Tensor:
    """Start latents that a caller gave, on the device and in the precision of those that they stand for."""
    if not isinstance(latents, torch.Tensor) or latents.shape != like.shape:
        found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"latents has the shape {found}; this call needs {tuple(like.shape)}")
    latents = latents.to(like)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents holds values that are infinite or not a number; give finite ones")
    return latents


def check_text_to_image(unet: Any, vae: Any, addition_embed_type: str | None = None) -> None:
    """Refuses the networks that have the same component names but take other inputs.

    Args:
        unet: The network; None is left to the check for missing components.
        vae: The autoencoder; ditto.
        addition_embed_type (`str`, *optional*): What the network takes besides text: None for Stable Diffusion 1.x and 2.x,
            `"text_time"` for SDXL.

    Raises:
        ValueError: If they do not fit.
    """
    if unet is None or vae is None:
        return
    config = unet.config
    family = "Stable Diffusion 1.x or 2.x" if addition_embed_type is None else "Stable Diffusion XL"
    for key, wanted in (("addition_embed_type", addition_embed_type), ("class_embed_type", None)):
        if (value := getattr(config, key, None)) != wanted:
            takes = f"takes conditions besides text ({key}={value!r})" if value else f"has {key}={value!r}"
            raise ValueError(f"the UNet {takes}; this pipeline needs a {family} model")
    channels = getattr(vae.config, "latent_channels", None)
    if config.in_channels != channels or config.out_channels != channels:
        raise ValueError(
            f"the UNet has {config.in_channels} input and {config.out_channels} output channels for a VAE of {channels}, "
            "as models for inpainting or instructions have; this pipeline needs a text-to-image model"
        )


def images_to_tensor(
    image: Any, height: int | None = None, width: int | None = None, name: str = "image"
) -> torch.Tensor:
    """Turns pictures of any accepted kind into one tensor.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
            PIL pictures of any mode (transparency is laid on white); arrays `([batch,] height, width[, 1 or 3])` of `uint8`
            or of floats in [0, 1]; tensors `([batch, 1 or 3,] height, width)` of floats in [0, 1], or in [-1, 1] if any is
            negative, as everywhere in diffusers.
        height (`int`, *optional*): Scale to this height in pixels.
        width (`int`, *optional*): Scale to this width in pixels.
        name (`str`, *optional*, defaults to `"image"`): The argument's name for messages.

    Returns:
        `torch.Tensor` of shape `(batch, 3, height, width)`: float32 in [-1, 1].

    Raises:
        ImageError: If a picture cannot be used, or the pictures of a list differ in size.
        TypeError: If it is not a picture.
    """
    if image is None:
        raise ImageError(f"{name} is missing; give a PIL picture, a numpy array or a torch tensor")
    if isinstance(image, (list, tuple)):
        checked = check_image([_with_three_channels(item) for item in image], name=name)
    else:
        checked = [check_image(_with_three_channels(image), name=name)]
    tensors = [_one_kind(item) for item in checked]
    sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
    if len(sizes) > 1 and (height is None or width is None):
        found = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
        raise ImageError(f"{name} has pictures of different sizes ({found}); give height and width, or one call each")
    return torch.cat([_scaled(tensor, height, width) for tensor in tensors])


def check_something_kept(keep: torch.Tensor) -> None:
    """Raises a `ValueError` if a mask (batch, 1, height, width), 1 where a picture is kept, keeps nothing of one."""
    if not bool(keep.flatten(1).any(1).all()):
        raise ValueError(
            "mask_image leaves nothing of a picture to be kept; make it black (0) where the picture shall stay, or call "
            "without image and mask_image"
        )


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Extends pictures on the right and below until a network's scale factors divide their size.

    Args:
        image (`torch.Tensor` of shape `(batch, channels, height, width)`): The pictures.
        multiple (`int`): Wanted divisor of height and width.

    Returns:
        `torch.Tensor`: Mirrored at the edge, or with the edge repeated where a picture is smaller than what it lacks. Cut
        it back with `[..., :height, :width]`.
    """
    lacking_height, lacking_width = (-size % multiple for size in image.shape[-2:])
    for padding in ((0, lacking_width, 0, 0), (0, 0, 0, lacking_height)):
        lacking, size = max(padding), image.shape[-1] if padding[1] else image.shape[-2]
        if lacking:
            image = F.pad(image, padding, mode="reflect" if lacking < size else "replicate")
    return image


def _with_three_channels(item: Any) -> Any:
    """Grayscale arrays and tensors in the shape of colour ones; all else as it is."""
    if isinstance(item, np.ndarray):
        if item.ndim == 2:
            item = item[..., None]
        return np.repeat(item, 3, axis=-1) if item.ndim in (3, 4) and item.shape[-1] == 1 else item
    if isinstance(item, torch.Tensor):
        if item.ndim == 2:
            item = item[None]
        return item.repeat_interleave(3, dim=-3) if item.ndim in (3, 4) and item.shape[-3] == 1 else item
    return item


def _one_kind(item: Any) -> torch.Tensor:
    if isinstance(item, torch.Tensor):
        tensor = item.detach().to("cpu", torch.float32)
        tensor = tensor if float(tensor.min()) < 0 else 2 * tensor - 1
        return tensor if tensor.ndim == 4 else tensor[None]
    array = item if isinstance(item, np.ndarray) else np.asarray(item, dtype=np.float32) / 255.0
    array = array if array.ndim == 4 else array[None]
    return 2 * torch.from_numpy(np.array(array, dtype=np.float32)).permute(0, 3, 1, 2) - 1


def _scaled(tensor: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor:
    size = (tensor.shape[-2] if height is None else height, tensor.shape[-1] if width is None else width)
    if size == tuple(tensor.shape[-2:]):
        return tensor
    return F.interpolate(tensor, size, mode="bicubic", antialias=True).clamp(-1, 1)


def check_step_callback(callback_on_step_end: Any, tensor_inputs: Any = (), known: Sequence[str] = ()) -> None:
    """Raises unless a callback can be called and wants tensors that there are.

    Raises:
        TypeError: If it cannot be called, or `tensor_inputs` is no list.
        ValueError: If a name is not one of `known`.
    """
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise TypeError(f"callback_on_step_end={callback_on_step_end!r} cannot be called; give a function")
    if not isinstance(tensor_inputs, (list, tuple)):
        raise TypeError(
            f"callback_on_step_end_tensor_inputs={tensor_inputs!r} must be a list of names; use some of {', '.join(known)}"
        )
    for name in tensor_inputs:
        checked_choice(name, "callback_on_step_end_tensor_inputs", known)
