"""Parts of the training of a restoration model: its network, its pairs of pictures, and its losses.

IR-SDE, Luo et al., ICML 2023, arXiv 2301.11699. A clean picture x0 and a degraded one mu make x_t = mu + alpha (x0 - mu) + sigma eps.

    target     compare the network's answer with eps, x0 or v = sigma_inf alpha eps - (sigma / sigma_inf) (x0 - mu)
    clean      compare the x0 that follows from the answer with x0: v counts by sigma / sigma_inf, eps by sigma / alpha
    optimum    compare Euler's step by the answer with the best x_(t-1), as IR-SDE and DA-CLIP were trained

In terms of y = (x - mu) / sigma_inf the process is variance-preserving, so its signal-to-noise ratio is (sigma_inf alpha / sigma)^2.
"""

from pathlib import Path
from typing import Any

import torch

from ..data.degradations import degrade
from ..data.photographs import PhotographCrops
from ..models import RestorationUNet2DModel
from ..schedulers import MRScheduler
from .data import FolderSource, Source
from .objectives import min_snr_weights
from .streams import stream


LOSS_TARGETS = ("target", "clean", "optimum")
LOSS_TYPES = ("l1", "l2")


def new_restoration_unet(
    channels: tuple[int, ...],
    layers_per_block: int | tuple[int, ...],
    picture_channels: int = 3,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
) -> RestorationUNet2DModel:
    """An untrained network whose first answers have the size of what is asked for.

    Args:
        channels: Width of each level.
        layers_per_block: Blocks of each level, one number for all or one for each.
        picture_channels: Channels of a picture; the network takes twice as many.
        input_scale: Size that x - mu is divided by, above 0. At 1 it counts as pictures do, which suits a sigma_inf of a few
            hundredths: larger noise drowns what the picture shows.
        output_scale: Typical size of the answer, above 0: sigma_inf for v, 1 for noise and pictures.

    Raises:
        ValueError: If the numbers do not fit each other.
    """
    # by name: diffusers takes positional arguments for defaults, which from_config leaves out
    unet = RestorationUNet2DModel(
        in_channels=2 * picture_channels,
        out_channels=picture_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
    )
    with torch.no_grad():
        unet.conv_in.weight[:, :picture_channels] /= input_scale
        unet.conv_out.weight *= output_scale
    return unet


