r"""Latent consistency distillation (LCM, Luo et al. 2023, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556).

The student f maps any point of the teacher's guided ODE to its clean end. With solver timesteps t_1 < ... < t_S of equal skips:
    f(x, t) = c_skip(t) x + c_out(t) x_0(x, t),     c_skip = d^2 / (tau^2 + d^2),     c_out = tau / sqrt(tau^2 + d^2),
    tau = 10 t, d = 0.5, so that f(x, 0) = x;
    x_0~ = x_0(cond) + w (x_0(cond) - x_0(uncond)) and eps~ alike, one DDIM step x_{t_n} -> x^_{t_{n-1}} of the teacher;
    loss = mean(sqrt((f(x_{t_n}, t_n, w) - stop f(x^_{t_{n-1}}, t_{n-1}, w))^2 + c^2) - c),     c = 0.001.
w ~ U(w_min, w_max) is told to the student by an embedding of its own; a LoRA, which has no place for it, learns their mean.
In the pipelines of diffusers `guidance_scale` is w + 1.
"""

import math
from collections.abc import Callable

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape
from .parameterization import NoiseSchedule


# (noisy sample, timesteps) -> prediction
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def boundary_scalings(
    timesteps: torch.Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out at timesteps of any shape, float64; 1 and 0 at timestep 0."""
    check_range("sigma_data", sigma_data, 0.0, above=True)
    tau, variance = timesteps.double() * timestep_scaling, sigma_data**2
    return variance / (tau.square() + variance), tau / (tau.square() + variance).sqrt()


def solver_timesteps(num_train_timesteps: int = 1000, num_ddim_timesteps: int = 50) -> torch.Tensor:
    """Timesteps t_1 ... t_S that `LCMScheduler` has at inference too, rising.

    Args:
        num_train_timesteps: Length of the training schedule.
        num_ddim_timesteps: S, from 1 to `num_train_timesteps`.

    Example:
        >>> solver_timesteps(1000, 4).tolist()
        [249, 499, 749, 999]
    """
    check_range("num_ddim_timesteps", num_ddim_timesteps, 1, num_train_timesteps)
    return torch.arange(1, num_ddim_timesteps + 1) * (num_train_timesteps // num_ddim_timesteps) - 1


def guidance_embedding(w: torch.Tensor, dimension: int = 256) -> torch.Tensor:
    """Sinusoidal embedding of the guidance, the one that the pipelines of diffusers make.

    Args:
        w: Guidance of each sample (n,): `guidance_scale - 1`.
        dimension: `time_cond_proj_dim` of the UNet, 4 or more.

    Returns:
        (n, dimension), float32.
    """
    check_range("dimension", dimension, 4)
    half = dimension // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(1e4) / (half - 1)))
    angles = (w.float() * 1000.0)[:, None] * frequencies
    embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedded, (0, dimension % 2))


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """cond + w (cond - uncond) of predictions (n, ...) with guidance w (n,)."""
    check_same_shape(conditional=conditional, unconditional=unconditional)
    check_levels(conditional, w=w)
    return conditional + per_sample(w, conditional) * (conditional - unconditional)


def consistency_output(
    schedule: NoiseSchedule,
    prediction: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    timestep_scaling: float = 10.0,
) -> torch.Tensor:
    """f(x, t) of a network's prediction.

    Args:
        schedule: Levels and prediction type of the network.
        prediction: Its output (n, ...).
        sample: Its noisy input, same shape.
        timesteps: (n,).
        timestep_scaling: As in the config of `LCMScheduler`.

    Returns:
        The end of the ODE that `sample` lies on, (n, ...), float32.
    """
    sample = sample.float()
    skip, out = boundary_scalings(timesteps, timestep_scaling)
    clean = schedule.clean(prediction.float(), sample, timesteps)
    return per_sample(skip, sample) * sample + per_sample(out, sample) * clean


def teacher_step(
    schedule: NoiseSchedule,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    earlier: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:
    """One guided DDIM step of the teacher.

    Args:
        schedule: Levels and prediction type of the teacher.
        conditional: Its prediction with the prompt (n, ...).
        unconditional: Its prediction without.
        sample: The noisy input of both.
        timesteps: Where they were made (n,).
        earlier: Timesteps to go to (n,).
        w: Guidance of each sample (n,).

    Returns:
        Sample at `earlier`, (n, ...), float32.
    """
    sample, conditional, unconditional = sample.float(), conditional.float(), unconditional.float()
    clean, noise = (
        guided(part(conditional, sample, timesteps), part(unconditional, sample, timesteps), w)
        for part in (schedule.clean, schedule.noise)
    )
    return schedule.noisy(clean, noise, earlier)


def huber(prediction: torch.Tensor, wanted: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """Mean over all elements of sqrt((x - y)^2 + c^2) - c."""
    check_same_shape(prediction=prediction, wanted=wanted)
    check_range("huber_c", c, 0.0, above=True)
    return ((prediction.float() - wanted.float()).square() + c * c).sqrt().mean() - c


def lcm_loss(
    schedule: NoiseSchedule,
    student: Denoiser,
    target: Denoiser,
    teacher: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    clean: torch.Tensor,
    noise: torch.Tensor,
    rows: torch.Tensor,
    w: torch.Tensor,
    num_ddim_timesteps: int = 50,
    huber_c: float = 0.001,
    timestep_scaling: float = 10.0,
) -> torch.Tensor:
    """Loss of a batch.

    Args:
        schedule: Levels and prediction type of teacher and student; a diffusion, no flow.
        student: The network that is trained.
        target: The same or its moving average; called without gradients.
        teacher: To predictions with and without the prompt; called without gradients.
        clean: Latents of pictures (n, ...).
        noise: Standard normal noise, same shape.
        rows: Which solver timestep each sample is noised to, (n,) from 0 to `num_ddim_timesteps` - 1.
        w: Guidance of each sample (n,).
        num_ddim_timesteps: Steps of the teacher's solver.
        huber_c: c of the loss, above 0.
        timestep_scaling: As in the config of `LCMScheduler`.

    Returns:
        A scalar.
    """
    grid = solver_timesteps(schedule.num_train_timesteps, num_ddim_timesteps).to(clean.device)
    check_levels(clean, rows=rows, w=w)
    check_range("rows", int(rows.min()), 0, num_ddim_timesteps - 1)
    check_range("rows", int(rows.max()), 0, num_ddim_timesteps - 1)
    timesteps = grid[rows]
    # below the first solver timestep lies the clean end
    earlier = (timesteps - schedule.num_train_timesteps // num_ddim_timesteps).clamp(min=0)
    sample = schedule.noisy(clean, noise, timesteps)
    with torch.no_grad():
        previous = teacher_step(schedule, *teacher(sample, timesteps), sample, timesteps, earlier, w).to(sample.dtype)
        wanted = consistency_output(schedule, target(previous, earlier), previous, earlier, timestep_scaling)
    reached = consistency_output(schedule, student(sample, timesteps), sample, timesteps, timestep_scaling)
    return huber(reached, wanted, huber_c)
