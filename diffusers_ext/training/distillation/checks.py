"""Checks of arguments that the losses share: a wrong call is answered here, not by an error from inside torch."""

import math

import torch


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Raises `ValueError` unless all tensors have one shape, with a batch axis in front."""
    (first, wanted), *others = tensors.items()
    if not wanted.ndim or not wanted.numel():
        raise ValueError(f"{first} has shape {tuple(wanted.shape)}; give (n, ...) with one sample or more")
    for name, tensor in others:
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give that of {first}, {tuple(wanted.shape)}")


def check_levels(samples: torch.Tensor, **levels: torch.Tensor) -> None:
    """Raises `ValueError` unless every tensor of `levels` has the shape (n,) with one entry for each sample."""
    for name, value in levels.items():
        if value.shape != samples.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give ({len(samples)},), one entry a sample")


def check_range(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raises `ValueError` unless `low <= value <= high`; `above` and `below` make the bounds strict."""
    fits = (low < value if above else low <= value) and (value < high if below else value <= high)
    if not (math.isfinite(value) and fits):
        left, right = "(" if above or low == -math.inf else "[", ")" if below or high == math.inf else "]"
        raise ValueError(f"{name}={value!r} must be a number in {left}{low:g}, {high:g}{right}")


def check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `words`."""
    if value not in words:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(words)}")
