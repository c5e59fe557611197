"""MR Sampler: restoration in 5 to 10 steps with a model of mean-reverting diffusion.

MR Sampler, Li et al., ICLR 2025, arXiv 2502.07856. Between a degraded picture mu and the clean one x0 lies
x_t = mu + alpha_t (x0 - mu) + sigma_t eps. The solvers integrate the reverse of that exactly but for the network, which they
extrapolate from its last answers: DPM-Solver on y = (x - mu) / sigma_inf. The process is in `mean_reverting.py`, the numbers of a
step in `mean_reverting_solvers.py`; this file keeps count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging

from . import mean_reverting as process_of
from . import mean_reverting_solvers as solvers
from .checks import check_choice, check_number
from .mean_reverting_mixin import MeanRevertingMixin
from .multistep import check_inputs, check_result, check_states, check_steps
from .noise import Generators, given_noise
from .step_counter import StepCounterMixin


__all__ = ["MRScheduler", "MRSchedulerOutput", "SchedulerMixin"]

logger = logging.get_logger(__name__)

FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass
class MRSchedulerOutput(BaseOutput):
    """What a step gives.

    Attributes:
        prev_sample (`torch.Tensor`): The sample at the next level.
        pred_original_sample (`torch.Tensor`): The clean picture as the network sees it at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


@dataclass(frozen=True)
class _Step:
    """What is precomputed of a step: its noise level, the conversion of the output, and an update for each order."""

    level: process_of.Level
    convert: tuple[float, float]
    updates: tuple[solvers.Update, ...]
    order: int


