"""The walking model on rows of its recording that it was not trained on, against the Wiener filter.

    python training/data/build_daphnet.py --out runs/daphnet
    python benchmarks/motion.py --data runs/daphnet               # ten minutes on one core
    python benchmarks/motion.py --data runs/daphnet --parts page  # only the page, from the last run

Everything is streamed through `RollingLadderPipeline` in the units of the recording. The filter sees as far ahead as the stream does; its
window and its ridge are chosen on the last fifth of the training rows. Seams are measured with streams that begin at each frame of a chunk,
each from noise of its own, so that every frame is at a border in one of them: what the person does at a moment falls out. Their standard
error is that of the jackknife over samples.
"""

import argparse
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, read_result, timed, write_result
from page import table, write_between
from wiener import chosen

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
from diffusers_ext.atomic import atomic_write
from diffusers_ext.pipelines.frame_units import ChannelUnits
from diffusers_ext.sequence_metrics import jitter_ratio, r_squared, seam_ratio, spectrum_error
from diffusers_ext.training.plots import line_panels
from diffusers_ext.training.sequences import Segment, SequenceFolder


PARTS = ("quality", "speed", "page")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGE, PICTURE = ROOT / "docs" / "rolling_motion.md", ROOT / "docs" / "images" / "rolling_motion.png"
# (l, m): ladders with one evaluation a roll, then with more
SETTINGS = ((1, 1), (2, 1), (4, 1), (4, 2))
SAMPLES = 16
# Choices of the filter: frames before and after, and the ridge. The cut is a share of the training rows.
PASTS, AHEADS, RIDGES, CUT = (0, 10, 20, 40, 64), (0, 10, 20, 30), (1e-3, 1e-2, 3e-2, 1e-1, 3e-1), 0.8
# The picture: which test rows and channels.
SHOWN = slice(1_000, 1_256)
CHANNELS = ("leg_horiz_fwd", "leg_vert", "trunk_vert", "trunk_horiz_lateral")


