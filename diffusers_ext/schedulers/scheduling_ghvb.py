"""GHVB: Adams-Bashforth with momentum, for few steps at high guidance.

Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, Wizadwongsa et al., ICLR 2024, arXiv 2307.11118. With
X = x / alpha, s = sigma / alpha, e_i the noise prediction (or the velocity of a flow model) and b the damping:

    GHVB       v_i = (1 - b) v_{i-1} + b e_i        u_i = sum_j c_j(b) v_{i-j}
    HB         g_i = AB-k(e)                        u_i = v_i = (1 - b) v_{i-1} + b g_i
    Nesterov   as HB                                u_i = (1 - b) v_i + b g_i
    step       X_{i+1} = X_i + (s_{i+1} - s_i) u_i

The weights c_j, their order and where they are stable: `adams_bashforth`. GHVB keeps the order of its Adams-Bashforth and
gains at most the stability of the order below; HB gains more and falls to order one.
"""

import numpy as np
import torch

from .adams_bashforth import (
    MOMENTUM_TYPES,
    check_damping,
    check_order,
    ghvb_weights,
    variable_ghvb_weights,
)
from .multistep import Levels, MultistepScheduler, SchedulerMixin, register_to_config


__all__ = ["GHVBScheduler", "SchedulerMixin"]


class GHVBScheduler(MultistepScheduler):
    """A deterministic multistep scheduler with momentum; one network evaluation a step.

    Momentum widens the range of step lengths in which the integration does not oscillate. It acts on what the pipeline hands
    over, so after guidance. `GHVBScheduler.from_config(pipe.scheduler.config)` fits diffusion models and flow models.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        solver_order (`int`, *optional*, defaults to 4): Values that a step uses, from 1 to 8. The first steps use fewer.
        damping (`float`, *optional*, defaults to 0.5): The paper's beta, in (0, 1]; 1 is no momentum. The authors use 0.8 to
            0.9; docs/samplers.md has the measurement behind 0.5.
        momentum_type (`str`, *optional*, defaults to `"ghvb"`): `"ghvb"`, `"hb"`, `"nesterov"`, or `"none"`, which leaves
            Adams-Bashforth (PLMS; with `variable_step` LMS) whatever `damping` is.
        variable_step (`bool`, *optional*, defaults to `False`): Whether the weights follow the true nodes. Constant-step weights
            are the paper's.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"`, `"v_prediction"`, or
            `"flow_prediction"` for models such as SD3 and Flux.
        timestep_spacing (`str`, *optional*, defaults to `"linspace"`): `"linspace"`, `"leading"` or `"trailing"`, where no
            grid is chosen below.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        use_karras_sigmas (`bool`, *optional*, defaults to `True`): Nodes even in s^(1/7).
        use_exponential_sigmas (`bool`, *optional*, defaults to `False`): Log-uniform nodes.
        use_lu_lambdas (`bool`, *optional*, defaults to `False`): Nodes even in log-SNR: the same, under its other name.
        use_beta_sigmas (`bool`, *optional*, defaults to `False`): Nodes at the quantiles of a beta distribution; needs scipy.
            Flow models have a grid of their own, even in time and shifted, and use none of these four.
        final_sigmas_type (`str`, *optional*, defaults to `"sigma_min"`): Where a diffusion run ends: `"sigma_min"`, the
            lowest level of the training process, or `"zero"`, by one more step of order one.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether the training process ends in pure noise.
        flow_shift (`float`, *optional*, defaults to 1.0): Shift of the times of a flow model towards noise.
        use_dynamic_shifting (`bool`, *optional*, defaults to `False`): Whether the pipeline gives the shift as `mu`.
        time_shift_type (`str`, *optional*, defaults to `"exponential"`): How `mu` shifts, or `"linear"`.
        shift_terminal (`float`, *optional*): Last time of a flow run before 0; others are stretched towards it.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        from diffusers_ext.hub import load_pipeline
        from diffusers_ext.schedulers import GHVBScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = GHVBScheduler.from_config(pipe.scheduler.config)
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
        solver_order: int = 4,
        damping: float = 0.5,
        momentum_type: str = "ghvb",
        variable_step: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = True,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        final_sigmas_type: str = "sigma_min",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        check_order(solver_order, "solver_order")
        check_damping(damping)
        if momentum_type not in MOMENTUM_TYPES:
            raise ValueError(f"momentum_type={momentum_type!r} is not known; use one of {', '.join(MOMENTUM_TYPES)}")
        self._set_up()

    def _forget(self) -> None:
        self._values: list[torch.Tensor] = []  # what the weights are applied to, newest first
        self._visited: list[float] = []  # the s they belong to
        self._velocity: torch.Tensor | None = None  # of heavy ball and Nesterov

    def _advance(self, slope: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        kind, damping = self.config.momentum_type, self.config.damping
        factor = levels.next_alpha * (levels.end - levels.start)
        following = sample * (levels.next_alpha / levels.alpha)
        if levels.end == 0 and not self._is_flow:
            # The jump to the clean picture takes the prediction of it as it is: order one, no momentum.
            return following.add_(slope, alpha=factor)

        # Not the slope itself in either case: it may be memory that the network writes into again.
        value = torch.lerp(self._values[0], slope, damping) if kind == "ghvb" and self._values else slope.clone()
        self._values = [value, *self._values[: self.config.solver_order - 1]]
        self._visited = [levels.start, *self._visited[: self.config.solver_order - 1]]
        weights = self._weights(tuple(self._visited), levels.end, damping if kind == "ghvb" else 1.0)
        if kind in ("ghvb", "none"):
            for weight, value in zip(weights, self._values, strict=True):
                following.add_(value, alpha=factor * weight)
            return following

        direction = self._values[0] * weights[0]
        for weight, value in zip(weights[1:], self._values[1:], strict=True):
            direction.add_(value, alpha=weight)
        last = direction if self._velocity is None else self._velocity
        self._velocity = torch.lerp(last, direction, damping)
        if kind == "nesterov":
            direction = torch.lerp(self._velocity, direction, damping)
        else:
            direction = self._velocity
        return following.add_(direction, alpha=factor)

    def _weights(self, nodes: tuple[float, ...], end: float, damping: float) -> tuple[float, ...]:
        if self.config.variable_step and nodes[0] != end:
            return variable_ghvb_weights(nodes, nodes[0], end, damping)
        return ghvb_weights(len(nodes), damping)
