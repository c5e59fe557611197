"""Gamma-sampling of consistency trajectory models: jumps between any two noise levels, with as much fresh noise as wanted.

Consistency Trajectory Models, Kim et al., ICLR 2024, arXiv 2310.02279. In X = x / alpha and s = sigma / alpha the network g jumps from
level t to any lower one u along the ODE:

    G(X, t, u) = (u / t) X + (1 - u / t) g(X, t, u) = g + u e            e = (X - g) / t
    step       X_s = G(X_t, t, sqrt(1 - gamma^2) s) + gamma s z          z ~ N(0, 1)

With the signal and noise level (a_s, b_s) of the next node, b_s / a_s = s, this is

    x_s = a_s g + b_s (sqrt(1 - gamma^2) e + gamma z)

so the variance of the noise is that of the level whatever gamma is. 0 is the deterministic jump, and DDIM for a network that is not told u;
1 jumps to the clean end and adds noise anew, the multistep sampling of consistency models. For a flow model a_s = 1 - t, b_s = t.
"""

import math

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from . import sigma_grids as grids
from .multistep import MultistepScheduler, SchedulerMixin, register_to_config
from .noise import Generators, check_generator, given_noise
from .scheduling_bdia_ddim import Level, check_gamma, mixed, split


__all__ = ["CTMScheduler", "SchedulerMixin"]


class CTMScheduler(MultistepScheduler):
    """Samples networks that jump from one noise level to another, by gamma-sampling; one network evaluation a step.

    The network is told where its jump ends: `target_timesteps` has an entry for each of `timesteps`. Networks without such an input
    can be sampled too: with `gamma=0` this is DDIM, with `gamma=1` the multistep sampling of consistency models.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        gamma (`float`, *optional*, defaults to 0.0): Share of the noise that is drawn anew in each step, from 0, deterministic, to 1.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): In what terms the network gives g: `"epsilon"`, `"sample"`,
            `"v_prediction"` or `"flow_prediction"`.
        timestep_spacing (`str`, *optional*, defaults to `"trailing"`): `"linspace"`, `"leading"` or `"trailing"`, where no grid is
            chosen below.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        use_karras_sigmas (`bool`, *optional*, defaults to `False`): Nodes even in s^(1/7), on which the paper trains.
        use_exponential_sigmas (`bool`, *optional*, defaults to `False`): Log-uniform nodes.
        use_lu_lambdas (`bool`, *optional*, defaults to `False`): Nodes even in log-SNR: the same, under its other name.
        use_beta_sigmas (`bool`, *optional*, defaults to `False`): Nodes at the quantiles of a beta distribution; needs scipy. Flow
            models use none of these four.
        final_sigmas_type (`str`, *optional*, defaults to `"zero"`): Where a diffusion run ends: `"zero"`, at g itself, or
            `"sigma_min"`, at the lowest level of the training process.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether the training process ends in pure noise.
        flow_shift (`float`, *optional*, defaults to 1.0): Shift of the times of a flow model towards noise.
        use_dynamic_shifting (`bool`, *optional*, defaults to `False`): Whether the pipeline gives the shift as `mu`.
        time_shift_type (`str`, *optional*, defaults to `"exponential"`): How `mu` shifts, or `"linear"`.
        shift_terminal (`float`, *optional*): Last time of a flow run before 0; others are stretched towards it.

    Attributes:
        target_timesteps (`torch.Tensor` of shape `(steps,)`): The timestep of the level sqrt(1 - gamma^2) s that each step jumps to,
            float32, in general between those of the training process; 0 for the clean end.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.schedulers import CTMScheduler

        scheduler = CTMScheduler(gamma=0.5)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, 3, 8, 8, generator=generator)
        for t, s in zip(scheduler.timesteps, scheduler.target_timesteps):
            output = 0.1 * sample  # a network, told t and s
            sample = scheduler.step(output, t, sample, generator=generator).prev_sample
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
        gamma: float = 0.0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        check_gamma(gamma, 0.0, "; 0 is deterministic")
        self._set_up()

    @property
    def _kept(self) -> float:
        """Share of the noise that is not drawn anew, sqrt(1 - gamma^2)."""
        return math.sqrt(1.0 - self.config.gamma**2)

    def _forget(self) -> None:
        """Nothing is remembered between steps."""

    def _lay(self, starts: np.ndarray, last: float, timesteps: torch.Tensor) -> None:
        super()._lay(starts, last, timesteps)
        ends = np.array(self._nodes[1:])
        if self._is_flow:
            # t / (1 - t) is the ratio of noise to signal
            ratios = self._kept * ends / (1.0 - ends)
            targets = ratios / (1.0 + ratios) * self.config.num_train_timesteps
        else:
            targets = grids.timesteps_of_sigmas(self._kept * ends, self._table())
        self.target_timesteps = torch.from_numpy(targets.astype(np.float32)).to(timesteps.device)

    def _level_at(self, node: float) -> Level:
        alpha = self._alpha(node)
        return (1.0 - node, node) if self._is_flow else (alpha, node * alpha)

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Jumps, and adds noise up to the next level.

        Args:
            model_output (`torch.Tensor`): What the network predicts for `sample`, told this step's entry of `target_timesteps`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The noisy sample.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise. None is drawn for `gamma=0` or
                where a run ends without noise.
            variance_noise (`torch.Tensor`, *optional*): Unit noise of the shape of `sample`, instead of drawn noise.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `DDIMSchedulerOutput` or `tuple`: `prev_sample`, the next sample in the dtype of `sample`, and `pred_original_sample`, the
                network's g.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite. The state is then what it was before the call. Also if the
                result overflows its dtype.
        """
        index, state, output = self._begin(model_output, timestep, sample)
        check_generator(generator, len(sample))
        start, end = (self._level_at(node) for node in self._nodes[index : index + 2])
        clean, noise = split(output, state, start, self.config.prediction_type)
        following = mixed(clean, noise, (end[0], self._kept * end[1]))
        if self.config.gamma and end[1]:
            fresh = given_noise(state, generator, variance_noise, "variance_noise")
            following = torch.add(following, fresh, alpha=self.config.gamma * end[1])
        prev_sample = following.to(sample.dtype)
        self._finish(prev_sample, index, timestep)
        if not return_dict:
            return prev_sample, clean.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean.to(sample.dtype))
