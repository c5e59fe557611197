"""PIE-Bench: 700 edits of real pictures, with the measures of its authors, for the methods of this package on any weights.

    python benchmarks/pie_bench.py --data PIE-Bench_v1 --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --methods ddim+p2p null-text+p2p direct+p2p guide-and-rescale \\
        --dino facebook/dino-vitb8 --clip openai/clip-vit-large-patch14 --output pie_bench

`--data` is a folder in the layout of the data set, see `pie_data.py`; methods are in `pie_methods.py`, measures in
`pie_measures.py`. Each result goes to `OUTPUT/METHOD/KEY.png`, with what it measures in a JSON beside it, so a run that was stopped
goes on where it was: pictures are made again where model, steps or the entry are others, and measured again where the measures
are. Last, `OUTPUT/results.json` and `OUTPUT/results.md` have the means of every type of edits and of all.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from editing_measures import mean_and_error
from page import table
from pie_data import EDITING_TYPES, Entry, read_entries
from pie_measures import MEASURES, Measures
from pie_methods import METHODS, Editors, Method

from diffusers_ext.atomic import atomic_write
from diffusers_ext.hub import resolve_device, resolve_model
from diffusers_ext.imaging import open_image
from diffusers_ext.reports import save_image, versions, write_json


ALL = "all"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Run:
    """Edits and measures entries, each once.

    Args:
        editors: The methods.
        measures: The measures.
        output: Folder of the results.
        about: What results depend on besides method and entry: the model, steps and the like.
        judges: What measures depend on: the networks.
    """

    def __init__(
        self, editors: Editors, measures: Measures, output: Path, about: dict[str, Any], judges: dict[str, Any]
    ) -> None:
        self.editors, self.measures, self.output = editors, measures, output
        self.about, self.judges = about, judges

    def record(self, method: Method, entry: Entry) -> dict[str, Any]:
        """What one method makes of one entry: from the disk where it is there and fits, else made now."""
        picture = open_image(entry.path)
        mask = entry.mask(*picture.size)
        folder = self.output / method.name
        image_path, path = folder / f"{entry.key}.png", folder / f"{entry.key}.json"
        made_of = {
            **self.about,
            "method": asdict(method),
            "source_prompt": entry.source_prompt,
            "prompt": entry.prompt,
            "blended_words": entry.blended_words and list(entry.blended_words),
            "picture": hashlib.sha256(entry.path.read_bytes()).hexdigest()[:16],
        }
        judged_by = {**self.judges, "mask": hashlib.sha256(mask.tobytes()).hexdigest()[:16]}
        record = _read(path)
        if record.get("made_of") != made_of or not image_path.is_file():
            record = {"key": entry.key, "editing_type": entry.editing_type, "made_of": made_of}
            try:
                edited = self.editors(method, entry, picture)
            except ValueError as error:
                # One picture that an optimisation cannot do is no reason to lose the others; the next run tries again.
                return {**record, "failed": str(error)}
            save_image(edited.image, image_path)
            record |= {
                "forward_passes": edited.forward_passes,
                "backward_passes": edited.backward_passes,
                "seconds": round(edited.seconds, 2),
                "blended": edited.blended,
            }
        elif record.get("judged_by") == judged_by:
            return record
        found = self.measures(picture, open_image(image_path), mask, entry.prompt)
        record["judged_by"] = judged_by
        record["measures"] = {name: value if math.isfinite(value) else None for name, value in found.items()}
        write_json(record, path)
        return record


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def summary(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means and standard errors of finished records, in the units of the table."""
    found: dict[str, Any] = {"pictures": len(records)}
    for name in names:
        scale = MEASURES[name][1]
        values = [record["measures"][name] * scale for record in records if record["measures"][name] is not None]
        mean, error = mean_and_error(values)
        found[name] = {"mean": _finite(mean), "error": _finite(error), "pictures": len(values)}
    for name in ("forward_passes", "backward_passes", "seconds"):
        found[name] = _finite(mean_and_error([record[name] for record in records])[0])
    return found


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def summaries(records: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Type of edits, or "all" -> method -> summary; types without a picture are left out."""
    kinds = [
        kind for kind in EDITING_TYPES if any(r["editing_type"] == kind for rows in records.values() for r in rows)
    ]
    return {
        kind: {
            method: summary([r for r in rows if "failed" not in r and kind in (ALL, r["editing_type"])], names)
            for method, rows in records.items()
        }
        for kind in [ALL, *kinds]
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables: all edits first, then each type."""
    settings, names = result["settings"], result["measures"]
    parts = [
        "# PIE-Bench",
        f"`{settings['model']}`, {settings['steps']} steps, {settings['dtype']}. Means, with standard errors over pictures.",
    ]
    parts += [f"Left out: {MEASURES[name][0]}, since {why}." for name, why in result["left_out"].items()]
    for kind, methods in result["tables"].items():
        parts.append("## All edits" if kind == ALL else f"## {kind}. {EDITING_TYPES[kind]}")
        arrows = [f"{MEASURES[name][0]} {'↑' if MEASURES[name][2] else '↓'}" for name in names]
        header = ["method", "pictures", *arrows, "passes forward / backward", "seconds"]
        rows = []
        for method, row in methods.items():
            cells = [_cell(row[name]) for name in names]
            passes = f"{_number(row['forward_passes'], 0)} / {_number(row['backward_passes'], 0)}"
            rows.append([method, row["pictures"], *cells, passes, _number(row["seconds"], 1)])
        parts.append(table(header, rows))
    if result["failed"]:
        parts.append("## Failed")
        parts.append("\n".join(f"* {row['method']}, {row['key']}: {row['why']}" for row in result["failed"]))
    unused = result["words_not_in_prompts"]
    if unused:
        parts.append(f"Without local blend, since the word of the change is not in its prompt: {', '.join(unused)}.")
    return "\n\n".join(parts) + "\n"


def _cell(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.2f}" + (f" ± {value['error']:.2f}" if value["error"] is not None else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with mapping_file.json and annotation_images/"
    )
    parser.add_argument(
        "--model", help="folder or Hub id of a Stable Diffusion 1.x or 2.x model; default the demo model"
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["ddim+p2p", "direct+p2p"])
    parser.add_argument("--categories", nargs="+", help="types of edits by number or name; default all")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each type")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dino", help="folder or Hub id of a ViT, facebook/dino-vitb8 for published figures")
    parser.add_argument(
        "--clip", help="folder or Hub id of a CLIP, openai/clip-vit-large-patch14 for published figures"
    )
    parser.add_argument("--device", help="default a GPU if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights")
    parser.add_argument("--output", type=Path, default=Path("pie_bench"))
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit={options.limit} leaves no picture; use 1 or more")
    if options.steps < 1:
        parser.error(f"--steps={options.steps} are none; use 1 or more")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Edits, measures, writes; returns what goes to `results.json`.

    Raises:
        ValueError: If an entry, a picture or a mask cannot be used, or a model is of another family.
        OSError: If the folder is not one of PIE-Bench, a model is not there, or the results cannot be written.
    """
    entries = read_entries(options.data, options.categories, options.limit)
    device = str(resolve_device(options.device))
    measures = Measures(options.dino, options.clip, device)
    editors = Editors(options.model, options.steps, device, DTYPES[options.dtype])
    model = options.model or Path(resolve_model()).name
    settings = {"model": model, "steps": options.steps, "dtype": options.dtype}
    judges = {"measures": measures.names, "dino": options.dino, "clip": options.clip}
    work = Run(editors, measures, options.output, settings, judges)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for number, entry in enumerate(entries, 1):
        for name in options.methods:
            record = work.record(METHODS[name], entry)
            records[name].append(record)
            shown = record.get("failed") or ", ".join(
                f"{measure} {value * MEASURES[measure][1]:.2f}"
                for measure, value in record["measures"].items()
                if value is not None
            )
            print(f"{number}/{len(entries)} {entry.key} {name}: {shown}", flush=True)
    blended = {
        name for name in options.methods if METHODS[name].prompt_to_prompt == "blended" and METHODS[name].inversion
    }
    result = {
        "settings": {**settings, **judges, "data": options.data.name, "limit": options.limit},
        "versions": versions(),
        "measures": measures.names,
        "left_out": measures.left_out,
        "tables": summaries(records, measures.names),
        "failed": [
            {"method": name, "key": record["key"], "why": record["failed"]}
            for name, rows in records.items()
            for record in rows
            if "failed" in record
        ],
        "words_not_in_prompts": sorted(
            {
                record["key"]
                for name in blended
                for record in records[name]
                if "failed" not in record and record["made_of"]["blended_words"] and not record["blended"]
            }
        ),
    }
    write_json(result, options.output / "results.json")
    atomic_write(options.output / "results.md", markdown(result).encode())
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = run(options)
    except (ValueError, OSError) as error:
        print(f"pie_bench: {error}", file=sys.stderr)
        return 2
    print(markdown(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
