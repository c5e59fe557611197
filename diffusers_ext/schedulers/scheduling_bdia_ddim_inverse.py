"""The inverse of BDIA-DDIM: from a picture to the pair of states from which sampling leads back to it.

Exact Diffusion Inversion via Bi-directional Integration Approximation, ECCV 2024, arXiv 2307.10829; the equations are at the head
of `scheduling_bdia_ddim`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .multistep import SchedulerMixin, register_to_config
from .scheduling_bdia_ddim import BidirectionalScheduler, check_gamma


__all__ = ["BDIADDIMInverseScheduler", "SchedulerMixin"]

# 1 / gamma per step is what inversion amplifies by: below this nothing is left after 50 steps.
LOWEST_GAMMA = 0.9


class BDIADDIMInverseScheduler(BidirectionalScheduler):
    """Adds noise to a picture so that [`BDIADDIMScheduler`] with the same settings takes it away again, exactly.

    `timesteps` ascend. The first is asked for the picture itself, whose level has no timestep: 0 stands for it. After the last
    step `pair` holds the two noisiest states. Invert with guidance 1, or at most 3: at 7.5 the states leave the range
    that the network knows, although the way back is still exact.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        gamma (`float`, *optional*, defaults to 0.96): From 0.9 to 1; errors grow by 1 / gamma at each step. Sampling must use the
            same.
        set_alpha_to_one (`bool`, *optional*, defaults to `True`): Whether the picture is at the level without noise instead of
            the lowest of the training process.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"`, `"v_prediction"` or
            `"flow_prediction"`.
        timestep_spacing (`str`, *optional*, defaults to `"leading"`): `"linspace"`, `"leading"` or `"trailing"`.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether the training process ends in pure noise.
        flow_shift (`float`, *optional*, defaults to 1.0): Shift of the times of a flow model towards noise.
        use_dynamic_shifting (`bool`, *optional*, defaults to `False`): Whether the pipeline gives the shift as `mu`.
        time_shift_type (`str`, *optional*, defaults to `"exponential"`): How `mu` shifts, or `"linear"`.
        shift_terminal (`float`, *optional*): Last time of a flow run before 0; others are stretched towards it.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers import BDIADDIMInverseScheduler

        scheduler = BDIADDIMInverseScheduler(gamma=0.96)
        scheduler.set_timesteps(10)
        sample = torch.zeros(1, 4, 8, 8)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.1 * sample + 0.2, timestep, sample).prev_sample
        noisiest, next_noisiest = scheduler.pair
        assert torch.equal(noisiest, sample)
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
        gamma: float = 0.96,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        check_gamma(gamma, LOWEST_GAMMA, ": an inversion multiplies errors by 1 / gamma at each step")
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays the levels of a run and forgets the one before. The arguments are those of the sampling run to be inverted.

        Args:
            num_inference_steps (`int`, *optional*): Steps, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.
            timesteps (`Sequence[float]`, *optional*): The timesteps of the sampling run, descending whole numbers.
            sigmas (`Sequence[float]`, *optional*): Of a flow model: the times of the sampling run, before the shift.
            mu (`float`, *optional*): Shift of a flow model with `use_dynamic_shifting`.

        Raises:
            ValueError: If the arguments do not describe a run.
        """
        if self.config.prediction_type == "sample" and self._clean_level[1] == 0:
            raise ValueError(
                "set_alpha_to_one=True with prediction_type='sample': a clean picture says nothing of its noise; use "
                "set_alpha_to_one=False in both schedulers"
            )
        grid, levels = self._walked(num_inference_steps, timesteps, sigmas, mu)
        self.num_inference_steps = len(grid)
        ascending = np.concatenate([np.zeros(1, grid.dtype), grid[:0:-1]])
        self._lay_levels(torch.from_numpy(ascending).to(device), [self._clean_level, *reversed(levels[1:])], levels[0])

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_N, z_{N-1}), float32 or better, for [`BDIADDIMScheduler.set_initial_pair`].

        Raises:
            ValueError: If the run is not at its end.
        """
        if self._newest is None or self._neighbour is None or self._step_index != len(self._times):
            raise ValueError(
                f"step_index={self._step_index} of {len(self._times)}: the pair is there after the last step; run all of them"
            )
        return self._newest, self._neighbour

    def _both_ways(self, onward: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        if self._neighbour is None:
            return onward
        return onward.add_(self._neighbour.to(onward) - back, alpha=1.0 / self.config.gamma)
