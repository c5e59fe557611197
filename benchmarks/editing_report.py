"""The report of `editing.py`: a table in Markdown, the curves of success against preservation, and a sheet of
edits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from editing_measures import Task, best_mixture, paired_difference
from editing_methods import DDIM, GUIDE, METHODS, NO_EDIT, SDEDIT, SETTINGS
from page import write_between
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.sheets import FAINT, FRAME, INK, PAPER, Tile, contact_sheet


DOCS = ROOT / "docs"
SHOWN = 4  # edits of each task and setting that are kept for the sheet
BEGIN, END = "<!-- editing benchmark: begin -->", "<!-- editing benchmark: end -->"
COLOURS = dict(zip(METHODS, ["#2f6f8f", "#7a8c2c", "#8a5fa8", "#c13b1a"], strict=True))
SCALE = 2  # curves are drawn this much larger and averaged down
MAIN = [setting for setting in SETTINGS if setting.main]

SHORT = {"DDIM inversion + CFG": "DDIM + CFG"}  # over a column of the sheet

Records = Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]


def trusted(task: str) -> str:
    """Whose success counts on a task: the attribute judge never saw another hand than Noto's, the second judge saw
    both."""
    return "success_judge" if task.startswith("noto") else "success_second"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)])


def task_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Every setting that was measured on one task, main settings in bold."""
    head = [
        "method, knob", "success: judge", "second judge", "wanted value read", "PSNR outside", "SSIM outside",
        "features outside", "PSNR to truth", "SSIM to truth", "features to truth",
    ]  # fmt: skip
    out = []
    for setting in SETTINGS:
        if setting.name not in rows:
            continue
        row = rows[setting.name]

        def cell(name: str, digits: int, row: Mapping[str, Mapping[str, float]] = row) -> str:
            return f"{row[name]['mean']:.{digits}f} ± {row[name]['error']:.{digits}f}"

        name = f"**{setting.name}**" if setting.main and setting.method in METHODS else setting.name
        out.append(
            [name, cell("success_judge", 2), cell("success_second", 2)]
            + [f"{row['reached_judge']['mean']:.2f} / {row['reached_second']['mean']:.2f}"]
            + [cell("psnr_outside", 2), f"{row['ssim_outside']['mean']:.3f}", f"{row['features_outside']['mean']:.3f}"]
            + [cell("psnr", 2), f"{row['ssim']['mean']:.3f}", f"{row['features']['mean']:.3f}"]
        )
    return _table(head, out)


def cost_table(costs: Mapping[str, Mapping[str, float | None]]) -> str:
    out = []
    for setting in SETTINGS:
        cost = costs[setting.name]
        memory = "–" if cost["peak_megabytes"] is None else f"{cost['peak_megabytes']:.0f}"
        out.append([setting.name, str(cost["forward"]), str(cost["backward"]), f"{cost['seconds']:.2f}", memory])
    return _table(["method, knob", "forward passes", "backward passes", "seconds", "peak MB"], out)


def paired_table(measured: Records) -> str:
    """How far Guide-and-Rescale lies ahead of each method in its main setting, picture by picture."""
    mains = {setting.method: setting.name for setting in MAIN}
    others = [method for method in METHODS if method != GUIDE]
    out = []
    for task, rows in measured.items():
        for measure, label in (
            ("psnr_outside", "PSNR outside"),
            ("psnr", "PSNR to truth"),
            (trusted(task), "success"),
        ):
            cells = []
            for other in others:
                if mains[other] not in rows or mains[GUIDE] not in rows:
                    cells.append("–")
                    continue
                mean, error = paired_difference(rows[mains[GUIDE]][measure], rows[mains[other]][measure])
                cells.append(f"{mean:+.2f} ± {error:.2f}")
            out.append([task, label, *cells])
    return _table(["pairs", "measure", *(f"over {mains[other]}" for other in others)], out)


def points_of(task: str, rows: Mapping[str, Mapping[str, Any]], method: str) -> list[tuple[float, float]]:
    """(success, PSNR outside) of every setting of a method that was measured."""
    return [
        (rows[setting.name][trusted(task)]["mean"], rows[setting.name]["psnr_outside"]["mean"])
        for setting in SETTINGS
        if setting.method == method and setting.name in rows
    ]


