"""Writes the tables of docs/samplers.md and its plot from the JSON of `samplers.py`."""

import math
from pathlib import Path
from typing import Any

from diffusers_ext.atomic import atomic_write


BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TITLES = {
    "mix": "mixture, no guidance",
    "cfg": "mixture, guidance 7.5",
    "guided": "two Gaussians, guidance 7.5, overshooting",
    "demo 3": "demo model, guidance 3",
    "demo 7.5": "demo model, guidance 7.5",
    "demo 15": "demo model, guidance 15",
}
# Rows of the tables; all others are in the JSON.
SHOWN = (
    "AdaptiveAdams karras", "AdaptiveAdams exponential", "GHVB 4, 0.5 karras", "GHVB 4, 0.5 exponential",
    "GHVB 3, 0.8 karras", "Adams p=.5 karras", "DPM++ 2M + HB .8 karras", "UniPC 2 + HB .8 karras", "EVODiff exponential",
    "BDIA-DDIM 0.5 leading",
    "DDIM karras", "DDIM leading", "DDIM trailing", "PNDM leading", "PNDM trailing", "DPM++ 2M karras", "DPM++ 2M exponential",
    "DPM++ 3M karras", "UniPC 2 karras", "UniPC 2 exponential", "UniPC 3 karras", "DEIS 2 karras", "DEIS 3 karras",
    "DEIS 3 exponential", "LMS 4 karras", "LMS 4 exponential", "Heun karras", "SASolver (ODE) karras",
)  # fmt: skip
DRAWN = {
    "AdaptiveAdams karras": "#c0392b", "AdaptiveAdams exponential": "#e67e22", "GHVB 4, 0.5 karras": "#8e44ad",
    "DPM++ 2M karras": "#2980b9", "UniPC 2 karras": "#16a085", "DEIS 3 karras": "#7f8c8d", "LMS 4 karras": "#2c3e50",
}  # fmt: skip
NEVER = "–"


def number(value: float) -> str:
    """Two significant digits, without a leading zero."""
    if value >= 100:
        return "blown up"
    text = f"{value:.2g}" if value >= 1e-3 else f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def cell(row: dict[str, Any]) -> str:
    failed = f" [{row['failures']:.0%}]" if row["failures"] else ""
    return f"{number(row['median'])} / {number(row['mean'])}{failed}"


