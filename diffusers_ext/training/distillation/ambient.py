r"""Training on noisy data: consistent with Ambient Tweedie (Daras et al. 2024, arXiv 2404.10177).

Of a sample only x_n = x_0 + sigma_n eps is known. At any higher noise sigma_t the posterior mean h of the *clean* sample follows from
that of the noisy one,
    E[x_n | x_t] = ((sigma_t^2 - sigma_n^2) / sigma_t^2) E[x_0 | x_t] + (sigma_n^2 / sigma_t^2) x_t,
so that the network that minimises || (that of h) - x_n ||^2 predicts E[x_0 | x_t]: clean pictures are never seen.
"""

import torch

from ..objectives import per_sample
from .checks import check_levels, check_same_shape


def add_more_noise(
    known: torch.Tensor, noise: torch.Tensor, known_level: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """x_t from x_n: adds what is missing to the noise, sqrt(sigma_t^2 - sigma_n^2).

    Args:
        known: Samples x_n (n, ...).
        noise: Fresh standard normal noise, same shape.
        known_level: sigma_n of each sample (n,), 0 for clean ones.
        level: sigma_t (n,), above `known_level`.

    Raises:
        ValueError: If a level is not above that of the data.
    """
    check_same_shape(known=known, noise=noise)
    _check_above(known, known_level, level)
    return known + per_sample((level.square() - known_level.square()).sqrt(), known) * noise


def known_from_clean(
    clean: torch.Tensor, sample: torch.Tensor, known_level: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """E[x_n | x_t] that a prediction of the clean sample implies.

    Args:
        clean: The network's clean samples (n, ...).
        sample: Its input x_t, same shape.
        known_level: sigma_n of each sample (n,).
        level: sigma_t (n,), above `known_level`.
    """
    check_same_shape(clean=clean, sample=sample)
    _check_above(sample, known_level, level)
    share = per_sample((known_level / level).square(), sample)
    return (1.0 - share) * clean + share * sample


def ambient_loss(
    clean: torch.Tensor,
    sample: torch.Tensor,
    known: torch.Tensor,
    known_level: torch.Tensor,
    level: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each sample (n,) against the noisy data; at `known_level` 0 it is the ordinary loss.

    Args:
        clean: The network's clean samples (n, ...).
        sample: Its input x_t, same shape.
        known: The data x_n, same shape.
        known_level: sigma_n (n,).
        level: sigma_t (n,), above `known_level`.
    """
    check_same_shape(clean=clean, known=known)
    return (known_from_clean(clean, sample, known_level, level) - known).square().flatten(1).mean(1)


def _check_above(samples: torch.Tensor, known_level: torch.Tensor, level: torch.Tensor) -> None:
    check_levels(samples, known_level=known_level, level=level)
    if not bool(((known_level >= 0) & (level > known_level)).all()):
        raise ValueError("level must be above known_level for each sample; draw it from above the noise of the data")
