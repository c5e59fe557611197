"""Problems that samplers are measured on: a mixture of two Gaussians in 256 dimensions whose noise prediction is exact.

With x0 ~ w1 N(m1, diag s1^2) + (1 - w1) N(m2, diag s2^2), abar the signal level and v_k = abar s_k^2 + 1 - abar, a component
predicts eps_k = sqrt(1 - abar) (x - sqrt(abar) m_k) / v_k, and

    mix      the mixture's prediction: eps_1 and eps_2, weighted with their responsibilities
    cfg      mix + w (eps_1 - mix), w = 7.5: guidance, and as stiff as guidance is
    guided   eps_2 + 7.5 (eps_1 - eps_2): linear, strongly overshooting

The mixture and the start noise are those of the reference vectors in `tests/golden/samplers/`; other start noise is drawn from
seeds. Errors are those of X = x / sqrt(abar) at the end, per sample, against a Runge-Kutta solution in log s.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tests.helpers.golden import golden


PROBLEMS = ("mix", "cfg", "guided")
GUIDANCE = 7.5
# Error of a sample above which it counts as failed: far outside what a wrong digit does, well below a wrong mode.
FAILURE = 0.2

Noise = Callable[[torch.Tensor, float], torch.Tensor]


class MixtureProblem:
    """One of the three problems.

    Args:
        name (`str`):
            `"mix"`, `"cfg"` or `"guided"`.
        guidance (`float`, defaults to 7.5):
            Guidance scale of the last two.
    """

    def __init__(self, name: str, guidance: float = GUIDANCE) -> None:
        if name not in PROBLEMS:
            raise ValueError(f"name={name!r} is not a problem; use one of {', '.join(PROBLEMS)}")
        data = golden("samplers/problem.npz")
        self.name, self.guidance = name, guidance
        self.means = torch.stack([data.tensor("m1"), data.tensor("m2")])
        self.variances = torch.stack([data.tensor("s1"), data.tensor("s2")]) ** 2
        self.weights = torch.tensor([float(data["w1"]), 1 - float(data["w1"])], dtype=torch.float64)
        self.alphas_cumprod = data.tensor("alphas_cumprod")
        self.start = data.tensor("xT")

    @property
    def s_max(self) -> float:
        """sigma / alpha of the last training timestep."""
        last = float(self.alphas_cumprod[-1])
        return math.sqrt((1 - last) / last)

    @property
    def s_min(self) -> float:
        """sigma / alpha of the first training timestep."""
        first = float(self.alphas_cumprod[0])
        return math.sqrt((1 - first) / first)

    def fresh_starts(self, seeds: Sequence[int], each: int = 16) -> torch.Tensor:
        """Start noise x_T, `each` samples a seed, float64."""
        shape = (each, *self.means.shape[1:])
        draws = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.cat(draws)

    def noise(self, x: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """eps(x) at a signal level, shape of `x`."""
        spread = alpha_bar * self.variances + 1 - alpha_bar
        offset = x[:, None] - math.sqrt(alpha_bar) * self.means
        parts = math.sqrt(1 - alpha_bar) * offset / spread
        if self.name == "guided":
            return parts[:, 1] + self.guidance * (parts[:, 0] - parts[:, 1])
        logs = self.weights.log() - 0.5 * (offset**2 / spread + spread.log()).flatten(2).sum(-1)
        shares = logs.softmax(-1).reshape(*logs.shape, *[1] * (x.ndim - 1))
        mixed = (shares * parts).sum(1)
        return mixed if self.name == "mix" else mixed + self.guidance * (parts[:, 0] - mixed)

    def slope(self, state: torch.Tensor, node: float) -> torch.Tensor:
        """dX/ds at X = `state` and s = `node`."""
        alpha_bar = 1 / (1 + node**2)
        return self.noise(state * math.sqrt(alpha_bar), alpha_bar)

    def reference(self, start: torch.Tensor, high: float, low: float, steps: int = 500) -> torch.Tensor:
        """X at s = `low` of the trajectory through x = `start` at s = `high`: Runge-Kutta of order four in log s."""
        state = start.double() * math.sqrt(1 + high**2)
        grid = np.linspace(math.log(high), math.log(low), steps + 1)
        for before, after in zip(grid[:-1], grid[1:], strict=True):
            width = after - before
            a, b, c = math.exp(before), math.exp(before + width / 2), math.exp(after)
            k1 = a * self.slope(state, a)
            k2 = b * self.slope(state + width / 2 * k1, b)
            k3 = b * self.slope(state + width / 2 * k2, b)
            k4 = c * self.slope(state + width * k3, c)
            state = state + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state


def ends(problem: MixtureProblem) -> tuple[float, float]:
    """The range of s that runs cover."""
    return problem.s_max, problem.s_min


def run(scheduler: object, problem: MixtureProblem, start: torch.Tensor) -> torch.Tensor:
    """X at the end of a run of a variance-preserving scheduler whose timesteps are set: one evaluation a step.

    The model is asked at the scheduler's own levels, `sigmas[i]` as sigma / alpha, so that no rounding of timesteps enters.
    """
    sample = start.double()
    nodes = exact_nodes(scheduler)
    for index, timestep in enumerate(scheduler.timesteps):
        output = problem.noise(sample, 1 / (1 + nodes[index] ** 2))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample * math.sqrt(1 + nodes[-1] ** 2)


def exact_nodes(scheduler: object) -> list[float]:
    """s of every node, in full precision where the scheduler keeps it."""
    kept = getattr(scheduler, "_nodes", None)
    return list(kept) if kept is not None else scheduler.sigmas.double().tolist()


def sample_errors(state: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Root mean square error of each sample, shape (n,); infinite where a run blew up."""
    errors = (state.double() - reference).flatten(1).square().mean(1).sqrt()
    return torch.nan_to_num(errors, nan=math.inf)


def log_uniform_nodes(problem: MixtureProblem, count: int) -> list[float]:
    """`count` intervals of equal ratio over the whole range."""
    return np.exp(np.linspace(math.log(problem.s_max), math.log(problem.s_min), count + 1)).tolist()


def karras_nodes(problem: MixtureProblem, count: int, rho: float = 7.0) -> list[float]:
    """`count` intervals even in s^(1 / rho) over the whole range."""
    return (np.linspace(problem.s_max ** (1 / rho), problem.s_min ** (1 / rho), count + 1) ** rho).tolist()
