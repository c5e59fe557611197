"""DPM-Solver++ with heavy-ball momentum.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2023, arXiv 2307.11118, over DPM-Solver++, 2022, arXiv
2211.01095. The equations are those of `heavy_ball`. Steps of order one, the first and where diffusers makes it so the last, have no
momentum, as in the authors' code.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from .exponential_weights import dpm_weights, log_snr
from .heavy_ball import HeavyBallMixin


__all__ = ["HeavyBallDPMSolverMultistepScheduler", "SchedulerMixin"]


class HeavyBallDPMSolverMultistepScheduler(HeavyBallMixin, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with momentum against oscillation under high guidance.

    Momentum buys stability with accuracy: below `damping=1` the method is of order one. Use it where the parent, at the number
    of steps you can afford, leaves spots of wrong colour.

    Args:
        damping (`float`, *optional*, defaults to 0.8): The paper's beta, in (0, 1]. 1 is the parent, bit for bit.

    All other arguments are those of the parent, with its defaults. A stochastic `algorithm_type` has no momentum: it needs
    `damping=1`.

    Raises:
        ValueError: If `damping` is out of range, or below 1 for a stochastic solver.

    Example:
        ```python
        from diffusers_ext.hub import load_pipeline
        from diffusers_ext.schedulers import HeavyBallDPMSolverMultistepScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = HeavyBallDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, damping=0.8)
        image = pipe("a red star on a blue background", num_inference_steps=10).images[0]
        ```
    """

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
        algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++",
        solver_type: Literal["midpoint", "heun"] = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: Literal["learned", "learned_range"] | None = None,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential"] = "exponential",
        damping: float = 0.8,
    ) -> None:
        if damping != 1.0 and algorithm_type.startswith("sde"):
            raise ValueError(
                f"damping={damping!r} with algorithm_type={algorithm_type!r}: use damping=1 or a solver of the ODE"
            )
        # Every argument is passed on: the parent registers its own defaults for those that are not.
        super().__init__(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, solver_order=solver_order,
            prediction_type=prediction_type, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
            algorithm_type=algorithm_type, solver_type=solver_type, lower_order_final=lower_order_final,
            euler_at_final=euler_at_final, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            use_lu_lambdas=use_lu_lambdas, use_flow_sigmas=use_flow_sigmas, flow_shift=flow_shift,
            final_sigmas_type=final_sigmas_type, lambda_min_clipped=lambda_min_clipped, variance_type=variance_type,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr, use_dynamic_shifting=use_dynamic_shifting,
            time_shift_type=time_shift_type,
        )  # fmt: skip
        self._start(damping)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """As the parent's; refuses what would lay no nodes or the same one twice, and forgets the run before."""
        self._lay(num_inference_steps, mu, device=device, timesteps=timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """As the parent's, with momentum; what is not finite or does not fit is refused."""
        return self._checked_step(
            model_output, timestep, sample, generator=generator, variance_noise=variance_noise, return_dict=return_dict
        )

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[torch.Tensor], *args: Any, sample: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """As the parent's, with momentum."""
        result = super().multistep_dpm_solver_second_order_update(model_output_list, *args, sample=sample, **kwargs)
        return self._with_momentum(result, sample)

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[torch.Tensor], *args: Any, sample: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """As the parent's, with momentum."""
        result = super().multistep_dpm_solver_third_order_update(model_output_list, *args, sample=sample, **kwargs)
        return self._with_momentum(result, sample)

    def _with_momentum(self, result: torch.Tensor, sample: torch.Tensor | None) -> torch.Tensor:
        if sample is None or self.step_index is None:
            return result
        return self._damped("step", result, sample, self.step_index)

    # -- a step without diffusers' ---------------------------------------------------------------------------------

    def _is_plain(self) -> bool:
        config = self.config
        return config.solver_order in (1, 2, 3) and not config.thresholding and config.variance_type is None

    @property
    def _of_noise(self) -> bool:
        return bool(self.config.algorithm_type == "dpmsolver")

    def _order(self, index: int) -> int:
        """As the parent chooses it: low while the history fills, and at the end where it is told so."""
        config, left = self.config, len(self.timesteps) - index
        short = config.lower_order_final and len(self.timesteps) < 15
        if left == 1 and (short or config.euler_at_final or config.final_sigmas_type == "zero"):
            return 1
        return min(config.solver_order, self.lower_order_nums + 1, 2 if left == 2 and short else 3)

    def _integrated(
        self, newest: torch.Tensor, sample: torch.Tensor, nodes: Sequence[float], index: int
    ) -> torch.Tensor:
        self.model_outputs = [*self.model_outputs[1:], newest]
        order = self._order(index)
        lambdas = tuple(log_snr(nodes[index + 1 - j], self._is_flow) for j in range(order + 1))
        weights = dpm_weights(lambdas, self.config.solver_type == "midpoint", self._of_noise)
        predictions = self.model_outputs[: -order - 1 : -1]
        name = "step" if order > 1 else None
        return self._moved(name, sample, predictions, weights, nodes[index], nodes[index + 1])
