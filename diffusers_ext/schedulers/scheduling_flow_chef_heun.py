"""FlowChef on Heun's scheduler of flow models.

The equations are those of `flow_steering`. A step of Heun is made of two velocities, v of the state x and w of where v leads,

    x  <-  x + (t' - t) (v + w) / 2

`"prox"` and `"project"` choose an estimate for each of the two. `"grad"` moves the state before the first; the second is of a
state that is given up again, so that moving it would change nothing. Noise is exchanged, and the measured part replaced, after the
second.
"""

from typing import Any

import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .flow_steering import FlowSteeringMixin
from .noise import Generators


__all__ = ["FlowChefHeunScheduler", "SchedulerMixin"]


class FlowChefHeunScheduler(FlowSteeringMixin, FlowMatchHeunDiscreteScheduler):
    """`FlowMatchHeunDiscreteScheduler` whose samples an objective steers; without one it is the parent, bit for bit.

    Args:
        learning_rate (`float`, *optional*, defaults to 1.0), optimization_steps (`int`, *optional*, defaults to 1), steer_start
            (`float`, *optional*, defaults to 0.0), steer_stop (`float`, *optional*, defaults to 1.0), data_step (`str`,
            *optional*), renoise (`float`, *optional*), learning_rate_ramp (`float`, *optional*, defaults to 0.0), optimizer
            (`str`, *optional*, defaults to `"sgd"`): As of [`FlowChefScheduler`].

    All other arguments are those of the parent, with its defaults.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext import FlowChefHeunScheduler
        from diffusers_ext.steering import MeasurementObjective, SuperResolution

        scheduler = FlowChefHeunScheduler(data_step="grad")
        scheduler.set_objective(MeasurementObjective(SuperResolution(4), torch.rand(1, 3, 2, 2)))
        scheduler.set_timesteps(10)
        sample = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:  # 19: each step but the last asks the network twice
            sample = scheduler.step(sample, t, sample).prev_sample
        ```
    """

    _evaluations_per_step = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        learning_rate: float = 1.0,
        optimization_steps: int = 1,
        steer_start: float = 0.0,
        steer_stop: float = 1.0,
        data_step: str | None = None,
        renoise: float | None = None,
        learning_rate_ramp: float = 0.0,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)
        self._start()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As the parent's; refuses what would lay no steps."""
        super().set_timesteps(self._check_steps(num_inference_steps), device=device)
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
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """As the parent's, with the objective's pull; what is not finite or does not fit is refused.

        Args:
            model_output (`torch.Tensor`): The velocity that the network predicts for `sample`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample.
            generator (`torch.Generator`, *optional*): Source of noise; that of `set_objective` by default.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `SchedulerOutput` or `tuple`: The next sample, in the dtype of `model_output`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite, or the objective answers with what is not.
        """
        index = self._checked(model_output, timestep, sample)
        first, acts = self.state_in_first_order, self._acts(index)
        further: dict[str, Any] = {
            "s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise,
            "generator": self._source(generator) if acts else generator,
        }  # fmt: skip
        velocity, state, begun = model_output, sample, None if first else self.prev_derivative
        if acts and (first or self._data_step() != "grad"):
            velocity, state = self._prepared(model_output, sample, index)
        result = super().step(velocity, timestep, state, **further)
        following = result.prev_sample
        if acts and (begun is not None or index + 1 == len(self.timesteps)):
            following = following.float()
            slope = velocity.float() if begun is None else 0.5 * (begun + velocity.float())
            clean = following - self._ahead(index + 1, following) * slope
            following = self._settled(following, clean, index, further["generator"])
        return self._answer(result, following.to(model_output.dtype), index, timestep, return_dict)
