r"""Guidance distillation along guided trajectories (AGD, Jensen & Sadat 2025, arXiv 2503.07274).

Classifier-free guidance asks the network twice, eps_u + w (eps_c - eps_u). An adapter that knows w learns the sum in one pass. Its inputs are
points of guided sampling runs, not noised data, because those are what it meets at inference:
    loss = mean ||eps_adapted(x_t, t, c, w) - (eps_u + w (eps_c - eps_u))||^2 over (x_t, t, c, w) of stored trajectories.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import check_levels, check_range, check_same_shape
from .lcm import guidance_embedding
from .lcm import guided as guided_by_excess


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uncond + scale (cond - uncond), the guidance of the pipelines; predictions (n, ...), `scale` (n,)."""
    return guided_by_excess(conditional, unconditional, scale - 1.0)


@dataclass(frozen=True)
class GuidedPoint:
    """One point of a guided run: the network's input and what guidance makes of its two outputs."""

    sample: torch.Tensor
    timestep: torch.Tensor
    guided: torch.Tensor


@torch.no_grad()
def guided_trajectory(
    scheduler: Any,
    denoise: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    noise: torch.Tensor,
    scale: torch.Tensor,
    num_inference_steps: int,
    step_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[GuidedPoint]:
    """Runs guided sampling and yields each point of it, to be stored and trained on.

    Args:
        scheduler: A scheduler of diffusers.
        denoise: From sample and timestep to the predictions with and without condition.
        noise: Start (n, ...), scaled by the scheduler's `init_noise_sigma`.
        scale: Guidance scale of each run (n,).
        num_inference_steps: Steps of the run, 1 or more.
        step_kwargs: What the scheduler's step takes besides, e.g. the `generator` of one whose steps are random.

    Yields:
        A point a step, from the noisiest on.
    """
    check_range("num_inference_steps", num_inference_steps, 1)
    check_levels(noise, scale=scale)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    sample = noise
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        prediction = guided(*denoise(scaled, timestep), scale)
        yield GuidedPoint(scaled, timestep, prediction)
        sample = scheduler.step(prediction, timestep, sample, **(step_kwargs or {})).prev_sample


def relative_error(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """||prediction - wanted||^2 / ||wanted||^2 over a batch, a scalar."""
    check_same_shape(prediction=prediction, wanted=wanted)
    return (prediction - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)


class GuidanceAdapter(nn.Module):
    """Adds to the features of an attention layer what they read from an embedding of the guidance scale.

    Features attend to two tokens, one of the scale and one that is learned; the last projection starts at zero, so that the
    network is unchanged before training.

    Args:
        channels: Width of the features, 1 or more.
        width: Width of the adapter, a multiple of 4.
        seed: Seed of the initial weights; the global random state is not touched.

    Raises:
        ValueError: For arguments out of range.

    Example:
        >>> adapter = GuidanceAdapter(6, width=8)
        >>> float(adapter(torch.ones(1, 5, 6), torch.tensor([7.5])).detach().abs().max())
        0.0
    """

    def __init__(self, channels: int, width: int = 64, seed: int = 0):
        super().__init__()
        check_range("channels", channels, 1)
        check_range("width", width, 4)
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query = nn.Linear(channels, width)
            self.tokens = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 4 * width))
            self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What to add to features (n, length, channels) at guidance scales (n,)."""
        check_levels(features, scale=scale)
        # scales of 1 to 12 are spread over the first waves of the embedding that diffusers multiplies by 1000
        embedded = guidance_embedding(scale / 1000.0, self.width).to(features)
        key, value = self.tokens(embedded).reshape(len(features), 2, 2, self.width).unbind(2)
        read = nn.functional.scaled_dot_product_attention(self.query(features), key, value)
        return self.out(read)
