"""Eight Gaussians on a circle, small networks for several seeds at once, and how near samples come to the truth.

The networks of all seeds are one batched product: weights (seeds, in, out). Nothing is shared between seeds but the arithmetic, and
Adam is elementwise, so each seed trains as it would alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from common import ROOT  # noqa: F401  (puts the repository on the path)
from torch import nn

from diffusers_ext.metrics import sliced_wasserstein
from diffusers_ext.training.distillation.consistency import karras_levels


MODES, RADIUS, DEVIATION = 8, 2.0, 0.15
SIGMA_MIN, SIGMA_MAX = 0.01, 20.0
# of one coordinate, which EDM's preconditioning divides by
SIGMA_DATA = math.sqrt(RADIUS**2 / 2 + DEVIATION**2)
WIDTH, LAYERS, FREQUENCIES = 128, 3, 8
EVALUATED, DRAWS, PROJECTIONS = 65_536, 2, 64

# (samples (seeds, n, 2), noise levels (seeds, n)) -> clean samples (seeds, n, 2)
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def centres() -> torch.Tensor:
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


def draw_data(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Samples (*shape, 2)."""
    modes = torch.randint(MODES, shape, generator=generator)
    return centres()[modes] + DEVIATION * torch.randn((*shape, 2), generator=generator)


def stratified_data(count: int, generator: torch.Generator) -> torch.Tensor:
    """Samples (count, 2), equally many of each mode."""
    noise = torch.randn((count, 2), generator=generator)
    return centres().repeat(count // MODES, 1) + DEVIATION * noise


class BatchedLinear(nn.Module):
    """A linear layer for each seed."""

    def __init__(self, seeds: Sequence[int], inputs: int, outputs: int, name: str):
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        drawn = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(hash_seed(seed, name))
            drawn.append((torch.rand(inputs + 1, outputs, generator=generator) * 2 - 1) * bound)
        both = torch.stack(drawn)
        self.weight = nn.Parameter(both[:, :-1].contiguous())
        self.bias = nn.Parameter(both[:, -1:].contiguous())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, values, self.weight)


def hash_seed(seed: int, name: str) -> int:
    return seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 1_000_003


class Perceptrons(nn.Module):
    """Residual networks from `inputs` numbers and some levels to `outputs` numbers, one a seed.

    Args:
        seeds: One network each.
        inputs: Length of the samples.
        outputs: Length of what is predicted.
        levels: How many levels the network is told.
    """

    def __init__(self, seeds: Sequence[int], inputs: int = 2, outputs: int = 2, levels: int = 1, name: str = ""):
        super().__init__()
        self.first = BatchedLinear(seeds, inputs + 2 * FREQUENCIES * levels, WIDTH, f"{name}first")
        self.blocks = nn.ModuleList(BatchedLinear(seeds, WIDTH, WIDTH, f"{name}block{i}") for i in range(LAYERS))
        self.last = BatchedLinear(seeds, WIDTH, outputs, f"{name}last")
        self.register_buffer("frequencies", 2.0 ** torch.arange(-3, FREQUENCIES - 3))

    def forward(self, samples: torch.Tensor, *told: torch.Tensor) -> torch.Tensor:
        """Outputs (seeds, n, outputs) for samples (seeds, n, inputs) and levels (seeds, n), of the order of 1."""
        phases = torch.cat([level[..., None] * self.frequencies for level in told], -1)
        hidden = self.first(torch.cat([samples, phases.sin(), phases.cos()], -1))
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden))
        return self.last(nn.functional.silu(hidden))


