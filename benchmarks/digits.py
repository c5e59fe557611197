"""Handwritten digits of 8x8 pixels, a network that is told the digit, and how near samples come to pictures that were held out.

The pictures are scikit-learn's `load_digits` (UCI, Alpaydin and Kaynak 1998), bundled with that package: 1797 of them, 16 grays. A small
classifier, trained on the training part alone, gives the features of Fréchet's distance and reads which digit a sample shows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import ROOT, share  # noqa: F401  (puts the repository on the path)
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from eight_gaussians import train
from torch import nn

from diffusers_ext.metrics import coverage, frechet_distance, sliced_wasserstein
from diffusers_ext.training.distillation.families import StableDiffusion
from diffusers_ext.training.distillation.lcm import guidance_embedding, guided
from diffusers_ext.training.distillation.parameterization import NoiseSchedule, convert


SIDE, CLASSES = 8, 10
NO_CLASS = CLASSES  # what the network is told for its prediction without a class
HELD_OUT, SPLIT_SEED = 600, 7
WIDTHS = (24, 48)
FEATURES, CLASSIFIER_STEPS, CLASSIFIER_SEED = 32, 500, 11
NEIGHBOURS = 5
BATCH = 256


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, 8, 8) in [-1, 1] and what they show, (n,) from 0 to 9; the two parts share no picture."""

    pictures: torch.Tensor
    labels: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures of the training part, with their labels."""
        rows = torch.randint(len(self.pictures), (count,), generator=generator)
        return self.pictures[rows], self.labels[rows]


def load_digits() -> Digits:
    """The pictures, in two parts that are the same in every run.

    Raises:
        ImportError: If scikit-learn, which has them, is missing.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's; install it with: pip install -e '.[bench]'") from error
    values, targets = bundled(return_X_y=True)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(SPLIT_SEED))
    pictures = (torch.from_numpy(values).float() / 8.0 - 1.0).reshape(-1, 1, SIDE, SIDE)[order]
    labels = torch.from_numpy(targets).long()[order]
    return Digits(pictures[HELD_OUT:], labels[HELD_OUT:], pictures[:HELD_OUT], labels[:HELD_OUT])


