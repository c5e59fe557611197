"""Sequences with a closed-form denoiser, and a plain rolling sampler to check the real one against.

x is a stationary Gaussian process with covariance S over frames. With z = A x + D^(1/2) n, A = diag(a), D = diag(s^2) per frame, the best
prediction is linear: E[x | z] = S A (A S A + D)^-1 z. The sampler is linear too, so one-hot noise in the channel axis (channel c is
noise variable c) makes the emitted frames M the map from noise to frames, and their covariance is exactly M M^T.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext import RollingLadderPipeline
from diffusers_ext.schedulers import RollingLadderScheduler


def ar1_correlations(rho: float, count: int) -> np.ndarray:
    return rho ** np.arange(count, dtype=np.float64)


def ar2_correlations(radius: float, angle: float, count: int) -> np.ndarray:
    """Of x_t = 2 r cos(w) x_{t-1} - r^2 x_{t-2} + noise, which has the poles r e^(+-iw)."""
    first, second = 2 * radius * math.cos(angle), -(radius**2)
    values = [1.0, first / (1 - second)]
    while len(values) < count:
        values.append(first * values[-1] + second * values[-2])
    return np.array(values[:count])


def covariance(correlations: np.ndarray, count: int) -> np.ndarray:
    frames = np.arange(count)
    return np.asarray(correlations[np.abs(frames[:, None] - frames)])


class LinearDenoiser(ModelMixin, ConfigMixin):
    """E[x | z] for a stationary process with the given correlations, as a network of the rolling pipeline.

    It answers the data on the cosine process, and the velocity (z - x) / s on that of flow models.
    """

    @register_to_config
    def __init__(self, in_channels: int, correlations: list[float], is_flow: bool = False) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # a module has its dtype from a parameter
        self._known: dict[bytes, torch.Tensor] = {}

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """Frames x frames."""
        key = times.numpy().tobytes()
        if key not in self._known:
            share = times.double().numpy() / 1000 if self.config.is_flow else (times.double().numpy() + 1) / 1000
            alpha = 1 - share if self.config.is_flow else np.where(share == 1, 0.0, np.cos(np.pi / 2 * share))
            sigma = share if self.config.is_flow else np.sin(np.pi / 2 * share)
            prior = covariance(np.array(self.config.correlations), len(share))
            seen = alpha[:, None] * prior * alpha + np.diag(sigma**2)
            self._known[key] = torch.from_numpy(np.linalg.solve(seen, alpha[:, None] * prior).T.copy())
        return self._known[key]

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, num_context: int = 0, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        assert timestep.shape == (1, sample.shape[1]) and not return_dict
        data = self.weights(timestep[0].cpu()).to(sample.dtype) @ sample
        if not self.config.is_flow:
            return (data,)
        share = timestep.double()[..., None] / 1000
        return (torch.where(share > 0, (sample - data) / share.clamp(min=1e-12), 0.0),)


def one_hot_noise(channels: int) -> Callable[[int], torch.Tensor]:
    """Noise whose n-th frame is 1 in the n-th channel and 0 elsewhere."""
    used = 0

    def source(count: int) -> torch.Tensor:
        nonlocal used
        rows = torch.zeros(1, count, channels, dtype=torch.float64)
        for i in range(count):
            rows[0, i, used + i] = 1.0
        used += count
        return rows

    return source


def rolling_scheduler(kind: str, window: int, step: int, context: int) -> RollingLadderScheduler:
    """`ddim`, `ddpm` or `2m` on the cosine process, `fm` or `fm-2m` on that of flow models."""
    settings: dict[str, Any] = {"window_length": window, "ladder_step": step, "context_length": context}
    if kind.startswith("fm"):
        base = "flow_match_euler" if kind == "fm" else "dpmsolver++"
        return RollingLadderScheduler(base=base, prediction_type="flow_prediction", **settings)
    base = {"2m": "dpmsolver++"}.get(kind, kind)
    return RollingLadderScheduler(base=base, prediction_type="sample", beta_schedule="cosine", **settings)


def plain_rollout(
    correlations: np.ndarray,
    kind: str,
    window: int,
    step: int,
    per_roll: int,
    context: int,
    noise: np.ndarray,
    frames: int,
) -> tuple[np.ndarray, int]:
    """The same stream, written down frame by frame from the definition, with absolute frame and evaluation numbers.

    Args:
        noise: (rows, channels), consumed in order.

    Returns:
        The emitted frames (frames, channels), and the number of evaluations.
    """
    levels, flow = window // step * per_roll, kind.startswith("fm")

    def pair(level: int) -> tuple[float, float]:
        share = level / levels
        if flow:
            return 1 - share, share
        return (0.0 if level == levels else math.cos(math.pi * share / 2)), math.sin(math.pi * share / 2)

    def log_snr(level: int) -> float:
        alpha, sigma = pair(level)
        return -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)

    state = {f: noise[f].astype(np.float64) for f in range(window)}
    past: dict[int, tuple[np.ndarray, int]] = {}
    done: list[np.ndarray] = []
    evaluation = 0
    while len(done) < frames:
        active = sorted(state)
        level = {f: min(max(levels + per_roll * (f // step) - evaluation, 0), levels) for f in active}
        following = {f: min(max(levels + per_roll * (f // step) - evaluation - 1, 0), levels) for f in active}
        before = done[max(0, len(done) - context) :] if context else []
        pairs = [(1.0, 0.0)] * len(before) + [pair(level[f]) for f in active]
        alpha, sigma = np.array(pairs).T
        prior = covariance(correlations, len(pairs))
        seen = np.stack([*before, *(state[f] for f in active)])
        gain = prior * alpha @ np.linalg.inv(alpha[:, None] * prior * alpha + np.diag(sigma**2))
        data = dict(zip(active, (gain @ seen)[len(before) :], strict=True))
        evaluation += 1
        for f in active:
            if following[f] == level[f]:
                continue
            (a, s), (a1, s1) = pair(level[f]), pair(following[f])
            target = data[f]
            if kind.endswith("2m") and f in past:
                old, old_level = past[f]
                lams = [log_snr(n) for n in (old_level, level[f], following[f])]
                if all(map(math.isfinite, lams)):
                    r = (lams[1] - lams[0]) / (lams[2] - lams[1])
                    target = (1 + 1 / (2 * r)) * data[f] - old / (2 * r)
            past[f] = (data[f], level[f])
            state[f] = s1 / s * state[f] + (a1 - s1 * a / s) * target
        ready = [f for f in active if following[f] == 0]
        for f in ready:
            done.append(state.pop(f))
            past.pop(f, None)
            new = f + window
            if new < len(noise):
                state[new] = noise[new].astype(np.float64)
    return np.stack(done[:frames]), evaluation


def gaussian_kl_per_frame(found: np.ndarray, true: np.ndarray) -> float:
    """KL(found || true) of centred Gaussians, divided by the number of frames."""
    count = len(true)
    ratio = np.linalg.solve(true, found)
    return float((np.trace(ratio) - count - np.linalg.slogdet(ratio)[1]) / (2 * count))


def analytic_pipeline(
    kind: str, correlations: np.ndarray, channels: int, window: int = 20, step: int = 1, context: int = 1
) -> RollingLadderPipeline:
    network = LinearDenoiser(channels, correlations.tolist(), kind.startswith("fm"))
    pipeline = RollingLadderPipeline(network, rolling_scheduler(kind, window, step, context))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stream_covariance(
    kind: str, correlations: np.ndarray, per_roll: int, window: int = 20, step: int = 1, context: int = 1, last: int = 40,
    frames: int = 120,
) -> np.ndarray:  # fmt: skip
    """The exact covariance of the last frames of a stream that the real pipeline made."""
    channels = frames + window
    pipeline = analytic_pipeline(kind, correlations, channels, window, step, context)
    steps = window // step * per_roll
    made = pipeline(num_frames=frames, num_inference_steps=steps, noise_source=one_hot_noise(channels)).frames
    rows = made[0, -last:].numpy()
    return np.asarray(rows @ rows.T)
