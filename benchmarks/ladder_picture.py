"""The noise ladder at work, as an animated picture: docs/images/ladder.svg.

    python benchmarks/ladder_picture.py

Each bar is a frame, its height the noise it has before an evaluation, read from `RollingLadderScheduler.level_at`. Frames that have come down
are emitted (dark); behind the window there is nothing yet.
"""

from html import escape

import torch
from common import ROOT

from diffusers_ext import RollingLadderScheduler
from diffusers_ext.atomic import atomic_write


PICTURE = ROOT / "docs" / "images" / "ladder.svg"
WINDOW, FRAMES = 12, 36
# (l, m): frames and evaluations of a roll
LADDERS = ((1, 1), (4, 2))
BAR, GAP, HEIGHT, BASE, LEFT, TOP, SECONDS = 12, 4, 90, 4, 20, 34, 0.35
NOISE, DATA = "#bbbbbb", "#0077bb"


def states(step: int, per_roll: int) -> torch.Tensor:
    """Levels in [0, 1] (evaluations, frames), and -1 for frames that are not in the window yet."""
    scheduler = RollingLadderScheduler(window_length=WINDOW, ladder_step=step, prediction_type="flow_prediction")
    count = WINDOW // step * per_roll
    scheduler.set_timesteps(count)
    rolls = (FRAMES - WINDOW) // step
    evaluations = torch.arange(count + rolls * per_roll)[:, None]
    levels = scheduler.level_at(torch.arange(FRAMES)[None], evaluations)
    emitted = (levels == 0).sum(1, keepdim=True)
    waiting = torch.arange(FRAMES)[None] >= emitted + WINDOW
    return torch.where(waiting, -1.0, levels / count)


def panel(step: int, per_roll: int, top: int) -> list[str]:
    table = states(step, per_roll)
    seconds = f"{SECONDS * len(table):.2f}s"
    title = f"ladder step {step}: {per_roll / step:g} network evaluations a frame"
    parts = [f'<text x="{LEFT}" y="{top - 10}">{escape(title)}</text>']
    floor = top + HEIGHT
    for frame in range(FRAMES):
        column = table[:, frame].tolist()
        heights = [0.0 if level < 0 else BASE + (HEIGHT - BASE) * level for level in column]
        moves = {
            "height": [f"{height:.1f}" for height in heights],
            "y": [f"{floor - height:.1f}" for height in heights],
            "fill": [DATA if level == 0 else NOISE for level in column],
        }
        still = {name: values[len(values) // 2] for name, values in moves.items()}
        drawn = " ".join(f'{name}="{value}"' for name, value in still.items())
        inside = "".join(
            f'<animate attributeName="{name}" values="{";".join(values)}" calcMode="discrete" dur="{seconds}" '
            'repeatCount="indefinite"/>'
            for name, values in moves.items()
        )
        parts.append(f'<rect x="{LEFT + frame * (BAR + GAP)}" width="{BAR}" {drawn}>{inside}</rect>')
    parts.append(
        f'<line x1="{LEFT}" x2="{LEFT + FRAMES * (BAR + GAP)}" y1="{floor + 1}" y2="{floor + 1}" stroke="#888"/>'
    )
    return parts


def picture() -> str:
    rows = [line for i, ladder in enumerate(LADDERS) for line in panel(*ladder, TOP + i * (HEIGHT + 50))]
    width, height = 2 * LEFT + FRAMES * (BAR + GAP), TOP + len(LADDERS) * (HEIGHT + 50) - 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *rows, "</svg>\n"])


if __name__ == "__main__":
    atomic_write(PICTURE, picture().encode())
