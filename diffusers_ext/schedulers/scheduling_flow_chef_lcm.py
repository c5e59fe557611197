"""FlowChef on the consistency scheduler of flow models.

The equations are those of `flow_steering`. Its step draws all noise anew, x <- (1 - t') x0 + t' n, so that only the estimate x0
carries over, and only it is steered.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .flow_steering import FlowSteeringMixin
from .noise import Generators


__all__ = ["FlowChefLCMScheduler", "SchedulerMixin"]


class FlowChefLCMScheduler(FlowSteeringMixin, FlowMatchLCMScheduler):
    """`FlowMatchLCMScheduler` whose samples an objective steers; without one it is the parent, bit for bit.

    Args:
        learning_rate (`float`, *optional*, defaults to 1.0), optimization_steps (`int`, *optional*, defaults to 1), steer_start
            (`float`, *optional*, defaults to 0.0), steer_stop (`float`, *optional*, defaults to 1.0), data_step (`str`,
            *optional*), learning_rate_ramp (`float`, *optional*, defaults to 0.0), optimizer (`str`, *optional*, defaults to
            `"sgd"`): As of [`FlowChefScheduler`]. There is no `renoise`: all noise is new in any case.

    All other arguments are those of the parent, with its defaults. With `scale_factors`, samples change their size on the way, and
    the objective must take each of them.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext import FlowChefLCMScheduler
        from diffusers_ext.steering import MeasurementObjective, SuperResolution

        scheduler = FlowChefLCMScheduler()
        scheduler.set_objective(MeasurementObjective(SuperResolution(4), torch.rand(1, 3, 2, 2)))
        scheduler.set_timesteps(4)
        sample = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:
            sample = scheduler.step(sample, t, sample).prev_sample
        ```
    """

    _may_renoise = False

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        scale_factors: list[float] | None = None,
        upscale_mode: Literal[
            "nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"
        ] = "bicubic",
        learning_rate: float = 1.0,
        optimization_steps: int = 1,
        steer_start: float = 0.0,
        steer_stop: float = 1.0,
        data_step: str | None = None,
        learning_rate_ramp: float = 0.0,
        optimizer: str = "sgd",
    ) -> None:
        # Every argument is passed on: the parent registers its own defaults for those that are not.
        super().__init__(
            num_train_timesteps=num_train_timesteps, shift=shift, use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift, max_shift=max_shift, base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len, invert_sigmas=invert_sigmas, shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas, use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas, time_shift_type=time_shift_type, scale_factors=scale_factors,
            upscale_mode=upscale_mode,
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
        acts = self._acts(index)
        velocity, state = self._prepared(model_output, sample, index) if acts else (model_output, sample)
        source = self._source(generator) if acts else generator
        result = super().step(velocity, timestep, state, generator=source)
        following = result.prev_sample
        if acts:
            # the noise of the state is new already
            following = self._settled(following, following, index, source)
        return self._answer(result, following.to(model_output.dtype), index, timestep, return_dict)
