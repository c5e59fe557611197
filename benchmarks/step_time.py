"""Processor time of a scheduler's step beside one of diffusers' `DPMSolverMultistepScheduler`, measured in turn.

    python benchmarks/step_time.py                          # all of ours, two shapes; a minute
    python benchmarks/step_time.py --schedulers EVODiffScheduler --repeats 200

Default settings, batch 4, 20 steps, one thread. The ratio is the median over pairs of runs of the same step in both; the first
four steps, in which a history fills, and the last two are left out. Peers of diffusers stand beside ours. The table goes to
`benchmarks/results/step_time.json`.
"""

import argparse
import statistics
import time
from typing import Any

import diffusers
import torch
from common import write_result

from diffusers_ext import schedulers as ours


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OURS = (
    "GHVBScheduler", "AdaptiveAdamsScheduler", "EVODiffScheduler", "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler", "BDIADDIMScheduler", "BDIADDIMInverseScheduler",
)  # fmt: skip
PEERS = ("DDIMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
SHAPES = ((4, 3, 64, 64), (4, 4, 64, 64))
STEPS, FILLING, ENDING = 20, 4, 2


def step_times(scheduler: Any, shape: tuple[int, ...]) -> list[float]:
    """Seconds of the steps in the middle of a run."""
    generator = torch.Generator().manual_seed(0)
    sample, *outputs = (torch.randn(shape, generator=generator) for _ in range(5))
    scheduler.set_timesteps(STEPS)
    found = []
    for index, timestep in enumerate(scheduler.timesteps):
        began = time.process_time_ns()
        sample = scheduler.step(outputs[index % 4], timestep, sample, return_dict=False)[0]
        found.append((time.process_time_ns() - began) * 1e-9)
    return found[FILLING : STEPS - ENDING]


def compare(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Microseconds of a step of `name` and of the one it is measured against, and the median ratio."""
    pair = (
        getattr(ours if name in OURS else diffusers, name)(**SCHEDULE),
        diffusers.DPMSolverMultistepScheduler(**SCHEDULE),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        # Who goes first changes from pair to pair: the second finds the processor warm.
        for which in (0, 1) if repeat % 2 else (1, 0):
            times[which].extend(step_times(pair[which], shape))
    return {
        "microseconds": round(1e6 * statistics.median(times[0]), 1),
        "peer_microseconds": round(1e6 * statistics.median(times[1]), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedulers", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, Any]] = {}
    for name in options.schedulers:
        for shape in SHAPES:
            row = table.setdefault(name, {})["x".join(map(str, shape))] = compare(name, shape, options.repeats)
            print(f"{name:40s} {shape} {row['microseconds']:8.1f} us, ratio {row['ratio']:.2f}", flush=True)
    if set(table) == {*OURS, *PEERS}:
        write_result("step_time", {"repeats": options.repeats, "steps": STEPS, "table": table})


if __name__ == "__main__":
    main()