class EDMDenoisers(nn.Module):
    """Denoisers with the preconditioning of EDM (arXiv 2206.00364); with `jumps` they are told the level a jump ends at."""

    def __init__(self, seeds: Sequence[int], jumps: bool = False, name: str = "teacher"):
        super().__init__()
        self.network = Perceptrons(seeds, levels=2 if jumps else 1, name=name)
        self.jumps = jumps

    def forward(self, samples: torch.Tensor, sigma: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        level = sigma[..., None]
        norm = (level.square() + SIGMA_DATA**2).sqrt()
        told = [level_told(sigma), level_told(sigma if wanted is None else wanted)][: 1 + self.jumps]
        output = self.network(samples / norm, *told)
        return (SIGMA_DATA / norm) ** 2 * samples + level * SIGMA_DATA / norm * output


def level_told(sigma: torch.Tensor) -> torch.Tensor:
    """What a network is told of a noise level; 0 is told as the lowest, where jumps of training end."""
    return sigma.clamp(min=SIGMA_MIN).log() / 4


def train(
    parameters: Sequence[nn.Parameter], steps: int, loss_of: Callable[[int], torch.Tensor], learning_rate: float
) -> None:
    """Adam with a rate that falls to 0 over the second half. `loss_of` is a sum over seeds."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * falling(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss_of(step).backward()
        optimizer.step()


def falling(step: int, steps: int) -> float:
    """1 over the first half of a run, then straight to 0."""
    return min(1.0, 2.0 * (1.0 - step / steps))


def per_seed(values: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient in each seed's network is that of the seed's own mean."""
    return values.flatten(1).mean(1).sum()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """An exponential moving average, in place."""
    for mean, value in zip(average.parameters(), network.parameters()):
        mean.lerp_(value, 1.0 - decay)


@torch.no_grad()
def sample_ode(denoise: Denoiser, noise: torch.Tensor, steps: int, heun: bool = False) -> torch.Tensor:
    """EDM's samplers on Karras levels: Euler with `steps` evaluations, or Heun with 2 `steps` - 1.

    Args:
        noise: (seeds, n, 2) of variance 1.
    """
    sigmas = torch.cat([karras_levels(max(steps, 2), SIGMA_MIN, SIGMA_MAX).flip(0), torch.zeros(1)]).float().tolist()
    if steps == 1:
        sigmas = [SIGMA_MAX, 0.0]
    samples = noise * SIGMA_MAX
    for sigma, after in zip(sigmas, sigmas[1:]):
        slope = (samples - denoise(samples, samples.new_full(samples.shape[:2], sigma))) / sigma
        ahead = samples + (after - sigma) * slope
        if heun and after > 0.0:
            second = (ahead - denoise(ahead, samples.new_full(samples.shape[:2], after))) / after
            ahead = samples + (after - sigma) * 0.5 * (slope + second)
        samples = ahead
    return samples


def measure(
    sampler: Callable[[torch.Tensor, torch.Generator], torch.Tensor], seeds: int, seed: int = 12_345
) -> dict[str, list[float]]:
    """Figures of each seed, means over draws of fresh noise.

    Args:
        sampler: From noise (seeds, n, 2) of variance 1 to samples; the generator is for noise on the way.
        seeds: How many networks there are.
        seed: Of the noise.

    Returns:
        "sliced_w2" from a reference with equally many samples of each mode; "inside", the share within three deviations of a
        centre; "mode_kl", of the shares of the modes from equal ones.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[list[float]]] = {"sliced_w2": [], "inside": [], "mode_kl": []}
    for _ in range(DRAWS):
        noise = torch.randn((seeds, EVALUATED, 2), generator=generator)
        reference = stratified_data(EVALUATED, generator)
        samples = torch.cat([sampler(part, generator) for part in noise.split(8_192, 1)], 1)
        rows = [mixture_figures(each, reference) for each in samples]
        for name, values in found.items():
            values.append([row[name] for row in rows])
    return {name: [sum(column) / DRAWS for column in zip(*values)] for name, values in found.items()}


def mixture_figures(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """The figures of `measure` for samples (n, 2)."""
    distances, nearest = torch.cdist(samples, centres()).min(1)
    shares = torch.bincount(nearest, minlength=MODES).double() / len(samples)
    return {
        "sliced_w2": float(sliced_wasserstein(samples, reference, PROJECTIONS)),
        "inside": float((distances < 3 * DEVIATION).double().mean()),
        "mode_kl": float(torch.xlogy(shares, shares * MODES).sum()),
    }
