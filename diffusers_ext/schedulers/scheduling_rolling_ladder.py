"""Rolling diffusion on a ladder: every frame of a window has a noise level of its own.

Accelerated Rolling Diffusion and its ladder (RDLA), arXiv 2503.10488, after Rolling Diffusion Models, arXiv 2402.09470. The levels are
those of `ladder.py`. A frame at level (a, s), z = a x + s n, goes to the level (a', s') by the update of a sampler for independent
noise, with its own coefficients; x is the predicted frame:

    k = (a s') / (a' s),   g = eta s' sqrt(1 - k^2),   d = sqrt(s'^2 - g^2)
    z' = (d / s) z + (a' - d a / s) D + g n'                     eta = 0: DDIM, and Euler where a = 1 - s; eta = 1: DDPM
    D  = x + (x - x_before) / (2 r),   r = (l - l_before) / (l' - l),   l = log(a / s)       DPM-Solver++ (2M); else D = x

`x_before` and `l_before` are the frame's own, from its last update, and roll with it: order 2 costs no further evaluation. It is of
order 1 where a frame has no such history, comes from pure noise (l = -inf) or becomes data (l = inf).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput

from . import sigma_grids as grids
from .checks import check_choice, is_finite
from .flow_config import FlowConfigMixin
from .frame_process import FrameProcessMixin
from .frame_updates import (
    FrameHistory,
    numbers,
    shown,
    update_coefficients,
    whole,
)
from .ladder import (
    checked_count,
    checked_evaluations,
    checked_rungs,
    drawn_ladders,
    drawn_shares,
    ladder_level,
    warmup_levels,
    window_levels,
)
from .multistep import (
    PREDICTION_TYPES,
    check_states,
    check_steps,
    check_steps_trained,
)
from .noise import drawn_noise


__all__ = ["RollingLadderScheduler", "RollingLadderSchedulerOutput", "SchedulerMixin"]

BASES = ("ddim", "ddpm", "flow_match_euler", "dpmsolver++")
TRAINING_MODES = ("rolling", "ladder", "independent", "init", "mixed")
# Timesteps of float32 tensors are found again within this.
TOLERANCE = 1e-3


@dataclass
class RollingLadderSchedulerOutput(BaseOutput):
    """What a step gives.

    Attributes:
        prev_sample (`torch.Tensor`): The frames at their next levels.
        pred_original_sample (`torch.Tensor`): The predicted data; frames that are data already are given back.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class RollingLadderScheduler(FlowConfigMixin, FrameProcessMixin, SchedulerMixin, ConfigMixin):
    """A scheduler whose frames have times of their own, `(batch, frames)`, laid out as a rolling ladder.

    Timesteps are those of the model: whole numbers from 0 to `num_train_timesteps - 1`, with -1 for data; or, for flow models,
    `num_train_timesteps` times the share of noise, with 0 for data. A timestep given to a method may be one number, `(batch,)`,
    one a sample, or `(batch or 1, frames)`, one a frame.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process, T.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"`, or
            `"cosine"`, which is a = cos(pi t / 2) with t = (timestep + 1) / T, and so ends in pure noise by itself.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): What the network predicts: `"epsilon"`, `"sample"` (as in
            the paper), `"v_prediction"` or `"flow_prediction"`. The last makes the process that of a flow model: a = 1 - s.
        base (`str`, *optional*, defaults to `"dpmsolver++"`): The update: `"ddim"`, `"ddpm"`, `"dpmsolver++"` (order 2), or
            `"flow_match_euler"`, which is DDIM on the process of a flow model, whatever the network predicts.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether the training process ends in pure noise. Frames
            enter as pure noise: train with `True` or `"cosine"`, and a prediction other than `"epsilon"`. The default is that of
            diffusers, so that `from_config` means the same; a model of such a process sees entering frames slightly wrong.
        flow_shift (`float`, *optional*, defaults to 1.0): Shift of the times of a flow model towards noise.
        window_length (`int`, *optional*, defaults to 20): Frames that the network sees at once, W, without context.
        ladder_step (`int`, *optional*, defaults to 1): Frames that share a level and are emitted together, l; divides W.
        context_length (`int`, *optional*, defaults to 1): Most emitted frames that the network sees before the window.
        context_timestep (`int` or `float`, *optional*): Timestep of the context, noised to it. The authors use 0, the least
            noise there is. By default the context is data.
        frame_dim (`int`, *optional*, defaults to 1): The axis of the frames; 1 in (batch, frames, channels), 2 in latents
            of videos.

    Raises:
        ValueError: If a setting is out of range or two do not fit.

    Example:
        ```python
        import torch
        from diffusers_ext import RollingLadderScheduler

        scheduler = RollingLadderScheduler(
            beta_schedule="cosine", prediction_type="sample", window_length=6, ladder_step=2
        )
        scheduler.set_timesteps(6)  # 3 rungs, 2 evaluations a roll: one evaluation an emitted frame
        window = torch.randn(1, 6, 4)
        evaluations = len(scheduler.warmup_timesteps) + len(scheduler.window_timesteps)
        for e in range(evaluations):  # a network that always predicts 0
            now, following = (scheduler.timesteps_at(i)[None] for i in (e, e + 1))
            window = scheduler.step(0.0 * window, now, window, next_timestep=following).prev_sample
        frames, window = scheduler.roll(window, torch.randn(1, 2, 4))
        assert frames.shape == (1, 2, 4) and window.shape == (1, 6, 4) and not frames.any()
        ```
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        base: str = "dpmsolver++",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        window_length: int = 20,
        ladder_step: int = 1,
        context_length: int = 1,
        context_timestep: int | float | None = None,
        frame_dim: int = 1,
    ) -> None:
        check_steps_trained(num_train_timesteps)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("base", base, BASES)
        is_flow = prediction_type == "flow_prediction" or base == "flow_match_euler"
        if is_flow and prediction_type == "v_prediction":
            raise ValueError("prediction_type='v_prediction' is not that of a flow model; use 'flow_prediction'")
        if isinstance(flow_shift, bool) or not isinstance(flow_shift, (int, float)) or not 0 < flow_shift < math.inf:
            raise ValueError(f"flow_shift={flow_shift!r} is not usable; use a number above 0")
        self._rungs = checked_rungs(window_length, ladder_step)
        checked_count(context_length, "context_length", least=0)
        checked_count(frame_dim, "frame_dim")
        self._is_flow = is_flow
        self.betas, self.alphas_cumprod, self._trained = self._training_process()
        self.alphas = 1.0 - self.betas
        if prediction_type == "epsilon" and (is_flow or self._trained[0, -1] == 0.0):
            raise ValueError(
                "prediction_type='epsilon' says nothing of a frame that is pure noise, as frames enter here; use 'sample' or "
                "'v_prediction', or rescale_betas_zero_snr=False with a beta_schedule that keeps some of the data"
            )
        if context_timestep is not None:
            self._levels_of_training(context_timestep, "context_timestep")
        self.num_inference_steps: int | None = None
        count = self.config.num_train_timesteps if is_flow else len(self.betas)
        self.timesteps = torch.from_numpy(np.arange(count, dtype=np.int64)[::-1] + int(is_flow))
        self._history: FrameHistory | None = None

    # -- the ladder ------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Lays the levels out and forgets the run before.

        Args:
            num_inference_steps (`int`, *optional*): Evaluations of a frame from noise to data, K; a multiple of
                window_length / ladder_step. One evaluation an emitted frame is K = W.
            device (`str` or `torch.device`, *optional*): Where `timesteps` and the tables shall be.
            timesteps (`list[float]`, *optional*): The K levels above data themselves, descending, from the noisiest.

        Raises:
            ValueError: If K does not fit, or the timesteps are not descending ones of the model.
        """
        trained = self.config.num_train_timesteps if self._is_flow else len(self.betas)
        if timesteps is not None:
            values = numbers(timesteps, "timesteps")
            if (
                values.ndim != 1
                or not values.size
                or (np.diff(values) >= 0).any()
                or values[-1] <= self.clean_timestep
            ):
                raise ValueError(f"timesteps={shown(timesteps)} are not usable; give a list of descending timesteps")
            if num_inference_steps not in (None, len(values)):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps!r} is not the number of timesteps, {len(values)}; give one of them"
                )
            self._levels_of_training(values)
            count = len(values)
        else:
            count = check_steps(num_inference_steps, trained)
            if self._is_flow:
                values = grids.shifted_times(np.arange(count, 0, -1) / count, self.config.flow_shift) * trained
            else:
                values = grids.spaced_timesteps("trailing", count, trained).astype(np.float64)
        per_roll = checked_evaluations(count, self._rungs, trained)

        self.num_inference_steps, self._per_roll = count, per_roll
        kind = np.float32 if self._is_flow else np.int64
        self.timesteps = torch.from_numpy(values.astype(kind)).to(device)
        self._times = np.append(values, self.clean_timestep)[::-1]  # ascending: by level
        self._alphas, self._sigmas = self._levels_of_training(self._times)
        with np.errstate(divide="ignore"):
            self._log_snr = np.log(self._alphas) - np.log(self._sigmas)
        by_level = torch.from_numpy(self._times.astype(kind)).to(device)
        window, step = self.config.window_length, self.config.ladder_step
        self._warmup = by_level[torch.from_numpy(warmup_levels(window, step, per_roll))]
        self._steady = by_level[torch.from_numpy(window_levels(window, step, per_roll))]
        self._by_level, self._history = by_level, None

    def _ready(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is missing; call set_timesteps first")

    @property
    def warmup_timesteps(self) -> torch.Tensor:
        """Timesteps of the window on its way from noise to the steady state, a row an evaluation: ((R - 1) m, W)."""
        self._ready()
        return self._warmup

    @property
    def window_timesteps(self) -> torch.Tensor:
        """Timesteps of the window between two rolls, a row an evaluation: (m, W)."""
        self._ready()
        return self._steady

    @property
    def evaluations_per_roll(self) -> int:
        """Evaluations between two rolls of the window, m."""
        self._ready()
        return self._per_roll

    @property
    def nfe_per_frame(self) -> float:
        """Network evaluations an emitted frame: K / W."""
        return self.evaluations_per_roll / float(self.config.ladder_step)

    def level_at(self, frame_index: Any, eval_index: Any) -> torch.Tensor:
        """Levels of frames before evaluations, L(f, e), both counted from 0 over the whole sequence.

        Args:
            frame_index (`int`, array or `torch.Tensor`): Frames.
            eval_index (`int`, array or `torch.Tensor`): Evaluations, broadcast with the frames.

        Returns:
            `torch.Tensor`, int64: From 0, data, to `num_inference_steps`, noise.
        """
        self._ready()
        frames, evaluations = (
            whole(value, name) for name, value in (("frame_index", frame_index), ("eval_index", eval_index))
        )
        try:
            np.broadcast_shapes(frames.shape, evaluations.shape)
        except ValueError as error:
            raise ValueError(
                f"frame_index of shape {frames.shape} does not fit eval_index of shape {evaluations.shape}; give shapes that "
                "broadcast"
            ) from error
        levels = ladder_level(
            frames, evaluations, int(self.num_inference_steps or 0), self._per_roll, self.config.ladder_step
        )
        return torch.from_numpy(np.asarray(levels, dtype=np.int64))

    def timesteps_at(self, eval_index: int, start_frame: int = 0) -> torch.Tensor:
        """Timesteps before an evaluation of the window that starts with a frame: (W,)."""
        start = checked_count(start_frame, "start_frame", least=0)
        levels = self.level_at(np.arange(start, start + self.config.window_length), eval_index)
        return self._by_level[levels.to(self._by_level.device)]

    def sample_training_timesteps(
        self,
        batch_size: int,
        mode: str = "mixed",
        init_probability: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws timesteps of windows to train on.

        Args:
            batch_size (`int`): Number of windows.
            mode (`str`, *optional*, defaults to `"mixed"`): `"ladder"`: a random moment of the steady roll, continuous, so that it
                covers every number of evaluations a roll. `"rolling"`: the same with a ladder step of 1. `"init"`: a random
                moment of the warm-up from noise. `"mixed"`: `"init"` with `init_probability`, else `"ladder"`, each sample by
                itself. `"independent"`: every frame by itself (Diffusion Forcing, arXiv 2407.01392).
            init_probability (`float`, *optional*, defaults to 0.1): From 0 to 1.
            generator (`torch.Generator`, *optional*): Source of the draws.

        Returns:
            `torch.Tensor` of shape `(batch_size, window_length)`, on the CPU: int64, or float32 for flow models.
        """
        count, window = checked_count(batch_size, "batch_size"), self.config.window_length
        check_choice("mode", mode, TRAINING_MODES)
        number = isinstance(init_probability, (int, float)) and not isinstance(init_probability, bool)
        if not number or not 0.0 <= init_probability <= 1.0:
            raise ValueError(f"init_probability={init_probability!r} is out of range; use a number from 0 to 1")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r} is not a torch.Generator; give one, or leave it out")
        step = 1 if mode == "rolling" else self.config.ladder_step
        chance = {"init": 1.0, "mixed": float(init_probability)}.get(mode, 0.0)
        if mode == "independent":
            share = drawn_shares(count, window, generator)
        else:
            share = drawn_ladders(count, window, step, chance, generator)
        if self._is_flow:
            shifted = grids.shifted_times(share.numpy(), self.config.flow_shift)
            return torch.from_numpy(shifted * self.config.num_train_timesteps).float()
        return (torch.ceil(share * len(self.betas)).long() - 1).clamp(min=0)

    # -- the update ------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is: networks see z itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        next_timestep: float | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> RollingLadderSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Moves every frame from its level to the next.

        Args:
            model_output (`torch.Tensor`): What the network predicts for `sample`, after guidance.
            timestep (`float` or `torch.Tensor`): Where the frames are; entries of `timesteps`, or `clean_timestep`.
            sample (`torch.Tensor`): The noisy frames.
            next_timestep (`float` or `torch.Tensor`, *optional*): Where they shall go; by default one level down. The warm-up
                needs it, since most frames wait there. A frame whose two timesteps are equal, or that is data, is given back
                bit for bit.
            generator (`torch.Generator` or a list of them, *optional*): Source of the noise of `"ddpm"`.
            variance_noise (`torch.Tensor`, *optional*): That noise itself.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`RollingLadderSchedulerOutput`] or `tuple`: The frames at their next levels, in the dtype of `sample`, and the
            predicted data.

        Raises:
            TypeError: If an argument is not a tensor of floats.
            ValueError: If an argument does not fit or is not finite. The state is then what it was before the call.
        """
        self._ready()
        check_states(model_output, sample)
        levels = self._levels_of(timestep, sample, "timestep")
        if next_timestep is None:
            following = np.maximum(levels - 1, 0)
        else:
            following = self._levels_of(next_timestep, sample, "next_timestep")
            if (following > levels).any():
                raise ValueError(f"next_timestep={shown(next_timestep)} is noisier than timestep; give a lower one")
        history = self._history
        if history is not None and history.data.shape != sample.shape:
            raise ValueError(
                f"sample of shape {tuple(sample.shape)} does not continue the run of shape {tuple(history.data.shape)}; use "
                "roll() to move the window, or call set_timesteps to start again"
            )
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not is_finite(value):
                raise ValueError(f"{name} is not finite at timestep={shown(timestep)}; check the model and its dtype")

        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        frames, output = sample.to(dtype), model_output.to(dtype)
        alpha, sigma = self._alphas[levels], self._sigmas[levels]
        data = self._data(output, frames, alpha, sigma)
        moved = np.broadcast_to(following < levels, np.broadcast_shapes(levels.shape, following.shape))
        eta = 1.0 if self.config.base == "ddpm" else 0.0
        of_sample, of_data, of_noise = update_coefficients(
            alpha, sigma, self._alphas[following], self._sigmas[following], eta
        )
        target = data
        if self.config.base == "dpmsolver++" and history is not None:
            weight = history.weight(levels, following, self._log_snr)
            if weight.any():
                target = torch.addcmul(data, self._spread(weight, frames), data - history.data)
        result = self._spread(of_sample, frames) * frames + self._spread(of_data, frames) * target
        if of_noise.any():
            noise = self._noise(variance_noise, generator, sample)
            result = torch.addcmul(result, self._spread(of_noise, frames), noise.to(dtype))
        if not moved.all():
            keep = self._spread(moved, frames).bool()
            result = torch.where(keep, result, frames)
        prev_sample = result.to(sample.dtype)
        if not is_finite(prev_sample):
            raise ValueError(f"sample overflows {sample.dtype} at timestep={shown(timestep)}; use float32")

        if self.config.base == "dpmsolver++":
            self._history = self._recorded(data, levels, following, moved)
        data = data.to(sample.dtype)
        return RollingLadderSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def _data(self, output: torch.Tensor, frames: torch.Tensor, alpha: np.ndarray, sigma: np.ndarray) -> torch.Tensor:
        kind = self.config.prediction_type
        if kind == "sample":
            data = output
        elif kind == "epsilon":
            data = (frames - self._spread(sigma, frames) * output) / self._spread(alpha, frames)
        elif kind == "v_prediction":
            data = self._spread(alpha, frames) * frames - self._spread(sigma, frames) * output
        elif kind == "flow_prediction":
            data = torch.addcmul(frames, self._spread(sigma, frames), output, value=-1.0)
        else:
            raise ValueError(f"prediction_type={kind!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")
        clean = sigma == 0
        return torch.where(self._spread(clean, frames).bool(), frames, data) if clean.any() else data

    def _recorded(
        self, data: torch.Tensor, levels: np.ndarray, following: np.ndarray, moved: np.ndarray
    ) -> FrameHistory:
        """The history after an update; frames that did not move keep theirs."""
        history = self._history
        if history is None:
            return FrameHistory(data.clone(), np.where(moved, levels, 0), np.where(moved, following, -1))
        kept = data.clone() if moved.all() else torch.where(self._spread(moved, data).bool(), data, history.data)
        return FrameHistory(kept, np.where(moved, levels, history.before), np.where(moved, following, history.reached))

    def _noise(self, noise: Any, generator: Any, sample: torch.Tensor) -> torch.Tensor:
        if noise is None:
            return drawn_noise(sample, generator)
        if not isinstance(noise, torch.Tensor) or noise.shape != sample.shape:
            found = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise ValueError(f"variance_noise={found} does not fit; give a tensor of shape {tuple(sample.shape)}")
        if not is_finite(noise):
            raise ValueError("variance_noise is not finite; give finite numbers")
        return noise.to(sample.device)

    def roll(self, sample: torch.Tensor, new_noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the first `ladder_step` frames off the window, and puts new ones behind it.

        Args:
            sample (`torch.Tensor`): The window.
            new_noise (`torch.Tensor`, *optional*): Frames of noise of the same shape but for their number. Without them the
                window becomes shorter, as at the end of a stream.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The emitted frames, in memory of their own, and the new window.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If the shapes do not fit.
        """
        axis = self.config.frame_dim
        for name, value in (("sample", sample), ("new_noise", sample if new_noise is None else new_noise)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} is {type(value).__name__}; give a tensor")
            shape = (value.shape[:axis], value.shape[axis + 1 :])
            if value.ndim <= axis or shape != (sample.shape[:axis], sample.shape[axis + 1 :]):
                raise ValueError(
                    f"{name} of shape {tuple(value.shape)} does not fit; give frames along axis {axis} of a sample of shape "
                    f"{tuple(sample.shape)}"
                )
        count = min(self.config.ladder_step, sample.shape[axis])
        emitted = sample.narrow(axis, 0, count).clone()
        added = 0 if new_noise is None else new_noise.shape[axis]
        parts = [sample.narrow(axis, count, sample.shape[axis] - count)]
        if new_noise is not None:
            parts.append(new_noise.to(sample))
        window = torch.cat(parts, axis)

        history = self._history
        if history is not None and history.data.shape == sample.shape:
            self._history = history.rolled(axis, count, added)
        return emitted, window

    def _levels_of(self, timestep: Any, sample: torch.Tensor, name: str) -> np.ndarray:
        """Levels of timesteps of the run, as (B or 1, F or 1)."""
        values = self._in_two_axes(numbers(timestep, name), sample, name)
        levels = np.searchsorted((self._times[1:] + self._times[:-1]) / 2, values)
        if (np.abs(self._times[levels] - values) > TOLERANCE).any():
            raise ValueError(
                f"{name}={shown(timestep)} is not in this run; use entries of `timesteps`, or clean_timestep="
                f"{self.clean_timestep} for data"
            )
        return np.asarray(levels)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
