"""What the pages of figures share: the part between two markers, and panels of lines as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from diffusers_ext.atomic import atomic_write


WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 320, 220, 52, 30, 24, 30


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two markers of a page.

    Raises:
        ValueError: If the page lacks them.
    """
    found = page.read_text(encoding="utf-8")
    before, first, rest = found.partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise ValueError(f"{page.name} has no {begin} and {end}; put them where the figures belong")
    atomic_write(page, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}".encode())


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells as a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@dataclass(frozen=True)
class Panel:
    """Lines over the same columns: `lines[name][column]`; columns that a line lacks are left out of it.

    Columns stand at their logarithms. Values do as well where `logarithmic`, cut off above `most`.
    """

    title: str
    columns: Sequence[int]
    lines: Mapping[str, Mapping[int, float]]
    logarithmic: bool = False
    most: float = math.inf

    def scaled(self, value: float) -> float:
        value = min(value, self.most)
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Scaled values at which lines of the grid stand; the first and the last are the ends of the axis."""
        values = [self.scaled(value) for line in self.lines.values() for value in line.values()]
        if self.logarithmic:
            low, high = math.floor(min(values)), math.ceil(max(values))
            return [float(power) for power in range(low, max(high, low + 1) + 1)]
        margin = 0.05 * (max(values) - min(values)) or 1.0
        low, high = min(values) - margin, max(values) + margin
        return [low + share * (high - low) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def line_chart(panels: Sequence[Panel], colours: Mapping[str, str], across: int = 2) -> str:
    """Panels of lines with one legend, as SVG.

    Args:
        panels: What to draw, in rows of `across`; those without a value are left out.
        colours: Colour of each line; others are not drawn.
        across: Panels in a row.

    Returns:
        The text of an SVG file.
    """
    drawn = []
    for panel in panels:
        lines = {name: line for name, line in panel.lines.items() if name in colours and line}
        if lines:
            drawn.append(Panel(panel.title, panel.columns, lines, panel.logarithmic, panel.most))
    parts = []
    for index, panel in enumerate(drawn):
        inside = "".join(_panel(panel, colours))
        x, y = (index % across) * (WIDTH + GAP), (index // across) * (HEIGHT + GAP)
        parts.append(f'<g transform="translate({x},{y})">{inside}</g>')
    named = [name for name in colours if any(name in panel.lines for panel in drawn)]
    per_row = max(1, across * (WIDTH + GAP) // 230)
    under = -(-len(drawn) // across) * (HEIGHT + GAP)
    for index, name in enumerate(named):
        x, y = 20 + (index % per_row) * 230, under + 18 * (index // per_row)
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{colours[name]}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{x + 26}" y="{y}">{escape(name)}</text>')
    height = under + 18 * -(-len(named) // per_row)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across * (WIDTH + GAP)}" height="{height}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    ticks = panel.ticks()
    low, high = ticks[0], ticks[-1]
    logs = [math.log(column) for column in panel.columns]
    across = (WIDTH - LEFT - 10) / ((logs[-1] - logs[0]) or 1.0)

    def x_at(column: int) -> float:
        return LEFT + across * (math.log(column) - logs[0])

    def y_at(scaled: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - scaled) / (high - low)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>']
    for tick in ticks:
        y = y_at(tick)
        label = f"{10.0**tick:g}" if panel.logarithmic else f"{tick:.3g}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 10}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for column in panel.columns:
        parts.append(f'<text x="{x_at(column):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{column}</text>')
    for name, line in panel.lines.items():
        points = " ".join(
            f"{x_at(column):.1f},{y_at(panel.scaled(line[column])):.1f}" for column in panel.columns if column in line
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        if " " not in points:  # a line of one point shows nothing
            x, y = points.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colours[name]}"/>')
    return parts
