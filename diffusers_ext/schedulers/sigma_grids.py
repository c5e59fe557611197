"""Noise levels: the training table of a model, and the ways to lay nodes between its ends.

`s` is sigma / alpha throughout (what diffusers calls sigma), from s_max, noise, down to s_min, almost a picture. For flow
models it is the time t in (0, 1]. All grids are float64 and are turned into tensors by the schedulers.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch


SPACINGS = ("linspace", "leading", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
KARRAS_RHO = 7.0
# Shape of "Beta Sampling is All You Need", 2024, arXiv 2407.12173.
BETA_SHAPE = 0.6


def training_betas(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """The variances of the training process, bit for bit as diffusers makes them.

    Args:
        num_train_timesteps (`int`): How many.
        beta_start (`float`), beta_end (`float`): First and last.
        beta_schedule (`str`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`Sequence[float]`, *optional*): The variances themselves, instead of all of the above.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether to move them so that nothing of the picture
            is left at the last one.

    Returns:
        `torch.Tensor` of shape `(num_train_timesteps,)`, float32.

    Raises:
        ValueError: If `beta_schedule` is not known.
    """
    if trained_betas is not None:
        betas = torch.tensor(trained_betas, dtype=torch.float32)
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    elif beta_schedule == "squaredcos_cap_v2":

        def share(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        count = num_train_timesteps
        values = [min(1 - share((i + 1) / count) / share(i / count), 0.999) for i in range(count)]
        betas = torch.tensor(values, dtype=torch.float32)
    else:
        raise ValueError(f"beta_schedule={beta_schedule!r} is not known; use one of {', '.join(BETA_SCHEDULES)}")
    if not rescale_betas_zero_snr:
        return betas
    root = torch.cumprod(1.0 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bars = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def log_uniform_grid(highest: float, lowest: float, count: int) -> np.ndarray:
    """`count` nodes with a constant ratio: even in log s, and so in log-SNR."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), count))


def karras_grid(highest: float, lowest: float, count: int, rho: float = KARRAS_RHO) -> np.ndarray:
    """`count` nodes even in s^(1 / `rho`). Elucidating the Design Space, 2022, arXiv 2206.00364, eq. 5."""
    return np.linspace(highest ** (1 / rho), lowest ** (1 / rho), count) ** rho


def beta_grid(highest: float, lowest: float, count: int) -> np.ndarray:
    """`count` nodes at the quantiles of a Beta(0.6, 0.6) distribution: dense at both ends.

    Raises:
        ValueError: If scipy is not installed.
    """
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ValueError("use_beta_sigmas=True needs scipy, which is missing: pip install scipy") from error
    return lowest + (highest - lowest) * beta.ppf(np.linspace(1.0, 0.0, count), BETA_SHAPE, BETA_SHAPE)


def spaced_timesteps(spacing: str, count: int, num_train_timesteps: int, steps_offset: int = 0) -> np.ndarray:
    """`count` descending training timesteps.

    Args:
        spacing (`str`): `"linspace"` (from the last, as DPM-Solver of diffusers), `"leading"` (as its DDIM) or `"trailing"`.
        count (`int`): How many, from 1 to `num_train_timesteps`.
        num_train_timesteps (`int`): Length of the training process.
        steps_offset (`int`, *optional*, defaults to 0): Added to `"leading"` timesteps.

    Returns:
        `np.ndarray` of shape `(count,)`, int64.

    Raises:
        ValueError: If `spacing` is not known or the offset leads out of the training process.
    """
    last = num_train_timesteps
    grid: np.ndarray
    if spacing == "linspace":
        # One more than there are: rounded, two of them would be the same.
        grid = np.linspace(0, last - 1, count + (count < last)).round()[::-1][:count]
    elif spacing == "leading":
        grid = np.arange(count)[::-1] * (last // count) + steps_offset
    elif spacing == "trailing":
        grid = np.round(last - np.arange(count) * (last / count)) - 1
    else:
        raise ValueError(f"timestep_spacing={spacing!r} is not known; use one of {', '.join(SPACINGS)}")
    if not 0 <= grid[-1] <= grid[0] < last:
        raise ValueError(
            f"steps_offset={steps_offset!r} with num_inference_steps={count} leads to timestep {int(grid[0])}, but the model "
            f"knows 0 to {last - 1}; use fewer steps or another timestep_spacing"
        )
    return grid.astype(np.int64)


def table_of(alphas_cumprod: torch.Tensor) -> np.ndarray:
    """s of every training timestep, ascending, float64."""
    bars = alphas_cumprod.detach().cpu().double().numpy()
    return np.sqrt((1.0 - bars) / bars)


def sigmas_of_timesteps(timesteps: np.ndarray, table: np.ndarray) -> np.ndarray:
    """s at timesteps, log s being linear between those of the training process."""
    return np.exp(np.interp(timesteps, np.arange(len(table)), np.log(table)))


def timesteps_of_sigmas(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The reverse of [`sigmas_of_timesteps`], held within the training process."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))


def shifted_times(times: np.ndarray, shift: float) -> np.ndarray:
    """Flow times moved towards noise by `shift`: t' = shift t / (1 + (shift - 1) t)."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def dynamically_shifted_times(times: np.ndarray, mu: float, kind: str = "exponential") -> np.ndarray:
    """Flow times shifted by the resolution, as Flux does it: t' = f / (f + 1/t - 1), f = exp(mu) or mu.

    Raises:
        ValueError: If `kind` is neither `"exponential"` nor `"linear"`.
    """
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type={kind!r} is not known; use 'exponential' or 'linear'")
    return shifted_times(times, math.exp(mu) if kind == "exponential" else mu)


def stretched_times(times: np.ndarray, last: float) -> np.ndarray:
    """Flow times stretched so that the last one is `last`; the noise end stays."""
    return 1.0 - (1.0 - times) * ((1.0 - last) / (1.0 - times[-1]))
