"""FLAIR: the most likely clean sample, found by optimisation along a flow.

Solving Inverse Problems with FLAIR, 2025, arXiv 2506.02680. One sample, the mean mu, is kept through a run. At the level t it is
noised, x_t = (1 - t) mu + t e, and what the network makes of it, with x0 = x_t - t v, moves it in two turns:

    prior     mu  <-  mu - lambda(t) (v - (e - mu))  =  mu - lambda(t) / t (mu - x0)
    data      mu  <-  mu - eta lambda(t) grad(mu), repeated until the measurement is met up to its noise; or prox, or project
    noise     e   <-  alpha (x_t + (1 - t) v) + sqrt(1 - alpha^2) n,   alpha = 1 - t' for the next level t'

The network is never differentiated. lambda(t) is half the inverse of the network's error at t, E |v - (eps - x0)|^2, over the mean of
these inverses: where the network knows little it moves little. `diffusers_ext.steering.velocity_errors` measures that error.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .checks import check_choice, check_number
from .flow_config import FlowMatchConfigMixin
from .flow_steering import FlowSteeringMixin, Objective, estimate_variance
from .noise import Generators, drawn_noise


__all__ = ["FLAIRScheduler", "SchedulerMixin"]

# lambda / t from which on the mean would swing about the estimate ever further is 2; the authors' settings reach 1.4.
MOST_OVERSHOOT = 1.5
FLAIR_DATA_STEPS = ("grad", "prox", "project")


def prior_weight(errors: Sequence[float] | None, level: float, scale: float = 0.5) -> float:
    """lambda(t): how far the network moves the mean.

    Args:
        errors (`Sequence[float]`, *optional*): The network's error at equally spaced levels from 1 to 0; equal by default.
        level (`float`): t.
        scale (`float`, *optional*, defaults to 0.5): Mean of lambda over these levels.

    Returns:
        `float`: That of the nearest of the levels.
    """
    if errors is None:
        return scale
    nearest = round((1.0 - level) * (len(errors) - 1))
    return scale / errors[nearest] * len(errors) / sum(1.0 / error for error in errors)


def prior_step(mean: torch.Tensor, clean: torch.Tensor, level: float, weight: float) -> torch.Tensor:
    """The mean after the network has pulled it.

    Args:
        mean (`torch.Tensor`): mu.
        clean (`torch.Tensor`): x0, the network's estimate from the noised mean.
        level (`float`): t, above 0.
        weight (`float`): lambda(t).

    Returns:
        `torch.Tensor`: mu - lambda / t (mu - x0), with lambda / t at most 1.5.
    """
    return mean - min(weight / level, MOST_OVERSHOOT) * (mean - clean)


def adjusted_noise(start: torch.Tensor, level: float, noise: torch.Tensor) -> torch.Tensor:
    """Noise for the next level, most of it what the network took the sample to have come from.

    Args:
        start (`torch.Tensor`): x1, the network's estimate of the pure noise.
        level (`float`): t' of the next level.
        noise (`torch.Tensor`): n, unit noise.

    Returns:
        `torch.Tensor`: alpha x1 + sqrt(1 - alpha^2) n with alpha = 1 - t'.
    """
    alpha = 1.0 - level
    return alpha * start + math.sqrt(1.0 - alpha**2) * noise


class FLAIRScheduler(FlowMatchConfigMixin, FlowSteeringMixin, FlowMatchEulerDiscreteScheduler):
    """Solves inverse problems with a flow model by optimising one sample; without an objective it is Euler's, bit for bit.

    It is put into pipelines as [`FlowChefScheduler`] is, and takes the same objectives: `steer(pipe, objective, solver="flair")`.
    A step costs one evaluation of the network, and some of the objective.

    Args:
        data_step (`str`, *optional*, defaults to `"grad"`): `"grad"` until the noise of the measurement is reached, `"prox"` or
            `"project"`, see above.
        data_learning_rate (`float`, *optional*, defaults to 1.0): eta of `"grad"`; objectives of this package are scaled so that
            0 to 2 is stable.
        data_steps (`int`, *optional*, defaults to 15): Most moves of `"grad"` in a step.
        prior_scale (`float`, *optional*, defaults to 0.5): Mean of lambda. Less keeps more of the start.
        velocity_errors (`list[float]`, *optional*): The network's error at equally spaced levels from 1 to 0, as measured by
            [`diffusers_ext.steering.velocity_errors`]. By default lambda is the same everywhere.
        final_level (`float`, *optional*, defaults to 0.18): Where a steered run ends. Its levels are equally spaced between 1 and this,
            unless sigmas are given; those are brought into that range. There is no shift.

    All other arguments are those of the parent, with its defaults.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext import FLAIRScheduler
        from diffusers_ext.steering import MeasurementObjective, SuperResolution

        scheduler = FLAIRScheduler()
        scheduler.set_objective(MeasurementObjective(SuperResolution(4), torch.rand(1, 3, 2, 2)))
        scheduler.set_timesteps(50)
        sample = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:
            velocity = sample  # a network, with t
            sample = scheduler.step(velocity, t, sample).prev_sample
        ```
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        data_step: str = "grad",
        data_learning_rate: float = 1.0,
        data_steps: int = 15,
        prior_scale: float = 0.5,
        velocity_errors: list[float] | None = None,
        final_level: float = 0.18,
    ) -> None:
        # Every argument is passed on: the parent registers its own defaults for those that are not.
        super().__init__(
            num_train_timesteps=num_train_timesteps, shift=shift, use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift, max_shift=max_shift, base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len, invert_sigmas=invert_sigmas, shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas, use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas, time_shift_type=time_shift_type, stochastic_sampling=stochastic_sampling,
        )  # fmt: skip
        if invert_sigmas:
            raise ValueError(
                "invert_sigmas=True: the formulas are those of levels from 1 to 0; use invert_sigmas=False"
            )
        check_choice("data_step", data_step, FLAIR_DATA_STEPS)
        check_number("data_learning_rate", data_learning_rate, 0.0)
        check_number("prior_scale", prior_scale, 0.0)
        check_number("final_level", final_level, 0.0, 1.0)
        if not isinstance(data_steps, int) or isinstance(data_steps, bool) or data_steps < 1:
            raise ValueError(f"data_steps={data_steps!r} is not a number of steps; give an int of at least 1")
        if velocity_errors is not None:
            if not isinstance(velocity_errors, (list, tuple)) or len(velocity_errors) < 2:
                raise ValueError(
                    f"velocity_errors={velocity_errors!r} is no table; give two numbers or more, from level 1 to 0"
                )
            for error in velocity_errors:
                check_number("velocity_errors", error, 0.0)
        self._objective: Any = None
        self._begin: torch.Tensor | None = None
        self._steering_generator: Generators = None
        self._ready = self._laid_for_mean = False
        self._mean: torch.Tensor | None = None

    @property
    def mean(self) -> torch.Tensor | None:
        """mu as it is now, float32; `None` before the first step of a run."""
        return self._mean

    def set_objective(
        self, objective: Objective | None, generator: Generators = None, start: torch.Tensor | None = None
    ) -> None:
        """Says what the sample is steered towards, from the next call of `set_timesteps` on.

        Args:
            objective ([`Objective`], *optional*): See [`diffusers_ext.steering`]. `None` ends the steering.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of noise, where the pipeline gives `step`
                none. By default it is drawn from the global one.
            start (`torch.Tensor` of the shape of the sample, *optional*): mu to begin with. By default what the objective's `start`
                gives, which for a measurement is the likeliest sample of unit variance, and 0 where it has none.

        Raises:
            TypeError: If it is not an objective, or `generator` or `start` is of a wrong type.
            ValueError: If it has not what `data_step` needs.
        """
        if start is not None and (not isinstance(start, torch.Tensor) or not start.is_floating_point()):
            raise TypeError(
                f"start={type(start).__name__} is not a tensor of floats; give one of the shape of the sample"
            )
        super().set_objective(objective, generator)
        self._begin, self._mean, self._ready = start, None, False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """As the parent's without an objective; with one, levels from 1 to `final_level`.

        Args:
            num_inference_steps (`int`, *optional*): Evaluations of the network.
            device (`str` or `torch.device`, *optional*): Where the timesteps shall be.
            sigmas (`Sequence[float]`, *optional*): Levels from 1 to 0 of one's own, which are brought into the range.
            mu (`float`, *optional*): Shift by the resolution, of the parent.
            timesteps (`Sequence[float]`, *optional*): The same as `sigmas`, from 1000 to 0.

        Raises:
            ValueError: If there are no steps, or levels are out of range.
        """
        count = self._check_steps(num_inference_steps, sigmas, timesteps)
        self._mean, self._laid_for_mean = None, self._objective is not None
        if not self._laid_for_mean:
            super().set_timesteps(count, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
            self._laid()
            return
        last, train = self.config.final_level, self.config.num_train_timesteps
        if sigmas is None and timesteps is None:
            levels = torch.linspace(1, last, int(count or 0) + 2, dtype=torch.float64)[1:-1]
        else:
            given = torch.as_tensor(sigmas if sigmas is not None else timesteps, dtype=torch.float64)
            levels = last + (1 - last) * (given if sigmas is not None else given / train)
        self.num_inference_steps = len(levels)
        self.sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
        self.timesteps = (train * levels).to(device, torch.float32)
        self._step_index = self._begin_index = None
        self._laid()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Moves the mean and returns it, noised to the next level; after the last step the mean itself.

        Args:
            model_output (`torch.Tensor`): The velocity that the network predicts for `sample`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): What the step before returned; noise, or a noised start, at first.
            generator (`torch.Generator`, *optional*): Source of noise; that of `set_objective` by default.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `SchedulerOutput` or `tuple`: The next sample, in the dtype of `model_output`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite, or the objective answers with what is not.
        """
        index = self._checked(model_output, timestep, sample)
        if not self._laid_for_mean:
            result = super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps
            )
            return self._answer(result, result.prev_sample, index, timestep, return_dict)
        if per_token_timesteps is not None:
            raise ValueError(
                "per_token_timesteps: tokens at different levels have no common mean; use FlowChefScheduler"
            )
        level, following = self._level(index), self._level(index + 1)
        state, velocity = sample.float(), model_output.float()
        mean = self._mean if self._mean is not None else self._started(state, index)
        if mean.shape != state.shape:
            raise ValueError(
                f"sample has shape {tuple(state.shape)} in a run of {tuple(mean.shape)}; call set_timesteps first"
            )
        weight = prior_weight(self.config.velocity_errors, level, self.config.prior_scale)
        mean = prior_step(mean.to(state), state - level * velocity, level, weight)
        mean = self._kept_to_data(mean, index, level, weight)
        answer = mean
        if following:
            noise = drawn_noise(state, self._source(generator))
            noise = adjusted_noise(state + (1 - level) * velocity, following, noise)
            answer = (1 - following) * mean + following * noise
        result = self._answer(
            SchedulerOutput(prev_sample=answer), answer.to(model_output.dtype), index, timestep, return_dict
        )
        self._mean, self._step_index = mean, index + 1  # type: ignore[assignment]
        return result

    def _started(self, state: torch.Tensor, index: int) -> torch.Tensor:
        if self._begin is not None:
            if self._begin.shape[1:] != state.shape[1:] or len(self._begin) not in (1, len(state)):
                raise ValueError(
                    f"start has shape {tuple(self._begin.shape)}; give {tuple(state.shape)}, that of the sample"
                )
            return self._begin.to(state).expand_as(state)
        zero = torch.zeros_like(state)
        return self._asked("start", index, zero) if callable(getattr(self._objective, "start", None)) else zero

    def _kept_to_data(self, mean: torch.Tensor, index: int, level: float, weight: float) -> torch.Tensor:
        """The mean after the objective has pulled it."""
        kind = self._data_step()
        if kind == "prox":
            return self._asked("prox", index, mean, estimate_variance(level))
        if kind == "project":
            return self._asked("project", index, mean)
        rate, shape = self.config.data_learning_rate * min(weight, 1.0), (-1, *[1] * (mean.ndim - 1))
        for _ in range(self.config.data_steps):
            active = self._above_noise(mean)
            if active is not None and not bool(active.any()):
                break
            moved = mean - rate * self._asked("grad", index, mean)
            mean = moved if active is None else torch.where(active.reshape(shape), moved, mean)
        return mean

    def _above_noise(self, mean: torch.Tensor) -> torch.Tensor | None:
        """Which samples miss the objective by more than its noise; nothing where it does not say."""
        loss, floor = getattr(self._objective, "loss", None), getattr(self._objective, "floor", None)
        if not callable(loss) or not callable(floor):
            return None
        return loss(mean) > floor(mean)
