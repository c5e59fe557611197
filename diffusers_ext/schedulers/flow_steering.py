"""Steering of flow models inside a scheduler's step: what the FlowChef schedulers share.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation (FlowChef), 2024, arXiv 2412.00100. A step knows
the state x_t = (1 - t) x0 + t eps and the velocity v = eps - x0 that the network predicts, and so its estimate of the clean picture,

    x0 = x_t - t v

An objective pulls that estimate, and the network is never differentiated. `"grad"` is the paper's: the state moves along,

    x_t  <-  x_t - eta grad(x0)

The other steps choose a new estimate x0' and keep the state, so that the velocity follows from both:

    v  <-  (x_t - x0') / t
    prox      x0' = argmin |A x - y|^2 / (2 s^2) + |x - x0|^2 / (2 nu),   nu = t^2 / (t^2 + (1 - t)^2)
    project   x0' = the nearest picture that has the measurement
    repaint   the estimate stays, and after the step the measured part of the state is replaced by the noised measurement

After a step, `renoise` exchanges a share r of the noise that the state holds: eps <- sqrt(1 - r^2) eps + r n. A model's errors
are forgotten with the noise that they were made of, and the estimates of all steps are averaged.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .checks import check_choice, is_finite
from .multistep import check_inputs, check_result, check_states, check_steps
from .noise import Generators, check_generator, drawn_noise


DATA_STEPS = ("grad", "prox", "project", "repaint")
OPTIMIZERS = ("sgd", "adam")


class Objective(Protocol):
    """What a scheduler asks of an objective. [`diffusers_ext.steering`] has some; anything with `grad` is one.

    It may also have `prox(clean, variance)` and `project(clean)`, which return the new estimate; without them, those data steps
    are refused. And it may have `at(share)`, which returns the objective for the step that begins at that share of the run.
    """

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        """The direction that an estimate moves against, by the learning rate.

        Args:
            clean (`torch.Tensor` of the shape of the sample): The estimate of the clean sample, float32.

        Returns:
            `torch.Tensor` of the same shape.
        """


def estimate_variance(level: float) -> float:
    """Variance of clean data of unit variance around its estimate, at t: t^2 / (t^2 + (1 - t)^2).

    Args:
        level (`float`): t, from 0 (clean) to 1 (noise).

    Returns:
        `float`: From 0 to 1.
    """
    return level**2 / (level**2 + (1.0 - level) ** 2)


def renoise(state: torch.Tensor, clean: torch.Tensor, level: float, share: float, noise: torch.Tensor) -> torch.Tensor:
    """Exchanges a share of the noise that a state holds.

    Args:
        state (`torch.Tensor`): x_t = (1 - t) x0 + t eps.
        clean (`torch.Tensor`): x0.
        level (`float`): t, above 0.
        share (`float`): r, from 0 to 1.
        noise (`torch.Tensor`): n, unit noise.

    Returns:
        `torch.Tensor`: (1 - t) x0 + t (sqrt(1 - r^2) eps + r n).
    """
    kept = state - (1.0 - level) * clean
    return (1.0 - level) * clean + math.sqrt(1.0 - share**2) * kept + level * share * noise


def repaint(
    state: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], level: float, noise: torch.Tensor
) -> torch.Tensor:
    """Replaces the measured part of a state by the noised measurement.

    Args:
        state (`torch.Tensor`): x_t.
        project (`Callable`): Affine: replaces the measured part of a picture, P x, by the measurement's, A^+ y.
        level (`float`): t.
        noise (`torch.Tensor`): n, unit noise.

    Returns:
        `torch.Tensor`: (I - P) x_t + (1 - t) A^+ y + t P n, which is project(x_t) + t (n - project(n)).
    """
    return project(state) + level * (noise - project(noise)) if level else project(state)


def adam_steps(
    state: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], rate: float, steps: int
) -> torch.Tensor:
    """Steps of Adam that start from no history, as the authors' code takes them at every timestep.

    Args:
        state (`torch.Tensor`): Where it starts.
        gradient (`Callable`): The gradient at a state.
        rate (`float`): Learning rate.
        steps (`int`): Number of steps.

    Returns:
        `torch.Tensor`: Where it ends.
    """
    first, second = torch.zeros_like(state), torch.zeros_like(state)
    for number in range(1, steps + 1):
        found = gradient(state)
        first, second = 0.9 * first + 0.1 * found, 0.999 * second + 0.001 * found.square()
        mean, spread = first / (1 - 0.9**number), (second / (1 - 0.999**number)).sqrt()
        state = state - rate * mean / (spread + 1e-8)
    return state


class FlowSteeringMixin:
    """An objective, the settings of steering, and clear answers to wrong calls, for a scheduler of flow models.

    A subclass registers the settings that `_start` reads and calls it at the end of its constructor, and makes its step with
    `_prepared` and `_settled` around the parent's. Without an objective it is the parent, bit for bit.
    """

    config: Any
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    step_index: int | None
    begin_index: int | None

    # Every second evaluation of Heun belongs to a step.
    _evaluations_per_step = 1
    # Whether noise may be exchanged between two steps: not where the next one goes back to the state before.
    _may_renoise = True
    _data_steps: tuple[str, ...] = DATA_STEPS
    # What pipelines of diffusion models ask of a scheduler and those of flow models do not.
    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sample as the network takes it: as it is."""
        return sample

    def _start(self) -> None:
        config = self.config
        self._objective: Any = None
        self._steering_generator: Generators = None
        self._ready = False
        rate, ramp = config.learning_rate, config.learning_rate_ramp
        for name, value, high in (("learning_rate", rate, math.inf), ("learning_rate_ramp", ramp, 1.0)):
            if not _is_number(value) or not 0 <= value <= high:
                raise ValueError(f"{name}={value!r} is out of range; give a number {_between(0, high)}")
        steps = config.optimization_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"optimization_steps={steps!r} is not a number of steps; give an int of at least 1")
        start, stop = config.steer_start, config.steer_stop
        if not (_is_number(start) and _is_number(stop) and 0 <= start < stop <= 1):
            raise ValueError(
                f"steer_start={start!r}, steer_stop={stop!r} is no part of a run; give shares of it with 0 <= steer_start < "
                "steer_stop <= 1"
            )
        if config.data_step is not None:
            check_choice("data_step", config.data_step, self._data_steps)
        share = config.get("renoise")
        if share is not None and (not _is_number(share) or not 0 <= share <= 1):
            raise ValueError(f"renoise={share!r} is out of range; give a number from 0 to 1, or None")
        check_choice("optimizer", config.optimizer, OPTIMIZERS)
        if config.optimizer == "adam" and config.data_step != "grad":
            raise ValueError(f"optimizer='adam' with data_step={config.data_step!r}: use data_step='grad' with it")

    # -- the objective ---------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Any:
        """What samples are steered towards; `None` where they are not."""
        return self._objective

    def set_objective(self, objective: Objective | None, generator: Generators = None) -> None:
        """Says what samples are steered towards, from the next step on.

        It is not part of the configuration, and not saved.

        Args:
            objective ([`Objective`], *optional*): See [`diffusers_ext.steering`]. `None` ends the steering.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise of `renoise` and
                `"repaint"`, where the pipeline gives `step` none. By default it is drawn from the global one.

        Raises:
            TypeError: If it is not an objective, or `generator` is not one.
            ValueError: If it has not what `data_step` needs.
        """
        if objective is not None:
            if not callable(getattr(objective, "grad", None)):
                raise TypeError(
                    f"objective={type(objective).__name__} has no method grad; give one of diffusers_ext.steering, which has "
                    "FunctionObjective for a function"
                )
            needed = {"prox": "prox", "project": "project", "repaint": "project"}.get(self.config.data_step)
            if needed and not callable(getattr(objective, needed, None)):
                raise ValueError(
                    f"data_step={self.config.data_step!r} needs {needed} of the objective, and {type(objective).__name__} has "
                    "none; use data_step='grad'"
                )
        check_generator(generator, len(generator) if isinstance(generator, list) else 1)
        self._objective, self._steering_generator = objective, generator

    # -- a step ----------------------------------------------------------------------------------------------------

    def _check_steps(self, num_inference_steps: Any, *lists: Any) -> int | None:
        """The number of steps, or nothing where a list of levels says it."""
        given = [values for values in lists if values is not None]
        if num_inference_steps is None and given:
            if any(len(values) == 0 for values in given):
                raise ValueError(
                    "num_inference_steps=None with an empty list of sigmas or timesteps; give at least one"
                )
            return None
        return check_steps(num_inference_steps, self.config.num_train_timesteps)

    def _laid(self) -> None:
        """Called when a run is laid."""
        self._ready = bool(((self.sigmas >= 0) & (self.sigmas <= 1)).all())
        if not self._ready:
            raise ValueError(
                f"num_inference_steps={len(self.timesteps)} with these settings gives levels that are not from 0 to 1; use other "
                "sigmas or another number of steps"
            )

    def _checked(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> int:
        """The number of the evaluation, once what goes in is sound."""
        check_states(model_output, sample)
        if not self._ready:
            raise ValueError(f"timestep={timestep!r}: no steps are laid yet; call set_timesteps first")
        index = self.step_index if self.step_index is not None else self.begin_index
        if index is None:
            if not isinstance(timestep, (int, float)) and not (
                isinstance(timestep, torch.Tensor) and timestep.numel() == 1
            ):
                raise TypeError(f"timestep={timestep!r} is not a number; give one of .timesteps")
            if not bool((self.timesteps == float(timestep)).any()):
                raise ValueError(
                    f"timestep={float(timestep):g} is not one of the {len(self.timesteps)} of this run; give one of .timesteps"
                )
            # The parent finds it again and counts from there; until the step is made, nothing has begun.
            index = int(self.index_for_timestep(float(timestep)))  # type: ignore[attr-defined]
        if not 0 <= index < len(self.timesteps):
            raise ValueError(
                f"timestep={timestep!r}: all {len(self.timesteps)} steps are done; call set_timesteps first"
            )
        if sample.numel():
            check_inputs(model_output, sample, index, timestep)
        return index

    def _acts(self, index: int) -> bool:
        """Whether an evaluation lies in a step that is steered: any that the shares of the run touch."""
        if self._objective is None or not self.config.learning_rate:
            return False
        per_step = self._evaluations_per_step
        count = math.ceil(len(self.timesteps) / per_step)
        first = math.floor(self.config.steer_start * count + 1e-9)
        last = math.ceil(self.config.steer_stop * count - 1e-9)
        return first <= index // per_step < last and self._level(index) > 0

    def _level(self, index: int) -> float:
        """t of a node, from 1 (noise) to 0 (clean)."""
        value = float(self.sigmas[index])
        return 1.0 - value if self.config.get("invert_sigmas") else value

    def _ahead(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """How far a node is from the clean end, as the velocity counts it: x0 = x - ahead v."""
        value = self.sigmas[index].to(like.device)
        # Inverted levels run upwards, and so does the velocity.
        return value - 1.0 if self.config.get("invert_sigmas") else value

    def _data_step(self) -> str:
        if self.config.data_step is not None:
            return str(self.config.data_step)
        return "prox" if callable(getattr(self._objective, "prox", None)) else "grad"

    def _share(self) -> float:
        """r of `renoise`. Left open, it is 1 for the steps that choose an estimate, which need it on operators that blur."""
        stochastic = self.config.get("stochastic_sampling") or self.config.get("algorithm_type", "").startswith("sde")
        if not self._may_renoise or stochastic:
            return 0.0
        given = self.config.get("renoise")
        return float(given) if given is not None else float(self._data_step() in ("prox", "project"))

    def _prepared(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int, sigma: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity and state in float32, after the objective has pulled the estimate.

        Args:
            model_output (`torch.Tensor`): v.
            sample (`torch.Tensor`): x_t.
            index (`int`): Number of the evaluation.
            sigma (`torch.Tensor`, *optional*): t of each value, where it is not that of the evaluation; only for `"grad"`.
        """
        velocity, state = model_output.float(), sample.float()
        kind = self._data_step() if sigma is None else "grad"
        ahead = self._ahead(index, state) if sigma is None else sigma
        level = self._level(index)
        rate = self.config.learning_rate
        if self.config.learning_rate_ramp:
            rate *= min(1.0, (1.0 - level) / self.config.learning_rate_ramp)
        if kind == "repaint" or rate == 0.0:
            return velocity, state
        if kind == "grad":

            def gradient(at: torch.Tensor) -> torch.Tensor:
                return self._asked("grad", index, at - ahead * velocity)

            steps, moved = self.config.optimization_steps, state
            if self.config.optimizer == "adam":
                moved = adam_steps(state, gradient, rate, steps)
            else:
                for _ in range(steps):
                    moved = moved - rate * gradient(moved)
            return velocity, moved
        extra = (estimate_variance(level),) if kind == "prox" else ()
        clean = start = state - ahead * velocity
        for _ in range(self.config.optimization_steps):
            clean = torch.lerp(clean, self._asked(kind, index, clean, *extra), rate)
        return velocity - (clean - start) / ahead, state

    def _asked(self, method: str, index: int, clean: torch.Tensor, *extra: float) -> torch.Tensor:
        """What the objective answers, once it is sound."""
        objective = self._objective
        if callable(getattr(objective, "at", None)):
            per_step = self._evaluations_per_step
            objective = objective.at(index // per_step / math.ceil(len(self.timesteps) / per_step))
        answer, name = getattr(objective, method)(clean, *extra), type(objective).__name__
        if not isinstance(answer, torch.Tensor) or answer.shape != clean.shape:
            found = f"shape {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else type(answer).__name__
            raise ValueError(
                f"objective={name}: {method} returned {found} at step {index}; it must return {tuple(clean.shape)}, the shape of "
                "the sample"
            )
        if not is_finite(answer):
            raise ValueError(
                f"objective={name}: {method} returned values that are not finite at step {index}; check the objective, or lower "
                "learning_rate"
            )
        return answer.to(clean)

    def _settled(self, state: torch.Tensor, clean: torch.Tensor, index: int, generator: Generators) -> torch.Tensor:
        """The state after a step, with other noise or its measured part replaced.

        Args:
            state (`torch.Tensor`): What the parent's step leads to, float32.
            clean (`torch.Tensor`): The estimate that it leads along.
            index (`int`): Number of the evaluation that the step ended with.
            generator (`torch.Generator` or list of them, *optional*): Source of noise.
        """
        level, share = self._level(index + 1), self._share()
        if self._data_step() == "repaint":
            noise = drawn_noise(state, generator) if level else state
            return repaint(state, lambda picture: self._asked("project", index, picture), level, noise)
        return renoise(state, clean, level, share, drawn_noise(state, generator)) if share and level else state

    def _source(self, generator: Generators) -> Generators:
        return self._steering_generator if generator is None else generator

    def _answer(self, result: Any, state: torch.Tensor, index: int, timestep: Any, return_dict: bool) -> Any:
        """The next sample, checked, in what the parent returns it in."""
        if state.numel():
            check_result(state, index, timestep)
        return type(result)(prev_sample=state) if return_dict else (state,)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _between(low: float, high: float) -> str:
    return f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
