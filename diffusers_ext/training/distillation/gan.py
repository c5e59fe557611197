r"""Adversarial part of DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.3) and approximate R1 (Lin et al. 2025, arXiv 2501.08316).

A head on features of the fake-score network tells noisy real from noisy generated samples:
    discriminator: E softplus(-D(real)) + E softplus(D(fake)),     generator: E softplus(-D(fake)).
R1 needs a second derivative, which fused attention lacks; instead D shall not change under noise on its input:
    R1 ~ E (D(x) - D(x + sigma n))^2,     n ~ N(0, I).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .checks import check_range, check_same_shape


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Mean of softplus(-D(fake)); logits of any shape."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Mean of softplus(-D(real)) plus mean of softplus(D(fake)); logits of any shapes."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def approximate_r1(logits: torch.Tensor, perturbed_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared change of the logits under a small perturbation of real samples; both of one shape."""
    check_same_shape(logits=logits, perturbed_logits=perturbed_logits)
    return (logits.float() - perturbed_logits.float()).square().mean()


class DiscriminatorHead(nn.Module):
    """Convolutions of stride 2 with group normalisation and SiLU down to one logit a sample.

    Args:
        channels: Channels of the features, 1 or more.
        layers: Convolutions that halve the side, 0 or more; those that would leave less than a pixel are skipped.

    Raises:
        ValueError: For arguments out of range.

    Example:
        >>> DiscriminatorHead(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 1])
    """

    def __init__(self, channels: int, layers: int = 3):
        super().__init__()
        check_range("channels", channels, 1)
        check_range("layers", layers, 0)
        groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels % count == 0)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU())
            for _ in range(layers)
        )
        self.logit = nn.Linear(channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, 1) for features (n, channels, h, w)."""
        for layer in self.down:
            if min(features.shape[2:]) > 1:
                features = layer(features)
        return self.logit(features.mean((2, 3)))


@contextmanager
def captured(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the block every output of `layer`, e.g. `unet.mid_block`, is appended to the list that is given.

    Example:
        >>> layer = nn.Identity()
        >>> with captured(layer) as features:
        ...     _ = layer(torch.zeros(1))
        >>> len(features)
        1
    """
    found: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
