"""The report of `editing.py`: tables in Markdown and a sheet of edits; the curves are in `editing_curves.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from editing_curves import curves, points_of, settings_of, trusted
from editing_measures import Task, best_mixture, mean_and_error, paired_difference, pareto_front, swapped
from editing_methods import DDIM, GUIDE, LEDITS, METHODS, OURS, PEERS, SDEDIT, SETTINGS
from page import table, write_between
from PIL import Image
from word_methods import BLENDED, DDIM_WORDS

from diffusers_ext.sheets import PAPER, Tile, contact_sheet


DOCS = ROOT / "docs"
SHOWN = 4  # edits of each task and setting that are kept for the sheet
BEGIN, END = "<!-- editing benchmark: begin -->", "<!-- editing benchmark: end -->"
LEVELS = (0.7, 0.8, 0.9, 0.95)  # of success
MAIN = [setting for setting in SETTINGS if setting.main]

SHEET = (SDEDIT, DDIM, LEDITS, DDIM_WORDS, GUIDE, BLENDED)  # methods that have a column
SHORT = {DDIM: "DDIM + CFG", BLENDED: "direct + P2P, blend"}  # over a column of the sheet

Records = Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]


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
    return table(head, out)


def cost_table(costs: Mapping[str, Mapping[str, float | None]]) -> str:
    out = []
    for setting in SETTINGS:
        if setting.name not in costs:
            continue
        cost = costs[setting.name]
        memory = "–" if cost["peak_megabytes"] is None else f"{cost['peak_megabytes']:.0f}"
        out.append([setting.name, str(cost["forward"]), str(cost["backward"]), f"{cost['seconds']:.2f}", memory])
    return table(["method, knob", "forward passes", "backward passes", "seconds", "peak MB"], out)


def paired_table(measured: Records, lead: str) -> str:
    """How far a method lies ahead of each other one in its main setting, picture by picture."""
    mains = {setting.method: setting.name for setting in MAIN}
    others = [method for method in METHODS if method != lead and method in mains]
    out = []
    for task, rows in measured.items():
        if mains[lead] not in rows:
            continue
        for measure, label in (
            ("psnr_outside", "PSNR outside"),
            ("psnr", "PSNR to truth"),
            (trusted(task), "success"),
        ):
            cells = [_ahead(rows, mains[lead], mains[other], measure) for other in others]
            out.append([task, label, *cells])
    return table(["pairs", "measure", *(f"over {mains[other]}" for other in others)], out)


def _ahead(rows: Mapping[str, Mapping[str, Sequence[Any]]], first: str, second: str, measure: str) -> str:
    """Mean and standard error of a difference, over the pairs that both were measured on."""
    if first not in rows or second not in rows:
        return "–"
    pairs = min(len(rows[first][measure]), len(rows[second][measure]))
    mean, error = paired_difference(rows[first][measure][:pairs], rows[second][measure][:pairs])
    return f"{mean:+.2f} ± {error:.2f}"


def few_table(measured: Records) -> str:
    """Settings that were measured on a part of the pairs, and the lead's main setting minus each of them there."""
    lead = next(setting.name for setting in MAIN if setting.method == BLENDED)
    out = []
    for task, rows in measured.items():
        for setting in SETTINGS:
            if setting.pairs is not None and setting.name in rows:
                row = rows[setting.name]
                share, kept = mean_and_error(row[trusted(task)]), mean_and_error(row["psnr_outside"])
                cells = [f"{share[0]:.2f} ± {share[1]:.2f}", f"{kept[0]:.2f} ± {kept[1]:.2f}"]
                ahead = [_ahead(rows, lead, setting.name, measure) for measure in (trusted(task), "psnr_outside")]
                out.append([task, setting.name, *cells, *ahead])
    head = ["pairs", "method, knob", "success", "PSNR outside", f"{lead} minus it: success", "PSNR outside"]
    return table(head, out) if out else "None."


