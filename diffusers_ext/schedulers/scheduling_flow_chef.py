"""FlowChef on the Euler scheduler of flow models: SD3, Flux, Qwen-Image, Wan, Lumina and the like.

Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, 2024, arXiv 2412.00100. The equations are those
of `flow_steering`; the step between them is Euler's, x <- x + (t' - t) v.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .flow_config import FlowMatchConfigMixin
from .flow_steering import FlowSteeringMixin
from .noise import Generators


__all__ = ["FlowChefScheduler", "SchedulerMixin"]


class FlowChefScheduler(FlowMatchConfigMixin, FlowSteeringMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` whose samples an objective steers; without one it is the parent, bit for bit.

    `FlowChefScheduler.from_config(pipe.scheduler.config)` fits any pipeline that runs the parent, and
    [`diffusers_ext.steering.steer`] puts it in for the time of a `with` block.

    Args:
        learning_rate (`float`, *optional*, defaults to 1.0):
            How far the estimate of the clean sample moves: for `"grad"` the paper's, where the objectives of this package are
            scaled so that 0 to 2 is stable at any batch and resolution; for `"prox"` and `"project"` a relaxation, 1 goes all
            the way. 0 does not steer.
        optimization_steps (`int`, *optional*, defaults to 1):
            Moves in each step; the network is not asked again.
        steer_start (`float`, *optional*, defaults to 0.0), steer_stop (`float`, *optional*, defaults to 1.0):
            The part of the run that is steered, as shares of its steps. Before the end, the measurement is released.
        data_step (`str`, *optional*):
            `"grad"`, `"prox"`, `"project"` or `"repaint"`, see `flow_steering`. By default `"prox"` where the objective has one, and
            `"grad"` elsewhere.
        renoise (`float`, *optional*):
            Share of the noise that is drawn anew after each steered step, from 0 to 1. By default 1 for `"prox"` and `"project"`, 0
            for the others.
        learning_rate_ramp (`float`, *optional*, defaults to 0.0):
            Part of the noise range, from pure noise downwards, over which the learning rate rises from 0.
        optimizer (`str`, *optional*, defaults to `"sgd"`):
            `"sgd"`, or `"adam"`, begun anew in each step as in the authors' code for UNets; only with `data_step="grad"`.

    All other arguments are those of the parent, with its defaults. The correction is made in float32 whatever the sample's dtype.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext import FlowChefScheduler
        from diffusers_ext.steering import InpaintMask, MeasurementObjective

        known = torch.ones(8, 8)
        known[2:6, 2:6] = 0
        picture = torch.rand(1, 3, 8, 8)
        operator = InpaintMask(known)

        scheduler = FlowChefScheduler(shift=3.0)
        scheduler.set_objective(MeasurementObjective(operator, operator.A(picture)))
        scheduler.set_timesteps(20)
        sample = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:
            velocity = sample  # a network, with t
            sample = scheduler.step(velocity, t, sample).prev_sample
        assert (operator.A(sample) - operator.A(picture)).abs().max() < 0.1
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
        learning_rate: float = 1.0,
        optimization_steps: int = 1,
        steer_start: float = 0.0,
        steer_stop: float = 1.0,
        data_step: str | None = None,
        renoise: float | None = None,
        learning_rate_ramp: float = 0.0,
        optimizer: str = "sgd",
    ) -> None:
        # Every argument is passed on: the parent registers its own defaults for those that are not.
        super().__init__(
            num_train_timesteps=num_train_timesteps, shift=shift, use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift, max_shift=max_shift, base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len, invert_sigmas=invert_sigmas, shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas, use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas, time_shift_type=time_shift_type, stochastic_sampling=stochastic_sampling,
        )  # fmt: skip
        self._start()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """As the parent's; refuses what would lay no steps."""
        count = self._check_steps(num_inference_steps, sigmas, timesteps)
        super().set_timesteps(count, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
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
        """As the parent's, with the objective's pull; what is not finite or does not fit is refused.

        Args:
            model_output (`torch.Tensor`): The velocity that the network predicts for `sample`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample.
            generator (`torch.Generator`, *optional*): Source of noise; that of `set_objective` by default.
            per_token_timesteps (`torch.Tensor` of shape `(batch, tokens)`, *optional*): Timesteps of the tokens, where each has
                its own. They are steered by `"grad"`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `SchedulerOutput` or `tuple`: The next sample, in the dtype of `model_output`.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite, or the objective answers with what is not.
        """
        index = self._checked(model_output, timestep, sample)
        acts = self._acts(index)
        further: dict[str, Any] = {
            "s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise,
            "generator": self._source(generator) if acts else generator, "per_token_timesteps": per_token_timesteps,
        }  # fmt: skip
        velocity, state = model_output, sample
        if acts and per_token_timesteps is not None:
            velocity, state = self._of_tokens(model_output, sample, index, per_token_timesteps)
        elif acts:
            velocity, state = self._prepared(model_output, sample, index)
        result = super().step(velocity, timestep, state, **further)
        following = result.prev_sample
        if acts and per_token_timesteps is None:
            clean = following - self._ahead(index + 1, following) * velocity
            following = self._settled(following, clean, index, further["generator"]).to(model_output.dtype)
        return self._answer(result, following, index, timestep, return_dict)

    def _of_tokens(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int, per_token_timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.data_step not in (None, "grad"):
            raise ValueError(
                f"data_step={self.config.data_step!r} with per_token_timesteps: tokens at different levels have no common "
                "estimate; use data_step='grad'"
            )
        sigma = per_token_timesteps.to(sample.device)[..., None] / self.config.num_train_timesteps
        return self._prepared(model_output, sample, index, sigma)
