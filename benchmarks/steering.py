"""Samples steered to a measurement, on a flow whose posteriors are known: `python benchmarks/steering.py`.

Three tasks of 16 pictures with 16 samples each, noise 0.05; see `tests/analytic/steering.py`. Writes the table of `docs/flowchef.md`
and `benchmarks/results/steering_analytic.json`. About two minutes on one core.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import read_result, write_result
from page import table, write_between


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diffusers_ext.schedulers import (  # noqa: E402
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)
from diffusers_ext.steering import MeasurementObjective  # noqa: E402
from tests.analytic.steering import NOISE_STD, Quality, run, start_noise, tasks  # noqa: E402


PAGE = ROOT / "docs" / "flowchef.md"
BEGIN, END = "<!-- posterior: begin -->", "<!-- posterior: end -->"
AUTHORS = {"data_step": "grad", "renoise": 0.0, "steer_stop": 29 / 30}

# what a row is called -> class, settings, steps, what the objective takes the noise for
ROWS: Mapping[str, tuple[type, dict[str, Any], int, float]] = {
    "not steered": (FlowChefScheduler, {"learning_rate": 0.0}, 30, 1.0),
    "the authors' code, eta 0.5": (FlowChefScheduler, {**AUTHORS, "learning_rate": 0.5}, 30, 1.0),
    "the authors' code, eta 1": (FlowChefScheduler, {**AUTHORS, "learning_rate": 1.0}, 30, 1.0),
    "**default** (`prox`, renoised)": (FlowChefScheduler, {}, 30, 1.0),
    "default, 100 steps": (FlowChefScheduler, {}, 100, 1.0),
    "default, 10 steps": (FlowChefScheduler, {}, 10, 1.0),
    "default, `noise_std` a fifth": (FlowChefScheduler, {}, 30, 0.2),
    "default, `noise_std` twice": (FlowChefScheduler, {}, 30, 2.0),
    "default, `steer_stop=2/3`": (FlowChefScheduler, {"steer_stop": 2 / 3}, 30, 1.0),
    "`prox`, `renoise=0`": (FlowChefScheduler, {"renoise": 0.0}, 30, 1.0),
    "`project`": (FlowChefScheduler, {"data_step": "project"}, 30, 1.0),
    "`repaint`": (FlowChefScheduler, {"data_step": "repaint"}, 30, 1.0),
    "DPM-Solver++, default": (FlowChefDPMSolverMultistepScheduler, {}, 30, 1.0),
    "Heun, default, 15 steps": (FlowChefHeunScheduler, {}, 15, 1.0),
    "UniPC, default": (FlowChefUniPCMultistepScheduler, {}, 30, 1.0),
}


def measure(scheduler_class: Any, settings: dict[str, Any], steps: int, noise: float) -> dict[str, Quality]:
    """The quality in each task."""
    found = {}
    for name, task in tasks().items():
        torch.manual_seed(0)
        scheduler = scheduler_class(**settings)
        objective = MeasurementObjective(task.operator, task.repeated, noise_std=noise * NOISE_STD)
        scheduler.set_objective(objective, generator=torch.Generator().manual_seed(2))
        found[name] = task.quality(run(scheduler, steps, start_noise()))
    return found


def cell(quality: Mapping[str, float]) -> str:
    if quality["psnr"] < 0:
        return "diverges"
    return f"{quality['psnr']:.2f} / {quality['mean_error']:.3f} / {quality['residual']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="write the page from the figures of the last run")
    arguments = parser.parse_args()
    figures = read_result("steering_analytic")
    if not arguments.page_only:
        torch.set_num_threads(1)
        figures = {}
        for name, row in ROWS.items():
            figures[name] = {task: asdict(quality) for task, quality in measure(*row).items()}
            print(name, *map(cell, figures[name].values()), sep="  ", flush=True)
        write_result("steering_analytic", figures)
    rows = [[name, *map(cell, found.values())] for name, found in figures.items()]
    write_between(PAGE, BEGIN, END, table(["", *next(iter(figures.values()))], rows))


if __name__ == "__main__":
    main()
