#!/usr/bin/env python
"""A small network of rolling diffusion, trained on a process whose correlations are known, and what it streams.

    python benchmarks/rolling_toy.py --folder runs/rolling-toy               # trains, 20 minutes on one core, and measures
    python benchmarks/rolling_toy.py --folder runs/rolling-toy --parts measure page

Four independent channels follow AR(2) with poles 0.97 e^(+-0.2i): smooth, as motion is. The script draws 40 000 frames of it, trains with
`training/train_rolling.py`, streams 16 x 4 000 frames for each ladder, and compares them with the true process: correlations at lags 1 to
10, energy of second differences (jitter), and steps across chunk borders over steps inside.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, read_result, write_result
from motion import ladder_pipeline
from page import table, write_between
from safetensors.torch import save_file

from diffusers_ext.sequence_metrics import seam_ratio
from tests.analytic.rolling import ar2_correlations


PARTS = ("train", "measure", "page")
PAGE = ROOT / "docs" / "rolling.md"
BEGIN, END = "<!-- trained: begin -->", "<!-- trained: end -->"
RADIUS, ANGLE, CHANNELS, ROWS = 0.97, 0.2, 4, 40_000
# (l, m): frames and evaluations of a roll
SETTINGS = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4))
STREAMS, FRAMES, SKIPPED, LAGS = 16, 4_000, 100, 10
TRAINING = [
    "--seed=0", "--max_train_steps=6000", "--decay_fraction=0.6", "--learning_rate=2e-3", "--num_layers=3",
    "--num_attention_heads=4", "--attention_head_dim=16", "--window_length=20", "--context_length=4", "--context_timestep=0",
    "--ladder_curriculum", "1", "2", "4", "--flow_shift=0.5", "--inertia_weight=0", "--condition_dropout=0", "--num_threads=1",
    "--num_validation_frames=400", "--num_validation_samples=4", "--validation_steps=0", "--checkpointing_steps=500",
    "--report_to=none", "--resume_from_checkpoint=latest",
]  # fmt: skip


def process(rows: int, generator: torch.Generator) -> torch.Tensor:
    """The process (rows, channels), stationary from the first row, of variance 1."""
    first, second = 2.0 * RADIUS * math.cos(ANGLE), -(RADIUS**2)
    innovation = math.sqrt((1 + second) * ((1 - second) ** 2 - first**2) / (1 - second))
    noise = innovation * torch.randn(rows + 1_000, CHANNELS, generator=generator, dtype=torch.float64)
    frames = torch.zeros_like(noise)
    for row in range(2, len(noise)):
        frames[row] = first * frames[row - 1] + second * frames[row - 2] + noise[row]
    return frames[1_000:].float()


def train(folder: Path) -> dict[str, Any]:
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    save_file({"frames": process(ROWS, torch.Generator().manual_seed(0))}, data / "process.safetensors")
    recording = {"file": "process.safetensors", "train": [[0, ROWS - 1_000]], "test": [[ROWS - 1_000, ROWS]]}
    index = {"frames": [f"channel_{i}" for i in range(CHANNELS)], "recordings": [recording]}
    (data / "sequences.json").write_text(json.dumps(index))
    script = ROOT / "training" / "train_rolling.py"
    command = [sys.executable, str(script), f"--train_data_dir={data}", f"--output_dir={folder / 'model'}", *TRAINING]
    subprocess.run(command, check=True)
    return {"settings": TRAINING, "rows": ROWS}


def correlations(frames: torch.Tensor) -> torch.Tensor:
    """Mean of x_t x_(t+k) over that of x_t^2, for each lag and channel (lags, channels); frames (streams, frames, channels)."""
    energy = frames.square().mean((0, 1))
    return torch.stack([(frames[:, k:] * frames[:, :-k]).mean((0, 1)) / energy for k in range(1, LAGS + 1)])


def bends(frames: torch.Tensor) -> torch.Tensor:
    """Mean square of second differences."""
    return frames.diff(n=2, dim=1).square().mean()


@torch.no_grad()
def measure(folder: Path) -> list[dict[str, Any]]:
    true = torch.tensor(ar2_correlations(RADIUS, ANGLE, LAGS + 1)[1:]).float()
    fresh = process(STREAMS * FRAMES, torch.Generator().manual_seed(1))
    rows = [{"l": 0, "m": 0, "correlation": float((correlations(fresh[None]) - true[:, None]).abs().max())}]
    for step, per_roll in SETTINGS:
        pipeline = ladder_pipeline(folder / "model", step)
        frames = pipeline(
            num_frames=FRAMES + SKIPPED, batch_size=STREAMS, num_inference_steps=20 // step * per_roll,
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip
        frames = torch.as_tensor(frames)[:, SKIPPED:].float()
        row = {
            "l": step,
            "m": per_roll,
            "variance": float(frames.square().mean()),
            "correlation": float((correlations(frames) - true[:, None]).abs().max()),
            "jitter": float(bends(frames) / bends(fresh[None])),
        }
        if step > 1:
            row["seam"] = seam_ratio(frames, step, first=-SKIPPED % step)
        rows.append({name: round(value, 4) for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    header = [
        "l (m)",
        "NFE a frame",
        "variance (1)",
        "worst error of a correlation, lags 1 to 10",
        "jitter (1)",
        "seam (1)",
    ]
    lines = [
        [f"{row['l']} ({row['m']})", f"{row['m'] / row['l']:g}", f"{row['variance']:.3f}", f"{row['correlation']:.3f}",
         f"{row['jitter']:.3f}", f"{row['seam']:.3f}" if "seam" in row else "-"]
        for row in rows[1:]
    ]  # fmt: skip
    return table(header, lines) + (
        f"\n\nThe process itself, over as many fresh frames, is {rows[0]['correlation']:.3f} from its own correlations."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/rolling-toy"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = read_result("rolling_toy")
    if "train" in args.parts:
        result["training"] = train(args.folder)
    if "measure" in args.parts:
        result["ladders"] = measure(args.folder)
    write_result("rolling_toy", result)
    if "page" in args.parts:
        write_between(PAGE, BEGIN, END, page(result["ladders"]))


if __name__ == "__main__":
    main()