def swept(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Tasks on which knobs were turned."""
    return {task: rows for task, rows in tasks.items() if len(points_of(task, rows, DDIM)) > 1}


def equal_success_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What each method keeps at a success, where it was measured on every pair."""
    methods = [method for method in METHODS if any(points_of(*item, method) for item in tasks.items())]
    out = []
    for task, rows in swept(tasks).items():
        for level in (0.5, *LEVELS):
            kept = {method: best_mixture(points_of(task, rows, method), level) for method in methods}
            best = max((height for height in kept.values() if height is not None), default=None)
            texts = ["–" if height is None else f"{height:.2f}" for height in kept.values()]
            texts = [f"**{text}**" if h == best and h is not None else text for text, h in zip(texts, kept.values())]
            out.append([task, f"{level:.2f}", *texts])
    return table(["pairs", "success", *methods], out) if out else "The sweep has not been run."


Best = tuple[float, str]  # how much, and which method


def best_of(task: str, rows: Mapping[str, Any], methods: Sequence[str], level: float, of_success: bool) -> Best | None:
    """The best of some methods at a level: PSNR outside at a success or, `of_success`, success at a PSNR outside."""
    found: list[Best] = []
    for method in methods:
        points = points_of(task, rows, method)
        height = best_mixture(swapped(points) if of_success else points, level)
        if height is not None:
            found.append((height, method))
    return max(found, default=None)


def _against(ours: Best | None, peers: Best | None, digits: int) -> list[str]:
    texts = ["–" if best is None else f"{best[0]:.{digits}f} ({best[1]})" for best in (ours, peers)]
    if ours is None or peers is None:
        return [*texts, "–" if ours is None and peers is None else "peers alone" if ours is None else "ours alone"]
    # Adding 0 takes the sign off a difference that rounds to -0.
    return [*texts, f"{round(ours[0] - peers[0], digits) + 0.0:+.{digits}f}"]


def pareto_tables(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The best of ours and of the peers at equal success and at equal preservation, and where peers are ahead."""
    at_success, at_preservation, behind = [], [], []
    for task, rows in swept(tasks).items():
        for level in LEVELS:
            ours, peers = (best_of(task, rows, methods, level, of_success=False) for methods in (OURS, PEERS))
            at_success.append([task, f"{level:.2f}", *_against(ours, peers, 2)])
            if peers is not None and (ours is None or ours[0] < peers[0]):
                behind.append(f"{task} at success {level:.2f}")
        peaks = [best_of(task, rows, PEERS, level, of_success=False) for level in LEVELS]
        for kept in sorted({best[0] for best in peaks if best is not None}, reverse=True):
            # What was interpolated must not be out of reach by its own rounding.
            ours, peers = (best_of(task, rows, methods, kept - 1e-9, of_success=True) for methods in (OURS, PEERS))
            at_preservation.append([task, f"{kept:.2f}", *_against(ours, peers, 2)])
            if peers is not None and (ours is None or ours[0] < peers[0] - 1e-6):
                behind.append(f"{task} at {kept:.2f} dB")
    if not at_success:
        return "The sweep has not been run."
    return "\n".join([
        table(["pairs", "success", "best of ours: PSNR outside", "best of the peers", "ours over peers"], at_success),
        "",
        table(["pairs", "PSNR outside", "best of ours: success", "best of the peers", "ours over peers"], at_preservation),
        "",
        f"Peers are ahead: {', '.join(behind) if behind else 'at none of these'}.",
    ])  # fmt: skip


def front_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings that no other beats in both."""
    owner = {setting.name: setting.method for setting in SETTINGS}
    out = []
    for task, rows in swept(tasks).items():
        points = settings_of(task, rows, METHODS)
        for name in pareto_front(points):
            whose = "peer" if owner[name] in PEERS else "ours"
            out.append([task, name, whose, f"{points[name][0]:.2f}", f"{points[name][1]:.2f}"])
    return table(["pairs", "method, knob", "whose", "success", "PSNR outside"], out)


def judge_table(judges: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = ("object", "colour", "background", "pattern", "all")
    labels = {"judge": "attribute judge", "second": "second judge"}
    out = [
        [hand, labels[judge], *(f"{values[name]:.3f}" for name in names)]
        for hand, rows in judges.items()
        for judge, values in rows.items()
    ]
    return table(["drawings", "judge", *names[:-1], "all four"], out)


def picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) bytes, or floats in [-1, 1]."""
    if image.is_floating_point():
        image = (image.clamp(-1.0, 1.0) * 127.5 + 127.5).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def sheet_of(measured: Records, tasks: Mapping[str, Task], file_of: Callable[..., Path], each: int = 2) -> Image.Image:
    """The first pairs of every task with every method in its main setting; none is picked."""
    names = [setting for method in SHEET for setting in MAIN if setting.method == method]
    names = [setting for setting in names if any(setting.name in rows for rows in measured.values())]
    lines = []
    for task, rows in measured.items():
        pairs = tasks[task].pairs
        edits = {
            setting.name: torch.load(file_of(task, setting.name).with_suffix(".pt"), weights_only=True)
            for setting in names
            if setting.name in rows
        }
        for i in range(min(each if task.startswith("noto") else 1, len(pairs.source))):
            tiles = [Tile(picture(pairs.source[i]), pairs.source_prompts[i])]
            tiles.append(Tile(picture(pairs.target[i]), pairs.target_prompts[i], compare=pairs.source_prompts[i]))
            for setting in names:
                if setting.name in edits:
                    row = rows[setting.name]
                    words = f"{_mark(task, row, i)} {row['psnr_outside'][i]:.1f} dB"
                    tiles.append(Tile(picture(edits[setting.name][i]), words))
                else:
                    tiles.append(Tile(Image.new("RGB", (8, 8), PAPER), "not measured"))
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
    parts = ["### The judges' own accuracy\n", judge_table(result["judges"]), "\n### Ours against the peers\n"]
    parts += [
        f"Peers are {', '.join(PEERS[:-1])} and {PEERS[-1]}; ours are {', '.join(OURS[:-1])} and {OURS[-1]}. Of each side "
        "the best method at a success is taken, and at what the best peer keeps at those successes. A method may choose "
        "at random between two of its settings where that is best. Settings that were measured on every pair.\n",
        pareto_tables(result["tasks"]),
        "\n### The Pareto front\n",
        "The settings that no other beats in both success and PSNR outside the mask; the line of the picture.\n",
        front_table(result["tasks"]),
        "\n### At equal success\n",
        "The most PSNR outside the mask that a method keeps at a given success; – where it gets there with none of its "
        "settings. The best of a row is bold.\n",
        equal_success_table(result["tasks"]),
        "\n### Measured on fewer pairs\n",
        few_table(measured),
        "\n### Main settings, picture by picture\n",
    ]
    for lead in (BLENDED, GUIDE):
        parts += [
            f"{lead} minus the other, mean and standard error over the pairs.\n",
            paired_table(measured, lead),
            "",
        ]
    parts += [
        "### Cost of one picture\n",
        "Inversion included. Seconds are of one CPU thread; memory is what the process grows by at most, weights not "
        "counted.\n",
        cost_table(result["costs"]),
        "\n### Everything\n",
        f"Mean ± standard error over {result['settings']['count']} pairs, or as many as the row says.",
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
