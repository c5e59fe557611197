"""The tables of docs/mean_reverting.md and its plot, from `benchmarks/results/mr_sampler.json`."""

from pathlib import Path
from typing import Any

from page import Panel, line_chart, write_between

from diffusers_ext.atomic import atomic_write


BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SETS = {"photographs": "photographs never trained on", "scenes": "emoji scenes never trained on"}
METRICS = {"psnr": "PSNR (dB), more is better", "ssim": "SSIM, more is better", "gmsd": "GMSD, less is better"}
DRAWN = {
    "posterior": "#888888", "Euler-Maruyama": "#bbbb44", "ode-d-2": "#cc3311", "ode-d-2, no start noise": "#aa3377", "sde-d-2": "#ee7733", "adapter: UniPC 2": "#0077bb",
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
    panels = []
    for name in (name for name in SETS if name in found):
        for metric in ("psnr", "gmsd"):
            lines = {
                sampler: {int(c): rows[c][metric]["mean"] for c in columns if c in rows and "failed" not in rows[c]}
                for sampler, rows in found[name].get("samplers", {}).items()
            }
            panels.append(Panel(f"{metric.upper()}: {name}", [int(c) for c in columns], lines))
    return line_chart(panels, DRAWN)


def write_page(result: dict[str, Any], docs: Path) -> None:
    """Renews what stands between the markers of docs/mean_reverting.md, and docs/images/mr_sampler.svg.

    Raises:
        ValueError: If the page lacks its markers.
    """
    page = docs / "mean_reverting.md"
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
    write_between(page, BEGIN, END, "\n".join(lines))
