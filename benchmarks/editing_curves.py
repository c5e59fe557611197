"""The picture of `editing.py`: a panel a kind of edit, every setting at its success and its PSNR outside the mask."""

from collections.abc import Mapping, Sequence
from typing import Any

from editing_measures import pareto_front
from editing_methods import DDIM, METHODS, NO_EDIT, PEERS, SETTINGS
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.sheets import FAINT, FRAME, INK, PAPER


COLOURS = dict(
    zip(
        METHODS,
        [
            "#2f6f8f", "#7a8c2c", "#8a5fa8", "#c13b1a", "#b0621a", "#4a4a4a", "#e0a400", "#1f3fbf", "#00857a",
            "#5b7fd1", "#9a6b4f", "#6aa84f",
        ],
        strict=True,
    )
)  # fmt: skip
SCALE = 2  # drawn this much larger and averaged down
COLUMNS, PANEL, LEFT, RIGHT = 2, (400, 330), 56, 824
LEAST = 0.4  # success at which a panel begins

Rows = Mapping[str, Mapping[str, Any]]


def trusted(task: str) -> str:
    """Whose success counts on a task: the attribute judge never saw another hand than Noto's, the second judge saw
    both."""
    return "success_judge" if task.startswith("noto") else "success_second"


def settings_of(task: str, rows: Rows, methods: Sequence[str] = METHODS) -> dict[str, tuple[float, float]]:
    """(success, PSNR outside) of every setting of some methods that was measured on every pair."""
    return {
        setting.name: (rows[setting.name][trusted(task)]["mean"], rows[setting.name]["psnr_outside"]["mean"])
        for setting in SETTINGS
        if setting.method in methods and setting.pairs is None and setting.name in rows
    }


def points_of(task: str, rows: Rows, method: str) -> list[tuple[float, float]]:
    return list(settings_of(task, rows, [method]).values())


def curves(tasks: Rows) -> Image.Image:
    """A panel a task: success to the right, PSNR outside the mask upwards; ours as discs, peers as open squares."""
    swept = [task for task, rows in tasks.items() if len(points_of(task, rows, DDIM)) > 1] or list(tasks)
    head, body, small = (ImageFont.load_default(size=points * SCALE) for points in (20, 13, 11))
    shown = [method for method in METHODS if any(points_of(task, tasks[task], method) for task in swept)]
    places, top = _legend(shown, body)
    columns = min(COLUMNS, len(swept))
    lines = -(-len(swept) // columns)
    top += 34
    size = (max(columns * PANEL[0] + 24, RIGHT), top + lines * PANEL[1] + 16)
    sheet = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((20 * SCALE, 14 * SCALE), "What is edited against what is kept", font=head, fill=INK)
    for method, (x, y) in places.items():
        _mark(draw, (x + 5) * SCALE, (y + 9) * SCALE, 5, method)
        draw.text(((x + 16) * SCALE, y * SCALE), method, font=body, fill=INK)
    draw.text((20 * SCALE, (top - 30) * SCALE), "discs: of this package   squares: peers   ring: main setting   "
              "line: Pareto front of all   to the right: success", font=small, fill=FAINT)  # fmt: skip
    draw.text((20 * SCALE, (top - 14) * SCALE), f"up: PSNR outside the mask, dB   dashes: autoencoder   success below {LEAST}: not drawn",
              font=small, fill=FAINT)  # fmt: skip
    for number, task in enumerate(swept):
        corner = (number % columns * PANEL[0] + LEFT, top + number // columns * PANEL[1] + 34)
        _panel(draw, task, tasks[task], corner, (PANEL[0] - LEFT - 4, PANEL[1] - 70), body, small)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _legend(methods: Sequence[str], font: Any) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each method's name stands, and where the legend ends."""
    places, x, y = {}, 20, 46
    for method in methods:
        width = round(font.getlength(method) / SCALE) + 36
        if x + width > RIGHT:
            x, y = 20, y + 22
        places[method] = (x, y)
        x += width
    return places, y + 24


def _panel(
    draw: ImageDraw.ImageDraw, task: str, rows: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int],
    body: Any, small: Any,
) -> None:  # fmt: skip
    every = settings_of(task, rows)
    points = {name: point for name, point in every.items() if point[0] >= LEAST}
    limit = rows[NO_EDIT]["psnr_outside"]["mean"] if NO_EDIT in rows else None
    heights = [height for _, height in points.values()] + ([] if limit is None else [limit])
    if not heights:
        return
    low = 5 * int(min(heights) // 5)
    high = max(5 * int(-(-max(heights) // 5)), low + 5)

    def at(success: float, decibels: float) -> tuple[float, float]:
        right = corner[0] + (success - LEAST) / (1 - LEAST) * size[0]
        down = corner[1] + (high - decibels) / (high - low) * size[1]
        return right * SCALE, down * SCALE

    draw.text((corner[0] * SCALE, (corner[1] - 24) * SCALE), task, font=body, fill=INK)
    for decibels in range(low, high + 1, 5):
        draw.line([at(LEAST, decibels), at(1, decibels)], fill=FRAME, width=SCALE)
        text = str(decibels)
        x, y = at(LEAST, decibels)
        draw.text((x - small.getlength(text) - 6 * SCALE, y - 7 * SCALE), text, font=small, fill=FAINT)
    for success in (LEAST, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        draw.line([at(success, low), at(success, high)], fill=FRAME, width=SCALE)
        text = f"{success:g}"
        x, y = at(success, low)
        draw.text((x - small.getlength(text) / 2, y + 4 * SCALE), text, font=small, fill=FAINT)
    if limit is not None:
        for dash in range(0, 50, 2):
            draw.line(
                [at(LEAST + (1 - LEAST) * share / 50, limit) for share in (dash, dash + 1)], fill=FAINT, width=SCALE
            )
    front = pareto_front(points)
    if len(front) > 1:
        draw.line([at(*points[name]) for name in front], fill=INK, width=SCALE, joint="curve")
    for setting in SETTINGS:
        if setting.name in points:
            x, y = at(*points[setting.name])
            _mark(draw, x, y, 4, setting.method)
            if setting.main:
                draw.ellipse(_around(x, y, 8), outline=COLOURS[setting.method], width=2 * SCALE)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, method: str) -> None:
    if method in PEERS:
        draw.rectangle(_around(x, y, radius), fill=PAPER, outline=COLOURS[method], width=2 * SCALE)
    else:
        draw.ellipse(_around(x, y, radius), fill=COLOURS[method])


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    radius *= SCALE
    return x - radius, y - radius, x + radius, y + radius
