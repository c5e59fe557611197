"""The figures of docs/distillation.md and its plot, from `benchmarks/results/distillation.json`."""

import statistics
from typing import Any

from common import ROOT
from page import Panel, line_chart, table, write_between

from diffusers_ext.atomic import atomic_write


PAGE, PICTURE = ROOT / "docs" / "distillation.md", ROOT / "docs" / "images" / "distillation.svg"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BASE = "teacher, Euler, 20"
TOY = {
    "teacher, Euler": "#888888", "teacher, DPM++ 2M": "#33bbee", "DMD2": "#cc3311", "f-distill, js": "#ee7733", "CTM": "#aa3377",
    "ReFlow": "#009988",
}  # fmt: skip
DEMO = {
    "emoji-scenes-flow, Euler": "#888888", "emoji-scenes-flow, DPM++ 2M": "#33bbee", "emoji-scenes-flow, UniPC": "#0077bb",
    "emoji-scenes-64, DPM++ 2M": "#bbbb44", "emoji-scenes-agd": "#aa3377", "emoji-scenes-reflow": "#009988",
}  # fmt: skip
DIGITS_BASE = "teacher, DDIM, 40"
DIGITS = {
    "teacher, DDIM": "#888888", "teacher, DPM++ 2M": "#33bbee", "teacher, UniPC": "#0077bb",
    "teacher without guidance, DPM++ 2M": "#bbbb44", "LCM": "#ee7733", "DMD2": "#cc3311", "ReFlow": "#009988", "AGD": "#aa3377",
}  # fmt: skip
LABELS = ("object", "colour", "background", "pattern", "all four")


