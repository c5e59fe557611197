"""FlowChef on UniPC for flow models.

The equations are those of `flow_steering`; the step between them is that of UniPC, 2023, arXiv 2302.04867, which integrates the
estimates x0 that the objective has pulled. Its corrector goes back to the state before, so that what is done to a state between two
steps is lost: there is no `renoise` and no `data_step="repaint"`, and of a move by `"grad"` only the estimate remains.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .multistep_flow_steering import MultistepFlowSteeringMixin


__all__ = ["FlowChefUniPCMultistepScheduler", "SchedulerMixin"]


class FlowChefUniPCMultistepScheduler(MultistepFlowSteeringMixin, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` for flow models whose samples an objective steers; without one it is the parent, bit for bit.

    Args:
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`), use_flow_sigmas (`bool`, *optional*, defaults to
            `True`): No others are taken.
        learning_rate (`float`, *optional*, defaults to 1.0), optimization_steps (`int`, *optional*, defaults to 1), steer_start
            (`float`, *optional*, defaults to 0.0), steer_stop (`float`, *optional*, defaults to 1.0), data_step (`str`,
            *optional*), learning_rate_ramp (`float`, *optional*, defaults to 0.0), optimizer (`str`, *optional*, defaults to
            `"sgd"`): As of [`FlowChefScheduler`], without `"repaint"`.

    All other arguments are those of the parent, with its defaults.

    Raises:
        ValueError: If a setting is out of range, or not one of a flow model.

    Example:
        ```python
        import torch
        from diffusers_ext import FlowChefUniPCMultistepScheduler
        from diffusers_ext.steering import MeasurementObjective, SuperResolution

        scheduler = FlowChefUniPCMultistepScheduler(flow_shift=3.0)
        scheduler.set_objective(MeasurementObjective(SuperResolution(4), torch.rand(1, 3, 2, 2)))
        scheduler.set_timesteps(10)
        sample = torch.randn(1, 3, 8, 8)
        for t in scheduler.timesteps:
            sample = scheduler.step(sample, t, sample).prev_sample
        ```
    """

    _may_renoise = False
    _data_steps = ("grad", "prox", "project")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "flow_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: Literal["bh1", "bh2"] = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],
        solver_p: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = True,
        flow_shift: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential"] = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
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
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, solver_order=solver_order,
            prediction_type=prediction_type, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
            predict_x0=predict_x0, solver_type=solver_type, lower_order_final=lower_order_final,
            disable_corrector=disable_corrector, solver_p=solver_p, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            use_flow_sigmas=use_flow_sigmas, flow_shift=flow_shift, timestep_spacing=timestep_spacing,
            steps_offset=steps_offset, final_sigmas_type=final_sigmas_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr, use_dynamic_shifting=use_dynamic_shifting,
            time_shift_type=time_shift_type, sigma_min=sigma_min, sigma_max=sigma_max, shift_terminal=shift_terminal,
        )  # fmt: skip
        if not predict_x0:
            raise ValueError("predict_x0=False integrates the noise, not the estimate; use predict_x0=True")
        self._start()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As the parent's; refuses what would lay no nodes or the same one twice."""
        self._lay(num_inference_steps, mu, sigmas, device=device, sigmas=sigmas)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """As the parent's, with the objective's pull; what is not finite or does not fit is refused."""
        return self._steered_step(model_output, timestep, sample, return_dict)
