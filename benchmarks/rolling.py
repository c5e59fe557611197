"""Rolling diffusion against closed forms: how near the emitted process is to the true one, at what cost and in how much memory.

    python benchmarks/rolling.py                              # seven minutes on one core
    python benchmarks/rolling.py --parts memory page          # some parts only; the others are kept from the last run

The sequences are stationary Gaussian processes, whose best network is a matrix. Sampler and network being linear, noise that is one-hot
in the channel axis makes the real pipeline compute its exact map from noise to frames, and with it the exact covariance of the stream:
no number here has a sampling error. KL is that of 40 frames, divided by 40. NFE is network evaluations an emitted frame, m / l.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
from common import ROOT, peak_memory, read_result, timed, write_result
from page import Panel, line_chart, table, write_between
from rolling_peers import COSTS, peers

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
from diffusers_ext.atomic import atomic_write
from diffusers_ext.models import RollingTransformer1DModel
from tests.analytic.rolling import (
    analytic_pipeline,
    ar1_correlations,
    ar2_correlations,
    covariance,
    gaussian_kl_per_frame,
    stream_covariance,
)


PARTS = ("quality", "acceleration", "context", "speed", "memory", "page", "peers")
PAGE, PICTURE = ROOT / "docs" / "rolling.md", ROOT / "docs" / "images" / "rolling_peers.svg"
PEERS_BEGIN, PEERS_END = "<!-- peers: begin -->", "<!-- peers: end -->"
COLOURS = {
    "ladder of 1": "#c0392b", "ladder of 5": "#e67e22", "chunks": "#999999", "chunks with context": "#555555",
    "FIFO": "#2980b9", "FIFO with lookahead": "#27ae60", "FIFO with lookahead on emitted frames": "#8e44ad",
}  # fmt: skip
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
AR1, AR2 = ar1_correlations(0.9, 64), ar2_correlations(0.97, 0.2, 64)
TRUE1, TRUE2 = covariance(AR1, 40), covariance(AR2, 40)
KINDS = {"ddim": "DDIM", "2m": "DPM-Solver++ (2M)", "fm": "flow, Euler", "fm-2m": "flow, 2M"}
# (l, m): the ladder at one half, one and two evaluations a frame; l = 20 is plain chunks with context
LADDERS = ((2, 1), (4, 2), (10, 5), (1, 1), (2, 2), (5, 5), (10, 10), (20, 20), (1, 2), (5, 10), (20, 40))


def statistics(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Variance, KL a frame, and the jitter: the energy of second differences over that of the true process."""
    bend = np.diff(np.eye(len(true)), n=2, axis=0)
    return {
        "variance": round(float(np.trace(found)) / len(true), 4),
        "kl": round(gaussian_kl_per_frame(found, true), 6),
        "jitter": round(float(np.trace(bend @ found @ bend.T) / np.trace(bend @ true @ bend.T)), 3),
    }


def quality() -> list[dict[str, Any]]:
    rows = []
    for (step, per_roll), kind in itertools.product(LADDERS, KINDS):
        found = stream_covariance(kind, AR1, per_roll=per_roll, step=step)
        rows.append({"kind": kind, "l": step, "m": per_roll, "nfe": per_roll / step, **statistics(found, TRUE1)})
    # as everybody does without a ladder: independent chunks, more steps do not join them
    found = stream_covariance("2m", AR1, per_roll=40, step=20, context=0)
    rows.append({"kind": "chunks, no context", "l": 20, "m": 40, "nfe": 2.0, **statistics(found, TRUE1)})
    return rows


def acceleration() -> list[dict[str, Any]]:
    """One evaluation a roll, as the paper accelerates: l frames for each."""
    rows = []
    for step, kind in itertools.product((1, 2, 4, 5, 10), ("ddim", "2m")):
        found = stream_covariance(kind, AR1, per_roll=1, step=step)
        rows.append({"kind": kind, "l": step, "m": 1, "nfe": 1 / step, **statistics(found, TRUE1)})
    return rows


def contexts() -> list[dict[str, Any]]:
    """A smooth process of order two, under more and less context."""
    rows = []
    for step, context in itertools.product((1, 5, 20), (0, 1, 2, 8)):
        found = stream_covariance("2m", AR2, per_roll=4 * step, step=step, context=context)
        rows.append({"l": step, "context": context, **statistics(found, TRUE2)})
    return rows


def network_pipeline(step: int) -> RollingLadderPipeline:
    network = RollingTransformer1DModel(in_channels=6, num_layers=4).eval()
    scheduler = RollingLadderScheduler(
        prediction_type="sample", beta_schedule="cosine", window_length=20, ladder_step=step
    )
    pipeline = RollingLadderPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def speed() -> list[dict[str, Any]]:
    """Frames a second of a transformer of four blocks, batch 1, one evaluation a roll; the ladders take turns."""
    seconds: dict[int, list[float]] = {step: [] for step in (1, 2, 4, 5, 10)}
    pipelines = {step: network_pipeline(step) for step in seconds}
    for _, (step, pipeline) in itertools.product(range(5), pipelines.items()):
        steps = 20 // step
        seconds[step].append(timed(lambda p=pipeline, k=steps: p(num_frames=400, num_inference_steps=k)))  # type: ignore[misc]
    rows = []
    for step, times in seconds.items():
        evaluations = 20 // step - 1 + 400 // step
        rows.append(
            {"l": step, "frames_a_second": round(400 / float(np.median(times)), 1), "nfe": round(evaluations / 400, 3)}
        )
    return rows


