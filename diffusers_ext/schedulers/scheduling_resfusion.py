"""Resfusion: restoration in five steps by diffusion of the residual.

Resfusion, Shi et al., NeurIPS 2024, arXiv 2311.14900. With R = d - x0, degraded minus clean, pictures in [-1, 1]:

    x_t = sqrt(ab) x0 + (1 - sqrt(ab)) R + sqrt(1 - ab) eps,       ab = alpha_bar_t

At sqrt(ab) = 1/2 the clean picture cancels: x_t = d / 2 + sqrt(3/4) eps, so sampling starts there and the schedule is cut. The network
sees x_t and d. For its `"resnoise"` e = eps + (1 - sqrt(alpha)) sqrt(1 - ab) / beta R the step is that of DDPM; for the clean picture or
the residual it is DDPM's around R.
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import check_choice
from .multistep import check_inputs, check_result, check_states, check_steps_trained
from .noise import Generators, check_same, check_tensor, given_noise
from .scheduling_mr import MRSchedulerOutput
from .step_counter import StepCounterMixin


__all__ = ["ResfusionScheduler", "SchedulerMixin", "truncated_betas"]

BETA_SCHEDULES = ("linear_pro", "cosine_pro")
PREDICTION_TYPES = ("resnoise", "sample", "residual")
# a table that passes 1/2 this closely is cut there, another one gets a last entry of exactly 1/2
CLOSE_TO_HALF = 0.49


def truncated_betas(schedule: str, num_train_timesteps: int) -> np.ndarray:
    """The betas of Resfusion up to where sqrt(alpha_bar) reaches one half.

    Args:
        schedule (`str`): `"linear_pro"` (from 0.1 / T to 20 / T) or `"cosine_pro"`.
        num_train_timesteps (`int`): T, the length of the whole schedule, at least 2.

    Returns:
        `np.ndarray` of shape `(T',)`, float64.

    Raises:
        ValueError: If the schedule is not known or shorter than 2.

    Example:
        >>> len(truncated_betas("linear_pro", 12))
        5
    """
    check_choice("beta_schedule", schedule, BETA_SCHEDULES)
    count = check_steps_trained(num_train_timesteps)
    if schedule == "linear_pro":
        # beyond 1 for short schedules, but only after the cut
        betas = np.linspace(0.1, 20.0, count) / count
    else:
        left = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2.0) ** 2
        betas = 1.0 - left[1:] / left[:-1]
    betas = np.minimum(betas, 0.999)
    bars = np.cumprod(1.0 - betas)
    cut = int(np.argmax(bars <= 0.25))
    betas = betas[: cut + 1]
    if math.sqrt(bars[cut]) < CLOSE_TO_HALF:
        betas[cut] = 1.0 - 0.25 / bars[cut - 1]
    return betas


class ResfusionScheduler(StepCounterMixin, SchedulerMixin, ConfigMixin):
    """Samples models of Resfusion; the number of steps is that of its cut schedule.

    The degraded picture is given to `prepare_initial`, `model_input`, `add_noise` and `step` as `mean=`, as with [`MRScheduler`], so
    that one pipeline runs both. It is not the mean of this process, which is the unknown residual.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 12): T, the length of the whole schedule; 12 makes 5 steps.
        beta_schedule (`str`, *optional*, defaults to `"linear_pro"`): `"linear_pro"` or `"cosine_pro"`.
        prediction_type (`str`, *optional*, defaults to `"resnoise"`): `"resnoise"`, `"sample"` (x0) or `"residual"` (R).
        clip_sample (`bool`, *optional*, defaults to `True`): Whether the clean picture of the last two is clipped to [-1, 1].

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers import ResfusionScheduler

        degraded = 2 * torch.rand(1, 3, 16, 16) - 1
        scheduler = ResfusionScheduler()
        scheduler.set_timesteps()
        sample = scheduler.prepare_initial(degraded, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            noise = 0.1 * scheduler.model_input(sample, degraded)[:, :3]  # a network, with t
            sample = scheduler.step(noise, t, sample).prev_sample
        ```
    """

    _compatibles: list[str] = []
    order = 1
    value_range = (-1.0, 1.0)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 12,
        beta_schedule: str = "linear_pro",
        prediction_type: str = "resnoise",
        clip_sample: bool = True,
    ) -> None:
        betas = truncated_betas(beta_schedule, num_train_timesteps)
        bars = np.cumprod(1.0 - betas)
        self._betas, self._bars = betas.tolist(), bars.tolist()
        self.betas = torch.from_numpy(betas).float()
        self.alphas_cumprod = torch.from_numpy(bars).float()
        self.init_noise_sigma = math.sqrt(1.0 - bars[-1])
        self.num_inference_steps: int | None = None
        self._lay(None)

    def _lay(self, device: str | torch.device | None) -> None:
        self.timesteps = torch.arange(len(self._betas) - 1, -1, -1, device=device)
        self._count_from_start(self.timesteps.tolist())

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Starts a run over.

        Args:
            num_inference_steps (`int`, *optional*): Only the length of the cut schedule, which is the default.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.

        Raises:
            ValueError: If another number is asked for.
        """
        steps = len(self._betas)
        if num_inference_steps is not None and (isinstance(num_inference_steps, bool) or num_inference_steps != steps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r} is not possible: the schedule of num_train_timesteps="
                f"{self.config.num_train_timesteps} has {steps} steps; use {steps}"
            )
        self._lay(device)
        self.num_inference_steps = steps

    # -- samples ---------------------------------------------------------------------------------------------------

    def prepare_initial(
        self,
        mean: torch.Tensor,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        timestep: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where a run starts: sqrt(ab) d + sqrt(1 - ab) eps.

        Args:
            mean (`torch.Tensor` of shape `(batch, ...)`): The degraded pictures, in [-1, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise.
            noise (`torch.Tensor`, *optional*): Unit noise of the shape of `mean`, instead of drawn noise.
            timestep (`float`, *optional*): Only the first; elsewhere the clean picture would have to be known.

        Returns:
            `torch.Tensor`: Samples of the shape and dtype of `mean`.

        Raises:
            ValueError: If `noise` or `timestep` does not fit.
            TypeError: If `mean` is not a tensor of floats.
        """
        check_tensor("mean", mean)
        if timestep is not None and float(timestep) != len(self._betas) - 1:
            raise ValueError(
                f"timestep={float(timestep):g}: a run of Resfusion starts at {len(self._betas) - 1}; use strength=1"
            )
        noise = given_noise(mean, generator, noise)
        return math.sqrt(self._bars[-1]) * mean + self.init_noise_sigma * noise

    def model_input(
        self, sample: torch.Tensor, mean: torch.Tensor | None = None, timestep: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the network sees: the sample and the degraded picture, one after the other along the channels.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, ...)`): The noisy sample.
            mean (`torch.Tensor`): The degraded pictures.
            timestep (`float` or `torch.Tensor`, *optional*): Without effect.

        Returns:
            `torch.Tensor` of shape `(batch, 2 * channels, ...)`.

        Raises:
            ValueError: If the degraded pictures are missing or have another shape.
        """
        return torch.cat([sample, self._degraded(sample, mean).to(sample)], dim=1)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    @staticmethod
    def _degraded(sample: torch.Tensor, mean: Any) -> torch.Tensor:
        check_tensor("sample", sample)
        if mean is None:
            raise ValueError("mean=None is missing; give the degraded picture as mean=...")
        check_tensor("mean", mean)
        if mean.shape != sample.shape:
            raise ValueError(
                f"mean of shape {tuple(mean.shape)} does not fit sample of shape {tuple(sample.shape)}; both must have the same shape"
            )
        return mean

    def _tables(self, timesteps: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_bar and beta of each sample, shaped to multiply a batch."""
        rows = torch.as_tensor(timesteps).reshape(-1).tolist()
        if len(rows) not in (1, like.shape[0]):
            raise ValueError(
                f"timesteps has {len(rows)} entries for a batch of {like.shape[0]}; give one, or one for each sample"
            )
        if not all(row == int(row) and 0 <= row < len(self._betas) for row in rows):
            raise ValueError(
                f"timesteps={rows!r} leaves the schedule; give whole numbers from 0 to {len(self._betas) - 1}"
            )
        shape, dtype = (-1, *[1] * (like.ndim - 1)), torch.float64 if like.dtype == torch.float64 else torch.float32
        options: Any = {"dtype": dtype, "device": like.device}
        bars = torch.tensor([self._bars[int(row)] for row in rows], **options).reshape(shape)
        return bars, torch.tensor([self._betas[int(row)] for row in rows], **options).reshape(shape)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_t of clean pictures, each at its own timestep.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): Clean pictures, in [-1, 1].
            noise (`torch.Tensor`): Unit noise of the same shape.
            timesteps (`torch.Tensor` of shape `(batch,)`): Timesteps from 0 to the last of the cut schedule.
            mean (`torch.Tensor`): The degraded pictures.

        Returns:
            `torch.Tensor` of the shape and dtype of `original_samples`.

        Raises:
            ValueError: If an argument does not fit.
        """
        residual = self._degraded(original_samples, mean).to(original_samples) - original_samples
        check_same(original_samples, noise)
        bars, _ = self._tables(timesteps, original_samples)
        root = bars.sqrt()
        noisy = root * original_samples + (1.0 - root) * residual + (1.0 - bars).sqrt() * noise
        return noisy.to(original_samples.dtype)

    def get_target(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a network of this `prediction_type` shall answer; arguments as of `add_noise`."""
        kind = self.config.prediction_type
        check_choice("prediction_type", kind, PREDICTION_TYPES)
        residual = self._degraded(original_samples, mean).to(original_samples) - original_samples
        if kind == "sample":
            return original_samples
        if kind == "residual":
            return residual
        check_same(original_samples, noise)
        bars, betas = self._tables(timesteps, original_samples)
        factor = (1.0 - (1.0 - betas).sqrt()) * (1.0 - bars).sqrt() / betas
        return (noise + factor * residual).to(original_samples.dtype)

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        mean: torch.Tensor | None = None,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MRSchedulerOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """Moves the sample to the next level.

        Args:
            model_output (`torch.Tensor`): What the model predicts for `model_input(sample, mean)`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The noisy sample.
            mean (`torch.Tensor`, *optional*): The degraded pictures; not needed for `"resnoise"`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise.
            variance_noise (`torch.Tensor`, *optional*): That noise itself.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`MRSchedulerOutput`] or `tuple`: The next sample, in the dtype of `sample`, and the predicted clean picture unless the
            network predicts `"resnoise"`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite, or if the result overflows.
        """
        check_states(model_output, sample)
        kind = self.config.prediction_type
        check_choice("prediction_type", kind, PREDICTION_TYPES)
        index = self._index(timestep)
        check_inputs(model_output, sample, index, timestep)
        row = len(self._betas) - 1 - index
        beta, bar = self._betas[row], self._bars[row]
        before = self._bars[row - 1] if row else 1.0
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        state, output = sample.to(dtype), model_output.to(dtype)
        original = None
        if kind == "resnoise":
            moved = (state - beta / math.sqrt(1.0 - bar) * output) / math.sqrt(1.0 - beta)
        else:
            degraded = self._degraded(sample, mean).to(state)
            original = output if kind == "sample" else degraded - output
            if self.config.clip_sample:
                original = original.clamp(-1.0, 1.0)
            residual = degraded - original
            kept = math.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - bar)
            moved = (
                residual + kept * (state - residual) + math.sqrt(before) * beta / (1.0 - bar) * (original - residual)
            )
            moved = moved if row else original
        if row:
            fresh = given_noise(sample, generator, variance_noise, "variance_noise", dtype)
            moved = moved + math.sqrt((1.0 - before) / (1.0 - bar) * beta) * fresh
        prev_sample = moved.to(sample.dtype)
        check_result(prev_sample, index, timestep)
        self._step_index = index + 1
        original = None if original is None else original.to(sample.dtype)
        if not return_dict:
            return prev_sample, original
        return MRSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)
