"""Polyak's heavy ball put into the multistep solvers of diffusers.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2023, arXiv 2307.11118. A solver that integrates the data
prediction moves from s to t, with lambda = log(alpha / sigma) and h = lambda_t - lambda_s, by

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) g          g: a mixture of data predictions, whose weights sum to 1

and one that integrates the noise prediction by x_t = (alpha_t / alpha_s) x_s - sigma_t (e^h - 1) g. Heavy ball replaces g by
v = (1 - b) v' + b g, where v' is the v of the step before. Whatever g is made of, it can be read off the result of the solver,
and at b = 1 that result is left as it is, bit for bit.
"""

from typing import Any

import torch

from .adams_bashforth import check_damping
from .multistep import (
    PREDICTION_TYPES,
    check_inputs,
    check_result,
    check_states,
    check_steps,
    is_flow_config,
    translated_flow_config,
)


class HeavyBallMixin:
    """Momentum and clear answers to wrong calls, for a subclass of a DPM-Solver or UniPC scheduler of diffusers."""

    config: Any
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    num_inference_steps: int | None
    step_index: int | None

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
        result = super().step(model_output, timestep, sample, **arguments)  # type: ignore[misc]
        check_result(result[0], index, timestep)
        self._shape = sample.shape
        return result

    def _damped(
        self, name: str, result: torch.Tensor, sample: torch.Tensor, step: int, of_noise: bool, divided: bool = False
    ) -> torch.Tensor:
        """The result of a solver's step with momentum.

        Args:
            name (`str`): Which velocity.
            result (`torch.Tensor`): What the solver makes of `sample`.
            sample (`torch.Tensor`): Where the step starts.
            step (`int`): Number of the step.
            of_noise (`bool`): Whether the solver integrates the noise prediction.
            divided (`bool`, *optional*, defaults to `False`): Whether the velocity is kept divided by sigma_t.
        """
        damping = self.config.damping
        if damping == 1.0:
            return result
        levels = (self._sigma_to_alpha_sigma_t(self.sigmas[i].double()) for i in (step, step + 1))  # type: ignore[attr-defined]
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ((float(a), float(b)) for a, b in levels)
        # alpha_t (1 - e^-h) = alpha_t - alpha_s sigma_t / sigma_s, and the like for noise: no logarithm of 0 at the end.
        if of_noise:
            kept, factor = alpha_t / alpha_s, sigma_t - sigma_s * alpha_t / alpha_s
        else:
            kept, factor = sigma_t / sigma_s, alpha_t - alpha_s * sigma_t / sigma_s
        if factor == 0.0:
            return result
        scale = factor * (sigma_t if divided and sigma_t else 1.0)
        velocity = torch.add(result, sample, alpha=-kept).div_(scale)
        if name in self._velocities:
            velocity = torch.lerp(self._velocities[name], velocity, damping)
        self._velocities[name] = velocity
        return torch.add(kept * sample, velocity, alpha=scale)
