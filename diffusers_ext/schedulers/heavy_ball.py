"""Polyak's heavy ball put into the multistep solvers of diffusers.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2023, arXiv 2307.11118. A solver that integrates the data
prediction moves from s to t, with lambda = log(alpha / sigma) and h = lambda_t - lambda_s, by

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) g          g: a mixture of data predictions, whose weights sum to 1

and one that integrates the noise prediction by x_t = (alpha_t / alpha_s) x_s - sigma_t (e^h - 1) g. Heavy ball replaces g by
v = (1 - b) v' + b g, where v' is the v of the step before.

At b = 1 the step is that of diffusers, bit for bit. Below it the step is made here, of the weights in `exponential_weights`, in a
part of the time that diffusers' takes. Where a setting changes what g is made of, such as thresholding, g is read off the
result of diffusers' step instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .adams_bashforth import check_damping
from .exponential_weights import alpha_and_sigma, conversion, transfer
from .flow_config import is_flow_config, translated_flow_config
from .multistep import (
    PREDICTION_TYPES,
    check_inputs,
    check_result,
    check_states,
    check_steps,
)


class HeavyBallMixin:
    """Momentum and clear answers to wrong calls, for a subclass of a DPM-Solver or UniPC scheduler of diffusers."""

    config: Any
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    num_inference_steps: int | None
    step_index: int | None
    model_outputs: list[Any]
    lower_order_nums: int

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a flow-matching scheduler is understood as well."""
        if is_flow_config(config):
            kwargs = {**translated_flow_config(config), "use_flow_sigmas": True} | kwargs
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def _start(self, damping: float) -> None:
        check_damping(damping)
        self._velocities: dict[str, torch.Tensor] = {}
        self._shape: torch.Size | None = None

    def _lay(self, num_inference_steps: Any, mu: float | None, **arguments: Any) -> None:
        """`set_timesteps` of the parent, refused where it would lay no or repeated nodes."""
        self._velocities, self._shape = {}, None
        spacing = self.config.timestep_spacing
        if self.config.use_dynamic_shifting:
            arguments["mu"] = mu  # pipelines hand it over in any case
        if num_inference_steps is not None:
            num_inference_steps = check_steps(num_inference_steps, self.config.num_train_timesteps)
        if spacing not in ("linspace", "leading", "trailing"):
            raise ValueError(f"timestep_spacing={spacing!r} is not known; use one of linspace, leading, trailing")
        super().set_timesteps(num_inference_steps, **arguments)  # type: ignore[misc]
        # A repeated first timestep makes the parents begin with the second step, and run over the end.
        repeated = bool((self.timesteps[1:] == self.timesteps[0]).any())
        if repeated or bool((self.sigmas[:-1].diff() >= 0).any()):
            self.num_inference_steps = None
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r} with timestep_spacing={spacing!r} repeats a node; use fewer steps"
            )

    def _checked_step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **arguments: Any) -> Any:
        """`step` of the parent between checks of what goes in and what comes out."""
        check_states(model_output, sample)
        if self.num_inference_steps is None:
            raise ValueError(f"timestep={timestep!r}: no steps are laid yet; call set_timesteps first")
        if self.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={self.config.prediction_type!r} is not known; use one of {', '.join(PREDICTION_TYPES)}"
            )
        if self._shape is not None and sample.shape != self._shape:
            raise ValueError(
                f"sample of shape {tuple(sample.shape)} differs from the {tuple(self._shape)} that this run began with; give "
                "that shape, or call set_timesteps first"
            )
        index = self.step_index or 0
        if index >= len(self.timesteps):
            raise ValueError(
                f"timestep={timestep!r}: all {len(self.timesteps)} steps are done; call set_timesteps first"
            )
        check_inputs(model_output, sample, index, timestep)
        if self.config.damping == 1.0 or not self._is_plain():
            result = super().step(model_output, timestep, sample, **arguments)  # type: ignore[misc]
        else:
            result = self._own_step(model_output, timestep, sample, arguments["return_dict"])
        check_result(result[0], index, timestep)
        self._shape = sample.shape
        return result

    # -- a step without diffusers' ---------------------------------------------------------------------------------

    def _is_plain(self) -> bool:
        """Whether the settings leave g a mixture of predictions as they are."""
        raise NotImplementedError(f"{type(self).__name__} does not define _is_plain")

    @property
    def _of_noise(self) -> bool:
        """Whether predictions of the noise are integrated."""
        raise NotImplementedError(f"{type(self).__name__} does not define _of_noise")

    @property
    def _is_flow(self) -> bool:
        return bool(self.config.use_flow_sigmas)

    def _integrated(
        self, newest: torch.Tensor, sample: torch.Tensor, nodes: Sequence[float], index: int
    ) -> torch.Tensor:
        """The next sample, from the newest prediction and `model_outputs` before it; a new tensor."""
        raise NotImplementedError(f"{type(self).__name__} does not define _integrated")

    def _own_step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        index = self.step_index or 0
        nodes = self.sigmas.tolist()
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        output, state = model_output.to(dtype), sample.to(dtype)
        of_sample, of_output = conversion(self.config.prediction_type, nodes[index], self._is_flow, self._of_noise)
        newest = torch.mul(output, of_output)
        if of_sample:
            newest.add_(state, alpha=of_sample)
        following = self._integrated(newest, state, nodes, index).to(sample.dtype)
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def _moved(
        self,
        name: str | None,
        sample: torch.Tensor,
        predictions: Sequence[torch.Tensor],
        weights: Sequence[float],
        start: float,
        end: float,
        divided: bool = False,
    ) -> torch.Tensor:
        """A new tensor: where the mixture of predictions, with momentum, leads.

        Args:
            name (`str`, *optional*): Which velocity; without one there is no momentum.
            sample (`torch.Tensor`): Where the step starts.
            predictions (`Sequence[torch.Tensor]`): m_j.
            weights (`Sequence[float]`): w_j.
            start (`float`): Level of the start.
            end (`float`): Level of the end.
            divided (`bool`, *optional*, defaults to `False`): Whether the velocity is kept divided by sigma_t.
        """
        kept, factor = transfer(start, end, self._is_flow, self._of_noise)
        following = torch.mul(sample, kept)
        if name is None:
            for prediction, weight in zip(predictions, weights, strict=True):
                following.add_(prediction, alpha=factor * weight)
            return following
        scale = alpha_and_sigma(end, self._is_flow)[1] or 1.0 if divided else 1.0
        velocity, damping = self._velocities.get(name), self.config.damping
        if velocity is None:
            velocity, damping = torch.zeros_like(sample), 1.0
            self._velocities[name] = velocity
        else:
            velocity.mul_(1.0 - damping)
        for prediction, weight in zip(predictions, weights, strict=True):
            velocity.add_(prediction, alpha=damping * weight / scale)
        return following.add_(velocity, alpha=factor * scale)

    # -- a step with diffusers' ------------------------------------------------------------------------------------

    def _damped(
        self, name: str, result: torch.Tensor, sample: torch.Tensor, step: int, divided: bool = False
    ) -> torch.Tensor:
        """The result of a solver's step with momentum.

        Args:
            name (`str`): Which velocity.
            result (`torch.Tensor`): What the solver makes of `sample`.
            sample (`torch.Tensor`): Where the step starts.
            step (`int`): Number of the step.
            divided (`bool`, *optional*, defaults to `False`): Whether the velocity is kept divided by sigma_t.
        """
        damping = self.config.damping
        if damping == 1.0:
            return result
        start, end = self.sigmas[step : step + 2].tolist()
        kept, factor = transfer(start, end, self._is_flow, self._of_noise)
        if factor == 0.0:
            return result
        if divided:
            factor *= alpha_and_sigma(end, self._is_flow)[1] or 1.0
        velocity = torch.add(result, sample, alpha=-kept).div_(factor)
        if name in self._velocities:
            velocity = torch.lerp(self._velocities[name], velocity, damping)
        self._velocities[name] = velocity
        return torch.add(kept * sample, velocity, alpha=factor)