def spread(values: list[float], digits: int = 4) -> str:
    """Mean of the seeds, and their range where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def toy_table(found: dict[str, Any]) -> list[str]:
    base = found["rows"][BASE]["sliced_w2"]
    rows = []
    for name, row in found["rows"].items():
        method, _, evaluations = name.rpartition(", ")
        ratio = statistics.fmean(row["sliced_w2"]) / statistics.fmean(base)
        inside, kl = statistics.fmean(row["inside"]), statistics.fmean(row["mode_kl"])
        seconds = "" if method == "data" else f"{row['training_seconds']:.0f}"
        rows.append(
            [method, evaluations, spread(row["sliced_w2"]), f"{ratio:.2f}", f"{inside:.3f}", f"{kl:.4f}", seconds]
        )
    header = ("sampler", "evaluations", "sliced W2, mean of seeds (range)", "of Euler 20", "within 3 deviations", "KL of the modes",
              "training, s")  # fmt: skip
    bends = found["straightness"]
    fall = statistics.fmean(bends["teacher"]) / statistics.fmean(bends["student"])
    settings = found["settings"]
    return [
        f"Seeds {', '.join(map(str, settings['seeds']))}, trained side by side; seconds of one core for all of them, the teacher's own not "
        f"counted in. {settings['tried']} settings were tried on another seed. Samples of the data themselves are row one: what is left is the "
        f"error of the measurement.",
        "",
        table(header, rows),
        "",
        "The goal for DMD2 is 1.35 of the teacher's Euler 20 in one step. CTM is no one-step method here: jumps from the highest level are a fortieth of "
        "what is trained, and its discriminator is left out.",
        "",
        f"ReFlow takes S from {spread(bends['teacher'])} to {spread(bends['student'])}, {fall:.0f} times less.",
    ]


def digits_table(found: dict[str, Any]) -> list[str]:
    base = statistics.fmean(found["rows"][DIGITS_BASE]["frechet"])
    rows = []
    for name, row in found["rows"].items():
        method, _, evaluations = name.rpartition(", ")
        means = {key: statistics.fmean(row[key]) for key in ("frechet", "sliced_w2", "right", "coverage", "apart")}
        sampled = "training_seconds" in row
        rows.append([
            method, evaluations if sampled else "", spread(row["frechet"]), f"{means['frechet'] / base:.2f}", f"{means['sliced_w2']:.4f}",
            f"{means['right']:.3f}", f"{means['coverage']:.3f}", f"{means['apart']:.2f}" if sampled else "",
            f"{row['training_seconds']:.0f}" if sampled else "", f"{row['pictures_per_second']:.0f}" if sampled else "",
        ])  # fmt: skip
    header = ("sampler", "evaluations", "Fréchet distance (range)", "of DDIM 20", "sliced W2", "read as asked", "coverage",
              "from training", "training, s", "pictures/s")  # fmt: skip
    settings, bends = found["settings"], found["straightness"]

    def at(name: str) -> str:
        return f"{statistics.fmean(found['rows'][name]['frechet']):.4f}"

    single = [name for name in settings["of_one_seed"] if "," not in name]
    errors = [
        [name, *(spread([100 * value for value in found["guidance"][name][scale]], 2) for scale in ("2", "4"))]
        for name in found["guidance"]
    ]
    fall = statistics.fmean(bends["teacher"]) / statistics.fmean(bends["student"])
    return [
        f"scikit-learn's 8x8 digits, told which digit, guidance {settings['guidance']:g} but where a row says otherwise: two passes a step of "
        f"the teacher, one of a student. One teacher; students of seeds {', '.join(map(str, settings['seeds']))} ({' and '.join(single)} of "
        f"the first alone), each begun at its weights. One setting of each method was tried, on another seed "
        f"({settings['tried']} in all). {settings['count']} samples from the same noise in every row and for every seed, so ranges tell of training alone. Row one is "
        f"the training pictures. Seconds of one core for one student, the teacher's own not counted in; pictures/s "
        f"differ by up to a fifth between runs.",
        "",
        f"* *Fréchet distance* from {settings['held_out']} held-out pictures, in the features of a classifier that knows the training pictures "
        f"(right on {found['classifier_accuracy']:.1%} of the held-out ones; its recipe is one of six, chosen by row one alone), scaled to variance 1",
        "* *read as asked*: share that the classifier reads as the digit asked for",
        "* *coverage*: share of held-out pictures with a sample nearer than their fifth neighbour, in pixels",
        "* *from training*: median distance to the nearest training picture, of that of held-out ones; near 0 the model repeats what it has seen",
        "",
        table(header, rows),
        "",
        f"Guidance leads away from the data: without it the teacher comes to {at('teacher without guidance, DPM++ 2M, 20')} in 20 evaluations, "
        f"with it to {at('teacher, DPM++ 2M, 20')}. Students learn the guided teacher, which is their floor more than row one is. At 4 "
        f"evaluations DPM++ 2M without guidance is at {at('teacher without guidance, DPM++ 2M, 4')} beside LCM's {at('LCM, 4')}, but farther off in "
        f"pixels.",
        "",
        f"ReFlow takes S from {spread(bends['teacher'])} to {spread(bends['student'])}, {fall:.0f} times less.",
        "",
        "Squared error of guidance in one pass (AGD), of the squared norm, on guided runs from fresh noise; 1 % is wanted:",
        "",
        table(("one pass of", "guidance 2, %", "guidance 4, %"), errors),
        "",
        "diffusers' own LCM script cannot be a row: it is made for Stable Diffusion on a web dataset and needs torchvision and webdataset.",
    ]


def demo_table(found: dict[str, Any]) -> list[str]:
    rows = []
    base = found["rows"]["emoji-scenes-flow, Euler, 20"]["frechet"]
    for name, row in found["rows"].items():
        sampler, _, steps = name.rpartition(", ")
        if "evaluations" not in row:
            rows.append([name, "", "", f"{row['frechet']:.3f}", "", *(f"{row[label]:.3f}" for label in LABELS), ""])
            continue
        rows.append(
            [sampler, steps, row["evaluations"], f"{row['frechet']:.3f}", f"{row['frechet'] / base:.2f}",
             *(f"{row[label]:.3f}" for label in LABELS), f"{row['pictures_per_second']:.1f}"]
        )  # fmt: skip
    header = ("sampler", "steps", "evaluations", "Fréchet distance", "of the flow's 20 steps", *LABELS, "pictures/s")
    settings = found["settings"]
    return [
        f"{settings['count']} captions of triples never trained on, guidance {settings['guidance_scale']:g}, the same noise in every row of a "
        f"model; {settings['references']} renderings of other such scenes to compare with. Pictures a second on one core.",
        "",
        table(header, rows),
    ]


def memory_table(memory: dict[str, Any]) -> list[str]:
    alone = memory["teacher"]
    rows = [["teacher alone, a pass forwards and backwards", f"{alone['peak_megabytes']:.0f}", ""]]
    rows += [
        [
            f"DMD2, student and fake score as LoRAs of rank {rank}",
            f"{row['peak_megabytes']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for rank, row in memory["ranks"].items()
    ]
    return [
        f"Network of the size of Stable Diffusion 1.5 ({alone['weights_megabytes']:.0f} MB in float32), 256 pixels, batch 1, AdamW:",
        "",
        table(("peak memory", "MB", "ratio"), rows),
    ]


def time_table(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name, f"{row['round_seconds']:.2f}", f"{row['sum_of_parts_seconds']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
        ]
        for name, row in found.items()
    ]  # fmt: skip
    return [table(("DMD2 on the demo model", "round, s", "sum of its passes, s", "ratio (range)"), rows)]


def lines_of(rows: dict[str, Any], colours: dict[str, str], value: Any) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {name: {} for name in colours}
    for name, row in rows.items():
        sampler, _, count = name.rpartition(", ")
        if sampler in lines:
            lines[sampler][row.get("evaluations", int(count))] = value(row)
    return lines


def picture(result: dict[str, Any]) -> str:
    toy = lines_of(result["toy"]["rows"], TOY, lambda row: statistics.fmean(row["sliced_w2"]))
    demo = lines_of(result["demo"]["rows"], DEMO, lambda row: row["frechet"])
    digits = lines_of(result["digits"]["rows"], DIGITS, lambda row: statistics.fmean(row["frechet"]))
    columns = sorted({count for line in demo.values() for count in line})
    panels = [
        Panel("Eight Gaussians: sliced W2 by evaluations", (1, 2, 4, 10, 20), toy, logarithmic=True),
        Panel("Demo model: Fréchet distance by evaluations", columns, demo, logarithmic=True),
        Panel("Digits: Fréchet distance by evaluations", (1, 2, 4, 8, 10, 20, 40), digits, logarithmic=True),
    ]
    return line_chart(panels, {**TOY, **DIGITS, **DEMO})


def write(result: dict[str, Any]) -> None:
    """Writes the part of the page between its markers, and the plot."""
    atomic_write(PICTURE, picture(result).encode())
    lines = [
        "![distance by network evaluations](images/distillation.svg)",
        "",
        "### Eight Gaussians",
        "",
        *toy_table(result["toy"]),
    ]
    lines += ["", "### Digits", "", *digits_table(result["digits"])]
    lines += ["", "### The demo model", "", *demo_table(result["demo"])]
    if "memory" in result:
        lines += ["", "### Memory", "", *memory_table(result["memory"])]
    if "time" in result:
        lines += ["", "### Time", "", *time_table(result["time"])]
    write_between(PAGE, BEGIN, END, "\n".join(lines))
