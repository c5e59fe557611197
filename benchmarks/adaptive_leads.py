"""Ideas for `AdaptiveAdamsScheduler` that were tried and measured: momentum, a Lipschitz estimate, other nodes.

    python benchmarks/adaptive_leads.py          # some minutes of one core; writes benchmarks/results/adaptive_leads.json

Every configuration is run on development problems; the best of each lead there is run once on held-out ones. All are mixtures of
Gaussians with full random covariances, guided towards some of their components, and none is a problem of `samplers.py`. On the
problems of that file the gate that came of it, and nothing else, is run last, on noise of its own. Scores
are ratios of mean errors to the rule as it ships, on the nodes of Karras: the geometric mean and the worst over problems and
numbers of evaluations, and the share of samples with an error above 0.2.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import write_result
from sampler_field import TABLE

from diffusers_ext.schedulers import scheduling_adaptive_adams as rule
from diffusers_ext.schedulers.adams_bashforth import power_basis_weights
from tests.analytic.sampler_problems import PROBLEMS, MixtureProblem


EVALUATIONS = (5, 6, 8, 10, 15, 20)
SAMPLES, FAILURE = 32, 0.2
HIGH, LOW = float(TABLE[-1]), float(TABLE[0])
Grid = Callable[[int], np.ndarray]


class Mixture:
    """Gaussians with random means and covariances; guidance `scale` towards the first two."""

    def __init__(self, seed: int, count: int, size: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.means = 0.8 * draw(count, size)
        self.turns = torch.linalg.qr(draw(count, size, size))[0]
        self.spread = (0.03 + 0.77 * torch.rand(count, size, generator=generator, dtype=torch.float64)) ** 2
        self.scale = scale
        self.start = draw(SAMPLES, size) * math.sqrt(1 + HIGH**2)

    def noise(self, state: torch.Tensor, s: float) -> torch.Tensor:
        """dX/ds."""
        offset = torch.einsum("kij,nki->nkj", self.turns, state[:, None] - self.means)
        total = self.spread + s * s
        parts = torch.einsum("kij,nkj->nki", self.turns, s * offset / total)
        logs = -0.5 * (offset**2 / total + total.log()).sum(-1)
        mixed = (logs.softmax(-1)[..., None] * parts).sum(1)
        if self.scale == 1.0:
            return mixed
        wanted = (logs[:, :2].softmax(-1)[..., None] * parts[:, :2]).sum(1)
        return mixed + self.scale * (wanted - mixed)


class Known:
    """A problem of `samplers.py`, with noise that it does not use."""

    def __init__(self, name: str) -> None:
        self.problem = MixtureProblem(name)
        self.shape = self.problem.means.shape[1:]
        self.start = self.problem.fresh_starts(range(992_000, 992_004)).flatten(1) * math.sqrt(1 + HIGH**2)

    def noise(self, state: torch.Tensor, s: float) -> torch.Tensor:
        """dX/ds."""
        return self.problem.slope(state.reshape(-1, *self.shape), s).flatten(1)


def reference(problem: Mixture | Known, steps: int = 160) -> torch.Tensor:
    """X at the end of the trajectory: Runge-Kutta of order four in log s."""
    state, nodes = problem.start, np.exp(np.linspace(math.log(HIGH), math.log(LOW), 2 * steps + 1))
    width = math.log(LOW / HIGH) / steps
    for a, b, c in zip(nodes[:-2:2], nodes[1:-1:2], nodes[2::2], strict=True):
        k1 = a * problem.noise(state, a)
        k2 = b * problem.noise(state + width / 2 * k1, b)
        k3 = b * problem.noise(state + width / 2 * k2, b)
        k4 = c * problem.noise(state + width * k3, c)
        state = state + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def karras(count: int, rho: float = 7.0) -> np.ndarray:
    return np.linspace(HIGH ** (1 / rho), LOW ** (1 / rho), count + 1) ** rho


def shifted_log(count: int, shift: float) -> np.ndarray:
    """Even in log(s + shift): as fine as log-uniform where s is large, and coarser below the shift."""
    return np.exp(np.linspace(math.log(HIGH + shift), math.log(LOW + shift), count + 1)) - shift


@dataclass(frozen=True)
class Options:
    """What is changed in the rule; the defaults are the rule as it ships.

    Attributes:
        damping: Heavy ball on what the prediction adds to Euler, per length of step; 1 is none.
        gates: By name, the ramp of z = |e_i - e_{i-1}| / |X_i - X_{i-1}| times the length of the step over which "trust" (the fast
            basis), "fallback" (all extrapolation) or "corrector" shuts.
        alone: Whether gates stand in the place of the ramps on rho, not beside them.
    """

    damping: float = 1.0
    gates: tuple[tuple[str, float, float], ...] = ()
    alone: bool = False


def lengths(values: torch.Tensor) -> list[float]:
    return values.norm(dim=1).tolist()


def run(problem: Mixture | Known, nodes: Sequence[float], options: Options) -> torch.Tensor:
    """The rule of the module `scheduling_adaptive_adams`, written in X."""
    state, history, visited = problem.start, [], []
    records = [rule.Record() for _ in range(len(state))]
    before = residual = momentum = previous = None
    for i in range(len(nodes) - 1):
        s, t = nodes[i], nodes[i + 1]
        asked = state
        history, visited = [problem.noise(state, s), *history][: rule.HISTORY], [s, *visited][: rule.HISTORY]
        if i == 0:
            before, previous, state = state, asked, state + (t - s) * history[0]
            continue
        new = history[0] - history[1]
        if i > 1:
            new = new - (visited[0] - visited[1]) / (visited[1] - visited[2]) * (history[1] - history[2])
        third = lengths(history[0]) if residual is None else (new * residual).sum(1).tolist()
        rows, steep = [], (history[0] - history[1]).norm(dim=1) / (asked - previous).norm(dim=1)
        stiff = (steep * (s - t)).tolist()
        for record, length, size, last, z in zip(records, lengths(new), lengths(state), third, stiff, strict=True):
            phi, share, trust = record.gates(length, s * length / size, last)
            for name, low, high in options.gates:
                gate = 1.0 - rule.ramp(z, (low, high))
                if name == "trust":
                    trust = gate if options.alone else trust * gate
                elif name == "fallback":
                    share = gate if options.alone else share * gate
                else:
                    phi *= gate
            rows.append((phi, share, trust))
        phi, share, trust = torch.tensor(rows, dtype=state.dtype).T[..., None]
        key = tuple(visited)

        def combine(start: float, end: float, power: float, key: tuple[float, ...] = key) -> torch.Tensor:
            weights = power_basis_weights(key, start, end, power)
            return sum(weight * value for weight, value in zip(weights, history, strict=True))

        corrected = before + combine(visited[1], s, rule.CORRECTOR_POWER)
        state = state + phi * (corrected - state)
        before = state
        safe, fast = combine(s, t, rule.SAFE_POWER), combine(s, t, rule.FAST_POWER)
        bend = share * (safe + trust * (fast - safe) - (t - s) * history[0]) / (t - s)
        momentum = bend if momentum is None else torch.lerp(momentum, bend, options.damping)
        residual, previous = new, asked
        state = state + (t - s) * (history[0] + momentum)
    return state


GRIDS: dict[str, Grid] = {
    **{f"rho {rho:g}": (lambda n, rho=rho: karras(n, rho)) for rho in (5.0, 9.0, 11.0, 14.0)},
    **{f"log(s + {shift:g})": (lambda n, shift=shift: shifted_log(n, shift)) for shift in (0.03, 0.1, 0.3)},
    "rho 7, 14 below 8 steps": lambda n: karras(n, 14.0 if n < 8 else 7.0),
}
# Where each gate alone was best on the development problems.
LIMITS = {"corrector": (0.1, 0.3), "trust": (0.1, 0.3), "fallback": (0.3, 1.0)}
LEADS: dict[str, dict[str, tuple[Options, Grid]]] = {
    "momentum": {f"b={b:g}": (Options(damping=b), karras) for b in (0.95, 0.9, 0.8, 0.5)},
    "Lipschitz, one gate": {
        f"{name}{' alone' if alone else ''}, {low:g} to {high:g}": (Options(1.0, ((name, low, high),), alone), karras)
        for name, alone in (("trust", False), ("trust", True), ("fallback", False), ("fallback", True), ("corrector", False))
        for low, high in ((0.03, 0.1), (0.1, 0.3), (0.3, 1.0), (0.7, 2.0), (1.5, 3.0))
    },
    "Lipschitz, corrector": {
        f"{low:g} to {high:g}": (Options(1.0, (("corrector", low, high),)), karras)
        for low, high in ((0.05, 0.2), (0.05, 0.3), (0.1, 0.2), (0.15, 0.3), (0.1, 0.4), (0.2, 0.4))
    },
    "Lipschitz, together": {
        " + ".join(names): (Options(1.0, tuple((name, *LIMITS[name]) for name in names)), karras)
        for names in (("corrector", "trust"), ("corrector", "fallback"), ("trust", "fallback"), ("corrector", "trust", "fallback"))
    },
    "nodes": {name: (Options(), grid) for name, grid in GRIDS.items()},
}  # fmt: skip
DEVELOPMENT = {"8 x 32, 4": (11, 8, 32, 4.0), "12 x 24, 6": (12, 12, 24, 6.0), "6 x 32, 1": (13, 6, 32, 1.0), "3 x 32, 7.5": (14, 3, 32, 7.5)}  # fmt: skip
HELD_OUT = {"8 x 48, 4": (91, 8, 48, 4.0), "10 x 32, 7.5": (92, 10, 32, 7.5), "5 x 32, 1": (93, 5, 32, 1.0), "4 x 24, 10": (94, 4, 24, 10.0)}  # fmt: skip


def errors_of(problems: dict[str, tuple[Any, torch.Tensor]], options: Options, grid: Grid) -> dict[str, Any]:
    table = {}
    for name, (problem, truth) in problems.items():
        for count in EVALUATIONS:
            errors = (run(problem, grid(count).tolist(), options) - truth).square().mean(1).sqrt()
            table[f"{name}, {count}"] = (float(errors.mean()), float((errors > FAILURE).double().mean()))
    return table


def score(table: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    ratios = {name: mean / base[name][0] for name, (mean, _) in table.items()}
    by_problem: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        by_problem.setdefault(name.rsplit(", ", 1)[0], []).append(ratio)
    return {
        "geometric_mean": round(math.exp(float(np.mean(np.log(list(ratios.values()))))), 3),
        "worst": round(max(ratios.values()), 2),
        "failures": round(float(np.mean([failed for _, failed in table.values()])), 4),
        "by_problem": {
            name: round(math.exp(float(np.mean(np.log(values)))), 3) for name, values in by_problem.items()
        },
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    sets = {}
    for name, parts in (("development", DEVELOPMENT), ("held_out", HELD_OUT)):
        built = {key: Mixture(*numbers) for key, numbers in parts.items()}
        sets[name] = {key: (problem, reference(problem)) for key, problem in built.items()}
    base = {name: errors_of(problems, Options(), karras) for name, problems in sets.items()}
    result: dict[str, Any] = {
        "configurations": sum(map(len, LEADS.values())), "samples": SAMPLES,
        "base": {name: score(table, table) for name, table in base.items()},
    }  # fmt: skip
    print(result["base"], flush=True)
    for lead, configurations in LEADS.items():
        found = {}
        for name, (options, grid) in configurations.items():
            found[name] = score(errors_of(sets["development"], options, grid), base["development"])
            print(f"{lead}, {name}: {found[name]}", flush=True)
        best = min(found, key=lambda name: found[name]["geometric_mean"])
        held_out = score(errors_of(sets["held_out"], *configurations[best]), base["held_out"])
        print(f"  held out: {best}: {held_out}", flush=True)
        result[lead] = {"development": found, "best": best, "held_out": held_out}
    known = {name: (problem, reference(problem)) for name, problem in ((name, Known(name)) for name in PROBLEMS)}
    gate = Options(gates=(("corrector", *LIMITS["corrector"]),))
    for grid_name, grid in (("karras", karras), ("exponential", lambda n: shifted_log(n, 0.0))):
        without, with_gate = (errors_of(known, options, grid) for options in (Options(), gate))
        result[f"known, {grid_name}"] = {
            name: {"ratio": round(mean / without[name][0], 3), "failures": [without[name][1], failed]}
            for name, (mean, failed) in with_gate.items()
        }  # fmt: skip
        print(result[f"known, {grid_name}"], flush=True)
    write_result("adaptive_leads", result)


if __name__ == "__main__":
    main()