def memory(frames: int = 100_000) -> dict[str, Any]:
    """Megabytes that a stream needs beyond those of its first 200 frames."""
    pipeline = analytic_pipeline("2m", AR1, 4, step=4)
    stream = pipeline.stream(num_frames=frames, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        next(stream)

    def rest() -> None:
        for _ in stream:
            pass

    seconds: list[float] = []
    grown = peak_memory(lambda: seconds.append(timed(rest)))
    return {
        "frames": frames,
        "megabytes": grown,
        "seconds": round(seconds[0], 1),
        "nfe": pipeline.network_evaluations / frames,
    }


def page(result: dict[str, Any]) -> str:
    """The measured part of the documentation."""
    by_place = {(row["kind"], row["l"], row["m"]): row for row in result["quality"]}
    lines = []
    for step, per_roll in LADDERS:
        cells: list[Any] = [f"{per_roll / step:g}", f"{step} ({per_roll})"]
        for kind in KINDS:
            row = by_place[kind, step, per_roll]
            cells.append(f"{row['variance']:.3f} / {row['kl']:.5f}")
        lines.append(cells)
    blocks = [
        "### Variance (true: 1) and KL a frame, AR(1) with correlation 0.9, W = 20, context 1",
        table(["NFE a frame", "l (m)", *KINDS.values()], lines),
    ]
    chunks = by_place["chunks, no context", 20, 40]
    blocks.append(
        f"Independent chunks of 20 at 2 evaluations a frame (2M): KL {chunks['kl']:.3f}, at any number of steps."
    )
    cells = {(row["kind"], row["l"]): row for row in result["acceleration"]}
    blocks += [
        "### One evaluation a roll: l frames for each",
        table(
            ["l", "NFE a frame", "KL, DDIM", "KL, 2M"],
            [
                [step, f"{1 / step:g}", f"{cells['ddim', step]['kl']:.4f}", f"{cells['2m', step]['kl']:.4f}"]
                for step in (1, 2, 4, 5, 10)
            ],
        ),
        "### Jitter (true: 1) of a smooth process, AR(2) with poles 0.97 e^(+-0.2i), 2M, 4 evaluations a frame",
        table(
            ["l", "no context", "1 frame", "2 frames", "8 frames"],
            [
                [step, *(row["jitter"] for row in result["context"] if row["l"] == step)]
                for step in (1, 5, 20)
            ],
        ),
        "### Speed, transformer of four blocks, one core, one evaluation a roll",
        table(
            ["l", "NFE a frame, with warm-up", "frames a second"],
            [[row["l"], row["nfe"], row["frames_a_second"]] for row in result["speed"]],
        ),
    ]  # fmt: skip
    stream = result["memory"]
    blocks.append(
        f"A stream of {stream['frames']:,} frames needs {stream['megabytes']} MB more than one of 200 "
        f"({stream['nfe']:.2f} evaluations a frame, {stream['seconds']:.0f} s with the analytic network)."
    )
    return "\n\n".join(blocks)


def peers_page(rows: list[dict[str, Any]]) -> str:
    """The comparison with other ways, and its picture."""
    blocks, panels = [], []
    for process in dict.fromkeys(row["process"] for row in rows):
        found = {(row["method"], row["kind"], row["nfe"]): row for row in rows if row["process"] == process}
        names = list(dict.fromkeys(method for method, _, _ in found))
        lines = []
        for name in names:
            cells = [name]
            for kind in ("ddim", "2m"):
                kls = [found.get((name, kind, cost)) for cost in COSTS]
                cells.append(" / ".join("-" if row is None else f"{row['kl']:.2g}" for row in kls))
            last = found[name, "2m", COSTS[-1]]
            cells += [f"{last['jitter']:.2f}", f"{last['seam']:.2f}" if "seam" in last else "-"]
            lines.append(cells)
        costs = " / ".join(map(str, COSTS))
        header = ["method", f"KL, DDIM, {costs} NFE", f"KL, 2M, {costs} NFE", f"jitter, 2M, {COSTS[-1]} NFE", "seam"]
        blocks += [f"### {process}", table(header, lines)]
        for kind, title in (("ddim", "DDIM"), ("2m", "2M")):
            lines_of = {
                name: {cost: found[name, kind, cost]["kl"] for cost in COSTS if (name, kind, cost) in found}
                for name in names
            }
            panels.append(Panel(f"{process}: KL, {title}", COSTS, lines_of, logarithmic=True))
    atomic_write(PICTURE, line_chart(panels, COLOURS).encode())
    blocks.append(f"![KL a frame over evaluations a frame, by method](images/{PICTURE.name})")
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--frames", type=int, default=100_000, help="length of the stream whose memory is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = read_result("rolling")
    runs = {
        "quality": quality, "acceleration": acceleration, "context": contexts, "speed": speed,
        "memory": lambda: memory(args.frames),
        "peers": lambda: peers({"AR(1), correlation 0.9": (AR1, 1), "AR(2), poles 0.97 e^(+-0.2i)": (AR2, 2)}),
    }  # fmt: skip
    for name, run in runs.items():
        if name in args.parts:
            result[name] = run()
            write_result("rolling", result)
            print(name, json.dumps(result[name]))
    if "page" in args.parts:
        write_between(PAGE, BEGIN, END, page(result))
        if "peers" in result:
            write_between(PAGE, PEERS_BEGIN, PEERS_END, peers_page(result["peers"]))


if __name__ == "__main__":
    main()
