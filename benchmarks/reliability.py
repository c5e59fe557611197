"""The reliability dashboard: every probe of `tests/reliability/` at full size, with stock diffusers in the same run.

    python benchmarks/reliability.py                     # all, about six minutes on two cores
    python benchmarks/reliability.py --only fuzz damage  # some

Prints the table and writes `benchmarks/results/reliability.json`, where probes that were not run keep their former figures. The
exit code is 1 if a goal is missed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

from tests.reliability import damaged, fuzz, wrong_calls  # noqa: E402
from tests.reliability.outcomes import EMPTY, NOT_FINITE, RAW, VAGUE, Tally  # noqa: E402
from tests.reliability.programs import run_probe  # noqa: E402
from tests.reliability.registry import PIPELINES  # noqa: E402
from tests.reliability.sandbox import sandbox  # noqa: E402


DRAWS, STOCK_DRAWS = 5000, 1200
DAMAGED, STOCK_DAMAGED = 200, 60
KILLS = 20
CALLS = 1000

# One row of the dashboard
COLUMNS = ("probe", "ours", "stock diffusers or other anchor", "goal", "met")
Row = tuple[str, str, str, str, bool]


def _shares(tally: Tally) -> str:
    total = max(tally.total, 1)
    return ", ".join(f"{kind} {tally.counts[kind] / total:.1%}" for kind in (RAW, NOT_FINITE, EMPTY))


def fuzzed(report: dict[str, Any]) -> list[Row]:
    with sandbox():
        ours = fuzz.summed(fuzz.fuzz_all(DRAWS))
        stock = fuzz.summed(fuzz.fuzz_schedulers(fuzz.stock_classes(), STOCK_DRAWS, package="diffusers"))
    report["fuzz"] = {"ours": ours.as_dict(), "stock schedulers": stock.as_dict(), "faults": ours.faults}
    bad = sum(ours.counts[kind] for kind in (RAW, VAGUE, NOT_FINITE, EMPTY))
    said = f"{ours.counts[RAW]} raw, {ours.counts[VAGUE]} vague, {ours.counts[NOT_FINITE]} NaN, {ours.counts[EMPTY]} empty of {ours.total}"
    return [("fuzzed calls", said, f"{_shares(stock)} of {stock.total}", "0 of 5000", bad == 0)]


def wrong(report: dict[str, Any]) -> list[Row]:
    with sandbox():
        ours, our_tally = wrong_calls.table(wrong_calls.own_calls())
        stock, _ = wrong_calls.table(wrong_calls.stock_calls())
    report["wrong calls"] = {"ours": ours, "stock": stock, "faults": our_tally.faults}
    best = {
        name: sum(
            verdict in ("clear", "refused") for mistake, verdict in verdicts.items() if mistake in wrong_calls.MISTAKES
        )
        for name, verdicts in stock.items()
    }
    rows: list[Row] = []
    for subject in PIPELINES:
        clear = sum(ours[subject.name][mistake] == "clear" for mistake in wrong_calls.MISTAKES)
        anchor = f"{max(best.values())} of 7 (best: {max(best, key=lambda name: best[name])})"
        rows.append((f"wrong calls, {subject.name}", f"{clear} of 7", anchor, "7 of 7", clear == 7))
    clear, total = our_tally.counts["clear"], our_tally.total
    rows.append(("wrong calls, all classes", f"{clear} of {total}", "", "all", clear == total))
    return rows


def damage(report: dict[str, Any]) -> list[Row]:
    subject = PIPELINES[0]
    rows: list[Row] = []

    def load_stock(folder: str) -> Any:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run_stock(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a", num_inference_steps=2, output_type="np", generator=generator).images

    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        with_manifest = damaged.sound_folder(subject, Path(scratch) / "with")
        without = damaged.sound_folder(subject, Path(scratch) / "without", manifest=False)
        index = without / "model_index.json"
        index.write_text(index.read_text().replace(subject.name, "StableDiffusionPipeline"))
        for suffix, kind in ((".safetensors", "safetensors"), (".json", "JSON")):
            ours = damaged.probe(subject, with_manifest, suffix, DAMAGED)
            bare = damaged.probe(subject, without, suffix, DAMAGED)
            stock = damaged.probe(subject, without, suffix, STOCK_DAMAGED, load_stock, run_stock)
            report[f"damaged {kind}"] = {
                "with manifest": ours.as_dict(), "without manifest": bare.as_dict(), "stock": stock.as_dict(),
                "faults": ours.faults, "faults without manifest": bare.faults,
            }  # fmt: skip
            for tally, name in ((ours, "with manifest"), (bare, "without manifest")):
                silent = tally.counts[NOT_FINITE] + (tally.counts[damaged.CHANGED] if tally is ours else 0)
                said = f"{tally.counts[RAW]} raw, {silent} silent of {tally.total}"
                if tally is bare:
                    said = f"{tally.counts[RAW]} raw, {silent} NaN, {tally.counts[damaged.CHANGED]} finite changes of {tally.total}"
                anchor = (
                    f"{stock.counts[RAW]} raw, {stock.counts[NOT_FINITE]} NaN, {stock.counts[damaged.CHANGED]} finite "
                    f"changes of {stock.total}"
                )
                # Without digests nobody can tell a finite change, or two settings that no longer fit each other.
                goal, missed = ("0 raw, 0 silent", tally.counts[RAW] + silent) if tally is ours else ("0 NaN", silent)
                rows.append((f"damaged {kind}, {name}", said, anchor, goal, missed == 0))
        refused = bool(damaged.pickle_only(subject, with_manifest))
        rows.append(
            ("pickle-only folder", "refused" if refused else "loaded", "loaded (weights-only)", "refused", refused)
        )
    return rows


def kills(report: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for what in ("pipeline", "training"):
        results = run_probe("kill", what, "--kills", str(KILLS), timeout=1800)
        report[f"kill -9, {what}"] = results
        for name, result in results.items():
            said = f"{result['sound']} of {result['kills']} ({result.get('inside a save', 0)} inside a save)"
            sound = result["sound"] == KILLS and not result["faults"]
            rows.append((f"kill -9, {name}", said, "accelerate: 4 of 14", "20 of 20, bit-equal", sound))
    return rows


def full_disk(report: dict[str, Any]) -> list[Row]:
    results = report["disk full"] = run_probe("disk_full")
    sound = sum(r["error"] == "sentence" and r["as before"] and r["former loads"] for r in results.values())
    return [("disk full", f"{sound} of {len(results)} intact, sentence", "", "all", sound == len(results))]


def pictures(report: dict[str, Any]) -> list[Row]:
    results = report["hostile pictures"] = run_probe("hostile_pictures")
    right = sum(
        r["outcome"] in ("opened", "refused") and r["wanted"] in ("either", r["outcome"]) for r in results.values()
    )
    seconds, megabytes = (max(r[key] for r in results.values()) for key in ("seconds", "megabytes"))
    bomb = results["100 MP PNG"]
    anchor = "a bare Gradio app: 24.7 s, 1.5 GB"
    return [
        ("hostile pictures", f"{right} of {len(results)} right, worst {seconds:.2f} s, {megabytes:.1f} MB", "",
         "<= 0.1 s, <= 20 MB", right == len(results) and seconds <= 0.1 and megabytes <= 20),
        (f"{bomb['kilobytes']:.0f} kB PNG of 100 MP", f"{bomb['seconds'] * 1000:.1f} ms, {bomb['megabytes']:.1f} MB", anchor,
         "<= 0.1 s, <= 20 MB", bomb["seconds"] <= 0.1 and bomb["megabytes"] <= 20),
    ]  # fmt: skip


def growth(report: dict[str, Any]) -> list[Row]:
    results = report["memory"] = run_probe("memory", str(CALLS), timeout=1800)
    return [
        (f"memory, {CALLS} calls, {name}", f"{r['megabytes']:+.2f} MB", "+0.00 MB", "<= 1 MB", r["megabytes"] <= 1)
        for name, r in results.items()
    ]


def determinism(report: dict[str, Any]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        for subject in PIPELINES:
            subject.build().save_pretrained(Path(scratch) / subject.name)
        first, second = (run_probe("determinism", scratch) for _ in range(2))
    equal = sum(first["built"][name] == second["built"][name] == second["reloaded"][name] for name in first["built"])
    report["determinism"] = first["built"]
    said = f"{equal} of {len(first['built'])} bit-equal"
    return [("two processes, and reloaded", said, "bit-equal", "bit-equal", equal == len(first["built"]))]


PROBES: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "fuzz": fuzzed, "wrong": wrong, "damage": damage, "kill": kills, "disk": full_disk, "pictures": pictures,
    "memory": growth, "determinism": determinism,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(PROBES), default=list(PROBES), help="probes to run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    content: dict[str, Any] = {"versions": versions, "probes": {}}
    if args.output.is_file():
        former = json.loads(args.output.read_text(encoding="utf-8"))
        # Probes that are not run now keep their figures, unless those were measured with other versions.
        content = former if former.get("versions") == versions else content
    for name in args.only:
        report: dict[str, Any] = {}
        started = time.perf_counter()
        rows = PROBES[name](report)
        content["probes"][name] = {
            "seconds": round(time.perf_counter() - started, 1),
            "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
            "details": report,
        }
        print(f"{name}: {content['probes'][name]['seconds']} s", file=sys.stderr)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = [row for name in PROBES if name in content["probes"] for row in content["probes"][name]["rows"]]
    table = [COLUMNS[:4], ["---"] * 4, *([row[column] for column in COLUMNS[:4]] for row in shown)]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in table))
    missed = [row["probe"] for row in shown if not row["met"]]
    print(
        f"\n{len(shown) - len(missed)} of {len(shown)} goals met"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
