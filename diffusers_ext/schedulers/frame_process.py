"""The noising process of frames that have times of their own: z = a x + s n with (a, s) per frame.

A mixin of [`RollingLadderScheduler`], which registers the config that is read here.
"""

from typing import Any

import numpy as np
import torch

from . import sigma_grids as grids
from .frame_updates import numbers, shown


class FrameProcessMixin:
    """Timesteps of the model and what they mean. A subclass sets `betas`, `_trained` and `_is_flow`."""

    config: Any
    betas: torch.Tensor
    _trained: np.ndarray
    _is_flow: bool

    def _training_process(self) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Variances, alpha-bar, and (a, s) of data and every training timestep in float64: (2, T + 1)."""
        config = self.config
        if config.beta_schedule == "cosine" and config.trained_betas is None:
            angles = np.linspace(0.0, np.pi / 2, config.num_train_timesteps + 1)
            table = np.stack([np.cos(angles), np.sin(angles)])
            table[0, -1] = 0.0  # which cos(pi / 2) in float64 is not
            bars = table[0] ** 2
            betas = torch.from_numpy(1.0 - bars[1:] / bars[:-1]).float()
            return betas, torch.from_numpy(bars[1:]).float(), table
        betas = grids.training_betas(
            config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule, config.trained_betas,
            config.rescale_betas_zero_snr,
        )  # fmt: skip
        alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        bars = np.concatenate([[1.0], alphas_cumprod.double().numpy()])
        if not bool(((betas >= 0) & (betas <= 1)).all()):  # NaN is neither
            raise ValueError(
                f"beta_start={config.beta_start!r}, beta_end={config.beta_end!r} or trained_betas are not variances; use "
                "numbers from 0 to 1"
            )
        return betas, alphas_cumprod, np.sqrt(np.stack([bars, 1.0 - bars]))

    def _levels_of_training(self, timesteps: Any, name: str = "timesteps") -> tuple[np.ndarray, np.ndarray]:
        """a and s of timesteps of the model, of any shape."""
        values = numbers(timesteps, name)
        last = self.config.num_train_timesteps if self._is_flow else len(self.betas) - 1
        lowest = 0 if self._is_flow else -1
        if values.size and not (lowest <= values.min() and values.max() <= last):
            raise ValueError(
                f"{name}={shown(timesteps)} is out of range; use timesteps from {lowest} (data) to {last}"
            )
        if self._is_flow:
            sigma = values / last
            return 1.0 - sigma, sigma
        if (values != values.round()).any():
            raise ValueError(f"{name}={shown(timesteps)} is not whole; this model knows whole timesteps only")
        alpha, sigma = self._trained[:, values.astype(np.int64) + 1]
        return alpha, sigma

    def signal_and_noise(self, timesteps: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors a of the data and s of the noise at timesteps of the model.

        Args:
            timesteps (`float` or `torch.Tensor` of any shape): Timesteps of the model.

        Returns:
            A pair of `torch.Tensor` of that shape, float64, on the CPU.
        """
        alpha, sigma = self._levels_of_training(timesteps)
        return torch.from_numpy(np.array(alpha)), torch.from_numpy(np.array(sigma))

    @property
    def clean_timestep(self) -> int:
        """The timestep of data: -1, or 0 for a flow model."""
        return 0 if self._is_flow else -1

    def _in_two_axes(self, values: np.ndarray, sample: torch.Tensor, name: str) -> np.ndarray:
        axis, found = self.config.frame_dim, values.shape
        frames = sample.shape[axis] if sample.ndim > axis else 1
        if values.ndim < 2:
            values = values.reshape(-1, 1)
        fits = values.ndim == 2 and values.shape[0] in (1, len(sample)) and values.shape[1] in (1, frames)
        if not fits:
            raise ValueError(
                f"{name} of shape {tuple(found)} does not fit sample of shape {tuple(sample.shape)}; give one number, one a "
                f"sample ({len(sample)},) or one a frame ({len(sample)} or 1, {frames})"
            )
        return values

    def _spread(self, values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """Numbers (B or 1, F or 1) in a shape that multiplies frames, in their dtype."""
        shape = [1] * like.ndim
        shape[0] = values.shape[0]
        if like.ndim > self.config.frame_dim:
            shape[self.config.frame_dim] = values.shape[1]
        return torch.from_numpy(np.array(values)).to(like.device, like.dtype).reshape(shape)

    def _factors(self, sample: Any, noise: Any, timesteps: Any) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
        for name, value in (("sample", sample), ("noise", noise)):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; give a tensor of floats")
        if sample.shape != noise.shape or sample.ndim < 1:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} does not fit a sample of shape {tuple(sample.shape)}; both need the same"
            )
        alpha, sigma = self._levels_of_training(timesteps)
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        like = sample.new_empty(1, dtype=dtype).expand(sample.shape)
        pair = [
            self._spread(self._in_two_axes(np.asarray(part), sample, "timesteps"), like) for part in (alpha, sigma)
        ]
        return pair[0], pair[1], dtype

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean frames with noise, a x + s n.

        Args:
            original_samples (`torch.Tensor`): Clean frames.
            noise (`torch.Tensor`): Noise of the same shape.
            timesteps (`float` or `torch.Tensor`): Timesteps of the model, one a sample or one a frame.

        Returns:
            `torch.Tensor` of the shape and dtype of `original_samples`.
        """
        alpha, sigma, dtype = self._factors(original_samples, noise, timesteps)
        return (alpha * original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What a network of `"v_prediction"` shall predict, a n - s x, or n - x for a flow model; arguments as `add_noise`."""
        alpha, sigma, dtype = self._factors(sample, noise, timesteps)
        clean, noise = sample.to(dtype), noise.to(dtype)
        return (noise - clean if self._is_flow else alpha * noise - sigma * clean).to(sample.dtype)
