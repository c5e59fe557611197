"""Times as networks are given them, of samples and of frames."""

from typing import Any

import torch


def checked_times(timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """Times in two axes that fit a sample.

    Args:
        timestep (`float` or `torch.Tensor`): One number, `(batch,)`, one a sample, or `(batch or 1, frames)`, one a frame.
        sample (`torch.Tensor` of shape `(batch, frames, ...)`): The frames.

    Returns:
        `torch.Tensor` of shape `(batch or 1, frames or 1)`, on the device of the sample.

    Raises:
        ValueError: If these are not numbers, or of another shape.
    """
    times = finite_times(timestep, sample.device)
    batch, frames = sample.shape[:2]
    found = tuple(times.shape)
    times = times.reshape(-1, 1) if times.ndim < 2 else times
    if times.ndim != 2 or times.shape[0] not in (1, batch) or times.shape[1] not in (1, frames):
        raise ValueError(
            f"timestep of shape {found} does not fit sample of shape {tuple(sample.shape)}; give one number, one a "
            f"sample ({batch},) or one a frame ({batch} or 1, {frames})"
        )
    return times


def finite_times(timestep: Any, device: torch.device) -> torch.Tensor:
    """Times as a tensor, of whatever shape.

    Raises:
        ValueError: If these are not finite numbers.
    """
    try:
        times = torch.as_tensor(timestep, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timestep={timestep!r} is not a number or a tensor of numbers; give timesteps") from error
    if times.is_complex() or not bool(torch.isfinite(times).all()):
        raise ValueError(f"timestep={timestep!r} is not finite; give timesteps of the model")
    return times
