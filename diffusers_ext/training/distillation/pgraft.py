r"""P-GRAFT: partial rejection sampling fine-tuning (Anil et al. 2025, arXiv 2510.02692).

Samples of the model are kept or rejected by the reward of their *final* picture; the kept ones, noised, are trained on only at noise
levels above a switch t_I. At inference the tuned network runs from the noise down to t_I and the base network from there on: the early
steps decide what is in the picture and are easy to teach, the late ones would only forget.
"""

from collections.abc import Callable

import torch

from .checks import check_range


def best_of(rewards: torch.Tensor, keep: int) -> torch.Tensor:
    """Which samples of each prompt are kept: those of the highest rewards.

    Args:
        rewards: (prompts, samples), higher is better; NaN is never kept.
        keep: Samples to keep of each prompt, from 1 to their number.

    Returns:
        Boolean mask of that shape with `keep` entries a row, fewer where rewards are NaN. Ties go to the earlier sample.

    Example:
        >>> best_of(torch.tensor([[0.1, 0.9, 0.5]]), keep=1).tolist()
        [[False, True, False]]
    """
    if rewards.ndim != 2 or not rewards.numel():
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; give (prompts, samples)")
    check_range("keep", keep, 1, rewards.shape[1])
    valid = ~rewards.isnan()
    filled = torch.where(valid, rewards.double(), -torch.inf)
    order = filled.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(valid).scatter_(1, order, True) & valid


def accepted(rewards: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Rejection sampling of the distribution p(x) exp(reward / temperature) / Z.

    Args:
        rewards: (n,), finite.
        uniform: Draws from [0, 1), (n,).
        temperature: Above 0; the lower, the fewer are kept.

    Returns:
        Boolean mask (n,); the best sample is always kept.
    """
    check_range("temperature", temperature, 0.0, above=True)
    if rewards.shape != uniform.shape or rewards.ndim != 1 or not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards and uniform must be finite and of one shape (n,)")
    if not len(rewards):
        return torch.zeros(0, dtype=torch.bool)
    return uniform < ((rewards - rewards.max()) / temperature).exp()


def switch_timestep(share: float, num_train_timesteps: int = 1000) -> int:
    """t_I for a share of the schedule, counted from the noise, that is tuned.

    Args:
        share: In (0, 1]; 1 tunes all timesteps, which is GRAFT.
        num_train_timesteps: Length of the training schedule.

    Example:
        >>> switch_timestep(0.25)
        750
    """
    check_range("share", share, 0.0, 1.0, above=True)
    return round((1.0 - share) * num_train_timesteps)


def tuned_timesteps(uniform: torch.Tensor, switch: int, num_train_timesteps: int = 1000) -> torch.Tensor:
    """Timesteps uniform on switch ... num_train_timesteps - 1 for draws from [0, 1)."""
    check_range("switch", switch, 0, num_train_timesteps - 1)
    return (switch + (uniform * (num_train_timesteps - switch)).long()).clamp(max=num_train_timesteps - 1)


def switched(
    tuned: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    base: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    switch: int,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One denoiser of two: `tuned` at timesteps of `switch` or more, `base` below."""

    def denoise(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (tuned if float(timestep.reshape(-1)[0]) >= switch else base)(sample, timestep)

    return denoise
