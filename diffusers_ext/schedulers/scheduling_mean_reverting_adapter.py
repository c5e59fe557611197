"""Any scheduler of diffusers on a model of mean-reverting diffusion.

y = (x - mu) / sigma_inf is variance-preserving diffusion with alpha_bar_t = alpha_t^2 and the same noise eps, so a scheduler that is
built with the betas 1 - alpha_t^2 / alpha_(t-1)^2 samples it. The adapter moves samples and predictions between the two:

    y = (x - mu) / sigma_inf,   x0_y = (x0 - mu) / sigma_inf,   v_y = v / sigma_inf,   eps_y = eps
"""

import inspect
from typing import Any

import diffusers.schedulers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import check_choice
from .mean_reverting import TableProcess
from .mean_reverting_mixin import PREDICTION_TYPES, MeanRevertingMixin
from .multistep import check_inputs, check_result, check_states, check_steps
from .noise import Generators, given_noise
from .scheduling_mr import MRSchedulerOutput
from .step_counter import StepCounterMixin


__all__ = ["MeanRevertingAdapter", "SchedulerMixin"]

# given by the process, so not to be set a second time
OWN_KEYS = (
    "num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "prediction_type",
    "rescale_betas_zero_snr", "use_flow_sigmas",
)  # fmt: skip


