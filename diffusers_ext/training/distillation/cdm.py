r"""Continuous-time distribution matching (CDM, byliutao/cdm, 2026): few-step students of flow models on a random schedule.

Flow: x_sigma = (1 - sigma) x_0 + sigma eps, v = eps - x_0, x_0 = x - sigma v. In every batch the student walks a schedule of its
own, 1 = sigma_0 > ... > sigma_K = 0 with random inner levels, and one of its steps i is trained by three terms of weight 1, each
mean((x_0 - stop(x_0 - direction))^2), without the factor 1/2 of DMD:
    CA   guidance        -alpha (D_cond - D_uncond) / w,    alpha = 7, teacher's level ~ U(0, sigma_i)
    DM   on trajectory   (D_fake - D_real) / w,             teacher's level ~ U(0, 1)
    CDM  off trajectory  the same, where the student predicts from x_i + (sigma_s - sigma_i) v_i, sigma_s ~ U(0, 1)
with w = max(0.1, mean |x_0 - D|) and all levels clamped to [0.02, 0.98].
"""

import torch

from ..objectives import per_sample
from ..streams import stream
from .checks import check_levels, check_range, check_same_shape
from .dmd import dmd_gradient, normalizer_of


SIGMA_RANGE = (0.02, 0.98)
INNER_RANGE = (0.25, 0.95)


def schedule_length(seed: int, step: int, longest: int = 28) -> int:
    """Number of student steps of a batch, uniform on 1 ... `longest`.

    It depends on nothing that differs between processes: all make the same number of forward passes, which sharded models
    need.

    Args:
        seed: Seed of the run.
        step: Optimiser step.
        longest: Most steps, 1 or more.
    """
    check_range("longest", longest, 1)
    return int(torch.randint(1, longest + 1, (), generator=stream(seed, step, "schedule-length")))


def dynamic_schedule(steps: int, generator: torch.Generator, inner: tuple[float, float] = INNER_RANGE) -> torch.Tensor:
    """Levels of a random schedule: 1, then `steps - 1` sorted draws from `inner`, then 0.

    Args:
        steps: Student steps, 1 or more.
        generator: Source of the draws.
        inner: Range of the inner levels within [0, 1].

    Returns:
        (steps + 1,), falling, float32.

    Example:
        >>> dynamic_schedule(1, torch.Generator()).tolist()
        [1.0, 0.0]
    """
    check_range("steps", steps, 1)
    check_range("inner", inner[0], 0.0, inner[1])
    check_range("inner", inner[1], 0.0, 1.0)
    drawn = torch.rand(steps - 1, generator=generator) * (inner[1] - inner[0]) + inner[0]
    return torch.cat([torch.ones(1), drawn.sort(descending=True).values, torch.zeros(1)])


def covering_range(levels: torch.Tensor, inner: tuple[float, float] = INNER_RANGE) -> tuple[float, float]:
    """The range of inner levels, widened so that a sampler's are within.

    Args:
        levels: Falling levels of the sampler (steps + 1,), in [0, 1]; the first and the last are no inner ones.
        inner: The range to widen.

    Example:
        >>> covering_range(torch.tensor([1.0, 0.5, 0.125, 0.0]))
        (0.125, 0.95)
    """
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"levels has shape {tuple(levels.shape)}; give (steps + 1,) with one step or more")
    between = levels[1:-1].tolist()
    return min([inner[0], *between]), max([inner[1], *between])


def clamp_sigma(sigma: torch.Tensor) -> torch.Tensor:
    """Levels kept within [0.02, 0.98], where neither the sample nor the noise is lost."""
    return sigma.clamp(*SIGMA_RANGE)


def extrapolate(
    sample: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, wanted_sigma: torch.Tensor
) -> torch.Tensor:
    """From a point of the student's path to another level along its own velocity, x + (sigma_s - sigma_i) v.

    Args:
        sample: x_i at level `sigma` (n, ...).
        velocity: The student's prediction there, same shape.
        sigma: Level of each sample (n,).
        wanted_sigma: Level to go to (n,), below or above.

    Returns:
        (n, ...).
    """
    check_same_shape(sample=sample, velocity=velocity)
    check_levels(sample, sigma=sigma, wanted_sigma=wanted_sigma)
    return sample + per_sample(wanted_sigma - sigma, sample) * velocity


def guidance_direction(
    clean: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor, alpha: float = 7.0
) -> torch.Tensor:
    """Direction of the CA term: away from what classifier-free guidance adds.

    Args:
        clean: The student's clean sample (n, ...).
        conditional: The teacher's clean sample with the prompt, same shape.
        unconditional: The teacher's clean sample without it.
        alpha: Strength, 0 or more.

    Returns:
        (n, ...), without graph.
    """
    check_same_shape(clean=clean, conditional=conditional, unconditional=unconditional)
    check_range("alpha", alpha, 0.0)
    scale = normalizer_of(clean, conditional, "clamp")
    push = (conditional - unconditional).detach().to(scale.dtype)
    return -alpha * push / per_sample(scale, push)


def matching_direction(clean: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Direction of the DM and CDM terms, that of DMD with the normaliser kept at 0.1 or more; arguments as there."""
    return dmd_gradient(clean, real, fake, "clamp")


def direction_loss(clean: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """mean((x_0 - stop(x_0 - direction))^2), of gradient 2 direction / numel; both (n, ...)."""
    check_same_shape(clean=clean, direction=direction)
    clean = clean.to(direction.dtype)
    return (clean - (clean - direction).detach()).square().mean()
