"""What the inversion tests share: ladders, networks with closed forms, and a counter of passes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler

from diffusers_ext.inversion import DDIMLadder, Denoiser
from tests.analytic.models import alpha_bar_levels, anisotropic_gaussian


SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def ladder(steps: int = 10, kind: str = "epsilon", **changes: Any) -> DDIMLadder:
    """A ladder in float64, so that closed forms can be compared to the last digits."""
    made = DDIMLadder.from_scheduler_config(DDIMScheduler(**{**SD, **changes}, prediction_type=kind).config, steps)
    return replace(made, alpha_bars=made.alpha_bars.double(), beyond=made.beyond.double())


def pictures(batch: int = 2, seed: int = 0, size: int = 3) -> torch.Tensor:
    return torch.randn(batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(batch: int = 2, kind: str = "epsilon") -> Denoiser:
    """The perfect network of Gaussian data; the prompt moves what it says by a constant."""
    perfect = anisotropic_gaussian(3).model(alpha_bar_levels(DDIMScheduler(**SD).alphas_cumprod.double()), kind)

    def network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return perfect(latents, float(timestep)) + 0.1 * embeddings.mean(dim=1)

    return Denoiser(
        network, torch.ones(batch, 2, 3, dtype=torch.float64), torch.zeros(batch, 2, 3, dtype=torch.float64)
    )


def linear(slope: float = 0.4, batch: int = 2, shift: float = 1.0) -> Denoiser:
    """f(z, e) = slope z + e, one token wide: every quantity is a formula of one line."""

    def network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return slope * latents + embeddings[:, 0]

    source = shift * torch.ones(batch, 1, 3, dtype=torch.float64)
    return Denoiser(network, source, torch.zeros_like(source))


class Counter:
    """Wraps a network and counts the pictures that pass through it, and the gradients that come back."""

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self.network, self.forward, self.backward = network, 0, 0

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.forward += len(latents)
        output = self.network(latents, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(self._count)
        return output

    def _count(self, gradient: torch.Tensor) -> None:
        self.backward += len(gradient)


def counted(denoiser: Denoiser) -> tuple[Denoiser, Counter]:
    counter = Counter(denoiser.network)
    return replace(denoiser, network=counter), counter
