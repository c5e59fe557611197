r"""Latent consistency training without a teacher's solver (sLCT, Dao et al. 2025, arXiv 2502.01441), on a diffusion's own timesteps.

Two neighbouring levels r < t of the same clean sample and the same noise stand in for a step of the ODE:
    loss = mean over samples of d(f(x_t, t), stop f(x_r, r)) / (sigma_t - sigma_r),     sigma = noise / signal,
with f of latent consistency distillation (`lcm`), which `LCMScheduler` samples, and the distances, numbers of levels and probabilities of
`consistency`. The levels of EDM, equally spaced in sigma^(1/7), are moved to the timesteps next to them: the network knows no others. Where
these lie closer than timesteps do, several become one.
"""

from dataclasses import dataclass

import torch

from ..objectives import stratified_uniform
from .checks import check_levels, check_range, check_word
from .consistency import (
    distance,
    ict_constant,
    ict_levels,
    interval_weights,
    karras_levels,
    lognormal_probabilities,
    slct_constant,
)
from .lcm import Denoiser, consistency_output
from .parameterization import NoiseSchedule


CONSISTENCY_DISTANCES = ("cauchy", "pseudo_huber")
# signal of the last timestep where a schedule ends in pure noise; diffusers' solvers use the same
LEAST_SIGNAL = 2.0**-12


def level_timesteps(schedule: NoiseSchedule, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps nearest to the levels of EDM between the first and the last of a schedule.

    Args:
        schedule: A diffusion, no flow.
        count: Number of levels, 2 or more.

    Returns:
        Rising timesteps from 0 to the last, at most `count` of them, and their noise over signal in float64.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> level_timesteps(NoiseSchedule.from_scheduler(DDIMScheduler()), 5)[0].tolist()
        [0, 142, 593, 843, 999]
    """
    if schedule.is_flow:
        raise ValueError("schedule is one of a flow; latent consistency training takes epsilon or v_prediction")
    signal, spread = schedule.levels(torch.arange(schedule.num_train_timesteps))
    table = spread / signal.clamp(min=LEAST_SIGNAL)
    wanted = karras_levels(count, float(table[0]), float(table[-1])).log()
    nearest = (wanted[:, None] - table.log()[None]).abs().argmin(1).unique()
    return nearest, table[nearest]


@dataclass(frozen=True)
class LevelPairs:
    """Neighbouring levels of a batch.

    Args:
        timesteps: t of each sample (n,).
        earlier: r of each sample (n,), the level below.
        weights: 1 / (sigma_t - sigma_r) of each sample (n,).
        levels: Number of levels that they were drawn from.
    """

    timesteps: torch.Tensor
    earlier: torch.Tensor
    weights: torch.Tensor
    levels: int


def draw_pairs(
    schedule: NoiseSchedule,
    size: int,
    step: int,
    total: int,
    generator: torch.Generator,
    start_levels: int = 10,
    end_levels: int = 640,
) -> LevelPairs:
    """Random neighbouring levels at one step of the curriculum.

    Args:
        schedule: Of the network.
        size: Number of samples, 1 or more.
        step: Optimiser step, from 0 on.
        total: Steps of the run, 1 or more.
        generator: Source of the draws.
        start_levels: Intervals at the start, 1 or more.
        end_levels: Intervals at the end, `start_levels` or more.
    """
    check_range("size", size, 1)
    timesteps, sigmas = level_timesteps(schedule, ict_levels(step, total, start_levels, end_levels))
    reached = lognormal_probabilities(sigmas).cumsum(0)
    rows = torch.searchsorted(reached, stratified_uniform(size, generator).double()).clamp(max=len(sigmas) - 2)
    return LevelPairs(timesteps[rows + 1], timesteps[rows], interval_weights(sigmas)[rows], len(sigmas))


def slct_loss(
    schedule: NoiseSchedule,
    student: Denoiser,
    target: Denoiser,
    clean: torch.Tensor,
    noise: torch.Tensor,
    pairs: LevelPairs,
    kind: str = "cauchy",
    timestep_scaling: float = 10.0,
) -> torch.Tensor:
    """Loss of a batch.

    Args:
        schedule: Levels and prediction type of the student; a diffusion, no flow.
        student: The network that is trained.
        target: The same, called without gradients.
        clean: Latents of pictures (n, ...).
        noise: Standard normal noise, same shape.
        pairs: From `draw_pairs`.
        kind: "cauchy" with the constant of sLCT, or "pseudo_huber" with that of iCT.
        timestep_scaling: As in the config of `LCMScheduler`.

    Returns:
        A scalar.
    """
    check_word("kind", kind, CONSISTENCY_DISTANCES)
    check_levels(clean, timesteps=pairs.timesteps, earlier=pairs.earlier, weights=pairs.weights)
    sample, previous = (schedule.noisy(clean, noise, at) for at in (pairs.timesteps, pairs.earlier))
    with torch.no_grad():
        prediction = target(previous, pairs.earlier)
        wanted = consistency_output(schedule, prediction, previous, pairs.earlier, timestep_scaling)
    prediction = student(sample, pairs.timesteps)
    reached = consistency_output(schedule, prediction, sample, pairs.timesteps, timestep_scaling)
    c = slct_constant(pairs.levels) if kind == "cauchy" else ict_constant(clean[0].numel())
    return (distance(kind, reached, wanted, c) * pairs.weights.to(reached)).mean()
