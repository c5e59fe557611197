"""Writes the tables of docs/samplers.md and its plot from the JSON of `samplers.py`."""

from pathlib import Path
from typing import Any

from page import Panel, line_chart, write_between

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
    "DDIM karras": "#f1c40f",
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
    panels = []
    for name, title in TITLES.items():
        table = problems.get(name, {}).get("equal") or {}
        lines = {sampler: {int(c): entry["rows"][c]["mean"] for c in columns} for sampler, entry in table.items()}
        panels.append(Panel(title, [int(c) for c in columns], lines, logarithmic=True, most=10.0))
    return line_chart(panels, DRAWN, across=3)


def write_page(result: dict[str, Any], docs: Path) -> None:
    """Renews what stands between the markers of docs/samplers.md, and docs/images/samplers.svg.

    Raises:
        ValueError: If the page lacks its markers.
    """
    page = docs / "samplers.md"
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
    write_between(page, BEGIN, END, "\n".join(lines))
    atomic_write(docs / "images" / "samplers.svg", plot(problems, columns).encode())
