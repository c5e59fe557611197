"""Noise of a batch: drawn from a generator or given by the caller, and the checks of both."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


Generators = torch.Generator | list[torch.Generator] | None


def check_generator(generator: Any, batch_size: int) -> None:
    """Raises unless it is nothing, a generator, or one for each sample.

    Raises:
        ValueError: If a list of generators has not one for each sample.
        TypeError: If it is neither a generator nor a list of them.
    """
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(item, torch.Generator) for item in generators):
        raise TypeError(f"generator={generator!r} is not a torch.Generator or a list of them; give one of these")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator is a list of {len(generator)} for a batch of {batch_size}; give one for each")


def drawn_noise(like: torch.Tensor, generator: Generators = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Unit noise in the shape and on the device of a batch.

    Raises:
        ValueError: If a list of generators has not one for each sample.
        TypeError: If `generator` is neither a generator nor a list of them.
    """
    check_generator(generator, like.shape[0])
    return randn_tensor(tuple(like.shape), generator=generator, device=like.device, dtype=dtype or like.dtype)


def check_tensor(name: str, value: Any) -> None:
    """Raises unless `value` is a tensor of floats with a batch axis.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 1:
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} is {found}; give a tensor of floats, batch first")


def check_same(samples: torch.Tensor, noise: Any) -> None:
    """Raises unless the noise has the shape of the samples.

    Raises:
        TypeError: If it is not a tensor of floats.
        ValueError: If it has another shape.
    """
    check_tensor("noise", noise)
    if noise.shape != samples.shape:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not fit samples of shape {tuple(samples.shape)}; give the same"
        )


def given_noise(
    like: torch.Tensor,
    generator: Generators,
    noise: torch.Tensor | None,
    name: str = "noise",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The noise that a caller gave, or drawn noise.

    Raises:
        TypeError: If it is not a tensor of floats.
        ValueError: If it has not the shape of `like`.
    """
    if noise is None:
        return drawn_noise(like, generator, dtype)
    check_tensor(name, noise)
    if noise.shape != like.shape:
        raise ValueError(
            f"{name} of shape {tuple(noise.shape)} does not fit; give {tuple(like.shape)}, the shape of the sample"
        )
    return noise.to(device=like.device, dtype=dtype or like.dtype)
