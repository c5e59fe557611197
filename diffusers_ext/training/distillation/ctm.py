r"""Consistency trajectory models (CTM, Kim et al. 2023, arXiv 2310.02279).

One network jumps from any noise level t to any lower one s of the ODE,
    G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s),
where g is a denoiser: at s = t it is the clean sample's posterior mean, at s = 0 the end of the ODE. Trained are
    the jump      d(G_(G(x_t, t, s), s, 0), G_(G_(Solver(x_t, t, u), u, s), s, 0)),   s <= u < t, the underlined without gradient,
    the denoiser  ||x_0 - g(x_t, t, t)||^2, which keeps the score.
gamma-sampling repeats: jump to s' = sqrt(1 - gamma^2) s, then add noise of deviation gamma s; 0 is deterministic, 1 is the sampling of
consistency models.

On the timesteps of a diffusion, with its signal a and noise level b, the same jump of a network that predicts in any terms, told t and s, is
    G(x, t, s) = a_s x_0 + b_s eps,     x_0 and eps those of the prediction at x, t.
The teacher is the guided one; its own denoiser takes the place of the data in the second loss, which has the same minimiser for guidance 0:
    latent_ctm_loss = huber(jump) + weight ||prediction(x_t, t, t) - guided prediction(x_t, t)||^2.
"""

import math
from collections.abc import Callable

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape
from .lcm import guided, huber, solver_timesteps, teacher_step
from .parameterization import NoiseSchedule


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


def latent_jump(
    schedule: NoiseSchedule,
    prediction: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """G of a network's prediction on the timesteps of a diffusion.

    Args:
        schedule: Levels and prediction type of the network.
        prediction: Its output (n, ...), told both timesteps.
        sample: Its noisy input, same shape.
        timesteps: t of each sample (n,).
        wanted: s of each sample (n,), from 0 to t.

    Returns:
        Samples at `wanted` (n, ...), float32.
    """
    check_levels(sample, timesteps=timesteps, wanted=wanted)
    prediction, sample = prediction.float(), sample.float()
    clean, noise = (part(prediction, sample, timesteps) for part in (schedule.clean, schedule.noise))
    return schedule.noisy(clean, noise, wanted)


def latent_ctm_loss(
    schedule: NoiseSchedule,
    student: Jump,
    target: Jump,
    teacher: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    clean: torch.Tensor,
    noise: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    w: torch.Tensor,
    num_ddim_timesteps: int = 50,
    huber_c: float = 0.001,
    denoising_weight: float = 1.0,
) -> torch.Tensor:
    """Loss of a batch; u is the solver's timestep next below t, one guided DDIM step of the teacher away.

    Args:
        schedule: Levels and prediction type of teacher and student; a diffusion, no flow.
        student: From sample, t and s to the prediction of the network that is trained. It is called once, with 2 n samples.
        target: The same or its moving average, with weights that take no gradient.
        teacher: To predictions with and without the prompt; called without gradients.
        clean: Latents of pictures (n, ...).
        noise: Standard normal noise, same shape.
        rows: Which of the solver's timesteps t is, (n,) from 0 to `num_ddim_timesteps` - 1.
        ends: Which of timestep 0 and the solver's s is, (n,) from 0 to `rows`: below t.
        w: Guidance of each sample (n,).
        num_ddim_timesteps: Steps of the teacher's solver.
        huber_c: c of the loss of the jump, above 0.
        denoising_weight: Weight of the second loss, 0 or more.

    Returns:
        A scalar.
    """
    check_levels(clean, rows=rows, ends=ends, w=w)
    check_range("rows", int(rows.max()), 0, num_ddim_timesteps - 1)
    check_range("denoising_weight", denoising_weight, 0.0)
    if not bool(((ends >= 0) & (ends <= rows)).all()):
        raise ValueError("ends must lie from 0 to rows for each sample: a jump ends below where it starts")
    solved = solver_timesteps(schedule.num_train_timesteps, num_ddim_timesteps)
    levels = torch.cat([torch.zeros(1, dtype=torch.long), solved]).to(clean.device)
    timesteps, middle, wanted = levels[rows + 1], levels[rows], levels[ends]
    sample = schedule.noisy(clean, noise, timesteps)
    with torch.no_grad():
        pair = teacher(sample, timesteps)
        denoised = guided(*pair, w).float()
    jumping, denoising = student(
        sample.repeat(2, *[1] * (sample.ndim - 1)), timesteps.repeat(2), torch.cat([wanted, timesteps])
    ).chunk(2)
    reached, expected = trajectory_pair(
        lambda x, t, s: latent_jump(schedule, jumping, x, t, s),
        lambda x, t, s: latent_jump(schedule, target(x, t, s), x, t, s),
        lambda x, t, u: teacher_step(schedule, *pair, x, t, u, w),
        sample, timesteps, middle, wanted,
    )  # fmt: skip
    return huber(reached, expected, huber_c) + denoising_weight * (denoising.float() - denoised).square().mean()