def restoration_loss(
    scheduler: MRScheduler,
    answer: torch.Tensor,
    sample: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    mean: torch.Tensor,
    kind: str = "target",
    norm: str = "l2",
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        scheduler: The process, with its `prediction_type`.
        answer: What the network says (n, c, H, W).
        sample: The noisy pictures it was shown.
        clean: The clean pictures.
        noise: The noise in `sample`.
        timesteps: Timesteps (n,), 1 or more.
        mean: The degraded pictures.
        kind: "target", "clean" or "optimum".
        norm: "l1" or "l2".
        snr_gamma: Cap of min-SNR weighting; `None` weighs all alike. For "target" alone.

    Returns:
        A scalar. Noise has unit size, and pictures and velocities are counted in units of sigma_inf, so that the number
        does not depend on the noise.

    Raises:
        ValueError: For an unknown `kind` or `norm`, or where `kind` does not go with the other settings.
    """
    if kind not in LOSS_TARGETS or norm not in LOSS_TYPES:
        known = f"{', '.join(LOSS_TARGETS)} and {', '.join(LOSS_TYPES)}"
        raise ValueError(f"loss {kind!r} with {norm!r} is unknown; use one of {known}")
    prediction_type = scheduler.config.prediction_type
    if kind == "clean" and snr_gamma is not None:
        raise ValueError(f"snr_gamma={snr_gamma!r} with loss 'clean' would weigh twice; use 'target' or leave it out")
    if kind == "optimum":
        if prediction_type != "epsilon" or snr_gamma is not None:
            raise ValueError("loss 'optimum' is defined for prediction_type='epsilon' without snr_gamma; use 'target'")
        answer, wanted = scheduler.training_optimum_pair(answer, sample, clean, timesteps, mean)
        scale = scheduler.process.sigma_inf
    else:
        wanted = scheduler.get_target(clean, noise, timesteps, mean)
        scale = 1.0 if prediction_type == "epsilon" else scheduler.process.sigma_inf
    error = (answer.float() - wanted.float()) / scale
    if kind == "clean" and prediction_type != "sample":
        alpha, sigma = scheduler._levels(timesteps, error)
        error = error * sigma / (scheduler.process.sigma_inf * (1.0 if prediction_type == "v_prediction" else alpha))
    error = (error.abs() if norm == "l1" else error.square()).flatten(1).mean(1)
    if snr_gamma is None:
        return error.mean()
    levels = [scheduler.process.level(time) for time in timesteps.double().tolist()]
    signal = error.new_tensor([level.alpha for level in levels])
    spread = error.new_tensor([level.sigma / scheduler.process.sigma_inf for level in levels])
    if prediction_type == "sample":
        # the weight that the loss of x0 itself has
        return (error * ((signal / spread) ** 2).clamp(max=snr_gamma)).mean()
    return (error * min_snr_weights(prediction_type, signal, spread, snr_gamma)).mean()


def training_timesteps(uniform: torch.Tensor, last: int, start_share: float = 0.0) -> torch.Tensor:
    """Whole timesteps, even but for a share that are the last one.

    A run starts at the last timestep, where the degraded picture alone says what to do. At the others the noisy sample shows the
    clean picture through its noise, and a network that sees them evenly learns to read that and hardly ever to restore.

    Args:
        uniform: Even numbers (n,) in [0, 1).
        last: The last timestep, 1 or more.
        start_share: Share of the last timestep, in [0, 1); 0 is even.

    Returns:
        Timesteps (n,) from 1 to `last`, int64.

    Example:
        >>> training_timesteps(torch.tensor([0.0, 0.4, 0.5, 0.75, 0.999]), 100, 0.5).tolist()
        [100, 100, 1, 51, 100]
    """
    rest = ((uniform - start_share) / (1.0 - start_share)).clamp(min=0.0)
    even = 1 + (rest * last).long().clamp(max=last - 1)
    return torch.where(uniform < start_share, last, even)


class RestorationPairs:
    """Pairs of a clean and a degraded picture in [0, 1], each a pure function of (seed, step).

    Args:
        source: Clean pictures.
        seed: Seed of the run.
        kinds: Degradations to draw from; see `diffusers_ext.data.degradations.DEGRADATIONS`.
        degraded: Where degraded pictures are given, the source of them, with the same items as `source`.
        photograph_share: Share of a batch that is crops of scikit-image's photographs instead.
        resolution: Side of those crops.

    Raises:
        ValueError: If `degraded` and photographs are both wanted.
        FileNotFoundError: If photographs are wanted and scikit-image is not installed.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        kinds: list[str] | None = None,
        degraded: FolderSource | None = None,
        photograph_share: float = 0.0,
        resolution: int = 64,
    ):
        if degraded is not None and photograph_share:
            raise ValueError(
                f"photograph_share={photograph_share} makes pairs of its own; leave it out where degraded pictures are given"
            )
        self.source, self.seed, self.kinds, self.degraded = source, seed, kinds, degraded
        self.share = photograph_share
        self.crops = PhotographCrops(resolution) if photograph_share else None

    def draw(self, step: int, count: int, split: str = "train") -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Clean and degraded pictures of the global batch of a step, (n, c, R, R) each, and how they were degraded."""
        items = self.source.draw(step, count, split)
        clean = self.source.images(items).cpu() / 2.0 + 0.5
        if self.degraded is not None:
            return clean, self.degraded.images(items).cpu() / 2.0 + 0.5, ["given"] * count
        if self.crops is not None:
            generator = stream(self.seed, step, f"photographs-{split}")
            chosen = torch.rand(count, generator=generator) < self.share
            crops = self.crops.draw(count, generator)
            clean = torch.where(chosen[:, None, None, None], crops, clean)
        spoilt, how = degrade(clean, self.kinds, stream(self.seed, step, f"degradations-{split}"))
        return clean, spoilt, how


def make_pairs(args: Any, source: Source) -> RestorationPairs:
    """The pairs that the arguments of a run ask for."""
    degraded = None
    if args.degraded_column:
        degraded = FolderSource(
            Path(args.train_data_dir), args.seed, args.resolution, args.degraded_column, None, strict=args.strict
        )
        if isinstance(source, FolderSource):
            source.leave_out(degraded.unreadable)
    return RestorationPairs(source, args.seed, args.degradations, degraded, args.photograph_share, args.resolution)
