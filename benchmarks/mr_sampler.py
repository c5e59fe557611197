"""Restoration in few steps: quality against network evaluations, convergence orders, and the time of a step.

    python benchmarks/mr_sampler.py                      # orders and step time: a minute
    python benchmarks/mr_sampler.py --parts quality      # the trained model: an hour or two on one core; stop and go on at will
    python benchmarks/mr_sampler.py --parts page         # only writes the page and the plot from the JSON

Quality is measured on pictures that were never trained on: the middles of three photographs (chelsea, coffee, astronaut, at half
size) and held-out emoji scenes, each degraded in every way that the model was trained for, with the strengths of training. All
samplers restore the same pictures, from the same start noise, with the same network. Posterior sampling and Euler-Maruyama are
re-spaced properly: their steps lead from each timestep of the run to the next one (the loops that the paper compares with take unit
steps from a subset of the timesteps). PSNR, SSIM and GMSD (a perceptual distance) are means over pictures; medians and the rest are in
`benchmarks/results/mr_sampler.json`. What is there already is not run again unless `--fresh` is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, read_result, summary, write_result
from diffusers import DPMSolverMultistepScheduler
from mr_sampler_page import write_page

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.data import EmojiScenes
from diffusers_ext.data.degradations import DEGRADATIONS, degrade
from diffusers_ext.data.photographs import held_out_crops
from diffusers_ext.metrics import gmsd, psnr, ssim
from diffusers_ext.schedulers import MeanRevertingAdapter, MRScheduler
from tests.schedulers.test_mr import slopes


MODEL = ROOT / "pipelines" / "mr-restoration"
EVALUATIONS = (3, 5, 10, 20, 50, 100)
SIDE = 96  # of the photographs' crops
SCENES_EACH = 3  # emoji scenes for each degradation
SEED = 4242
NO_START_NOISE = "ode-d-2, no start noise"  # the one that differs by the pipeline's call as well
PROCESS = (
    "num_train_timesteps",
    "theta_schedule",
    "sigma_inf",
    "alpha_min",
    "cosine_s",
    "zero_start",
    "prediction_type",
)


def samplers(config: Any) -> dict[str, Callable[[], Any]]:
    """Every configuration that is compared, on the process of a model. Fixed before anything was drawn."""
    process = {name: config[name] for name in PROCESS}

    def ours(**settings: Any) -> Callable[[], Any]:
        return lambda: MRScheduler(**process, **settings)

    def stock(name: str, **settings: Any) -> Callable[[], Any]:
        return lambda: MeanRevertingAdapter(name, settings, **process)

    return {
        "posterior": ours(algorithm_type="posterior"),
        "Euler-Maruyama": ours(algorithm_type="euler-maruyama"),
        "ode-d-1": ours(algorithm_type="ode-d", solver_order=1),
        "ode-d-2": ours(algorithm_type="ode-d", solver_order=2),
        "ode-d-3": ours(algorithm_type="ode-d", solver_order=3),
        "ode-n-2": ours(algorithm_type="ode-n", solver_order=2),
        "ode-d-2, linear-lambda": ours(algorithm_type="ode-d", solver_order=2, timestep_spacing="linear-lambda"),
        "sde-d-1": ours(algorithm_type="sde-d", solver_order=1),
        "sde-d-2": ours(algorithm_type="sde-d", solver_order=2),
        "sde-n-2": ours(algorithm_type="sde-n", solver_order=2),
        NO_START_NOISE: ours(algorithm_type="ode-d", solver_order=2),
        "adapter: DPM++ 2": stock("DPMSolverMultistepScheduler", solver_order=2),
        "adapter: UniPC 2": stock("UniPCMultistepScheduler", solver_order=2),
        "adapter: DDIM": stock("DDIMScheduler"),
    }


def test_pictures() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of a set -> clean and degraded pictures (n, 3, H, W) in [0, 1]."""
    scenes = EmojiScenes(None, 64)
    count = SCENES_EACH * len(DEGRADATIONS)
    sets = {
        "photographs": torch.cat([crop for crop in held_out_crops(SIDE).values() for _ in DEGRADATIONS]),
        "scenes": scenes.render(scenes.sample(count, SEED, "held_out"))[0] / 2.0 + 0.5,
    }
    pairs = {}
    for index, (name, clean) in enumerate(sets.items()):
        generator = torch.Generator().manual_seed(SEED + index)
        kinds = [kind for _ in range(len(clean) // len(DEGRADATIONS)) for kind in DEGRADATIONS]
        spoilt = [degrade(clean[i : i + 1], [kind], generator)[0] for i, kind in enumerate(kinds)]
        pairs[name] = (clean, torch.cat(spoilt))
    return pairs


def measured(restored: torch.Tensor, clean: torch.Tensor) -> dict[str, Any]:
    restored, clean = restored * 2.0 - 1.0, clean * 2.0 - 1.0
    values = {"psnr": psnr(restored, clean), "ssim": ssim(restored, clean), "gmsd": gmsd(restored, clean)}
    each = [psnr(restored[i :: len(DEGRADATIONS)], clean[i :: len(DEGRADATIONS)]) for i in range(len(DEGRADATIONS))]
    table: dict[str, Any] = {name: summary(value.tolist()) for name, value in values.items()}
    table["psnr_by_degradation"] = {
        kind: round(float(value.mean()), 3) for kind, value in zip(DEGRADATIONS, each, strict=True)
    }
    return table


def quality(
    folder: Path, names: list[str] | None, nfes: list[int], result: dict[str, Any], save: Callable[[], None]
) -> None:
    pipe = MRRestorationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    found = result.setdefault("quality", {})
    pairs = test_pictures()
    for name, (clean, degraded) in pairs.items():
        found.setdefault(name, {})["degraded"] = measured(degraded, clean)
        found[name]["pictures"] = len(clean)
    for sampler, build in samplers(pipe.scheduler.config).items():
        for count in nfes if names is None or sampler in names else ():
            for name, (clean, degraded) in pairs.items():
                rows = found[name].setdefault("samplers", {}).setdefault(sampler, {})
                if str(count) in rows:
                    continue
                pipe.scheduler = build()
                generator = torch.Generator().manual_seed(SEED)
                try:
                    scale = 0.0 if sampler == NO_START_NOISE else 1.0
                    output = pipe(degraded, count, noise_scale=scale, generator=generator, output_type="pt")
                except ValueError as error:  # sde-n overflows where its steps are too long
                    rows[str(count)] = {"failed": str(error)}
                else:
                    rows[str(count)] = {**measured(output.images, clean), "evaluations": output.network_evaluations}
                    line = ", ".join(f"{key} {rows[str(count)][key]['mean']:.4f}" for key in ("psnr", "ssim", "gmsd"))
                    print(f"{name:12} {sampler:24} {count:4}: {line}", flush=True)
                save()


def orders() -> dict[str, Any]:
    """Observed orders on the exact map of a mixture of two Gaussians, from 80 to 640 steps even in lambda."""
    return {
        f"{kind}-{order}{'' if corrected else ' as published'}": [
            round(value, 3) for value in slopes(kind, order, corrected=corrected)
        ]
        for kind in ("ode-n", "ode-d")
        for order, corrected in ((1, True), (2, True), (3, True), (3, False))
    }


def step_time(repeats: int = 60) -> dict[str, Any]:
    """Microseconds of a step, and the ratio to DPM-Solver++ of diffusers, measured in turn; 3 x 64 x 64, batch 4."""
    sample, output, mean = (
        torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    table = {}
    for kind, peer in (("ode-d", "dpmsolver++"), ("ode-n", "dpmsolver++"), ("sde-d", "sde-dpmsolver++")):
        pair = (
            (MRScheduler(algorithm_type=kind), {"mean": mean}),
            (DPMSolverMultistepScheduler(algorithm_type=peer), {}),
        )
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for (scheduler, further), kept in zip(pair, times, strict=True):
                scheduler.set_timesteps(20)
                state = sample
                for timestep in scheduler.timesteps:
                    begun = time.perf_counter()
                    state = scheduler.step(output, timestep, state, return_dict=False, **further)[0]
                    kept.append(time.perf_counter() - begun)
        table[kind] = {
            "microseconds": round(1e6 * statistics.median(times[0]), 1),
            "peer_microseconds": round(1e6 * statistics.median(times[1]), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("orders", "time", "quality", "page"), default=["orders", "time"]
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of an MRRestorationPipeline")
    parser.add_argument("--nfes", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--samplers", nargs="+", help="only these; all by default")
    parser.add_argument("--fresh", action="store_true", help="measure the quality again")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = read_result("mr_sampler")
    if args.fresh:
        result.pop("quality", None)
    result["settings"] = {
        "seed": SEED, "photograph_side": SIDE, "degradations": list(DEGRADATIONS), "evaluations": list(EVALUATIONS),
    }  # fmt: skip

    def save() -> None:
        write_result("mr_sampler", result)

    if "orders" in args.parts:
        result["orders"] = orders()
    if "time" in args.parts:
        result["step_time"] = step_time()
    save()
    if "quality" in args.parts:
        quality(args.model, args.samplers, args.nfes, result, save)
    if "page" in args.parts:
        write_page(result, ROOT / "docs")


if __name__ == "__main__":
    main()
