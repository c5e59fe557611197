"""Edits with a known ground truth: the editing methods of this package against their peers, on the same model.

    python benchmarks/editing.py       # measures; writes results/editing.json, and tables and pictures into docs/
    python benchmarks/editing.py --folder my_pictures --model stable-diffusion-v1-5/stable-diffusion-v1-5

Every method gets the same pictures, captions, steps and weights, in one process. Settings are in
`editing_methods.py` and `word_methods.py`, measures in `editing_measures.py`, and both are explained in
docs/editing_benchmark.md. A run
that is stopped goes on where it was: what is measured lies in --cache, and is measured again where model, pictures or
settings are others.

The second form edits pictures of one's own and writes the measures that need no truth; see `editing_folder.py`.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import ATTRIBUTES, JUDGE, MODEL, load_judge, peak_memory, share, timed, write_result
from editing_folder import edit_folder
from editing_measures import (
    Judge,
    Labels,
    Task,
    against_source,
    against_truth,
    hearts,
    labels_of,
    outside_only,
    places,
    summary_of,
    verdict,
)
from editing_methods import SETTINGS, Setting
from editing_report import SHOWN, write_report
from editors import GUIDANCE_SCALE, Batch, Editors
from second_judge import SecondJudge, feature_distance

from diffusers_ext.atomic import atomic_write
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.data.sprites import SHEETS, SpriteSheet


KINDS = ("colour", "background", "pattern", "object")
TASKS = tuple(f"noto {kind}" for kind in KINDS) + ("noto hearts",) + tuple(f"fxemoji {kind}" for kind in KINDS)
SWEPT = tuple(f"noto {kind}" for kind in KINDS)
# What the model has no words for. Numbers on it would measure the model's vocabulary, not the methods.
NOT_MEASURABLE = {
    "style, vendor": "the model was trained on Noto's drawings alone and knows no word for a style",
    "expression": "one face is among its 24 objects, so there is no other to ask for",
    "skin tone, hair, clock": "not among its words",
    "hearts in brown, black, white": "colours that it has no word for; the other hearts are measured",
}


def common_scenes() -> EmojiScenes:
    return EmojiScenes(objects=DEMO_OBJECTS)


def hand_scenes(hand: str) -> EmojiScenes:
    drawn = SpriteSheet.load(SHEETS / f"{hand}.json").objects()
    return EmojiScenes(hand, objects=[word for word in DEMO_OBJECTS if word in drawn])


def make_task(name: str, count: int, seed: int) -> Task:
    hand, kind = name.split()
    common = common_scenes()
    if kind == "hearts":
        return hearts(count, seed, hand, common)
    own = hand_scenes(hand)
    pairs = own.edit_pairs(kind, count, seed)
    return Task(hand, kind, pairs, labels_of(pairs.target_scenes, own, common))


class Bench:
    """Measures settings on tasks and remembers what it measured.

    Args:
        options: Those of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.common = common_scenes()
        self.judge = load_judge(self.common, options.judge)
        self.second = self._second_judge(options.cache / f"second_judge_{options.judge_count}.pt")
        self.editors = Editors(options.model, options.steps)
        model = b"".join(sorted(path.read_bytes() for path in Path(options.model).rglob("*.safetensors")))
        self.facts = {
            "model": hashlib.sha256(model).hexdigest()[:16],
            **{name: getattr(options, name) for name in ("count", "seed", "steps")},
        }
        self._tasks: dict[tuple[str, int | None], tuple[Task, list[Batch]]] = {}

    def _second_judge(self, path: Path) -> SecondJudge:
        if path.is_file():
            return SecondJudge.load(path)
        hands = [(own, places(own, self.common)) for own in (hand_scenes("noto"), hand_scenes("fxemoji"))]
        judge = SecondJudge.fit(hands, self.options.judge_count)
        judge.save(path)
        return judge

    def file(self, *parts: str) -> Path:
        name = "-".join(parts).replace(" ", "_").replace(",", "").replace("+", "p")
        return self.options.cache / f"{name}.json"

    def remembered(self, path: Path) -> Any:
        if path.is_file():
            found = json.loads(path.read_text())
            if found["facts"] == self.facts:
                return found["values"]
        return None

    def remember(self, path: Path, values: Any) -> None:
        atomic_write(path, json.dumps({"facts": self.facts, "values": values}).encode())

    def batches(self, name: str, pairs: int | None = None) -> tuple[Task, list[Batch]]:
        """The pairs of a task, or its first ones, kept while the task is the same, so that they are inverted once."""
        if name not in {kept for kept, _ in self._tasks}:
            self._tasks = {(name, None): self._batched(make_task(name, self.options.count, self.options.seed))}
        if (name, pairs) not in self._tasks:
            self._tasks[name, pairs] = self._batched(self._tasks[name, None][0].first(pairs))
        return self._tasks[name, pairs]

    def _batched(self, task: Task) -> tuple[Task, list[Batch]]:
        pairs, made = task.pairs, []
        for first in range(0, len(pairs.source), self.options.batch):
            rows = slice(first, first + self.options.batch)
            seeds = list(range(len(pairs.source)))[rows]
            made.append(
                Batch(
                    pairs.source[rows],
                    pairs.source_prompts[rows],
                    pairs.target_prompts[rows],
                    seeds,
                    pairs.target[rows],
                )
            )
        return task, made

    @torch.no_grad()
    def measure(self, name: str, setting: Setting) -> dict[str, list[Any]]:
        """Per-picture measures of a setting on a task."""
        path = self.file(name, setting.name)
        found = self.remembered(path)
        if found is not None:
            return found
        task, batches = self.batches(name, setting.pairs)
        pairs = task.pairs
        edited = torch.cat([setting.run(self.editors, batch) for batch in batches])
        features, truth = self.second.features(edited), self.second.features(pairs.target)
        bare = self.second.features(outside_only(edited, pairs.source, pairs.mask))
        judges = {"judge": self.judge.read(edited), "second": self.second.read_features(features)}
        records: dict[str, list[Any]] = {
            **against_source(edited, pairs.source, pairs.mask),
            "features_outside": feature_distance(bare, self.second.features(pairs.source)).tolist(),
            **against_truth(edited, pairs.target),
            "features": feature_distance(features, truth).tolist(),
        }
        for judge, read in judges.items():
            for what, flags in verdict(read, task.wanted, task.changes, self.common).items():
                records[f"{what}_{judge}"] = flags
        torch.save((edited[:SHOWN].clamp(-1, 1) * 127.5 + 127.5).round().byte(), path.with_suffix(".pt"))
        self.remember(path, records)
        return records

    @torch.no_grad()
    def cost(self, setting: Setting) -> dict[str, float | None]:
        """What one picture alone costs: passes, seconds, memory. The smallest of three calls, after one to warm up."""
        path = self.file("cost", setting.name)
        found = self.remembered(path)
        if found is not None:
            return found
        pairs = make_task("noto colour", 1, self.options.seed).pairs

        def call() -> None:
            setting.run(
                self.editors, Batch(pairs.source, pairs.source_prompts, pairs.target_prompts, [0], pairs.target)
            )

        call()
        self.editors.forward_passes = self.editors.backward_passes = 0
        seconds = timed(call)
        passes = {"forward": self.editors.forward_passes, "backward": self.editors.backward_passes}
        seconds = min(seconds, timed(call), timed(call))
        values = {**passes, "seconds": round(seconds, 3), "peak_megabytes": peak_memory(call)}
        self.remember(path, values)
        return values

    def accuracy(self) -> dict[str, dict[str, dict[str, float]]]:
        """How often each judge reads ground-truth renderings of triples that neither was fitted to."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        judges: dict[str, Judge] = {"judge": self.judge, "second": self.second}
        for hand in ("noto", "fxemoji"):
            own = hand_scenes(hand)
            drawn = own.sample(500, self.options.seed + 1, "held_out")
            images, _ = own.render(drawn)
            wanted = labels_of(drawn, own, self.common)
            out[hand] = {name: self._accuracy(judge.read(images), wanted) for name, judge in judges.items()}
        return out

    def _accuracy(self, read: Labels, wanted: Labels) -> dict[str, float]:
        rows = {name: verdict(read, wanted, name, self.common)["reached"] for name in ATTRIBUTES}
        rows["all"] = verdict(read, wanted, "object", self.common)["success"]
        return {name: share(torch.tensor(flags)) for name, flags in rows.items()}


def chosen(sweep: bool, tasks: list[str]) -> list[tuple[str, Setting]]:
    """Main settings of every task first, then the others, kind by kind, so that a run that is stopped has the
    table."""
    plan = [(task, setting) for task in tasks for setting in SETTINGS if setting.main]
    if sweep:
        plan += [(task, setting) for task in tasks if task in SWEPT for setting in SETTINGS if not setting.main]
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="folder or, with --folder, Hub id")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="'HAND KIND'")
    parser.add_argument("--count", type=int, default=100, help="pairs of each task")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="only the main setting of each method")
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--judge-count", type=int, default=2500, help="renderings of each hand for the second judge")
    parser.add_argument("--cache", type=Path, default=Path("runs/editing"), help="what was measured, to go on from")
    parser.add_argument("--report", action="store_true", help="write the report from the cache without measuring")
    parser.add_argument("--folder", type=Path, help="edit these pictures (metadata.jsonl) instead")
    parser.add_argument("--output", type=Path, default=Path("runs/editing-folder"), help="where --folder writes")
    options = parser.parse_args()
    # LEDITS++ compares pictures with the autoencoder's nominal size, which is that of the crops it was trained on.
    diffusers.utils.logging.set_verbosity_error()
    if options.folder:
        edit_folder(options.folder, options.model, options.output, options.steps)
        return

    options.cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    measured: dict[str, dict[str, Any]] = {}
    for task, setting in chosen(options.sweep, options.tasks):
        if options.report and bench.remembered(bench.file(task, setting.name)) is None:
            continue
        records = bench.measure(task, setting)
        measured.setdefault(task, {})[setting.name] = records
        row = summary_of(records)
        print(
            f"{task:20s} {setting.name:40s} "
            f"success {row['success_judge']['mean']:.2f} / {row['success_second']['mean']:.2f}  "
            f"outside {row['psnr_outside']['mean']:5.2f} dB  truth {row['psnr']['mean']:5.2f} dB",
            flush=True,
        )
    measured_at_all = {name for rows in measured.values() for name in rows}
    costs = {
        setting.name: bench.cost(setting)
        for setting in SETTINGS
        if setting.name in measured_at_all
        and not (options.report and bench.remembered(bench.file("cost", setting.name)) is None)
    }
    result = {
        "settings": {**bench.facts, "guidance_scale": GUIDANCE_SCALE, "model": Path(options.model).name},
        "not_measurable": NOT_MEASURABLE,
        "judges": bench.accuracy(),
        "costs": costs,
        "tasks": {
            task: {name: summary_of(records) for name, records in rows.items()} for task, rows in measured.items()
        },
    }
    write_report(result, measured, {task: bench.batches(task)[0] for task in measured}, bench.file)
    write_result("editing", result)


if __name__ == "__main__":
    main()
