"""UniPC with heavy-ball momentum.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2023, arXiv 2307.11118, over UniPC, 2023, arXiv 2302.04867.
The equations are those of `heavy_ball`, for the predictor and the corrector each with a velocity of its own; a predictor of order
one has none. The authors' code differs, and `official_momentum=True` does what it does: its predictor momentum is overwritten by
the plain direction right after it is computed, so that only the corrector has any, and velocities are divided by the sigma_t of
their step before they are averaged.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .exponential_weights import log_snr, unipc_weights
from .heavy_ball import HeavyBallMixin


__all__ = ["HeavyBallUniPCMultistepScheduler", "SchedulerMixin"]


class HeavyBallUniPCMultistepScheduler(HeavyBallMixin, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` with momentum against oscillation under high guidance.

    Momentum buys stability with accuracy: below `damping=1` the method is of order one.

    Args:
        damping (`float`, *optional*, defaults to 0.8): The paper's beta, in (0, 1]. 1 is the parent, bit for bit.
        official_momentum (`bool`, *optional*, defaults to `False`): Whether to do as the authors' code; see the head of the
            module.

    All other arguments are those of the parent, with its defaults.

    Raises:
        ValueError: If `damping` is out of range.

    Example:
        ```python
        from diffusers_ext.hub import load_pipeline
        from diffusers_ext.schedulers import HeavyBallUniPCMultistepScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = HeavyBallUniPCMultistepScheduler.from_config(pipe.scheduler.config, damping=0.8)
        image = pipe("a red star on a blue background", num_inference_steps=10).images[0]
        ```
    """

    last_sample: torch.Tensor | None
    this_order: int

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
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
        use_flow_sigmas: bool = False,
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
        damping: float = 0.8,
        official_momentum: bool = False,
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
        self._start(damping)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As the parent's; refuses what would lay no nodes or the same one twice, and forgets the run before."""
        self._lay(num_inference_steps, mu, device=device, sigmas=sigmas)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """As the parent's, with momentum; what is not finite or does not fit is refused."""
        return self._checked_step(model_output, timestep, sample, return_dict=return_dict)

    def multistep_uni_p_bh_update(
        self,
        model_output: torch.Tensor,
        *args: Any,
        sample: torch.Tensor | None = None,
        order: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the parent's, with momentum above order one."""
        result = super().multistep_uni_p_bh_update(model_output, *args, sample=sample, order=order, **kwargs)
        if sample is None or self.step_index is None or order == 1 or self.config.official_momentum:
            return result
        return self._damped("predictor", result, sample, self.step_index)

    def multistep_uni_c_bh_update(
        self,
        this_model_output: torch.Tensor,
        *args: Any,
        last_sample: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the parent's, with momentum."""
        result = super().multistep_uni_c_bh_update(this_model_output, *args, last_sample=last_sample, **kwargs)
        if last_sample is None or self.step_index is None:
            return result
        return self._damped("corrector", result, last_sample, self.step_index - 1, self.config.official_momentum)

    # -- a step without diffusers' ---------------------------------------------------------------------------------

    def _is_plain(self) -> bool:
        return self.config.solver_order >= 1 and not self.config.thresholding and not self.solver_p

    @property
    def _of_noise(self) -> bool:
        return not self.predict_x0

    def _integrated(
        self, newest: torch.Tensor, sample: torch.Tensor, nodes: Sequence[float], index: int
    ) -> torch.Tensor:
        official = self.config.official_momentum
        if index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None:
            predictions = [newest, *self.model_outputs[: -self.this_order - 1 : -1]]
            weights = self._weights(nodes, index, self.this_order, corrector=True)
            start = self.last_sample
            sample = self._moved("corrector", start, predictions, weights, nodes[index - 1], nodes[index], official)
        self.model_outputs = [*self.model_outputs[1:], newest]
        left = len(self.timesteps) - index if self.config.lower_order_final else self.config.solver_order
        self.this_order = min(self.config.solver_order, left, self.lower_order_nums + 1)
        self.last_sample = sample
        predictions = self.model_outputs[: -self.this_order - 1 : -1]
        weights = self._weights(nodes, index + 1, self.this_order, corrector=False)
        name = "predictor" if self.this_order > 1 and not official else None
        return self._moved(name, sample, predictions, weights, nodes[index], nodes[index + 1])

    def _weights(self, nodes: Sequence[float], end: int, order: int, corrector: bool) -> tuple[float, ...]:
        lambdas = tuple(log_snr(nodes[end - j], self._is_flow) for j in range(order + 1))
        return unipc_weights(lambdas, corrector, self.config.solver_type == "bh1", self._of_noise)
