"""Samplers against each other: distance to the exact trajectory, sample by sample, and how many samples fail.

    python benchmarks/samplers.py                      # analytic problems, a few minutes
    python benchmarks/samplers.py --parts demo         # the trained demo model: hours on one core; stop and go on at will
    python benchmarks/samplers.py --parts page         # only writes the page and the plot from the JSON

Three analytic problems (`tests/analytic/sampler_problems.py`) with 128 samples and the demo model at guidance 3, 7.5 and 15 with 80
prompts and noises; 5, 6, 8, 10, 15 and 20 evaluations. The error of a sample is the root mean square of X = x / alpha at the end
against a Runge-Kutta solution in log s from the same start to the same end; a sample fails if it is above 0.2. Samplers, settings
and seeds were fixed before anything was drawn (`sampler_field.py`); all that ran is in the JSON. Results are written to
`benchmarks/results/samplers.json` after each sampler, and what is there already is not run again unless `--fresh` is given.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import MODEL, ROOT, read_result, write_result
from sampler_field import MULTISTEP, TABLE, Noise, Run, Sampler, field_of, walk
from sampler_page import write_page

from diffusers_ext.metrics import magnitude_score, sliced_wasserstein
from tests.analytic.sampler_problems import FAILURE, PROBLEMS, MixtureProblem, sample_errors


EVALUATIONS = (5, 6, 8, 10, 15, 20)
GUIDANCE = (3.0, 7.5, 15.0)
SETTINGS = ("equal", "shipped")
ANALYTIC_SEEDS = tuple(range(990_000, 990_008))  # 16 samples each
DEMO_SEED, DEMO_COUNT = 770_000, 80
# Runge-Kutta steps of the references: twice as many change the analytic ones by 1e-9, half as many the network's by the
# figure that the JSON gives.
ANALYTIC_STEPS, DEMO_STEPS = 500, 64
CACHE = ROOT / ".cache" / "samplers"

Reference = Callable[[float, float], torch.Tensor]


def runge_kutta(noise: Noise, start: torch.Tensor, high: float, low: float, steps: int) -> torch.Tensor:
    """X at s = `low`, from x = `start` at s = `high`: order four in log s, double precision but for the network."""

    def slope(state: torch.Tensor, log_s: float) -> torch.Tensor:
        s = math.exp(log_s)
        return s * noise((state / math.sqrt(1 + s * s)).to(start.dtype), s).double()

    state = start.double() * math.sqrt(1 + high**2)
    first, width = math.log(high), (math.log(low) - math.log(high)) / steps
    for number in range(steps):
        here = first + number * width
        k1 = slope(state, here)
        k2 = slope(state + width / 2 * k1, here + width / 2)
        k3 = slope(state + width / 2 * k2, here + width / 2)
        k4 = slope(state + width * k3, here + width)
        state = state + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def figures(errors: torch.Tensor, run: Run) -> dict[str, Any]:
    """What is kept of a run."""
    values = [min(float(error), 1e6) for error in errors]
    return {
        "mean": float(f"{statistics.fmean(values):.4g}"),
        "median": float(f"{statistics.median(values):.4g}"),
        "failures": round(sum(value > FAILURE for value in values) / len(values), 4),
        "evaluations": run.evaluations,
    }


def stored() -> dict[str, Any]:
    return read_result("samplers") or {"problems": {}}


def keep(result: dict[str, Any]) -> None:
    write_result("samplers", result)


def _table(result: dict[str, Any], name: str, setting: str) -> dict[str, Any]:
    found: dict[str, Any] = result["problems"].setdefault(name, {}).setdefault(setting, {})
    return found


def measure(
    name: str, noise: Noise, start: torch.Tensor, reference: Reference, chosen: list[Sampler],
    extra: Callable[[torch.Tensor, torch.Tensor], dict[str, float]], fresh: bool,
) -> None:  # fmt: skip
    """Runs samplers on one problem and writes the JSON after each."""
    for sampler in chosen:
        if sampler.name in _table(stored(), name, sampler.setting) and not fresh:
            continue
        began, rows = time.perf_counter(), {}
        for evaluations in EVALUATIONS:
            run = walk(sampler, noise, start, evaluations)
            truth = reference(run.start, run.end)
            rows[str(evaluations)] = figures(sample_errors(run.state, truth), run) | extra(run.state, truth)
        result = stored()  # read again: another process may have measured something meanwhile
        _table(result, name, sampler.setting)[sampler.name] = {"own": sampler.own, "rows": rows}
        keep(result)
        shown = " ".join(f"{row['mean']:.4g}[{row['failures']:.0%}]" for row in rows.values())
        print(
            f"{name:12s} {sampler.setting:8s} {sampler.name:28s} {shown}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The problems
# ---------------------------------------------------------------------------------------------------------------------


def analytic(fresh: bool) -> None:
    for name in PROBLEMS:
        problem = MixtureProblem(name)
        start = problem.fresh_starts(ANALYTIC_SEEDS)
        known: dict[tuple[float, float], torch.Tensor] = {}

        def noise(x: torch.Tensor, s: float, problem: MixtureProblem = problem) -> torch.Tensor:
            return problem.noise(x, 1 / (1 + s * s))

        def reference(
            high: float, low: float, noise: Noise = noise, start: Any = start, known: Any = known
        ) -> torch.Tensor:
            # s = 1e-4 stands for 0: what lies below changes a sample by less than 1e-4.
            key = (round(high, 5), round(max(low, 1e-4), 5))
            if key not in known:
                known[key] = runge_kutta(noise, start, high, max(low, 1e-4), ANALYTIC_STEPS)
            return known[key]

        chosen = [sampler for setting in SETTINGS for sampler in field_of(setting)]
        measure(name, noise, start, reference, chosen, lambda state, truth: {}, fresh)


class DemoModel:
    """eps(x, s) of the demo model with guidance, for a fixed batch of prompts; the latest answers are kept.

    All samplers begin with the same evaluation, and those on the same nodes with the same two.
    """

    def __init__(self, guidance: float) -> None:
        from diffusers import StableDiffusionPipeline

        from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes

        pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
        scenes = EmojiScenes(objects=DEMO_OBJECTS)
        captions = scenes.captions(scenes.sample(DEMO_COUNT, DEMO_SEED, "all"))
        wanted, empty = pipe.encode_prompt(captions, "cpu", 1, True)
        self.unet = pipe.unet.to(memory_format=torch.channels_last)
        self.text, self.guidance = torch.cat([empty, wanted]), guidance
        generator = torch.Generator().manual_seed(DEMO_SEED)
        self.start = torch.randn(DEMO_COUNT, 4, 16, 16, generator=generator)
        self.answers: dict[tuple[float, float], tuple[torch.Tensor, torch.Tensor]] = {}

    def noise(self, x: torch.Tensor, s: float) -> torch.Tensor:
        # The sum tells inputs apart; the comparison decides.
        key = (round(s, 6), float(x.double().sum()))
        if key in self.answers and torch.equal(self.answers[key][0], x):
            return self.answers[key][1]
        answer = self._asked(x, s)
        if len(self.answers) > 400:
            self.answers.pop(next(iter(self.answers)))
        self.answers[key] = (x.clone(), answer)
        return answer

    @torch.no_grad()
    def _asked(self, x: torch.Tensor, s: float) -> torch.Tensor:
        timestep = float(np.interp(math.log(s), np.log(TABLE), np.arange(len(TABLE))))
        plain, wanted = self.unet(torch.cat([x, x]), timestep, self.text).sample.chunk(2)
        v = plain + self.guidance * (wanted - plain)
        alpha = (1 + s * s) ** -0.5
        return alpha * v + s * alpha * x

    def reference(self, steps: int) -> torch.Tensor:
        """X at the lowest level, from a file if it has been computed before."""
        CACHE.mkdir(parents=True, exist_ok=True)
        path = CACHE / f"demo-{self.guidance:g}-{DEMO_SEED}-{DEMO_COUNT}-{steps}.npy"
        if not path.is_file():
            began = time.perf_counter()
            np.save(path, runge_kutta(self._asked, self.start, TABLE[-1], TABLE[0], steps).numpy())
            print(f"reference at guidance {self.guidance:g}: {time.perf_counter() - began:.0f} s", flush=True)
        return torch.from_numpy(np.load(path, allow_pickle=False))


# The demo model costs a second and more for each evaluation of the batch, so it sees every peer on the nodes of Karras, which suit
# trained networks, those that were best on log-uniform nodes there as well, and the defaults as shipped.
DEMO_EQUAL = (
    *(f"{name} karras" for name in ("DDIM", *MULTISTEP, "LMS 4", "Heun", "AdaptiveAdams", "GHVB 4, 0.5", "GHVB 3, 0.8",
                                    "Adams p=.5", "DPM++ 2M + HB .8", "UniPC 2 + HB .8")),
    *(f"{name} exponential" for name in ("AdaptiveAdams", "EVODiff", "GHVB 4, 0.5", "DPM++ 2M", "UniPC 2", "DEIS 3", "LMS 4")),
)  # fmt: skip
DEMO_SHIPPED = (
    "DDIM trailing", "PNDM trailing",
    *(f"{name} karras" for name in ("DPM++ 2M", "DPM++ 3M", "UniPC 2", "UniPC 3", "DEIS 2", "DEIS 3", "LMS 4", "AdaptiveAdams",
                                    "GHVB 4, 0.5")),
    "EVODiff exponential",
)  # fmt: skip


def demo_field(setting: str) -> list[Sampler]:
    """The samplers that the demo model is run with. All start at the last timestep, where the reference does."""
    chosen = {"equal": DEMO_EQUAL, "shipped": DEMO_SHIPPED}[setting]
    return [sampler for sampler in field_of(setting) if sampler.name in chosen]


def demo(fresh: bool, guidances: list[float], settings: list[str]) -> None:
    for guidance in guidances:
        model = DemoModel(guidance)
        truth = model.reference(DEMO_STEPS)
        result = stored()
        coarse = model.reference(DEMO_STEPS // 2)
        doubt = float(sample_errors(coarse, truth).mean())
        result.setdefault("doubt", {})[f"demo {guidance:g}"] = float(f"{doubt:.2g}")
        keep(result)
        # The jump to sigma 0 that some samplers end with, made from the exact state.
        at_zero = (
            truth - TABLE[0] * model.noise((truth / math.sqrt(1 + TABLE[0] ** 2)).float(), float(TABLE[0])).double()
        )

        def reference(high: float, low: float, truth: Any = truth, at_zero: Any = at_zero) -> torch.Tensor:
            if abs(high / TABLE[-1] - 1) > 1e-3:
                raise ValueError(f"high={high:g}: the reference starts at {TABLE[-1]:g}")
            return at_zero if low == 0 else truth

        def extra(state: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
            spread = truth.std((0, 2, 3))
            finite = torch.nan_to_num(state.double(), nan=1e6).clamp(-1e6, 1e6)
            score = magnitude_score(finite, truth.mean((0, 2, 3)).tolist(), spread.tolist()).mean()
            distance = sliced_wasserstein(finite, truth, 256)
            return {"magnitude": float(f"{float(score):.4g}"), "sliced": float(f"{float(distance):.4g}")}

        for setting in settings:
            measure(f"demo {guidance:g}", model.noise, model.start, reference, demo_field(setting), extra, fresh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["analytic", "demo", "page"], default=["analytic", "page"])
    parser.add_argument("--guidance", nargs="+", type=float, default=list(GUIDANCE), help="of the demo model")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of the demo model")
    parser.add_argument("--fresh", action="store_true", help="run again what the JSON has already")
    options = parser.parse_args()
    result = stored()
    result["settings"] = {
        "evaluations": list(EVALUATIONS), "failure": FAILURE, "analytic_samples": 16 * len(ANALYTIC_SEEDS),
        "analytic_seeds": list(ANALYTIC_SEEDS), "demo_samples": DEMO_COUNT, "demo_seed": DEMO_SEED,
        "demo_reference_steps": DEMO_STEPS, "configurations": {s: len(field_of(s)) for s in SETTINGS},
        "demo_configurations": {s: len(demo_field(s)) for s in SETTINGS},
    }  # fmt: skip
    keep(result)
    if "analytic" in options.parts:
        analytic(options.fresh)
    if "demo" in options.parts:
        demo(options.fresh, options.guidance, options.settings)
    write_page(stored(), ROOT / "docs")


if __name__ == "__main__":
    main()
