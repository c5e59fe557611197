"""A small network that reads what an emoji scene shows: object, colour, background and pattern.

It is trained on ground-truth renderings only, never on a generated picture, and serves as the ruler of the benchmarks:
an edit has succeeded when the wanted attribute is read and the others are read unchanged.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class AttributeJudge(ModelMixin, ConfigMixin):
    """Reads the labels of 64-pixel scenes.

    Args:
        labels: Attribute -> its values, in the order of the labels of `EmojiScenes`.
        channels: Widths of the convolutional levels, multiples of 4; each level halves the picture.

    Example:
        >>> judge = AttributeJudge({"colour": ["native", "red"], "pattern": ["plain", "striped"]}, channels=[16, 32])
        >>> sorted(judge(torch.zeros(3, 3, 64, 64)))
        ['colour', 'pattern']
    """

    @register_to_config
    def __init__(self, labels: dict[str, list[str]], channels: list[int] | None = None):
        super().__init__()
        widths = channels or [32, 64, 96, 128]
        levels: list[nn.Module] = []
        for before, width in zip([3, *widths], widths):
            levels += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            levels += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
        self.trunk = nn.Sequential(*levels)
        # mean, maximum and the four corners: what fills the picture, what stands in it, what lies behind it
        self.heads = nn.ModuleDict({name: nn.Linear(6 * widths[-1], len(values)) for name, values in labels.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (n, number of values) of every attribute for `images` (n, 3, H, W) in [-1, 1]."""
        features = self.trunk(images)
        corners = [features[:, :, y, x] for y in (0, -1) for x in (0, -1)]
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3)), *corners], 1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The most likely label (n,) of every attribute."""
        return {name: logits.argmax(1) for name, logits in self(images.to(self.dtype)).items()}


def judge_loss(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the attributes."""
    return torch.stack([F.cross_entropy(logits[name], labels[name]) for name in logits]).mean()
