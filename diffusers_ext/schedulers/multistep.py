"""What the deterministic multistep schedulers of this package share: noise levels, counting, checks and conversions.

In X = x / alpha and s = sigma / alpha the probability-flow ODE of a diffusion model is dX/ds = eps(x). For a flow model, with
x = (1 - t) x0 + t eps, it is dx/dt = v(x): the same equation with X = x, s = t and v in the place of eps. A subclass gets X,
s and the slope in float32 (float64 where the sample is float64) and returns the next X.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput

from . import sigma_grids as grids
from .checks import is_finite
from .flow_config import FlowConfigMixin
from .step_counter import StepCounterMixin


__all__ = ["Levels", "MultistepScheduler", "SchedulerMixin", "register_to_config"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
GRID_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas")
FINAL_SIGMAS = ("zero", "sigma_min")
# A scheduler that has not been told a number of steps shows the training process, as those of diffusers do.
UNSET = -1


def check_steps(num_inference_steps: Any, most: int) -> int:
    """The number of steps as an int.

    Raises:
        ValueError: If it is not a whole number from 1 to `most`.
    """
    whole = isinstance(num_inference_steps, (int, np.integer)) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= most:
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r} is out of range; use an int from 1 to {most}, the number of training "
            "timesteps"
        )
    return int(num_inference_steps)


def check_states(model_output: Any, sample: Any) -> None:
    """Raises unless the two arguments of a step are tensors of floats of the same shape.

    Raises:
        TypeError: If one of them is not a tensor of floats.
        ValueError: If their shapes differ or have no batch axis.
    """
    for name, value in (("model_output", model_output), ("sample", sample)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name} is {found}; give a tensor of floats")
    if model_output.shape != sample.shape or sample.ndim < 1:
        raise ValueError(
            f"model_output of shape {tuple(model_output.shape)} does not fit sample of shape {tuple(sample.shape)}; both "
            "must have the same shape, batch first"
        )


def check_inputs(model_output: torch.Tensor, sample: torch.Tensor, step: int, timestep: Any) -> None:
    """Raises if what goes into a step is not finite.

    Raises:
        ValueError: If a value of `model_output` or `sample` is not finite; it names the step.
    """
    # One number leaves the device. A sum may overflow where its terms do not, so it is only grounds for suspicion.
    if math.isfinite((model_output.sum(dtype=torch.float32) + sample.sum(dtype=torch.float32)).item()):
        return
    for name, value in (("model_output", model_output), ("sample", sample)):
        count = int((~torch.isfinite(value)).sum())
        if count:
            raise ValueError(
                f"{name} is not finite in {count} of {value.numel()} values at step {step} (timestep {float(timestep):g}); "
                "check the model and its dtype"
            )


def check_result(result: torch.Tensor, step: int, timestep: Any) -> None:
    """Raises if a step with finite inputs overflowed.

    Raises:
        ValueError: If a value of `result` is not finite; it names the step.
    """
    if not is_finite(result):
        raise ValueError(
            f"sample overflows {result.dtype} at step {step} (timestep {float(timestep):g}); use float32, fewer steps or less "
            "guidance, and call set_timesteps to start again"
        )


def as_numbers(value: torch.Tensor) -> np.ndarray:
    """A small tensor as float64 numbers of this process."""
    return value.detach().to("cpu", torch.float64).numpy()


@dataclass(frozen=True)
class Levels:
    """The levels of one step: s before and after, and the factor alpha between x and X at both."""

    index: int
    start: float
    end: float
    alpha: float
    next_alpha: float


class MultistepScheduler(FlowConfigMixin, StepCounterMixin, SchedulerMixin, ConfigMixin):
    """Base of schedulers that follow dX/ds = slope from node to node. Defines no constructor: the config is the subclass's.

    A subclass registers the arguments that `_set_up` reads, and defines `_advance`, which makes the next sample and remembers what
    later steps need, and `_forget`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    # -- the schedule ----------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        """Lays out the training process from the config."""
        config = self.config
        trained = check_steps_trained(config.num_train_timesteps)
        if sum(bool(config[name]) for name in GRID_FLAGS) > 1:
            chosen = ", ".join(f"{name}=True" for name in GRID_FLAGS if config[name])
            raise ValueError(f"{chosen}: only one grid can be used; leave the others False")
        if config.final_sigmas_type not in FINAL_SIGMAS:
            raise ValueError(
                f"final_sigmas_type={config.final_sigmas_type!r} is not known; use one of {', '.join(FINAL_SIGMAS)}"
            )
        self.betas = grids.training_betas(
            trained, config.beta_start, config.beta_end, config.beta_schedule, config.trained_betas,
            config.rescale_betas_zero_snr,
        )  # fmt: skip
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)
        if config.rescale_betas_zero_snr:
            # s would be infinite; diffusers' DPM-Solver uses the same number.
            self.alphas_cumprod[-1] = 2**-24
        self.num_inference_steps: int | None = None
        table = self._table()
        descending = np.arange(len(table), dtype=np.float32)[::-1] + (1.0 if self._is_flow else 0.0)
        self._lay(table[::-1], 0.0, torch.from_numpy(descending.copy()))

    @property
    def _is_flow(self) -> bool:
        return bool(self.config.prediction_type == "flow_prediction")

    def _table(self) -> np.ndarray:
        if self._is_flow:
            count = self.config.num_train_timesteps
            return np.arange(1, count + 1, dtype=np.float64) / count
        return grids.table_of(self.alphas_cumprod)

    def _lay(self, starts: np.ndarray, last: float, timesteps: torch.Tensor) -> None:
        self._nodes = [*map(float, starts), float(last)]
        self.sigmas = torch.tensor(self._nodes, dtype=torch.float32)
        self.timesteps = timesteps
        self._count_from_start(timesteps.tolist())
        self._shape: torch.Size | None = None
        self._forget()

    def _forget(self) -> None:
        """Clears what a run has accumulated."""
        raise NotImplementedError(f"{type(self).__name__} does not define _forget")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays the nodes of a run and forgets the one before. Exactly one of the first, third and fourth is needed.

        Args:
            num_inference_steps (`int`, *optional*): Steps, from 1 to `num_train_timesteps`; one network evaluation each.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.
            timesteps (`Sequence[float]`, *optional*): The timesteps themselves, descending.
            sigmas (`Sequence[float]`, *optional*): The nodes themselves, descending. For a diffusion model all n + 1 of them,
                sigma / alpha, and 0 may be the last. For a flow model the n times from which steps start, before the shift.
            mu (`float`, *optional*): Shift of a flow model with `use_dynamic_shifting`; pipelines compute it.

        Raises:
            ValueError: If the arguments do not describe a run.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r}, timesteps={timesteps!r}, sigmas={sigmas!r}: give exactly one"
            )
        if num_inference_steps is not None:
            num_inference_steps = check_steps(num_inference_steps, self.config.num_train_timesteps)
        own_timesteps = None if timesteps is None else self._checked_timesteps(timesteps)
        lay = self._flow_nodes if self._is_flow else self._diffusion_nodes
        starts, last, whole = lay(num_inference_steps, own_timesteps, sigmas, mu)
        self.num_inference_steps = len(starts)
        self._lay(starts, last, torch.from_numpy(whole).to(device))

    def _checked_timesteps(self, timesteps: Sequence[float]) -> np.ndarray:
        values = _numbers("timesteps", timesteps)
        highest = self.config.num_train_timesteps - (0 if self._is_flow else 1)
        if len(values) < 1 or (np.diff(values) >= 0).any() or not 0 <= values[-1] <= values[0] <= highest:
            raise ValueError(f"timesteps={timesteps!r} is not usable; give descending numbers between 0 and {highest}")
        return values

    def _diffusion_nodes(
        self, count: int | None, timesteps: np.ndarray | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> tuple[np.ndarray, float, np.ndarray]:
        config, table = self.config, self._table()
        last = float(table[0]) if config.final_sigmas_type == "sigma_min" else 0.0
        if timesteps is not None:
            return grids.sigmas_of_timesteps(timesteps, table), last, _as_whole(timesteps)
        if sigmas is not None:
            nodes = _numbers("sigmas", sigmas)
            if len(nodes) < 2 or (np.diff(nodes) >= 0).any() or nodes[-1] < 0:
                raise ValueError(f"sigmas={sigmas!r} is not usable; give two or more descending numbers, none below 0")
            starts, last = nodes[:-1], float(nodes[-1])
        elif count is not None and any(config[name] for name in GRID_FLAGS):
            # The nodes end where the run ends. diffusers spends its last step on a jump that this grid has no need of.
            size = count + 1 if last else count
            ends = float(table[-1]), float(table[0])
            if config.use_karras_sigmas:
                nodes = grids.karras_grid(*ends, size)
            elif config.use_beta_sigmas:
                nodes = grids.beta_grid(*ends, size)
            else:
                nodes = grids.log_uniform_grid(*ends, size)
            starts = nodes[:count]
        else:
            grid = grids.spaced_timesteps(
                config.timestep_spacing, count or 1, config.num_train_timesteps, config.steps_offset
            )
            return table[grid], last, grid
        return starts, last, grids.timesteps_of_sigmas(starts, table).astype(np.float32)

    def _flow_nodes(
        self, count: int | None, timesteps: np.ndarray | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> tuple[np.ndarray, float, np.ndarray]:
        config, trained = self.config, self.config.num_train_timesteps
        dynamic = config.use_dynamic_shifting
        if dynamic and mu is None:
            raise ValueError("mu=None is missing; use_dynamic_shifting=True needs it")
        if timesteps is not None:
            return timesteps / trained, 0.0, timesteps.astype(np.float32)
        if sigmas is not None:
            times = _numbers("sigmas", sigmas)
            if len(times) < 1 or (np.diff(times) >= 0).any() or not 0 < times[-1] <= times[0] <= 1:
                raise ValueError(f"sigmas={sigmas!r} is not usable; give descending times above 0 and up to 1")
        else:
            # The lowest time is shifted here and once more below, as in FlowMatchEulerDiscreteScheduler.
            lowest = 1 / trained if dynamic else float(grids.shifted_times(np.array(1 / trained), config.flow_shift))
            times = np.linspace(1.0, lowest, count or 1)
        if dynamic and mu is not None:
            times = grids.dynamically_shifted_times(times, float(mu), config.time_shift_type)
        else:
            times = grids.shifted_times(times, config.flow_shift)
        if config.shift_terminal and len(times) > 1:
            times = grids.stretched_times(times, config.shift_terminal)
        return times, 0.0, (times * trained).astype(np.float32)

    def _alpha(self, node: float) -> float:
        return 1.0 if self._is_flow else (1.0 + node * node) ** -0.5

    def _around(self, index: int) -> Levels:
        start, end = self._nodes[index], self._nodes[index + 1]
        return Levels(index, start, end, self._alpha(start), self._alpha(end))

    # -- a step ----------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself: the model sees the variance-preserving state."""
        return sample

    def _slope(self, output: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        """dX/ds from what the model predicts."""
        kind, s, alpha = self.config.prediction_type, levels.start, levels.alpha
        if kind == "epsilon" or kind == "flow_prediction":
            return output
        if kind == "v_prediction":
            return torch.add(alpha * output, sample, alpha=s * alpha)
        if kind == "sample":
            return (sample / alpha - output) / s
        raise ValueError(f"prediction_type={kind!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Moves the sample to the next node.

        Args:
            model_output (`torch.Tensor`): What the model predicts for `sample`, after guidance.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The noisy sample.
            generator (`torch.Generator`, *optional*): Taken for the sake of interchangeability; no noise is drawn.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `SchedulerOutput` or `tuple`: The next sample as `prev_sample`, in the dtype of `sample`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite. The state is then what it was before the call. Also if the
                result overflows its dtype.
        """
        index, state, output = self._begin(model_output, timestep, sample)
        levels = self._around(index)
        slope, state = self._converted(output, state, levels)
        prev_sample = self._advance(slope, state, levels).to(sample.dtype)
        self._finish(prev_sample, index, timestep)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _begin(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Checks the arguments of a step. Returns its number, and sample and output in the dtype of the arithmetic."""
        check_states(model_output, sample)
        index = self._index(timestep)
        if self._shape is not None and sample.shape != self._shape:
            raise ValueError(
                f"sample of shape {tuple(sample.shape)} differs from the {tuple(self._shape)} that this run began with; give "
                "that shape, or call set_timesteps first"
            )
        check_inputs(model_output, sample, index, timestep)
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        return index, sample.to(dtype), model_output.to(dtype)

    def _finish(self, result: torch.Tensor, index: int, timestep: Any) -> None:
        """Checks what a step gives and counts it."""
        check_result(result, index, timestep)
        self._step_index, self._shape = index + 1, result.shape

    def _converted(
        self, output: torch.Tensor, sample: torch.Tensor, levels: Levels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_advance` gets of a prediction and the sample it is for."""
        return self._slope(output, sample, levels), sample

    def _advance(self, slope: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        """The next sample. `slope` and `sample` may be the caller's own tensors: not to be kept, nor written into."""
        raise NotImplementedError(f"{type(self).__name__} does not define _advance")

    # -- noise -----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples with noise, each at its own timestep.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, ...)`): Clean samples.
            noise (`torch.Tensor`): Noise of the same shape.
            timesteps (`torch.Tensor` of shape `(batch,)`): Any timesteps of the training process or of the run.

        Returns:
            `torch.Tensor` of the shape and dtype of `original_samples`.
        """
        nodes = [self._level_of(float(timestep)) for timestep in timesteps.reshape(-1)]
        alphas = [1.0 - node if self._is_flow else self._alpha(node) for node in nodes]
        scales = [node if self._is_flow else node * alpha for node, alpha in zip(nodes, alphas, strict=True)]
        pair = torch.tensor([alphas, scales], device=original_samples.device, dtype=original_samples.dtype)
        alpha, sigma = pair.reshape(2, -1, *[1] * (original_samples.ndim - 1))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` under the name and argument order that pipelines of flow models use."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1).expand(len(sample)))

    def _level_of(self, timestep: float) -> float:
        if timestep in self._times:
            return self._nodes[self._times.index(timestep)]
        if self._is_flow:
            return timestep / float(self.config.num_train_timesteps)
        return float(grids.sigmas_of_timesteps(np.array(timestep), self._table()))


def check_steps_trained(num_train_timesteps: Any) -> int:
    """The length of the training process.

    Raises:
        ValueError: If it is not a whole number above 1.
    """
    if isinstance(num_train_timesteps, bool) or not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps={num_train_timesteps!r} is not usable; use an int of at least 2")
    return num_train_timesteps


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        numbers = np.asarray(values.tolist() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r} is not a list of numbers; give descending numbers") from error
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{name}={values!r} is not a flat list of finite numbers; give descending numbers")
    return numbers


def _as_whole(timesteps: np.ndarray) -> np.ndarray:
    """As int64 where nothing is lost, so that networks that embed whole timesteps see what they were trained on."""
    return timesteps.astype(np.int64) if (timesteps == timesteps.round()).all() else timesteps.astype(np.float32)
