"""Steering in the multistep solvers of diffusers, which run flow models among others.

Their step integrates the estimate x0 = x_t - t v of this step and of those before. Every one of them is what the objective made
of it, since the velocity goes in with which the pulled estimate comes out.
"""

from typing import Any

import torch

from .checks import check_choice
from .flow_config import is_flow_config, translated_flow_config
from .flow_steering import FlowSteeringMixin


SPACINGS = ("linspace", "leading", "trailing")
OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class MultistepFlowSteeringMixin(FlowSteeringMixin):
    """For a subclass of a DPM-Solver or UniPC scheduler of diffusers, restricted to flow models."""

    num_inference_steps: int | None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a flow-matching scheduler is understood as well."""
        if is_flow_config(config):
            kwargs = {**translated_flow_config(config), "use_flow_sigmas": True} | kwargs
        elif hasattr(config, "get"):
            # What another class left at its default is not taken over, and a default of theirs is a diffusion model.
            given = {key: config[key] for key in ("prediction_type", "use_flow_sigmas") if key in config}
            kwargs = given | kwargs
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def _start(self) -> None:
        config = self.config
        if config.prediction_type != "flow_prediction" or not config.use_flow_sigmas:
            raise ValueError(
                f"prediction_type={config.prediction_type!r}, use_flow_sigmas={config.use_flow_sigmas!r}: only flow models are "
                "steered; use prediction_type='flow_prediction' and use_flow_sigmas=True"
            )
        check_choice("timestep_spacing", config.timestep_spacing, SPACINGS)
        for name in OTHER_GRIDS:
            if config.get(name):
                raise ValueError(f"{name}=True lays levels of diffusion models; use flow_shift with flow models")
        super()._start()

    def _lay(self, num_inference_steps: Any, mu: float | None, *lists: Any, **arguments: Any) -> None:
        """`set_timesteps` of the parent, refused where it would lay no or repeated nodes."""
        count = self._check_steps(num_inference_steps, *lists)
        if self.config.use_dynamic_shifting:
            arguments["mu"] = mu  # pipelines hand it over in any case
        super().set_timesteps(count, **arguments)  # type: ignore[misc]
        # A repeated first timestep makes the parents begin with the second step, and run over the end.
        if bool((self.timesteps[1:] == self.timesteps[0]).any()) or bool((self.sigmas[:-1].diff() >= 0).any()):
            self._ready = False
            raise ValueError(f"num_inference_steps={num_inference_steps!r} repeats a node; use fewer steps")
        self._laid()

    def _steered_step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool, **further: Any
    ) -> Any:
        """`step` of the parent with the objective's pull before it and the exchange of noise after it."""
        index = self._checked(model_output, timestep, sample)
        acts, velocity, state = self._acts(index), model_output, sample
        if acts:
            velocity, state = self._prepared(model_output, sample, index)
            if "generator" in further:
                further["generator"] = self._source(further["generator"])
        elif self._objective is not None:
            # Estimates of all steps of a run must have one dtype.
            velocity, state = model_output.float(), sample.float()
        result = super().step(velocity, timestep, state, **further)  # type: ignore[misc]
        following = result.prev_sample
        if acts:
            clean = state - self._ahead(index, state) * velocity
            following = self._settled(following, clean, index, further.get("generator"))
        if self._objective is not None:
            following = following.to(model_output.dtype)
        return self._answer(result, following, index, timestep, return_dict)
