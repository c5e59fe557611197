"""BDIA-DDIM: DDIM that can be undone exactly.

Exact Diffusion Inversion via Bi-directional Integration Approximation, ECCV 2024, arXiv 2307.10829. With levels 0 (the picture) to
N (noise) and the DDIM map from level i to level j with the noise predicted at z_i,

    D_{i->j}(z_i) = a_j (z_i - s_i eps_i) / a_i + s_j eps_i                     a = sqrt(abar), s = sqrt(1 - abar)

    z_{i-1} = gamma (z_{i+1} - D_{i->i+1}(z_i)) + D_{i->i-1}(z_i)               the first step is DDIM; gamma = 0 is DDIM
    z_{i+1} = (z_{i-1} - D_{i->i-1}(z_i)) / gamma + D_{i->i+1}(z_i)             solved for the other end: inversion

Both use the network at z_i only, so what was inverted comes back to rounding error, whatever the network. What must be kept is the
pair (z_N, z_{N-1}): sampling starts from both and so leaves the first timestep out.

gamma is a choice between accuracy and damping. On dX/ds = lambda X with constant steps, z = lambda d, sampling is stable for
|z| < 2 (1 - gamma) / (1 + gamma): 2 for DDIM, 0.67 at 0.5, and nothing at 1. Inversion multiplies errors by 1 / gamma at each step:
over 50 steps by 8 at 0.96, by 200 at 0.9 and by 1e15 at 0.5, which is why the inverse scheduler refuses gamma below 0.9.

For a flow model D_{i->j}(z_i) = z_i + (t_j - t_i) v_i.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from . import sigma_grids as grids
from .multistep import (
    PREDICTION_TYPES,
    MultistepScheduler,
    SchedulerMixin,
    check_steps,
    check_steps_trained,
    register_to_config,
)


__all__ = ["BDIADDIMScheduler", "SchedulerMixin"]

Level = tuple[float, float]  # factors of the clean sample and of the noise


def split(output: torch.Tensor, sample: torch.Tensor, level: Level, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean sample and the noise that a prediction stands for; operations and order are those of `DDIMScheduler`."""
    alpha, sigma = level
    if kind == "epsilon":
        return (sample - sigma * output) / alpha, output
    if kind == "sample":
        return output, (sample - alpha * output) / sigma
    if kind == "v_prediction":
        return alpha * sample - sigma * output, alpha * output + sigma * sample
    if kind == "flow_prediction":
        return sample - sigma * output, sample + alpha * output
    raise ValueError(f"prediction_type={kind!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")


def mixed(clean: torch.Tensor, noise: torch.Tensor, level: Level) -> torch.Tensor:
    """The sample at a level: D of the equations, once prediction and sample are split."""
    return level[0] * clean + level[1] * noise