def grid_table(table: dict[str, Any], columns: list[str]) -> list[str]:
    """Median / mean [share of failed samples], one line a sampler; the lowest mean of a column is bold."""
    best = {column: min(entry["rows"][column]["mean"] for entry in table.values()) for column in columns}
    lines = ["| sampler | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in SHOWN:
        if name not in table:
            continue
        rows = table[name]["rows"]
        cells = [
            f"**{cell(rows[column])}**" if rows[column]["mean"] == best[column] else cell(rows[column])
            for column in columns
        ]
        label = f"*{name}*" if table[name]["own"] else name
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def winners(problems: dict[str, Any], columns: list[str]) -> list[str]:
    """By problem and evaluations: the lowest mean of all, and how AdaptiveAdams with its default grid stands beside it."""
    lines = ["| problem | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, title in TITLES.items():
        table = problems.get(name, {}).get("equal", {})
        if not table:
            continue
        cells = []
        for column in columns:
            means = {sampler: entry["rows"][column]["mean"] for sampler, entry in table.items()}
            best = min(means, key=lambda sampler: means[sampler])
            failed = table[best]["rows"][column]["failures"]
            label = f"*{best}*" if table[best]["own"] else best
            cells.append(f"{label} {number(means[best])}" + (f" [{failed:.0%}]" if failed else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def ratios(problems: dict[str, Any], setting: str, columns: list[str]) -> list[str]:
    """Mean error over that of the best peer of the column."""
    lines = ["| problem | sampler | " + " | ".join(columns) + " | worst |", "|---" * (len(columns) + 3) + "|"]
    for name, title in TITLES.items():
        table = problems.get(name, {}).get(setting, {})
        peers = [entry["rows"] for entry in table.values() if not entry["own"]]
        if not peers:
            continue
        best = {column: min(rows[column]["mean"] for rows in peers) for column in columns}
        for sampler in (
            "AdaptiveAdams karras",
            "AdaptiveAdams exponential",
            "GHVB 4, 0.5 karras",
            "GHVB 4, 0.5 exponential",
        ):
            if sampler in table:
                values = [table[sampler]["rows"][column]["mean"] / best[column] for column in columns]
                shown = [*(f"{value:.2f}" for value in values), f"**{max(values):.2f}**"]
                lines.append(f"| {title} | {sampler} | " + " | ".join(shown) + " |")
        # The peer whose worst column is the least: what one can do with a single sampler of diffusers.
        steady = min(
            (max(entry["rows"][column]["mean"] / best[column] for column in columns), sampler)
            for sampler, entry in table.items()
            if not entry["own"]
        )
        rows = table[steady[1]]["rows"]
        shown = [*(f"{rows[column]['mean'] / best[column]:.2f}" for column in columns), f"{steady[0]:.2f}"]
        lines.append(f"| {title} | steadiest peer: {steady[1]} | " + " | ".join(shown) + " |")
    return lines


def plot(problems: dict[str, Any], columns: list[str]) -> str:
    """Mean error over evaluations, both logarithmic, a panel a problem, as SVG."""
    names = [name for name in TITLES if problems.get(name, {}).get("equal")]
    width, height, left, top = 300, 220, 46, 30
    panels = []
    for index, name in enumerate(names):
        x0, y0 = (index % 3) * (width + 20), (index // 3) * (height + 40)
        table = problems[name]["equal"]
        means = [table[s]["rows"][c]["mean"] for s in DRAWN if s in table for c in columns]
        low, high = math.floor(math.log10(min(means))), min(1.0, math.ceil(math.log10(max(means))))

        def place(
            evaluations: str, mean: float, x0: float = x0, y0: float = y0, low: float = low, high: float = high
        ) -> str:
            first, last = math.log(int(columns[0])), math.log(int(columns[-1]))
            x = x0 + left + (width - left - 10) * (math.log(int(evaluations)) - first) / (last - first)
            y = y0 + top + (height - top - 24) * (high - min(math.log10(mean), high)) / (high - low)
            return f"{x:.1f},{y:.1f}"

        parts = [f'<text x="{x0 + left}" y="{y0 + 16}" font-weight="bold">{TITLES[name]}</text>']
        for power in range(low, int(high) + 1):
            (ax, ay), (bx, _) = (place(c, 10.0**power).split(",") for c in (columns[0], columns[-1]))
            parts.append(f'<line x1="{ax}" y1="{ay}" x2="{bx}" y2="{ay}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 + left - 6}" y="{float(ay) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for column in columns:
            x = place(column, 1.0).split(",")[0]
            parts.append(f'<text x="{x}" y="{y0 + height - 6}" text-anchor="middle">{column}</text>')
        for sampler, colour in DRAWN.items():
            if sampler in table:
                points = " ".join(place(c, table[sampler]["rows"][c]["mean"]) for c in columns)
                parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        panels += parts
    rows = (len(names) + 2) // 3
    total_height = rows * (height + 40) + 40
    for index, (sampler, colour) in enumerate(DRAWN.items()):
        x, y = 20 + (index % 4) * 235, total_height - 30 + 18 * (index // 4)
        panels.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        panels.append(f'<text x="{x + 26}" y="{y}">{sampler}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * (width + 20)}" height="{total_height}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + "\n".join(panels) + "\n</svg>\n"


def write_page(result: dict[str, Any], docs: Path) -> None:
    """Renews what stands between the markers of docs/samplers.md, and docs/images/samplers.svg.

    Raises:
        ValueError: If the page lacks its markers.
    """
    page = docs / "samplers.md"
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has no {BEGIN} and {END}; put them where the figures belong")
    problems, columns = result["problems"], [str(count) for count in result["settings"]["evaluations"]]
    settings = result["settings"]
    measured = any("demo" in name for name in problems)
    demo = f"{settings['demo_samples']} prompts" if measured else "not measured yet"
    lines = [
        f"Analytic problems: {settings['analytic_samples']} samples. Demo model: {demo}. "
        f"Configurations: {settings['configurations']['equal']} on equal nodes, {settings['configurations']['shipped']} as "
        "shipped, all fixed before noise was drawn. Columns are network evaluations. Ours are in italics.",
        "", "### The lowest mean error, equal nodes", "", *winners(problems, columns),
        "", "### Mean error over that of the best peer of the column, equal nodes", "", *ratios(problems, "equal", columns),
        "", "### The same, as shipped", "",
        "Peers spend their last step on the jump to sigma 0, which ours do not by default: this flatters us.", "",
        *ratios(problems, "shipped", columns),
    ]  # fmt: skip
    for name, title in TITLES.items():
        for setting, words in (("equal", "equal nodes"), ("shipped", "as shipped")):
            table = problems.get(name, {}).get(setting)
            if table:
                doubt = result.get("doubt", {}).get(name)
                note = f" The reference itself is known to about {doubt}." if doubt and setting == "equal" else ""
                lines += ["", f"### {title[0].upper()}{title[1:]}: {words}", ""]
                lines += [f"Median / mean error [samples above {settings['failure']}].{note}", ""]
                lines += grid_table(table, columns)
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    atomic_write(page, (before + "\n" + "\n".join(lines) + "\n" + after).encode())
    atomic_write(docs / "images" / "samplers.svg", plot(problems, columns).encode())
