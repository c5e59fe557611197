"""The tables of docs/mean_reverting.md and its plot, from `benchmarks/results/mr_sampler.json`."""

import math
from pathlib import Path
from typing import Any

from diffusers_ext.atomic import atomic_write


BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SETS = {"photographs": "photographs never trained on", "scenes": "emoji scenes never trained on"}
METRICS = {"psnr": "PSNR (dB), more is better", "ssim": "SSIM, more is better", "gmsd": "GMSD, less is better"}
DRAWN = {
    "posterior": "#888888", "Euler-Maruyama": "#bbbb44", "ode-d-2": "#cc3311", "sde-d-2": "#ee7733", "adapter: UniPC 2": "#0077bb",
    "adapter: DPM++ 2": "#33bbee",
}  # fmt: skip


def cell(row: dict[str, Any] | None, metric: str) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "diverged"
    return f"{row[metric]['mean']:.2f}" if metric == "psnr" else f"{row[metric]['mean']:.4f}"


def quality_tables(found: dict[str, Any], columns: list[str]) -> list[str]:
    lines = []
    for name, title in SETS.items():
        if name not in found:
            continue
        for metric, label in METRICS.items():
            before = cell(found[name]["degraded"], metric)
            lines += ["", f"### {label}: {found[name]['pictures']} {title}", "", f"Degraded: {before}.", ""]
            lines += ["| sampler | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
            for sampler, rows in found[name].get("samplers", {}).items():
                lines.append(f"| {sampler} | " + " | ".join(cell(rows.get(c), metric) for c in columns) + " |")
    return lines


def verdict(found: dict[str, Any]) -> list[str]:
    """Five evaluations of each solver against a hundred of posterior sampling."""
    lines = ["", "### Five evaluations against a hundred of posterior sampling", ""]
    lines += [
        "| pictures | sampler | PSNR difference (dB) | GMSD difference | at least as good |",
        "| --- |" + " --- |" * 4,
    ]
    for name, title in SETS.items():
        table = found.get(name, {}).get("samplers", {})
        base = table.get("posterior", {}).get("100")
        for sampler, rows in table.items():
            row = rows.get("5")
            if base is None or row is None or "failed" in row or sampler == "posterior":
                continue
            gain, distance = (row[key]["mean"] - base[key]["mean"] for key in ("psnr", "gmsd"))
            good = "yes" if gain >= -0.1 and distance <= 0.0 else "no"
            lines.append(f"| {title} | {sampler} | {gain:+.2f} | {distance:+.4f} | {good} |")
    return lines


def plot(found: dict[str, Any], columns: list[str]) -> str:
    """PSNR and GMSD over evaluations, a panel a set and metric, as SVG."""
    width, height, left, top = 330, 220, 52, 30
    parts = []
    panels = [(name, metric) for name in SETS if name in found for metric in ("psnr", "gmsd")]
    for index, (name, metric) in enumerate(panels):
        x0, y0 = (index % 2) * (width + 20), (index // 2) * (height + 30)
        table = {s: r for s, r in found[name].get("samplers", {}).items() if s in DRAWN}
        values = [
            rows[c][metric]["mean"]
            for rows in table.values()
            for c in columns
            if c in rows and "failed" not in rows[c]
        ]
        if not values:
            continue
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 1.0
        low, high = low - margin, high + margin
        first, last = math.log(int(columns[0])), math.log(int(columns[-1]))

        def at(column: str, value: float, x0: float = x0, y0: float = y0, low: float = low, high: float = high) -> str:
            x = x0 + left + (width - left - 10) * (math.log(int(column)) - first) / (last - first)
            return f"{x:.1f},{y0 + top + (height - top - 24) * (high - value) / (high - low):.1f}"

        title = f"{metric.upper()}: {name}"
        parts.append(f'<text x="{x0 + left}" y="{y0 + 16}" font-weight="bold">{title}</text>')
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            value = low + share * (high - low)
            (ax, ay), (bx, _) = (at(c, value).split(",") for c in (columns[0], columns[-1]))
            parts.append(f'<line x1="{ax}" y1="{ay}" x2="{bx}" y2="{ay}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 + left - 6}" y="{float(ay) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for column in columns:
            x = at(column, low).split(",")[0]
            parts.append(f'<text x="{x}" y="{y0 + height - 6}" text-anchor="middle">{column}</text>')
        for sampler, rows in table.items():
            points = " ".join(at(c, rows[c][metric]["mean"]) for c in columns if c in rows and "failed" not in rows[c])
            parts.append(f'<polyline points="{points}" fill="none" stroke="{DRAWN[sampler]}" stroke-width="2"/>')
    total = ((len(panels) + 1) // 2) * (height + 30) + 50
    for index, (sampler, colour) in enumerate(DRAWN.items()):
        x, y = 20 + (index % 3) * 220, total - 34 + 18 * (index // 3)
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 26}" y="{y}">{sampler}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (width + 20)}" height="{total}" font-family="sans-serif" '
        'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def write_page(result: dict[str, Any], docs: Path) -> None:
    """Renews what stands between the markers of docs/mean_reverting.md, and docs/images/mr_sampler.svg.

    Raises:
        ValueError: If the page lacks its markers.
    """
    page = docs / "mean_reverting.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has no {BEGIN} and {END}; put them where the figures belong")
    lines = [
        "### Convergence orders",
        "",
        "| solver | 80 to 160 steps | 160 to 320 | 320 to 640 |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for name, row in result["orders"].items()
    ]
    lines += ["", "### Time of a step", "", "| algorithm | microseconds | DPM-Solver of diffusers | median ratio |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, row in result["step_time"].items():
        lines.append(f"| {name} | {row['microseconds']} | {row['peer_microseconds']} | {row['ratio']} |")
    found = result.get("quality")
    if found:
        columns = [str(count) for count in result["settings"]["evaluations"]]
        lines += ["", "![quality against network evaluations](images/mr_sampler.svg)"]
        lines += [*verdict(found), *quality_tables(found, columns)]
        atomic_write(docs / "images" / "mr_sampler.svg", plot(found, columns).encode())
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    atomic_write(page, (before + "\n" + "\n".join(lines) + "\n" + after).encode())