class MeanRevertingAdapter(MeanRevertingMixin, StepCounterMixin, SchedulerMixin, ConfigMixin):
    """Runs a variance-preserving scheduler (DDIM, DPM-Solver++, UniPC, DEIS, Heun, ...) on a mean-reverting model.

    It is used like [`MRScheduler`]. Schedulers that keep their samples in another scale (Heun, Euler) do so here too, so a sample
    between two steps is only meaningful to `model_input` with its timestep, and the last one is the picture.

    Args:
        scheduler_class (`str`, *optional*, defaults to `"DPMSolverMultistepScheduler"`): Name of a scheduler of diffusers, or of this
            package, that takes `trained_betas`.
        scheduler_config (`dict`, *optional*): Its settings, other than the noise levels and `prediction_type`. By default pictures
            are not clipped and `timestep_spacing` is `"trailing"`.
        num_train_timesteps (`int`, *optional*, defaults to 100), theta_schedule (`str`, *optional*, defaults to `"cosine"`), trained_thetas
            (`list[float]`, *optional*), sigma_inf (`float`, *optional*, defaults to 50 / 255), alpha_min (`float`, *optional*, defaults
            to 0.005), cosine_s (`float`, *optional*, defaults to 0.008), zero_start (`bool`, *optional*, defaults to `True`),
            prediction_type (`str`, *optional*, defaults to `"epsilon"`): As of [`MRScheduler`].

    Raises:
        ValueError: If the scheduler is not known or does not fit, or a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers import MeanRevertingAdapter

        degraded = torch.rand(1, 3, 16, 16)
        scheduler = MeanRevertingAdapter("UniPCMultistepScheduler", {"solver_order": 2})
        scheduler.set_timesteps(5)
        sample = scheduler.prepare_initial(degraded, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            noise = 0.1 * scheduler.model_input(sample, degraded, t)[:, :3]  # a network, with t
            sample = scheduler.step(noise, t, sample, mean=degraded).prev_sample
        ```
    """

    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        scheduler_class: str = "DPMSolverMultistepScheduler",
        scheduler_config: dict[str, Any] | None = None,
        num_train_timesteps: int = 100,
        theta_schedule: str = "cosine",
        trained_thetas: list[float] | None = None,
        sigma_inf: float = 50 / 255,
        alpha_min: float = 0.005,
        cosine_s: float = 0.008,
        zero_start: bool = True,
        prediction_type: str = "epsilon",
    ) -> None:
        # no other process gets past the check of theta_schedule
        self.process: TableProcess = self._make_process()  # type: ignore[assignment]
        # where the table starts with the clean picture, the lowest level of the wrapped scheduler is timestep 1
        self._shift = self.process.lowest
        self.inner = self._built()
        self.num_inference_steps: int | None = None
        self._reset(None)

    def _built(self) -> Any:
        config = self.config
        name, settings = config.scheduler_class, dict(config.scheduler_config or {})
        found = getattr(diffusers.schedulers, str(name), None) or _own(str(name))
        if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
            raise ValueError(
                f"scheduler_class={name!r} is not known; use a scheduler of diffusers such as 'UniPCMultistepScheduler'"
            )
        known = inspect.signature(found).parameters
        if "trained_betas" not in known or "prediction_type" not in known:
            raise ValueError(
                f"scheduler_class={name!r} takes no trained_betas; use a scheduler of diffusion models, such as DDIM"
            )
        wrong = [key for key in settings if key in OWN_KEYS or key not in known]
        if wrong:
            reason = "is set by the process" if wrong[0] in OWN_KEYS else f"is no setting of {name}"
            raise ValueError(f"scheduler_config={settings!r}: {wrong[0]} {reason}; leave it out")
        bars = self.process.alphas[int(self._shift) :] ** 2
        betas = 1.0 - bars / np.concatenate([[1.0], bars[:-1]])
        # centred pictures are not in [-1, 1]; noise as strong as sigma_inf belongs to the last timestep, and evenly spaced
        # ones never coincide
        defaults = {"clip_sample": False, "timestep_spacing": "trailing"}
        usable = {key: value for key, value in defaults.items() if key in known}
        kind = config.prediction_type if config.prediction_type in PREDICTION_TYPES else "epsilon"
        return found(
            **{**usable, **settings},
            num_train_timesteps=len(betas),
            trained_betas=betas.tolist(),
            prediction_type=kind,
        )

    # -- the schedule ----------------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """That of the wrapped scheduler: network evaluations a step, but for the last."""
        return int(self.inner.order)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise around the mean that a run starts from, in the scale of the wrapped scheduler."""
        return self.process.sigma_inf * float(self.inner.init_noise_sigma)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays the levels of a run and forgets the one before, its mean too.

        Args:
            num_inference_steps (`int`): Steps, from 1 to the timesteps of the process.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.

        Raises:
            ValueError: If it is out of range.
        """
        count = check_steps(num_inference_steps, self.inner.config.num_train_timesteps)
        self.inner.set_timesteps(count, device=device)
        self.num_inference_steps = count
        self._reset(device)

    def _reset(self, device: str | torch.device | None) -> None:
        self._mean = None
        self._inner_times = self.inner.timesteps
        self.timesteps = (self._inner_times.to(torch.float32) + self._shift).to(device)
        self._count_from_start(self.timesteps.tolist())

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says with which step the run begins."""
        super().set_begin_index(begin_index)
        if hasattr(self.inner, "set_begin_index"):
            self.inner.set_begin_index(begin_index)

    # -- samples ---------------------------------------------------------------------------------------------------

    def prepare_initial(
        self,
        mean: torch.Tensor,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        timestep: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        if timestep is None:
            return super().prepare_initial(mean, generator, noise)
        noise = given_noise(mean, generator, noise)
        at = self._inner_times[self.index_for_timestep(timestep)].reshape(1).to(mean.device)
        return mean + self.process.sigma_inf * self.inner.add_noise(torch.zeros_like(mean), noise, at)

    def scale_model_input(
        self, sample: torch.Tensor, timestep: Any = None, mean: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sample in the scale of the process; `model_input` with a timestep does this too.

        Args:
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample.
            timestep (`float` or `torch.Tensor`, *optional*): The entry of `timesteps` that it is at.
            mean (`torch.Tensor`, *optional*): The degraded pictures; those of `set_mean` by default.

        Returns:
            `torch.Tensor` of the shape of `sample`.

        Raises:
            ValueError: If there is no mean, or no such timestep.
        """
        if timestep is None or float(self.inner.init_noise_sigma) == 1.0:
            return sample
        mu = self._mean_for(sample, mean).to(sample)
        at = self._inner_times[self._index(timestep)]
        return mu + self.process.sigma_inf * self.inner.scale_model_input((sample - mu) / self.process.sigma_inf, at)

    def model_input(
        self, sample: torch.Tensor, mean: torch.Tensor | None = None, timestep: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().model_input(self.scale_model_input(sample, timestep, mean), mean)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        mean: torch.Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> MRSchedulerOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """Moves the sample to the next level.

        Args:
            model_output (`torch.Tensor`): What the model predicts for `model_input(sample, mean, timestep)`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample.
            mean (`torch.Tensor`, *optional*): The degraded pictures, of the same shape; those of `set_mean` by default.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise of stochastic schedulers.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            [`MRSchedulerOutput`] or `tuple`: The next sample in the dtype of `sample`, and the predicted clean picture if the
            wrapped scheduler gives it.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite, or if the result overflows.
        """
        check_states(model_output, sample)
        mean = self._mean_for(sample, mean)
        kind = self.config.prediction_type
        check_choice("prediction_type", kind, PREDICTION_TYPES)
        index = self._index(timestep)
        check_inputs(model_output, sample, index, timestep)
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        scale, mu = self.process.sigma_inf, mean.to(device=sample.device, dtype=dtype)
        if not bool(torch.isfinite(mu).all()):
            raise ValueError(f"mean is not finite in {int((~torch.isfinite(mu)).sum())} values; give finite pictures")
        output = model_output.to(dtype)
        if kind == "sample":
            output = output - mu
        if kind != "epsilon":
            output = output / scale
        takes = inspect.signature(self.inner.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        centred = (sample.to(dtype) - mu) / scale
        if self._step_index is None and self._begin_index is None and hasattr(self.inner, "set_begin_index"):
            # Heun's timesteps come twice, and its own search would take the second of them
            self.inner.set_begin_index(index)
        result = self.inner.step(output, self._inner_times[index], centred, **extra)
        prev_sample = (mu + scale * result.prev_sample).to(sample.dtype)
        check_result(prev_sample, index, timestep)
        original = getattr(result, "pred_original_sample", None)
        if original is not None:
            original = (mu + scale * original).to(sample.dtype)
        self._step_index = index + 1
        if not return_dict:
            return prev_sample, original
        return MRSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)


def _own(name: str) -> Any:
    # the package that this module is a part of is complete only now
    from .. import schedulers

    return getattr(schedulers, name, None)