def check_gamma(gamma: Any, lowest: float, reason: str) -> None:
    """Raises a ValueError unless `gamma` is a number from `lowest` to 1."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not lowest <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma!r} is out of range; use a number from {lowest:g} to 1{reason}")


class BidirectionalScheduler(MultistepScheduler):
    """What sampling and inversion share: levels as DDIM has them, and a step that looks at both neighbours."""

    def _set_up(self) -> None:
        config = self.config
        trained = check_steps_trained(config.num_train_timesteps)
        self.betas = grids.training_betas(
            trained, config.beta_start, config.beta_end, config.beta_schedule, config.trained_betas,
            config.rescale_betas_zero_snr,
        )  # fmt: skip
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)
        self.num_inference_steps = None
        descending = torch.arange((trained if self._is_flow else len(self.betas)) - 1, -1, -1)
        self._lay_levels(descending, [self._level(int(timestep)) for timestep in descending], (1.0, 0.0))

    def _level(self, timestep: float) -> Level:
        if self._is_flow:
            time = timestep / self.config.num_train_timesteps
            return 1.0 - time, time
        # Rounded as DDIM rounds: float32 unless someone has put a float64 table here.
        bar = self.alphas_cumprod[int(timestep)]
        return float(bar**0.5), float((1 - bar) ** 0.5)

    @property
    def _clean_level(self) -> Level:
        if self._is_flow or self.config.set_alpha_to_one:
            return 1.0, 0.0
        return self._level(0)

    def _lay_levels(self, timesteps: torch.Tensor, levels: list[Level], last: Level) -> None:
        self._levels = [*levels, last]
        starts = np.array([level[1] / max(level[0], 1e-12) for level in levels])
        self._lay(starts, last[1] / max(last[0], 1e-12), timesteps)

    def _walked(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
    ) -> tuple[np.ndarray, list[Level]]:
        """Timesteps of a sampling run, descending, and their levels."""
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r}, timesteps={timesteps!r}, sigmas={sigmas!r}: give exactly one"
            )
        config = self.config
        if sigmas is not None and not self._is_flow:
            raise ValueError(f"sigmas={sigmas!r}: only flow models have levels between timesteps here; give timesteps")
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr=True with prediction_type='epsilon': noise says nothing of the picture where there is "
                "none in it; use 'v_prediction' or 'sample'"
            )
        if num_inference_steps is not None:
            num_inference_steps = check_steps(num_inference_steps, config.num_train_timesteps)
        if self._is_flow:
            own = None if timesteps is None else self._checked_timesteps(timesteps)
            times, _, grid = self._flow_nodes(num_inference_steps, own, sigmas, mu)
            return grid, [(1.0 - time, time) for time in times.tolist()]
        if timesteps is not None:
            grid = self._checked_timesteps(timesteps)
            if (grid != grid.round()).any():
                raise ValueError(
                    f"timesteps={timesteps!r} must be whole numbers; levels between them are not defined here"
                )
            grid = grid.astype(np.int64)
        else:
            spacing, count = config.timestep_spacing, num_inference_steps or 1
            grid = grids.spaced_timesteps(spacing, count, config.num_train_timesteps, config.steps_offset)
        return grid, [self._level(timestep) for timestep in grid]

    def _forget(self) -> None:
        self._neighbour: torch.Tensor | None = None  # the state that the run has just left
        self._newest: torch.Tensor | None = None

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Moves the sample to the next level.

        Args:
            model_output (`torch.Tensor`): What the model predicts for `sample`, after guidance.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` that `sample` is at.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample. Keep it in float32: a state rounded to half precision
                cannot be undone exactly.
            eta (`float`, *optional*, defaults to 0.0): Must be 0: noise cannot be undone.
            generator (`torch.Generator`, *optional*): Taken for the sake of interchangeability; no noise is drawn.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an object instead of a tuple.

        Returns:
            `DDIMSchedulerOutput` or `tuple`: `prev_sample`, the next state in the dtype of `sample`, and
                `pred_original_sample`, the predicted clean sample.

        Raises:
            TypeError: If an argument is not a tensor.
            ValueError: If an argument does not fit or is not finite. The state is then what it was before the call. Also if the
                result overflows its dtype.
        """
        if eta:
            raise ValueError(f"eta={eta!r}: noise added on the way cannot be undone; use eta=0 or a DDIMScheduler")
        index, state, output = self._begin(model_output, timestep, sample)
        clean, noise = split(output, state, self._levels[index], self.config.prediction_type)
        following = mixed(clean, noise, self._levels[index + 1])
        if self._neighbour is not None:
            following = self._both_ways(following, mixed(clean, noise, self._levels[index - 1]))
        prev_sample = following.to(sample.dtype)
        self._finish(prev_sample, index, timestep)
        # Copies where they would be the caller's own memory.
        self._neighbour = state.clone() if state is sample else state
        self._newest = following
        if not return_dict:
            return prev_sample, clean.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean.to(sample.dtype))

    def _both_ways(self, onward: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """The next state from D to the next level and D to the level just left."""
        raise NotImplementedError(f"{type(self).__name__} does not define _both_ways")

    def _level_of(self, timestep: float) -> float:
        alpha, sigma = self._level(timestep)
        return sigma if self._is_flow else sigma / alpha


class BDIADDIMScheduler(BidirectionalScheduler):
    """DDIM that uses the step before as well, and that can be undone exactly with [`BDIADDIMInverseScheduler`].

    By itself it is a sampler of its own: `gamma=0.5` at ten steps and larger values at more are more accurate than DDIM
    without guidance; under high guidance small values are the safe ones.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        gamma (`float`, *optional*, defaults to 0.5): Weight of the step before, from 0, which is DDIM, to 1.
        set_alpha_to_one (`bool`, *optional*, defaults to `True`): Whether the last step leads to the clean picture instead of
            the lowest level of the training process.
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
        from diffusers_ext.hub import load_pipeline
        from diffusers_ext.schedulers import BDIADDIMScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = BDIADDIMScheduler.from_config(pipe.scheduler.config, gamma=0.5)
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
        gamma: float = 0.5,
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
        check_gamma(gamma, 0.0, "; 0 is DDIM")
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays the levels of a run and forgets the one before. Exactly one of the first, third and fourth.

        Args:
            num_inference_steps (`int`, *optional*): Steps, from 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall be.
            timesteps (`Sequence[float]`, *optional*): The timesteps themselves, descending whole numbers.
            sigmas (`Sequence[float]`, *optional*): Of a flow model: the times from which steps start, before the shift.
            mu (`float`, *optional*): Shift of a flow model with `use_dynamic_shifting`; pipelines compute it.

        Raises:
            ValueError: If the arguments do not describe a run.
        """
        grid, levels = self._walked(num_inference_steps, timesteps, sigmas, mu)
        self.num_inference_steps = len(grid)
        self._lay_levels(torch.from_numpy(grid).to(device), levels, self._clean_level)

    def set_initial_pair(self, noisiest: torch.Tensor, next_noisiest: torch.Tensor) -> None:
        """Lets the run begin with the pair that an inversion has left. Call it after `set_timesteps`.

        The run then begins with the second timestep and `next_noisiest` as its sample.

        Args:
            noisiest (`torch.Tensor` of shape `(batch, ...)`): z_N.
            next_noisiest (`torch.Tensor`): z_{N-1}, of the same shape.

        Raises:
            TypeError: If one of them is not a tensor of floats.
            ValueError: If there are fewer than two steps, or the shapes differ.
        """
        for name, value in (("noisiest", noisiest), ("next_noisiest", next_noisiest)):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} is {type(value).__name__}; give a tensor of floats")
        if noisiest.shape != next_noisiest.shape:
            raise ValueError(
                f"noisiest of shape {tuple(noisiest.shape)} and next_noisiest of shape {tuple(next_noisiest.shape)} must be the "
                "two states of one inversion"
            )
        if self.num_inference_steps is None or self.num_inference_steps < 2:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps!r} has no second step to begin with; call set_timesteps with at "
                "least 2"
            )
        wide = torch.float64 if noisiest.dtype == torch.float64 else torch.float32
        self._neighbour, self._shape = noisiest.to(wide).clone(), noisiest.shape
        self._begin_index = 1

    def _both_ways(self, onward: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        if self.config.gamma == 0 or self._neighbour is None:
            return onward
        return onward.add_(self._neighbour.to(onward) - back, alpha=self.config.gamma)