class MRScheduler(MeanRevertingMixin, StepCounterMixin, SchedulerMixin, ConfigMixin):
    """Samples models of mean-reverting diffusion (IR-SDE, DA-CLIP, Refusion, SGMSE+); one network evaluation a step.

    The network gets `model_input(sample, mean)` and the timestep as it is. `step` gets the mean, that is the degraded picture, as
    `mean=`, or once a run by `set_mean`.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 100): T, the length of the training process.
        theta_schedule (`str`, *optional*, defaults to `"cosine"`): How fast pictures decay to the mean: `"cosine"`, `"linear"`,
            `"constant"`, `"trained"`, or `"ouve"`, the process of SGMSE+ with timesteps from 0 to 1.
        trained_thetas (`list[float]`, *optional*): The T + 1 speeds of `"trained"`.
        sigma_inf (`float`, *optional*, defaults to 50 / 255): Standard deviation of pure noise, for pictures in [0, 1].
        alpha_min (`float`, *optional*, defaults to 0.005): What is left of the clean picture at T, in (0, 1).
        cosine_s (`float`, *optional*, defaults to 0.008): Offset of the cosine schedule.
        zero_start (`bool`, *optional*, defaults to `True`): Whether timestep 0 has no noise, as IR-SDE and DA-CLIP were trained; `False`
            is the table of the MR Sampler code.
        ouve_theta (`float`, *optional*, defaults to 1.5), ouve_sigma_min (`float`, *optional*, defaults to 0.05), ouve_sigma_max
            (`float`, *optional*, defaults to 0.5), ouve_t_eps (`float`, *optional*, defaults to 0.03): Of the process `"ouve"`; the last is
            the lowest time a network is asked at.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        algorithm_type (`str`, *optional*, defaults to `"ode-d"`): `"ode-d"` or `"ode-n"` (deterministic; extrapolating the clean picture or
            the noise), `"sde-d"` or `"sde-n"` (stochastic; the latter diverges below 10 steps), `"posterior"` or
            `"euler-maruyama"` (IR-SDE's own, made for 100 steps).
        solver_order (`int`, *optional*, defaults to 2): 1 to 3 for ODE solvers, 1 or 2 for SDE solvers; the last two algorithms have none.
        third_order_correction (`bool`, *optional*, defaults to `True`): Whether order 3 is of third order; `False` is as published.
        lower_order_final (`bool`, *optional*): Whether the order falls to 1 towards the end. By default so for `"-d"` solvers.
        official_order (`bool`, *optional*, defaults to `False`): Whether orders are those of the authors' code instead.
        final_sigmas_type (`str`, *optional*, defaults to `"zero"`): Whether a run ends at the predicted clean picture, or at the
            lowest level of its grid (`"sigma_min"`), as published.
        timestep_spacing (`str`, *optional*, defaults to `"linspace"`): `"linspace"`, `"leading"`, `"trailing"`, `"karras-n"`, `"karras-t"`
            or `"linear-lambda"`.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        rho (`float`, *optional*, defaults to 7): Exponent of the two Karras grids.
        lambda_min_clipped (`float`, *optional*): Noisier levels (ln alpha / sigma below this) are left out.
        thresholding (`bool`, *optional*, defaults to `False`): Whether to scale predicted pictures back by a quantile of theirs.
        dynamic_thresholding_ratio (`float`, *optional*, defaults to 0.995): That quantile.
        sample_max_value (`float`, *optional*, defaults to 1.5): Most that it may be.
        clip_sample (`bool`, *optional*, defaults to `False`): Whether to clip predicted pictures.
        clip_sample_range (`list[float]`, *optional*): To this range, by default from 0 to 1.
        schedule_interpolation (`str`, *optional*, defaults to `"consistent"`): Between timesteps; `"table"` is that of the authors.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers import MRScheduler

        degraded = torch.rand(1, 3, 16, 16)
        scheduler = MRScheduler()
        scheduler.set_timesteps(5)
        sample = scheduler.prepare_initial(degraded, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            noise = 0.1 * scheduler.model_input(sample, degraded)[:, :3]  # a network, with t
            sample = scheduler.step(noise, t, sample, mean=degraded).prev_sample
        ```
    """

    _compatibles: list[str] = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 100,
        theta_schedule: str = "cosine",
        trained_thetas: list[float] | None = None,
        sigma_inf: float = 50 / 255,
        alpha_min: float = 0.005,
        cosine_s: float = 0.008,
        zero_start: bool = True,
        ouve_theta: float = 1.5,
        ouve_sigma_min: float = 0.05,
        ouve_sigma_max: float = 0.5,
        ouve_t_eps: float = 0.03,
        prediction_type: str = "epsilon",
        algorithm_type: str = "ode-d",
        solver_order: int = 2,
        third_order_correction: bool = True,
        lower_order_final: bool | None = None,
        official_order: bool = False,
        final_sigmas_type: str = "zero",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rho: float = 7.0,
        lambda_min_clipped: float | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.5,
        clip_sample: bool = False,
        clip_sample_range: list[float] | None = None,
        schedule_interpolation: str = "consistent",
    ) -> None:
        check_choice("algorithm_type", algorithm_type, solvers.ALGORITHMS)
        check_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
        check_choice("timestep_spacing", timestep_spacing, process_of.SPACINGS)
        check_number("rho", rho, 0.0)
        if lambda_min_clipped is not None:
            check_number("lambda_min_clipped", lambda_min_clipped, -math.inf)
        check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0.0, 1.0)
        if isinstance(steps_offset, bool) or not isinstance(steps_offset, int) or steps_offset < 0:
            raise ValueError(f"steps_offset={steps_offset!r} is out of range; use an int of at least 0")
        self._range = _checked_range([0.0, 1.0] if clip_sample_range is None else clip_sample_range)
        self._to_data = algorithm_type in solvers.DATA_SOLVERS
        highest = (solvers.DATA_SOLVERS | solvers.NOISE_SOLVERS)[algorithm_type]
        single = algorithm_type in ("posterior", "euler-maruyama")
        if isinstance(solver_order, bool) or solver_order not in (range(1, 4) if single else range(1, highest + 1)):
            raise ValueError(
                f"solver_order={solver_order!r} is not possible with algorithm_type={algorithm_type!r}; use 1 to {highest}"
            )
        self._highest = 1 if single else solver_order
        self.process = self._make_process()
        self.num_inference_steps: int | None = None
        count = num_train_timesteps
        self._lay([self.process.level(self.process.first * (count - i) / count) for i in range(count + 1)], None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, with a warning where the config describes another process than this one.

        Args:
            config (`dict`): A config, for example that of a [`MeanRevertingAdapter`].
            return_unused_kwargs (`bool`, *optional*, defaults to `False`): Whether to return the arguments left over too.
            **kwargs: Settings that replace those of the config.

        Returns:
            The scheduler, or a pair of it and the unused arguments.
        """
        # the config of a live scheduler does not name its class
        if hasattr(config, "get") and "sigma_inf" not in config and {"beta_schedule", "shift"} & set(config):
            logger.warning(
                f"the config of {config.get('_class_name', 'another scheduler')} says nothing of mean-reverting diffusion, so its "
                "noise levels are not used; give theta_schedule and sigma_inf of the model"
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # -- the schedule ----------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lays the levels of a run and forgets the one before, its mean too. Exactly one of the first and third is needed.

        Args:
            num_inference_steps (`int`, *optional*): Steps, from 1 to `num_train_timesteps`; one network evaluation each.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.
            timesteps (`Sequence[float]`, *optional*): The timesteps themselves, descending, whole or not.

        Raises:
            ValueError: If the arguments do not describe a run.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r}, timesteps={timesteps!r}: give exactly one of the two"
            )
        config, process = self.config, self.process
        to_zero = config.final_sigmas_type == "zero"
        if timesteps is None:
            count = check_steps(num_inference_steps, config.num_train_timesteps)
            # where a process ends above zero the last step, to zero, comes on top of its grid
            between = count - 1 if to_zero and process.ends_at_zero else count
            times = process_of.spaced_timesteps(
                process, config.timestep_spacing, between, config.steps_offset, config.rho, config.lambda_min_clipped
            )
            if (np.diff(times) >= 0).any():
                raise ValueError(
                    f"num_inference_steps={count} is too many for timestep_spacing={config.timestep_spacing!r}, whose timesteps "
                    "would coincide; use fewer steps or 'linspace'"
                )
        else:
            times = self._checked_timesteps(timesteps)
            count = len(times)
            if not process.ends_at_zero or not to_zero:
                times = np.append(times, process.lowest if process.ends_at_zero else 0.0)
        levels = [process.level(float(time)) for time in times[: count if to_zero else count + 1]]
        if to_zero:
            levels.append(process_of.Level(0.0, 1.0, 0.0, math.inf))
        self._mean = None
        self._lay(levels, device)
        self.num_inference_steps = count
        self._steps = [self._planned(levels, index) for index in range(count)]

    def _checked_timesteps(self, timesteps: Any) -> np.ndarray:
        values = process_of.as_numbers("timesteps", timesteps)
        top = self.process.first
        low = self.process.lowest if self.process.ends_at_zero and self.config.final_sigmas_type != "zero" else 0.0
        if len(values) < 1 or (np.diff(values) >= 0).any() or not low < values[-1] <= values[0] <= top:
            raise ValueError(
                f"timesteps={timesteps!r} is not usable; give descending numbers above {low:g} and up to {top:g}"
            )
        return values

    def _lay(self, levels: list[process_of.Level], device: str | torch.device | None) -> None:
        table = torch.tensor([(level.sigma, level.alpha, level.lam) for level in levels], dtype=torch.float64).float()
        self.sigmas, self.alphas, self.lambdas = (column.contiguous() for column in table.T)
        times = torch.tensor([level.timestep for level in levels[:-1]], dtype=torch.float32)
        self.timesteps = times.to(device)
        self._count_from_start(times.tolist())
        self._shape: torch.Size | None = None
        self._history: list[torch.Tensor] = []

    def _planned(self, levels: list[process_of.Level], index: int) -> _Step:
        config, process, start, end = self.config, self.process, levels[index], levels[index + 1]
        kind, count = config.algorithm_type, len(levels) - 1
        # an unknown prediction_type is reported by the step, as in diffusers
        known = config.prediction_type in solvers.PREDICTION_TYPES
        convert = solvers.conversion(
            config.prediction_type if known else "epsilon", self._to_data, start, process.sigma_inf
        )
        if kind == "posterior":
            return _Step(start, convert, (solvers.posterior_update(start, end),), 1)
        if kind == "euler-maruyama":
            drift, diffusion = process.drift_and_diffusion(start, end)
            last = config.final_sigmas_type == "zero" and index == count - 1
            return _Step(start, convert, (solvers.euler_maruyama_update(start, drift, diffusion, last),), 1)
        highest = self._highest
        if config.official_order:
            order = solvers.official_orders(count, highest)[index]
        else:
            lowers = self._to_data if config.lower_order_final is None else config.lower_order_final
            order = min(highest, count - index) if lowers else highest
        order = min(order, index + 1)
        updates = tuple(
            solvers.multistep_update(
                kind, [levels[index - i] for i in range(used)], end, config.third_order_correction
            )
            for used in range(1, order + 1)
        )
        return _Step(start, convert, updates, order)

    # -- counting --------------------------------------------------------------------------------------------------

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
            mean (`torch.Tensor`, *optional*): The degraded pictures, of the same shape; those of `set_mean` by default.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise of stochastic algorithms.
            variance_noise (`torch.Tensor`, *optional*): That noise itself.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`MRSchedulerOutput`] or `tuple`: The next sample and the predicted clean picture, in the dtype of `sample`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite. The state is then what it was before the call. Also if the
                result overflows its dtype.
        """
        check_states(model_output, sample)
        mean = self._mean_for(sample, mean)
        kind = self.config.prediction_type
        check_choice("prediction_type", kind, solvers.PREDICTION_TYPES)
        index = self._index(timestep)
        if self._shape is not None and sample.shape != self._shape:
            raise ValueError(
                f"sample of shape {tuple(sample.shape)} differs from the {tuple(self._shape)} that this run began with; give "
                "that shape, or call set_timesteps first"
            )
        check_inputs(model_output, sample, index, timestep)

        step = self._steps[index]
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        mu = mean.to(device=sample.device, dtype=dtype)
        centred = sample.to(dtype) - mu
        output = model_output.to(dtype)
        if kind == "sample":
            output = output - mu
        state_factor, output_factor = step.convert
        value = output if output_factor == 1.0 else output * output_factor
        if state_factor:
            value = torch.add(value, centred, alpha=state_factor)
        if self.config.thresholding or self.config.clip_sample:
            value = self._limited(value, centred, mu, step.level)

        update = step.updates[min(step.order, len(self._history) + 1, len(step.updates)) - 1]
        if update.state == 0.0 and update.outputs == (1.0,):
            moved = value.clone()
        else:
            moved = value * update.outputs[0]
            if update.state:
                moved.add_(centred, alpha=update.state)
            for weight, older in zip(update.outputs[1:], self._history, strict=False):
                moved.add_(older, alpha=weight)
        if update.noise:
            fresh = given_noise(sample, generator, variance_noise, "variance_noise", dtype)
            moved.add_(fresh, alpha=update.noise)
        prev_sample = moved.add_(mu, alpha=1.0 + update.mean).to(sample.dtype)
        self._check_result(prev_sample, mean, index, timestep)
        if self._to_data:
            original = value + mu
        else:
            original = torch.add(centred, value, alpha=-step.level.sigma).mul_(1.0 / step.level.alpha).add_(mu)

        # not the network's own memory, which it may write into again
        kept = value.clone() if value is model_output else value
        self._history = [kept, *self._history[: self._highest - 2]] if self._highest > 1 else []
        self._step_index, self._shape = index + 1, sample.shape
        if not return_dict:
            return prev_sample, original.to(sample.dtype)
        return MRSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original.to(sample.dtype))

    @staticmethod
    def _check_result(prev_sample: torch.Tensor, mean: torch.Tensor, index: int, timestep: Any) -> None:
        try:
            check_result(prev_sample, index, timestep)
        except ValueError:
            if bool(torch.isfinite(mean).all()):
                raise
            raise ValueError(
                f"mean is not finite in {int((~torch.isfinite(mean)).sum())} values; give finite pictures"
            ) from None

    def _limited(
        self, value: torch.Tensor, centred: torch.Tensor, mu: torch.Tensor, level: process_of.Level
    ) -> torch.Tensor:
        """The value of a network whose predicted picture is held within limits."""
        config = self.config
        data = value if self._to_data else (centred - level.sigma * value) / level.alpha
        picture = data + mu
        if config.thresholding:
            # Imagen, arXiv 2205.11487, section 2.3
            flat = picture.flatten(1)
            bound = flat.abs().quantile(config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            bound = bound.clamp(min=1.0, max=max(1.0, config.sample_max_value))
            picture = (flat.clamp(-bound, bound) / bound).reshape(picture.shape)
        else:
            picture = picture.clamp(*self._range)
        data = picture - mu
        return data if self._to_data else (centred - level.alpha * data) / level.sigma

    # -- training --------------------------------------------------------------------------------------------------

    def training_optimum_pair(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        original_samples: torch.Tensor,
        timesteps: torch.Tensor,
        mean: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two sides of IR-SDE's training loss, to be compared pixel by pixel.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`): The noise that the network predicts for `sample`.
            sample (`torch.Tensor`): Noisy samples.
            original_samples (`torch.Tensor`): Their clean pictures.
            timesteps (`torch.Tensor` of shape `(batch,)`): Their timesteps, 1 or more.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Mean of Euler's step to t - 1 by the prediction, and the best x_(t-1).

        Raises:
            ValueError: If the process is `"ouve"`, which has no unit steps, or an argument does not fit.
        """
        if self.config.theta_schedule == "ouve":
            raise ValueError("theta_schedule='ouve' has no unit steps; compare the output with get_target instead")
        mu = self._mean_for(sample, mean).to(sample)
        self._levels(timesteps, sample)
        euler, best = [], []
        for time in torch.as_tensor(timesteps, dtype=torch.float64).reshape(-1).tolist():
            if time < 1.0:
                raise ValueError(f"timesteps={time:g} has no step below it; give 1 or more")
            start, end = self.process.level(time), self.process.level(time - 1.0)
            euler.append(solvers.euler_maruyama_update(start, *self.process.drift_and_diffusion(start, end)))
            best.append(solvers.posterior_update(start, end))

        def factors(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=sample.dtype, device=sample.device).reshape(-1, *[1] * (sample.ndim - 1))

        def mean_of(updates: list[solvers.Update], output: torch.Tensor) -> torch.Tensor:
            state = factors([update.state for update in updates])
            return mu + state * (sample - mu) + factors([update.outputs[0] for update in updates]) * output

        return mean_of(euler, model_output), mean_of(best, original_samples - mu)


def _checked_range(value: Any) -> list[float]:
    numbers = process_of.as_numbers("clip_sample_range", value)
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError(f"clip_sample_range={value!r} is not usable; give two ascending numbers")
    return [float(number) for number in numbers]
