"""Measures of generated sequences against a recorded one, in float64.

Sequences are `(frames, channels)`; a batch of samples has one more axis in front, and every measure takes the mean over samples and channels.
With x the samples and y the recording:

    R2        1 - sum (x - y)^2 / sum (y - mean y)^2            of the mean of many samples: how much of the recording is explained
    jitter    sum x''^2 / sum y''^2                             x'' second differences; 1 is as rough as the recording
    seam      mean x'^2 at the borders of chunks / within them  x' first differences; 1 is without a seam
    spectrum  sum |P_x - P_y| / sum P_y                         P by Welch's method: Hann windows that overlap by half

A single draw from the true distribution has R2 = 2 R2_mean - 1 at best, where the mean of many has R2_mean: the draw's own variance counts twice.
"""

import torch


def r_squared(samples: torch.Tensor, recording: torch.Tensor) -> float:
    """Share of the recording's variance that is explained: 1 at best, 0 for its mean, negative beyond.

    Args:
        samples (`torch.Tensor` of shape `(batch, frames, channels)` or `(frames, channels)`): What was generated.
        recording (`torch.Tensor` of shape `(frames, channels)`): What was recorded.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or a channel of the recording never changes.

    Example:
        ```python
        import torch
        from diffusers_ext.sequence_metrics import r_squared

        recording = torch.tensor([[0.0], [2.0], [4.0]])
        assert r_squared(recording, recording) == 1.0 and r_squared(torch.full((3, 1), 2.0), recording) == 0.0
        ```
    """
    x, y = _pair(samples, recording, least=2)
    variance = (y - y.mean(0)).square().sum(0)
    _check_changes("recording", recording.shape, variance)
    return float((1.0 - (x - y).square().sum(1) / variance).mean())


def jitter_ratio(samples: torch.Tensor, recording: torch.Tensor) -> float:
    """Energy of second differences over that of the recording, the mean over channels; arguments as [`r_squared`]."""
    x, y = _pair(samples, recording, least=3)
    return _ratio(
        x.diff(n=2, dim=1).square().mean((0, 1)), y.diff(n=2, dim=0).square().mean(0), "recording", recording.shape
    )


def seam_ratio(samples: torch.Tensor, chunk: int, first: int = 0) -> float:
    """Mean squared step from the last frame of a chunk to the first of the next, over that of steps within a chunk; mean over channels.

    Args:
        samples (`torch.Tensor` of shape `(batch, frames, channels)` or `(frames, channels)`): The sequences.
        chunk (`int`): Frames of a chunk, at least 2: with 1 there is no inside.
        first (`int`, *optional*, defaults to 0): A frame that begins a chunk.

    Raises:
        ValueError: If there is no border or no inside, or a channel never moves.
    """
    x = _checked("samples", samples, least=3)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 2 <= chunk < x.shape[1]:
        raise ValueError(f"chunk={chunk!r} is not usable; use an int from 2 to {x.shape[1] - 1}, below the frames")
    if isinstance(first, bool) or not isinstance(first, int):
        raise ValueError(f"first={first!r} is not usable; use an int")
    energy = x.diff(dim=1).square().mean(0)
    border = (torch.arange(1, len(energy) + 1) - first % chunk) % chunk == 0
    return _ratio(energy[border].mean(0), energy[~border].mean(0), "samples", samples.shape)


def power_spectrum(samples: torch.Tensor, window: int = 128) -> torch.Tensor:
    """Power by frequency, by Welch's method: the mean periodogram of Hann windows that overlap by half, without the mean.

    Args:
        samples (`torch.Tensor` of shape `(batch, frames, channels)` or `(frames, channels)`): The sequences.
        window (`int`, *optional*, defaults to 128): Frames of a window, even.

    Returns:
        `torch.Tensor` of shape `(window // 2 + 1, channels)`, float64: Mean over the batch; white noise of variance 1 has 1.
    """
    _check_window(window)
    x = _checked("samples", samples, least=window)
    hann = torch.hann_window(window, dtype=torch.float64)
    parts = (x - x.mean(1, keepdim=True)).unfold(1, window, window // 2)
    return (torch.fft.rfft(parts * hann).abs().square() / hann.square().sum()).mean((0, 1)).T


def spectrum_error(samples: torch.Tensor, recording: torch.Tensor, window: int = 128) -> float:
    """Sum of the differences of the two power spectra over the recording's power, mean over channels; 1 for samples at rest.

    Args:
        samples (`torch.Tensor`): As for [`r_squared`]. The spectra of single samples are averaged, not the samples.
        recording (`torch.Tensor`): As for [`r_squared`].
        window (`int`, *optional*, defaults to 128): As for [`power_spectrum`].
    """
    _check_window(window)
    _pair(samples, recording, least=window)
    found, true = power_spectrum(samples, window), power_spectrum(recording, window)
    _check_changes("recording", recording.shape, true.sum(0))
    return float(((found - true).abs().sum(0) / true.sum(0)).mean())


def _pair(samples: torch.Tensor, recording: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples with a batch axis and the recording, in float64."""
    x, y = _checked("samples", samples, least), _checked("recording", recording, least)
    if recording.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"samples of shape {tuple(samples.shape)} do not fit a recording of shape {tuple(recording.shape)}; give the latter "
            "as (frames, channels), and the same number of both"
        )
    return x, y[0]


def _checked(name: str, value: torch.Tensor, least: int) -> torch.Tensor:
    """A sequence with a batch axis, in float64."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; give a tensor of floats")
    if value.ndim not in (2, 3) or 0 in value.shape or value.shape[-2] < least:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}; give at least {least} frames of channels")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds values that are infinite or not a number; give finite ones")
    return (value if value.ndim == 3 else value[None]).double()


def _check_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 4 or window % 2:
        raise ValueError(f"window={window!r} is not usable; use an even int of at least 4")


def _check_changes(name: str, shape: torch.Size, energy: torch.Tensor) -> None:
    """Refuses channels `(channels,)` without energy, over which there is no ratio."""
    if bool((energy == 0).any()):
        channel = int((energy == 0).nonzero()[0])
        raise ValueError(
            f"{name} of shape {tuple(shape)} has the channel {channel}, which never changes; leave it out"
        )


def _ratio(value: torch.Tensor, of: torch.Tensor, name: str, shape: torch.Size) -> float:
    _check_changes(name, shape, of)
    return float((value / of).mean())
