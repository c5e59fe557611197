"""Other ways to make endless sequences, on the closed-form processes of `rolling.py`: chunks, and the queue of FIFO-Diffusion.

FIFO-Diffusion: Generating Infinite Videos from Text without Training, Kim et al., NeurIPS 2024, arXiv 2405.11473. A queue of f n frames, each one
level noisier than the one before it; in a round the network sees n partitions of f frames, one after the other, the first frame is emitted
and noise enters behind. Lookahead denoising has 2 n partitions, each half over the one before it, of which only the noisier half is kept;
the first one is filled with copies of the frame at the head. So a frame costs n evaluations, or 2 n.

A queue is a ladder of step 1 with a window of f n frames, and partitions are what the network makes of it. So everything here runs through
`RollingLadderPipeline` with the same denoiser and the same updates, and every evaluation is of f = 20 frames (and context).
"""

import itertools
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext import RollingLadderPipeline
from tests.analytic.rolling import LinearDenoiser, covariance, gaussian_kl_per_frame, one_hot_noise, rolling_scheduler


FRAMES, LAST, MADE = 20, 40, 120
LOOKAHEADS = ("none", "copies", "emitted")
COSTS = (1, 2, 4)


class PartitionedDenoiser(LinearDenoiser):
    """The exact denoiser, asked for `frames` of a window at a time.

    Args:
        in_channels (`int`), correlations (`list[float]`): As of `LinearDenoiser`.
        frames (`int`): Frames of a partition.
        lookahead (`str`): `"none"`; or partitions that overlap by half, with `"copies"` of the head before the first, as published,
            or the `"emitted"` frames in their place.
    """

    @register_to_config
    def __init__(self, in_channels: int, correlations: list[float], frames: int, lookahead: str = "none") -> None:
        super().__init__(in_channels, correlations)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, num_context: int = 0, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        frames, lookahead = self.config.frames, self.config.lookahead
        context, queue = sample[:, :num_context], sample[:, num_context:]
        before, times = timestep[:, :num_context], timestep[:, num_context:]

        def asked(*parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            rows, levels = (torch.cat(list(pieces), 1) for pieces in zip(*parts, strict=True))
            return super(PartitionedDenoiser, self).forward(rows, levels, return_dict=False)[0]

        answers = [torch.zeros_like(context)]
        step = frames if lookahead == "none" else frames // 2
        for start in range(0, queue.shape[1], step):
            part = queue[:, start : start + step], times[:, start : start + step]
            if lookahead == "none":
                answers.append(asked(part))
                continue
            if start:
                front = queue[:, start - step : start], times[:, start - step : start]
            elif lookahead == "copies":
                front = queue[:, :1].expand(-1, step, -1), times[:, :1].expand(-1, step)
            else:
                front = context, before
            answers.append(asked(front, part)[:, front[0].shape[1] :])
        return (torch.cat(answers, 1),)


def stream_of(
    denoiser: LinearDenoiser, kind: str, window: int, step: int, context: int, per_roll: int, frames: int = MADE
) -> np.ndarray:
    """The exact covariance of the last frames of a stream."""
    pipeline = RollingLadderPipeline(denoiser, rolling_scheduler(kind, window, step, context))
    pipeline.set_progress_bar_config(disable=True)
    noise = one_hot_noise(denoiser.config.in_channels)
    made = pipeline(num_frames=frames, num_inference_steps=window // step * per_roll, noise_source=noise).frames
    rows = made[0, -LAST:].numpy()
    return np.asarray(rows @ rows.T)


def fifo(kind: str, correlations: np.ndarray, partitions: int, lookahead: str) -> np.ndarray:
    window, context = FRAMES * partitions, FRAMES // 2 if lookahead == "emitted" else 0
    denoiser = PartitionedDenoiser(MADE + window, correlations.tolist(), FRAMES, lookahead)
    return stream_of(denoiser, kind, window, 1, context, 1)


def ladder(kind: str, correlations: np.ndarray, step: int, context: int, per_roll: int) -> np.ndarray:
    denoiser = LinearDenoiser(MADE + FRAMES, correlations.tolist())
    return stream_of(denoiser, kind, FRAMES, step, context, per_roll)


def seam(found: np.ndarray, step: int) -> float:
    """Mean squared step at borders of chunks over that within them; the first frame begins a chunk."""
    steps = np.diag(found)[1:] + np.diag(found)[:-1] - 2 * np.diag(found, 1)
    border = np.arange(1, len(found)) % step == 0
    return float(steps[border].mean() / steps[~border].mean())


def methods(kind: str, correlations: np.ndarray, context: int) -> dict[tuple[str, int], tuple[np.ndarray, int]]:
    """Covariances and chunk lengths by method and evaluations a frame."""
    found: dict[tuple[str, int], tuple[np.ndarray, int]] = {}
    for cost in COSTS:
        for name, step, before in (
            ("ladder of 1", 1, context),
            ("ladder of 5", 5, context),
            ("chunks", FRAMES, 0),
            ("chunks with context", FRAMES, context),
        ):
            found[name, cost] = ladder(kind, correlations, step, before, cost * step), step
        found["FIFO", cost] = fifo(kind, correlations, cost, "none"), 1
        if cost > 1:
            found["FIFO with lookahead", cost] = fifo(kind, correlations, cost // 2, "copies"), 1
            found["FIFO with lookahead on emitted frames", cost] = fifo(kind, correlations, cost // 2, "emitted"), 1
    return found


def peers(processes: dict[str, tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
    """Figures of all methods for processes by name, each with its correlations and the context that it needs."""
    rows = []
    for (process, (correlations, context)), kind in itertools.product(processes.items(), ("ddim", "2m")):
        true = covariance(correlations, LAST)
        bend = np.diff(np.eye(LAST), n=2, axis=0)
        for (name, cost), (found, step) in methods(kind, correlations, context).items():
            row = {
                "process": process,
                "kind": kind,
                "method": name,
                "nfe": cost,
                "variance": round(float(np.trace(found)) / LAST, 4),
                "kl": round(gaussian_kl_per_frame(found, true), 6),
                "jitter": round(float(np.trace(bend @ found @ bend.T) / np.trace(bend @ true @ bend.T)), 4),
            }
            rows.append(row | ({"seam": round(seam(found, step), 4)} if step > 1 else {}))
    return rows
