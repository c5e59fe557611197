"""Samples steered to a measurement, on a flow whose posteriors are known: `python benchmarks/steering.py`.

Three tasks of 16 pictures with 16 samples each, noise 0.05; see `tests/analytic/steering.py`. Writes the tables of `docs/flowchef.md`,
`benchmarks/results/steering_analytic.json`, `steering_peers.json` and `steering_cost.json`, and `docs/images/steering_posterior.png`. About three minutes on one
core, one of them with `--only peers`.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from common import ROOT, read_result, timed, write_result
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from page import table, write_between
from PIL import Image
from steering_peers import PEERS

from diffusers_ext.schedulers import (
    FLAIRScheduler,
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)
from diffusers_ext.sheets import Tile, contact_sheet
from diffusers_ext.steering import LatentMaskObjective, MeasurementObjective, velocity_errors
from tests.analytic.steering import (
    NOISE_STD,
    SAMPLES,
    Quality,
    Task,
    picture_flow,
    run,
    start_noise,
    tasks,
)


PAGE = ROOT / "docs" / "flowchef.md"
BEGIN, END = "<!-- posterior: begin -->", "<!-- posterior: end -->"
NETWORK = ROOT / "pipelines" / "emoji-scenes-flow"
COST_BEGIN, COST_END = "<!-- cost: begin -->", "<!-- cost: end -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: begin -->", "<!-- peers: end -->"
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


def default(task: Task) -> torch.Tensor:
    return _solved(FlowChefScheduler(), task)


def flair(task: Task) -> torch.Tensor:
    return _solved(FLAIRScheduler(), task)


def authors_flair(task: Task) -> torch.Tensor:
    """With the table of the flow's errors, and a data term that stops at 1e-4 a value whatever the noise."""
    samples = picture_flow().sample(512, torch.Generator().manual_seed(3))

    def velocity(state: torch.Tensor, level: float) -> torch.Tensor:
        return picture_flow().velocity(state, max(level, 1e-3))

    errors = velocity_errors(velocity, samples, generator=torch.Generator().manual_seed(4))
    # their rate of 0.1 is one of |A x - y|^2, whose curvature is 2 |A|^2
    scheduler = FLAIRScheduler(velocity_errors=errors, data_learning_rate=0.2)
    return _solved(scheduler, task, noise_std=0.01)


def authors_flowchef(rate: float) -> Any:
    return lambda task: _solved(FlowChefScheduler(**AUTHORS, learning_rate=rate), task)


def projection(task: Task) -> torch.Tensor:
    return _solved(FlowChefScheduler(data_step="project"), task)


def _solved(scheduler: Any, task: Task, noise_std: float = NOISE_STD) -> torch.Tensor:
    torch.manual_seed(0)
    objective = MeasurementObjective(task.operator, task.repeated, noise_std=noise_std)
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(2))
    return run(scheduler, STEPS, start_noise())


def _peer(name: str, setting: Any) -> Any:
    def call(task: Task) -> torch.Tensor:
        objective = MeasurementObjective(task.operator, task.repeated, noise_std=NOISE_STD)
        generator = torch.Generator().manual_seed(2)
        return PEERS[name].run(picture_flow(), objective, start_noise(), STEPS, generator, setting)

    return call


STEPS = 30
# what a row is called -> passes backwards in a step, and the settings tried
CONTENDERS: Mapping[str, tuple[int, list[Any]]] = {
    "**FlowChef**, default": (0, [default]),
    "**FLAIR**, default": (0, [flair]),
    "FlowChef, the authors' code": (0, [authors_flowchef(rate) for rate in (0.5, 1.0)]),
    "FLAIR, the authors' settings": (0, [authors_flair]),
    "projection (DDNM)": (0, [projection]),
    **{name: (peer.backward, [_peer(name, setting) for setting in peer.settings]) for name, peer in PEERS.items()},
}


def contend() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Figures of every contender at the best of its settings by the mean of the tasks' PSNR, and its samples."""
    figures, pictures = {}, {}
    for name, (backward, tried) in CONTENDERS.items():
        runs = [{task: call(problem) for task, problem in tasks().items()} for call in tried]
        found = [{task: tasks()[task].quality(samples) for task, samples in one.items()} for one in runs]
        # a run that diverged counts as nothing, so that the others are not hidden by it
        scores = [sum(max(quality.psnr, 0.0) for quality in one.values()) for one in found]
        best = scores.index(max(scores))
        pictures[name] = runs[best]
        cells = {task: asdict(quality) for task, quality in found[best].items()}
        figures[name] = {"backward": backward, "tried": len(tried), "tasks": cells}
        print(name, *map(cell, cells.values()), sep="  ", flush=True)
    return figures, pictures