class DigitNetwork(nn.Module):
    """A stock `UNet2DModel` that is told the digit and, if wanted, the guidance.

    Args:
        seed: Of the first weights.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        width = 4 * WIDTHS[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet = UNet2DModel(
                sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=WIDTHS, layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
                attention_head_dim=16, resnet_time_scale_shift="scale_shift", class_embed_type="identity",
            )  # fmt: skip
            self.labels = nn.Embedding(CLASSES + 1, width)
            self.guidance = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        # untrained, what it is told of the guidance changes nothing
        nn.init.zeros_(self.guidance[-1].weight)
        nn.init.zeros_(self.guidance[-1].bias)

    @property
    def mid_block(self) -> nn.Module:
        return self.unet.mid_block

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None = None
    ) -> UNet2DOutput:
        """Predictions (n, 1, 8, 8) at timesteps (n,) for labels (n,) and guidance scales (n,)."""
        told = self.labels(labels)
        if scale is not None:
            told = told + self.guidance(guidance_embedding(scale / 1000.0, 64))
        return self.unet(sample, timesteps, told)


class DigitTeacher:
    """A frozen network with what the losses ask of a teacher; it is called as a UNet of Stable Diffusion is."""

    family = StableDiffusion()

    def __init__(self, network: DigitNetwork, schedule: NoiseSchedule):
        self.unet = network.requires_grad_(False).eval()
        self.schedule = schedule

    @torch.no_grad()
    def predictions(
        self, sample: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With the class and without."""
        told = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
        both = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), told).sample
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    @torch.no_grad()
    def guided(
        self, sample: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """The prediction at a guidance scale, or at one of each sample; without a second pass at 1."""
        if isinstance(scale, float) and scale == 1.0:
            return self.unet(sample, timesteps, labels).sample
        w = torch.as_tensor(scale).expand(len(sample)) - 1.0
        return guided(*self.predictions(sample, timesteps, labels), w)


class Flow:
    """A network of a diffusion as the velocity eps - x_0 on the straight path (1 - sigma) x_0 + sigma eps.

    A point of the straight path, divided by its norm sqrt((1 - sigma)^2 + sigma^2), is one of the diffusion's path at the level
    with the same ratio of signal and noise, whose timestep is looked up between those of the table.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.kind = schedule.prediction_type
        timesteps = torch.arange(schedule.num_train_timesteps)
        signal, spread = schedule.levels(timesteps)
        self.table = (spread / signal).log()

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """Of the diffusion, between 0 and the last, for sigma (n,) in [0, 1]."""
        level = (sigma.double() / (1.0 - sigma.double()).clamp(min=1e-12)).clamp(min=1e-12).log()
        above = torch.searchsorted(self.table, level).clamp(1, len(self.table) - 1)
        low, high = self.table[above - 1], self.table[above]
        return (above - 1 + ((level - low) / (high - low)).clamp(0.0, 1.0)).float()

    def __call__(self, predict: Any, sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Velocities at points (n, ...) of the straight path; `predict` takes samples and timesteps of the diffusion."""
        norm = ((1.0 - sigma).square() + sigma.square()).sqrt()
        scaled = sample / norm[:, None, None, None]
        prediction = predict(scaled, self.timesteps(sigma))
        return convert(prediction, self.kind, "flow", scaled, (1.0 - sigma) / norm, sigma / norm)


class Classifier(nn.Module):
    """Two convolutions, `FEATURES` numbers, and the digit."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(CLASSIFIER_SEED)
            self.trunk = nn.Sequential(
                nn.Conv2d(1, 24, 3, 1, 1), nn.SiLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.SiLU(), nn.Flatten(),
                nn.Linear(48 * 16, FEATURES), nn.SiLU(),
            )  # fmt: skip
            self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.last(self.trunk(pictures))


def train_classifier(digits: Digits) -> Classifier:
    """Learns the training part, with so much noise that its features spread alike on pictures that it has not seen."""
    classifier, generator = Classifier(), torch.Generator().manual_seed(CLASSIFIER_SEED)

    def loss_of(_: int) -> torch.Tensor:
        pictures, labels = digits.draw(128, generator)
        noise = torch.randn(pictures.shape, generator=generator)
        return nn.functional.cross_entropy(classifier(pictures + 0.4 * noise), labels, label_smoothing=0.1)

    train(list(classifier.parameters()), CLASSIFIER_STEPS, loss_of, 1e-3)
    return classifier.requires_grad_(False).eval()


class Measures:
    """Figures of samples against the pictures that were held out.

    Args:
        digits: Both parts.
        classifier: Trained on the first part.
    """

    def __init__(self, digits: Digits, classifier: Classifier):
        self.digits, self.classifier = digits, classifier
        self.features = classifier.trunk(digits.held_out)
        # the held-out pictures shall have features of variance 1 in all
        self.spread = float(self.features.var(0).sum().sqrt())
        read = classifier(digits.held_out).argmax(1)
        self.accuracy = share(read == digits.held_out_labels)
        self.apart = self._nearest(digits.held_out)

    def _nearest(self, pictures: torch.Tensor) -> float:
        """Median distance to the nearest picture of the training part."""
        return float(torch.cdist(pictures.flatten(1), self.digits.pictures.flatten(1)).min(1).values.median())

    def __call__(self, samples: torch.Tensor, labels: torch.Tensor) -> Mapping[str, float]:
        """Figures of samples (n, 1, 8, 8) that were asked for as `labels` (n,).

        Returns:
            "frechet" in the classifier's features, of the variance of the held-out ones; "frechet_pixels"; "sliced_w2" of pixels; "right", the share that is read as the
            digit asked for; "coverage" of the held-out pictures in pixels, by as many samples as there are training pictures; and
            "apart", the median distance to the nearest training picture, of that of the held-out pictures.
        """
        held = self.digits.held_out
        with torch.no_grad():
            features = self.classifier.trunk(samples)
            read = self.classifier.last(features).argmax(1)
        few = samples[: len(self.digits.pictures)]
        found = {
            "frechet": float(frechet_distance(features / self.spread, self.features / self.spread)),
            "frechet_pixels": float(frechet_distance(samples.flatten(1), held.flatten(1))),
            "sliced_w2": float(sliced_wasserstein(samples, held)),
            "right": float((read == labels).double().mean()),
            "coverage": float(coverage(few.flatten(1), held.flatten(1), NEIGHBOURS)),
            "apart": self._nearest(samples) / self.apart,
        }
        if not all(math.isfinite(value) for value in found.values()):
            raise ValueError(f"figures are not finite: {found}; the sampler has diverged")
        return {name: round(value, 5) for name, value in found.items()}