def equal_success_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What each method keeps at the success of Guide-and-Rescale's main setting, and at rounder ones."""
    main = next(setting.name for setting in MAIN if setting.method == GUIDE)
    out = []
    for task, rows in tasks.items():
        if main not in rows or any(len(points_of(task, rows, method)) < 2 for method in METHODS):
            continue
        own = rows[main][trusted(task)]["mean"]
        for level in sorted({0.5, 0.7, 0.8, 0.9, own}):
            kept = {method: best_mixture(points_of(task, rows, method), level) for method in METHODS}
            best = max((height for height in kept.values() if height is not None), default=None)
            texts = ["–" if height is None else f"{height:.2f}" for height in kept.values()]
            texts = [f"**{text}**" if h == best and h is not None else text for text, h in zip(texts, kept.values())]
            ahead = "–"
            if (ours := kept[GUIDE]) is not None and (plain := kept[DDIM]) is not None:
                ahead = f"{ours - plain:+.2f}"
            out.append([task, f"{level:.2f}" + (" (its main setting)" if level == own else ""), *texts, ahead])
    return _table(["pairs", "success", *METHODS, f"{GUIDE} over DDIM"], out) if out else "The sweep has not been run."


def judge_table(judges: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = ("object", "colour", "background", "pattern", "all")
    labels = {"judge": "attribute judge", "second": "second judge"}
    out = [
        [hand, labels[judge], *(f"{values[name]:.3f}" for name in names)]
        for hand, rows in judges.items()
        for judge, values in rows.items()
    ]
    return _table(["drawings", "judge", *names[:-1], "all four"], out)


def curves(tasks: Mapping[str, Mapping[str, Any]]) -> Image.Image:
    """A panel a task: success to the right, PSNR outside the mask upwards, each method's settings joined in order."""
    swept = [task for task, rows in tasks.items() if len(points_of(task, rows, GUIDE)) > 1] or list(tasks)
    columns, panel, left, top = min(2, len(swept)), (400, 290), 56, 92
    lines = -(-len(swept) // columns)
    size = (columns * panel[0] + 24, top + lines * panel[1] + 16)
    sheet = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)
    head, body, small = (ImageFont.load_default(size=points * SCALE) for points in (20, 13, 11))
    draw.text((20 * SCALE, 14 * SCALE), "What is edited against what is kept", font=head, fill=INK)
    x = 20 * SCALE
    for method in METHODS:
        draw.ellipse(_dot(x + 5 * SCALE, 58 * SCALE, 5), fill=COLOURS[method])
        draw.text((x + 16 * SCALE, 49 * SCALE), method, font=body, fill=INK)
        x += round(body.getlength(method)) + 40 * SCALE
    draw.text((20 * SCALE, 70 * SCALE), "ring: main setting   to the right: success   up: PSNR outside the mask, dB"
              "   dashes: autoencoder", font=small, fill=FAINT)  # fmt: skip
    for number, task in enumerate(swept):
        corner = (number % columns * panel[0] + left, top + number // columns * panel[1] + 26)
        _panel(draw, task, tasks[task], corner, (panel[0] - left - 4, panel[1] - 62), body, small)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _panel(
    draw: ImageDraw.ImageDraw, task: str, rows: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int],
    body: Any, small: Any,
) -> None:  # fmt: skip
    heights = [p for method in METHODS for _, p in points_of(task, rows, method)]
    limit = rows[NO_EDIT]["psnr_outside"]["mean"] if NO_EDIT in rows else None
    low = 5 * int(min(heights) // 5)
    high = max(5 * int(-(-max([*heights, limit or 0]) // 5)), low + 5)

    def at(success: float, decibels: float) -> tuple[float, float]:
        right = corner[0] + success * size[0]
        down = corner[1] + (high - decibels) / (high - low) * size[1]
        return right * SCALE, down * SCALE

    draw.text((corner[0] * SCALE, (corner[1] - 22) * SCALE), task, font=body, fill=INK)
    for decibels in range(low, high + 1, 5):
        draw.line([at(0, decibels), at(1, decibels)], fill=FRAME, width=SCALE)
        text = str(decibels)
        x, y = at(0, decibels)
        draw.text((x - small.getlength(text) - 6 * SCALE, y - 7 * SCALE), text, font=small, fill=FAINT)
    for success in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line([at(success, low), at(success, high)], fill=FRAME, width=SCALE)
        text = f"{success:g}"
        x, y = at(success, low)
        draw.text((x - small.getlength(text) / 2, y + 4 * SCALE), text, font=small, fill=FAINT)
    if limit is not None:
        for dash in range(0, 50, 2):
            draw.line([at(dash / 50, limit), at((dash + 1) / 50, limit)], fill=FAINT, width=SCALE)
    for method in METHODS:
        points = [at(*point) for point in points_of(task, rows, method)]
        # The others have more than one knob, and their settings form no line.
        if method in (SDEDIT, DDIM) and len(points) > 1:
            draw.line(points, fill=COLOURS[method], width=2 * SCALE, joint="curve")
        for x, y in points:
            draw.ellipse(_dot(x, y, 4), fill=COLOURS[method])
        main = next(setting.name for setting in MAIN if setting.method == method)
        if main in rows:
            x, y = at(rows[main][trusted(task)]["mean"], rows[main]["psnr_outside"]["mean"])
            draw.ellipse(_dot(x, y, 8), outline=COLOURS[method], width=2 * SCALE)


def _dot(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    radius *= SCALE
    return x - radius, y - radius, x + radius, y + radius


def picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) bytes, or floats in [-1, 1]."""
    if image.is_floating_point():
        image = (image.clamp(-1.0, 1.0) * 127.5 + 127.5).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def sheet_of(measured: Records, tasks: Mapping[str, Task], file_of: Callable[..., Path], each: int = 2) -> Image.Image:
    """The first pairs of every task with every method in its main setting; none is picked."""
    names = [setting for setting in MAIN if setting.method in METHODS]
    lines = []
    for task, rows in measured.items():
        if any(setting.name not in rows for setting in names):
            continue
        pairs = tasks[task].pairs
        edits = [torch.load(file_of(task, setting.name).with_suffix(".pt"), weights_only=True) for setting in names]
        for i in range(min(each if task.startswith("noto") else 1, len(pairs.source))):
            tiles = [Tile(picture(pairs.source[i]), pairs.source_prompts[i])]
            tiles.append(Tile(picture(pairs.target[i]), pairs.target_prompts[i], compare=pairs.source_prompts[i]))
            tiles += [
                Tile(
                    picture(edit[i]),
                    f"{_mark(task, rows[setting.name], i)} {rows[setting.name]['psnr_outside'][i]:.1f} dB",
                )
                for edit, setting in zip(edits, names, strict=True)
            ]
            lines.append(tiles)
    return contact_sheet(
        lines,
        title="Edits with a known truth",
        subtitle="The first pairs of each kind, not picked. Under an edit: what a judge reads, and the PSNR to the "
        "source outside the mask.",
        columns=["source", "truth", *(SHORT.get(setting.method, setting.method) for setting in names)],
        tile=120,
    )


def _mark(task: str, record: Mapping[str, Sequence[Any]], i: int) -> str:
    if record[trusted(task)][i]:
        return "done,"
    return "rest changed," if record[trusted(task).replace("success", "reached")][i] else "not done,"


def save_small(image: Image.Image, path: Path, limit: int = 300_000) -> None:
    """As a PNG of at most `limit` bytes: in true colours, or in as few as it takes."""
    for colours in (None, 256, 128, 64):
        shown = image if colours is None else image.quantize(colours, dither=Image.Dither.NONE)
        shown.save(path, optimize=True)
        if path.stat().st_size <= limit:
            return


def markdown(result: Mapping[str, Any], measured: Records) -> str:
    parts = ["### The judges' own accuracy\n", judge_table(result["judges"]), "\n### At equal success\n"]
    parts += [
        "The most PSNR outside the mask that a method keeps at a given success, choosing at random between two "
        "of its settings where that is best; – where it gets there with none. The best of a row is bold.\n",
        equal_success_table(result["tasks"]),
        "\n### Main settings, picture by picture\n",
        f"{GUIDE} minus the other, mean and standard error over the pairs.\n",
        paired_table(measured),
        "\n### Cost of one picture\n",
        "Inversion included. Seconds are of one CPU thread; memory is what the process grows by at most, weights not "
        "counted.\n",
        cost_table(result["costs"]),
        "\n### Everything\n",
        f"Mean ± standard error over {result['settings']['count']} pairs.",
    ]
    for task, rows in result["tasks"].items():
        parts += [f"\n#### {task}\n", task_table(rows)]
    return "\n".join(parts)


def write_report(
    result: Mapping[str, Any], measured: Records, tasks: Mapping[str, Task], file_of: Callable[..., Path]
) -> None:
    """The pictures into docs/images, the tables between the two marks of docs/editing_benchmark.md."""
    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    save_small(curves(result["tasks"]), images / "editing_curves.png")
    save_small(sheet_of(measured, tasks, file_of), images / "editing_sheet.png")
    write_between(DOCS / "editing_benchmark.md", BEGIN, END, markdown(result, measured))
