"""A scheduler that passes every check, as short as one can be: two-step Adams-Bashforth in the ratio of noise to signal.

With y = x / alpha and lambda = sigma / alpha the probability-flow ODE is dy/dlambda = epsilon. The first step is Euler's
(that is DDIM), later ones use the last two predictions:

    y' = y + h (eps + (h / 2 h_previous) (eps - eps_previous)),   h = lambda' - lambda

It exists so that the suite is shown to be satisfiable, and so that each fault can be planted in it alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput


@dataclass
class ReferenceSchedulerOutput(SchedulerOutput):
    """The state after the step, and the picture that the model expects."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class ReferenceScheduler(SchedulerMixin, ConfigMixin):
    """Two-step Adams-Bashforth on the probability-flow ODE; arguments as in `DDIMScheduler`."""

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        if trained_betas is not None:
            self.betas = torch.tensor(trained_betas, dtype=torch.float32)
        elif beta_schedule == "linear":
            self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
        elif beta_schedule == "scaled_linear":
            self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
        else:
            raise ValueError(f"beta_schedule={beta_schedule!r} is not known; use 'linear' or 'scaled_linear'")
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.init_noise_sigma = 1.0
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self.history: list[tuple[torch.Tensor, float]] = []
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Number of the step that comes next."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the step that a run begins with, where the caller has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says with which step the next run begins."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays out the timesteps and forgets the run before."""
        last, count = self.config.num_train_timesteps, num_inference_steps
        if self.config.timestep_spacing == "leading":
            grid = np.arange(count)[::-1] * (last // count) + self.config.steps_offset
        elif self.config.timestep_spacing == "trailing":
            grid = np.round(last - np.arange(count) * last / count) - 1
        else:
            grid = np.linspace(last - 1, 0, count).round()
        self.timesteps = torch.from_numpy(grid.astype(np.int64)).to(device)
        self.num_inference_steps = num_inference_steps
        self._forget()

    def _forget(self) -> None:
        self.history = []
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself: the model sees the variance-preserving state."""
        return sample

    def _next_timestep(self, index: int) -> int | None:
        return int(self.timesteps[index + 1]) if index + 1 < len(self.timesteps) else None

    def _signal_and_noise(self, timestep: int | None) -> tuple[float, float]:
        share = 1.0 if timestep is None else float(self.alphas_cumprod[timestep])
        return share**0.5, (1 - share) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> ReferenceSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from `timestep` to the next entry of `timesteps`."""
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = int((self.timesteps == int(timestep)).nonzero()[0])
        alpha, sigma = self._signal_and_noise(int(timestep))
        next_alpha, next_sigma = self._signal_and_noise(self._next_timestep(index))
        output, state = model_output.float(), sample.float()
        if self.config.prediction_type == "epsilon":
            epsilon = output
        elif self.config.prediction_type == "v_prediction":
            epsilon = alpha * output + sigma * state
        else:
            raise ValueError(f"prediction_type={self.config.prediction_type!r}; use 'epsilon' or 'v_prediction'")
        width = next_sigma / next_alpha - sigma / alpha
        slope = epsilon
        if self.history:
            previous, previous_width = self.history[-1]
            slope = epsilon + 0.5 * width / previous_width * (epsilon - previous)
        self.history.append((epsilon, width))
        self._step_index = index + 1
        prev_sample = (next_alpha * (state / alpha + width * slope)).to(sample.dtype)
        clean = ((state - sigma * epsilon) / alpha).to(sample.dtype)
        if not return_dict:
            return prev_sample, clean
        return ReferenceSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Pictures with noise, each at its own timestep."""
        shape = (-1, *[1] * (original_samples.ndim - 1))
        share = self.alphas_cumprod.to(original_samples.device)[timesteps.long()].reshape(shape)
        return (share.sqrt() * original_samples + (1 - share).sqrt() * noise).to(original_samples.dtype)
