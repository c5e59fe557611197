r"""Consistency trajectory models (CTM, Kim et al. 2023, arXiv 2310.02279).

One network jumps from any noise level t to any lower one s of the ODE,
    G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s),
where g is a denoiser: at s = t it is the clean sample's posterior mean, at s = 0 the end of the ODE. Trained are
    the jump      d(G_(G(x_t, t, s), s, 0), G_(G_(Solver(x_t, t, u), u, s), s, 0)),   s <= u < t, the underlined without gradient,
    the denoiser  ||x_0 - g(x_t, t, t)||^2, which keeps the score.
gamma-sampling repeats: jump to s' = sqrt(1 - gamma^2) s, then add noise of deviation gamma s; 0 is deterministic, 1 is the sampling of
consistency models.
"""

import math
from collections.abc import Callable

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape


# (sample, t, s) -> sample at s
Jump = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def jump(sample: torch.Tensor, denoised: torch.Tensor, level: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """G of the denoiser's output.

    Args:
        sample: Noisy samples (n, ...) at `level`, noise added to an unscaled signal.
        denoised: g(x, t, s), same shape.
        level: Noise level t of each sample (n,), above 0.
        wanted: Noise level s to go to (n,), from 0 to `level`.

    Returns:
        Samples at `wanted` (n, ...).

    Example:
        >>> jump(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([4.0]), torch.tensor([1.0])).tolist()
        [[0.25]]
    """
    check_same_shape(sample=sample, denoised=denoised)
    check_levels(sample, level=level, wanted=wanted)
    ratio = per_sample(wanted / level, sample)
    return ratio * sample + (1.0 - ratio) * denoised


def heun_step(
    sample: torch.Tensor,
    level: torch.Tensor,
    wanted: torch.Tensor,
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One step of the teacher's ODE dx / dt = (x - D(x, t)) / t by Heun's method.

    Args:
        sample: Noisy samples (n, ...) at `level`.
        level: Noise level of each sample (n,), above 0.
        wanted: Noise level to go to (n,), above 0: `jump` with the denoiser is the way to 0.
        denoise: The teacher.

    Returns:
        Samples at `wanted`.
    """
    check_levels(sample, level=level, wanted=wanted)
    gap = per_sample(wanted - level, sample)
    slope = (sample - denoise(sample, level)) / per_sample(level, sample)
    euler = sample + gap * slope
    return sample + gap * 0.5 * (slope + (euler - denoise(euler, wanted)) / per_sample(wanted, sample))


def trajectory_pair(
    student: Jump,
    target: Jump,
    solver: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    level: torch.Tensor,
    middle: torch.Tensor,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two clean samples that CTM compares.

    Args:
        student: Jumps with gradients.
        target: Its moving average, without gradients for its weights.
        solver: The teacher's ODE from one level to a lower one.
        sample: Noisy samples (n, ...) at `level`.
        level: t (n,).
        middle: u (n,), between s and t.
        wanted: s (n,).

    Returns:
        What the student's jump comes to, with graph, and what it should, without. The map from s to 0 is the target's on both
        sides and passes gradients to the student's jump.

    Raises:
        ValueError: Unless s <= u <= t.
    """
    check_levels(sample, level=level, middle=middle, wanted=wanted)
    if not bool(((wanted <= middle) & (middle <= level)).all()):
        raise ValueError("level, middle and wanted must fall for each sample: wanted <= middle <= level")
    end = torch.zeros_like(wanted)
    reached = target(student(sample, level, wanted), wanted, end)
    with torch.no_grad():
        expected = target(target(solver(sample, level, middle), middle, wanted), wanted, end)
    return reached, expected


def draw_levels(
    grid: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random t, u and s of a rising grid of levels: t uniform, s uniform below it, u uniform between them.

    Args:
        grid: Rising levels (N,), N of 2 or more.
        count: Number of triples, 1 or more.
        generator: Source of the draws.

    Returns:
        t, u and s, each (count,), with s <= u < t.
    """
    check_range("count", count, 1)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"grid has shape {tuple(grid.shape)}; give (N,) with two levels or more")
    uniform = torch.rand(3, count, generator=generator)
    top = 1 + (uniform[0] * (len(grid) - 1)).long().clamp(max=len(grid) - 2)
    low = (uniform[1] * top).long().clamp(max=top - 1)
    middle = low + (uniform[2] * (top - low)).long().clamp(max=top - low - 1)
    return grid[top], grid[middle], grid[low]


def gamma_levels(wanted: float, gamma: float) -> tuple[float, float]:
    """Where a step of gamma-sampling jumps to and how much noise it then adds: sqrt(1 - gamma^2) s and gamma s.

    Args:
        wanted: Level s of the next sample, 0 or more.
        gamma: From 0, deterministic, to 1.

    Example:
        >>> gamma_levels(2.0, 0.0)
        (2.0, 0.0)
    """
    check_range("wanted", wanted, 0.0)
    check_range("gamma", gamma, 0.0, 1.0)
    return math.sqrt(1.0 - gamma * gamma) * wanted, gamma * wanted