def ladder_pipeline(folder: Path, step: int) -> RollingLadderPipeline:
    pipeline = RollingLadderPipeline.from_pretrained(folder)
    scheduler = RollingLadderScheduler.from_config(pipeline.scheduler.config, ladder_step=step)
    pipeline = RollingLadderPipeline(pipeline.transformer.float(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def streamed(
    pipeline: RollingLadderPipeline, condition: torch.Tensor, per_roll: int, samples: int, seed: int = 0
) -> torch.Tensor:
    """Samples `(samples, frames, channels)` for a condition `(frames, width)`, chunk by chunk."""
    config = pipeline.scheduler.config
    chunks = pipeline.stream(
        condition.expand(samples, -1, -1),
        num_inference_steps=config.window_length // config.ladder_step * per_roll,
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.cat(list(chunks), 1)


def seams(pipeline: RollingLadderPipeline, first: torch.Tensor, test: Segment, per_roll: int) -> dict[str, float]:
    """Steps at borders over those inside, mean over streams that begin at each frame of a chunk; `first` is that from frame 0."""
    step, count = pipeline.scheduler.config.ladder_step, len(first)
    streams = [first]
    streams += [streamed(pipeline, test.condition[start:], per_roll, count, seed=start) for start in range(1, step)]

    def ratio(kept: list[int]) -> float:
        return float(np.mean([seam_ratio(stream[kept], step) for stream in streams]))

    without = [ratio([k for k in range(count) if k != left_out]) for left_out in range(count)]
    error = float(np.sqrt((count - 1) * np.var(without)))
    return {"seam": round(ratio(list(range(count))), 4), "seam_error": round(error, 4)}


def measured(frames: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Of samples; the units of each channel cancel in all of these."""
    return {
        "r2_of_mean": round(r_squared(frames.mean(0), truth), 4),
        "r2": round(r_squared(frames, truth), 4),
        "variance": round(float((frames.var(1) / truth.var(0)).mean()), 4),
        "jitter": round(jitter_ratio(frames, truth), 4),
        "spectrum": round(spectrum_error(frames, truth), 4),
    }


def wiener(folder: Path, data: SequenceFolder) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures of the filter and its guess, in the units of the recording."""
    (train,), (test,) = data.segments["train"], data.segments["test"]
    window = ladder_pipeline(folder, 1).scheduler.config.window_length
    units = {name: ChannelUnits.of(data.statistics(), name) for name in ("frame", "condition")}
    best = chosen(
        units["condition"].inward(train.condition),
        units["frame"].inward(train.frames),
        round(CUT * len(train.frames)),
        PASTS,
        (*AHEADS, window - 1),
        RIDGES,
    )
    guess = units["frame"].outward(best(units["condition"].inward(test.condition)))
    figures = measured(guess[None].float(), test.frames)
    return {"past": best.past, "ahead": best.ahead, "ridge": best.ridge, **figures}, guess.float()


def quality(folder: Path, data: SequenceFolder) -> dict[str, Any]:
    (test,) = data.segments["test"]
    rows: list[dict[str, Any]] = []
    drawn: dict[str, torch.Tensor] = {}
    for step, per_roll in SETTINGS:
        pipeline = ladder_pipeline(folder, step)
        frames = streamed(pipeline, test.condition, per_roll, SAMPLES)
        row: dict[str, Any] = {"l": step, "m": per_roll, "nfe": per_roll / step, **measured(frames, test.frames)}
        if step > 1:
            row |= seams(pipeline, frames, test, per_roll)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if (step, per_roll) == (4, 2):
            drawn = {"one stream, ladder of 4": frames[0], f"mean of {SAMPLES} streams": frames.mean(0)}
    filtered, guess = wiener(folder, data)
    draw(data, {"recording": test.frames, "Wiener filter": guess, **drawn})
    return {"rows": len(test.frames), "samples": SAMPLES, "ladders": rows, "wiener": filtered}


def draw(data: SequenceFolder, lines: dict[str, torch.Tensor]) -> None:
    """A part of the test rows, in the units of the recording."""
    colours = {"recording": "#999999", "Wiener filter": "#2980b9", "one stream, ladder of 4": "#c0392b"}
    places = [data.frame_names.index(name) for name in CHANNELS]
    titles = [f"{name} (mg)" for name in CHANNELS]
    parts = [(name, colours[name], line[SHOWN][:, places]) for name, line in lines.items() if name in colours]
    pixels = io.BytesIO()
    line_panels(titles, parts, height=110).quantize(64).save(pixels, "png", optimize=True)
    atomic_write(PICTURE, pixels.getvalue())


def speed(folder: Path, data: SequenceFolder, frames: int = 400, rounds: int = 9) -> list[dict[str, Any]]:
    """Frames a second of one stream with one evaluation a roll; the ladders take turns, and each is compared with the 1 of its round."""
    condition = data.segments["test"][0].condition[:frames]
    pipelines = {step: ladder_pipeline(folder, step) for step in (1, 2, 4)}
    seconds: dict[int, list[float]] = {step: [] for step in pipelines}
    for _, (step, pipeline) in itertools.product(range(rounds), pipelines.items()):
        seconds[step].append(timed(lambda p=pipeline: streamed(p, condition, 1, 1)))  # type: ignore[misc]
    return [
        {
            "l": step,
            "frames_a_second": round(frames / float(np.median(times)), 1),
            "over_ladder_1": round(float(np.median(np.array(seconds[1]) / np.array(times))), 2),
        }
        for step, times in seconds.items()
    ]


def page(result: dict[str, Any]) -> str:
    """The measured part of the documentation."""
    found, filtered = result["quality"], result["quality"]["wiener"]
    names = ("r2_of_mean", "r2", "variance", "jitter", "spectrum")

    def cells(row: dict[str, Any]) -> list[str]:
        seam = f"{row['seam']:.3f}" if "seam" in row else "-"
        if "seam_error" in row:
            seam += f" +- {row['seam_error']:.3f}"
        return [*(f"{row[name]:.3f}" for name in names), seam]

    header = ["l (m)", "NFE a frame", "R2 of the mean", "R2 of one", "variance", "jitter", "spectrum error", "seam"]
    lines = [[f"{row['l']} ({row['m']})", f"{row['nfe']:g}", *cells(row)] for row in found["ladders"]]
    # a guess has no samples
    guess = cells(filtered)
    lines.append(["Wiener filter", "-", guess[0], "-", *guess[2:]])
    speeds = [[row["l"], row["frames_a_second"], f"{row['over_ladder_1']:.2f}"] for row in result["speed"]]
    return "\n\n".join(
        [
            f"{found['rows']:,} test rows, {found['samples']} streams; true: 1 for variance, jitter and seam.",
            table(header, lines),
            f"The filter sees {filtered['past']} frames back and {filtered['ahead']} ahead, with a ridge of {filtered['ridge']:g}.",
            "One stream, one core, one evaluation a roll; each round compares the ladders in turns:",
            table(["l", "frames a second", "over l = 1"], speeds),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of training/data/build_daphnet.py")
    parser.add_argument("--model", type=Path, default=ROOT / "pipelines" / "rolling-motion")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = SequenceFolder(args.data)
    result = read_result("motion")
    runs = {"quality": lambda: quality(args.model, data), "speed": lambda: speed(args.model, data)}
    for name, run in runs.items():
        if name in args.parts:
            result[name] = run()
            write_result("motion", result)
            print(name, json.dumps(result[name]))
    if "page" in args.parts:
        write_between(PAGE, BEGIN, END, page(result))


if __name__ == "__main__":
    main()