def cost(rounds: int = 40) -> dict[str, Any]:
    """Time of a step on the demo network over that of the plain sampler, the two made in turn, and what is kept for a backward pass."""
    unet = UNet2DConditionModel.from_pretrained(NETWORK, subfolder="unet").float().eval()
    for weight in unet.parameters():
        weight.requires_grad_(False)
    side, channels = unet.config.sample_size, unet.config.in_channels
    state = torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(0))
    words = torch.zeros(4, 16, unet.config.cross_attention_dim)
    keep = torch.ones(side, side).tril()
    objective = LatentMaskObjective(keep, torch.zeros_like(state[:1]), noise_std=0.05)

    def step(scheduler: Any, wanted: Any = objective) -> Any:
        if wanted is not None:
            scheduler.set_objective(wanted)

        def call() -> None:
            scheduler.set_timesteps(4)
            with torch.no_grad():
                velocity = unet(state, scheduler.timesteps[0], encoder_hidden_states=words, return_dict=False)[0]
                scheduler.step(velocity, scheduler.timesteps[0], state)

        return call

    def whole() -> None:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        leaf = state.clone().requires_grad_(True)
        velocity = unet(leaf, scheduler.timesteps[0], encoder_hidden_states=words, return_dict=False)[0]
        (gradient,) = torch.autograd.grad(objective.loss(leaf - velocity).sum(), leaf)
        scheduler.step(velocity.detach(), scheduler.timesteps[0], state - gradient)

    plain = step(FlowMatchEulerDiscreteScheduler(), None)
    calls = {
        "FlowChef, `prox`": step(FlowChefScheduler()), "FlowChef, `grad`": step(FlowChefScheduler(data_step="grad")),
        "FLAIR": step(FLAIRScheduler()), "DPS": whole,
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        call(), plain()
        ratios = [timed(call) / timed(plain) for _ in range(rounds)]
        found[name] = {"time": float(np.median(ratios)), "kept_bytes": _kept_bytes(call)}
        print(name, found[name], flush=True)
    return {"network": NETWORK.name, "weights": sum(weight.numel() for weight in unet.parameters()), "steps": found}


def _kept_bytes(call: Any) -> int:
    """Bytes that autograd keeps between a forward and a backward pass."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        call()
    return kept


def draw(pictures: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """A sheet: of each task a picture, its measurement, the posterior's mean, and one sample of every contender."""

    def tile(values: torch.Tensor, caption: str) -> Tile:
        array = ((values.double() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return Tile(Image.fromarray(np.ascontiguousarray(array)).resize((96, 96), Image.Resampling.NEAREST), caption)

    rows = []
    for name, task in tasks().items():
        truth = task.truth[0]
        row = [
            tile(truth, name),
            tile(task.measurement[0], "measured"),
            tile(task.posterior_mean[0], "posterior mean"),
        ]
        for contender, samples in pictures.items():
            sample = samples[name][:SAMPLES].double()
            errors = (sample - truth).square().flatten(1).mean(1)
            row.append(
                tile(sample[0], f"{contender.replace('*', '')}: {float(10 * torch.log10(4 / errors).mean()):.1f} dB")
            )
        rows.append(row)
    sheet = contact_sheet(rows, title="One picture of a mixture, three measurements", tile=96)
    sheet.save(ROOT / "docs" / "images" / "steering_posterior.png", optimize=True)


def cell(quality: Mapping[str, float]) -> str:
    if quality["psnr"] < 0:
        return "diverges"
    return f"{quality['psnr']:.2f} / {quality['mean_error']:.3f} / {quality['residual']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="write the page from the figures of the last run")
    parser.add_argument("--only", choices=("settings", "peers", "cost"), help="measure one of the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.page_only and arguments.only in (None, "settings"):
        figures = {}
        for name, row in ROWS.items():
            figures[name] = {task: asdict(quality) for task, quality in measure(*row).items()}
            print(name, *map(cell, figures[name].values()), sep="  ", flush=True)
        write_result("steering_analytic", figures)
    if not arguments.page_only and arguments.only in (None, "cost"):
        write_result("steering_cost", cost())
    if not arguments.page_only and arguments.only in (None, "peers"):
        peers, pictures = contend()
        write_result("steering_peers", peers)
        draw(pictures)
    figures, peers = read_result("steering_analytic"), read_result("steering_peers")
    rows = [[name, *map(cell, found.values())] for name, found in figures.items()]
    write_between(PAGE, BEGIN, END, table(["", *tasks()], rows))
    rows = [
        [name, found["tried"], found["backward"], *map(cell, found["tasks"].values())] for name, found in peers.items()
    ]
    deepinv = read_result("steering_deepinv")  # of deepinv_peers.py, in an environment of its own
    rows += [
        [
            f"deepinv {deepinv['version']}, {name}",
            found["tried"],
            found["backward"],
            *map(cell, found["tasks"].values()),
        ]
        for name, found in deepinv["rows"].items()
    ]
    header = ["", "settings tried", "backward passes a step", *tasks()]
    write_between(PAGE, PEERS_BEGIN, PEERS_END, table(header, rows))
    steps = read_result("steering_cost")["steps"]
    rows = [[name, f"{one['time']:.2f}", f"{one['kept_bytes'] / 1e6:.1f} MB"] for name, one in steps.items()]
    write_between(PAGE, COST_BEGIN, COST_END, table(["a step of", "time, plain sampler 1", "kept for backward"], rows))


if __name__ == "__main__":
    main()
