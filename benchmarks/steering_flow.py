"""Restoration of scenes that the demo flow model has never seen: `python benchmarks/steering_flow.py`.

Four tasks with the captions as prompts, 30 steps with guidance for every method, 60 evaluations of the network. Settings were fixed on
scenes of the training split (`--tune`), before a held-out one was drawn. Writes `benchmarks/results/steering_flow.json`, its table in
`docs/flowchef.md` and `docs/images/steering_flow.png`. About three quarters of an hour on one core.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import ATTRIBUTES, ROOT, load_judge, read_result, right, share, summary, timed, write_result
from page import table, write_between
from PIL import Image
from torch.nn.functional import interpolate

from diffusers_ext import FLAIRScheduler, FlowChefPipeline
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.imaging import to_pil
from diffusers_ext.metrics import psnr, ssim
from diffusers_ext.sheets import Tile, contact_sheet
from diffusers_ext.steering import GaussianBlur, LinearOperator, SuperResolution, official_settings


MODEL = ROOT / "pipelines" / "emoji-scenes-flow"
PAGE, SHEET = ROOT / "docs" / "flowchef.md", ROOT / "docs" / "images" / "steering_flow.png"
BEGIN, END = "<!-- flow: begin -->", "<!-- flow: end -->"
SIDE, STEPS, GUIDANCE_SCALE, NOISE_STD = 64, 30, 3.0, 0.05
# the authors' learning rate is for 100 steps, here there are 30
AUTHORS_RESTORE = {**official_settings("instaflow_restore").scheduler, "learning_rate": 0.06}
AUTHORS_INPAINT = official_settings("instaflow_inpaint").scheduler


@dataclass(frozen=True)
class Task:
    """A way to spoil pictures.

    Attributes:
        name (`str`): As in the table.
        hole (`torch.Tensor` of shape `(1, 1, SIDE, SIDE)`, *optional*): 1 where pixels are missing, for an inpainting.
        operator ([`LinearOperator`], *optional*): Otherwise.
        plain (`str`): What is done without a model.
        repair (`Callable`): Does it.
    """

    name: str
    plain: str
    repair: Callable[[torch.Tensor], torch.Tensor]
    hole: torch.Tensor | None = None
    operator: LinearOperator | None = None

    def spoil(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What is left of pictures (n, 3, SIDE, SIDE) in [-1, 1]."""
        if self.hole is not None:
            return pictures * (1 - self.hole)
        measured = self.operator.A(pictures)
        return measured + NOISE_STD * torch.randn(measured.shape, generator=generator)

    def arguments(self, measured: torch.Tensor) -> dict[str, Any]:
        """Of the pipeline. What the encoder sees in a hole it spreads beyond it, so that nothing of the picture may be there."""
        if self.hole is not None:
            return {"image": self.repair(measured), "mask_image": self.hole * 2 - 1}
        return {"measurement": measured, "operator": self.operator, "noise_std": NOISE_STD}


def _hole(top: int, bottom: int, left: int, end: int) -> torch.Tensor:
    hole = torch.zeros(1, 1, SIDE, SIDE)
    hole[..., top:bottom, left:end] = 1
    return hole


def _filled(hole: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """With the mean colour of what is known."""

    def fill(measured: torch.Tensor) -> torch.Tensor:
        mean = measured.sum((2, 3), keepdim=True) / (1 - hole).sum()
        return measured * (1 - hole) + mean * hole

    return fill


def _inpainting(name: str, hole: torch.Tensor) -> Task:
    return Task(name, "mean colour", _filled(hole), hole=hole)


def _enlarged(measured: torch.Tensor) -> torch.Tensor:
    return interpolate(measured, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)


TASKS = (
    _inpainting("inpainting, centre", _hole(16, 48, 16, 48)),
    _inpainting("inpainting, half", _hole(0, 64, 32, 64)),
    Task("super-resolution x4", "bicubic", _enlarged, operator=SuperResolution(4)),
    Task("deblurring", "as it is", lambda measured: measured, operator=GaussianBlur(13, 2.0)),
)
# a flow's error at each level; it was of use where the decoder is in between, on scenes of the training split
CALIBRATED = {
    "velocity_errors": FLAIRScheduler.load_config(ROOT / "schedulers" / "flair-emoji-scenes")["velocity_errors"]
}
# what a row is called -> settings for inpainting, and for restoration through the decoder
METHODS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FlowChef, the authors' settings": (AUTHORS_INPAINT, AUTHORS_RESTORE),
    "**FlowChef**, default": ({}, {}),
    "FLAIR": ({"solver": "flair"}, {"solver": "flair", "data_steps": 3, **CALIBRATED}),
}


@dataclass(frozen=True)
class Scenery:
    """Pictures (n, 3, SIDE, SIDE) in [-1, 1], their labels and their captions."""

    pictures: torch.Tensor
    labels: Any
    captions: list[str]


def scenery(count: int, seed: int, split: str) -> Scenery:
    world = EmojiScenes(resolution=SIDE, objects=DEMO_OBJECTS)
    labels = world.sample(count, seed, split)
    return Scenery(world.render(labels)[0], labels, world.captions(labels))


def sample(
    pipe: FlowChefPipeline, scenes: Scenery, batch: int, arguments: Mapping[str, torch.Tensor | Any]
) -> torch.Tensor:
    """A picture for each caption, in calls of `batch`; those of a batch have noise of their own, the same for every method."""
    found = []
    for first in range(0, len(scenes.captions), batch):
        rows = slice(first, first + batch)
        count = len(scenes.captions)
        part = {
            name: value[rows] if isinstance(value, torch.Tensor) and len(value) == count else value
            for name, value in arguments.items()
        }
        result: Any = pipe(
            scenes.captions[rows], num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, output_type="pt",
            generator=torch.Generator().manual_seed(first), **part,
        )  # fmt: skip
        found.append(result.images * 2 - 1)
    return torch.cat(found)


def measures(
    found: torch.Tensor, scenes: Scenery, judge: Any, plain: torch.Tensor, hole: torch.Tensor | None
) -> dict[str, Any]:
    """Figures of restored pictures; failed is what is further from the picture than the plain repair."""
    truth = scenes.pictures
    read = right(judge, found, scenes.labels)
    result = {
        "psnr": summary(psnr(found, truth)), "ssim": summary(ssim(found, truth)),
        "failed": share(psnr(found, truth) < psnr(plain, truth)),
        "labels_right": share(torch.stack([read[name] for name in ATTRIBUTES]).all(0)),
    }  # fmt: skip
    if hole is not None:
        result["psnr_hole"] = summary(psnr(found, truth, hole.expand(len(truth), -1, -1, -1)))
    return result


def measure(
    count: int, seed: int, split: str, batch: int
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Figures of every task and method, and the pictures."""
    pipe = FlowChefPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(EmojiScenes(objects=DEMO_OBJECTS))
    scenes = scenery(count, seed, split)
    truth = scenes.pictures
    free = sample(pipe, scenes, batch, {})
    with torch.no_grad():
        codes = torch.cat([pipe.vae.encode(part).latent_dist.mode() for part in truth.split(batch)])
        coded = torch.cat([pipe.vae.decode(part).sample for part in codes.split(batch)]).clamp(-1, 1)
    figures: dict[str, Any] = {}
    shown: dict[str, dict[str, torch.Tensor]] = {}
    for task in TASKS:
        measured = task.spoil(truth, torch.Generator().manual_seed(seed))
        plain = task.repair(measured)
        shown[task.name] = {"truth": truth, f"without a model ({task.plain})": plain, "not steered": free}
        seconds: dict[str, float] = {}
        for name, settings in METHODS.items():
            arguments = task.arguments(measured) | {"steering_kwargs": settings[task.operator is not None]}

            def call(name: str = name, arguments: dict[str, Any] = arguments) -> None:
                shown[task.name][name] = sample(pipe, scenes, batch, arguments)

            seconds[name] = round(timed(call) / count, 2)
        everything = {**shown[task.name], "autoencoder of the picture itself": coded}
        del everything["truth"]
        figures[task.name] = {
            name: {**measures(found, scenes, judge, plain, task.hole), "seconds": seconds.get(name)}
            for name, found in everything.items()
        }
        for name, row in figures[task.name].items():
            print(f"{task.name:22s} {name:36s} {cell(row)}", seconds.get(name, ""), flush=True)
    return figures, shown


def cell(row: Mapping[str, Any]) -> str:
    return (
        f"{row['psnr']['mean']:.1f} ({row['psnr']['median']:.1f}) / {row['ssim']['mean']:.2f} ({row['ssim']['median']:.2f}) / "
        f"{100 * row['failed']:.0f} %"
    )


def draw(shown: Mapping[str, Mapping[str, torch.Tensor]], rows: int = 2) -> Image.Image:
    """The first pictures of the set, whatever they came out as."""
    tiles = []
    for name, methods in shown.items():
        truth = methods["truth"]
        for row in range(rows):
            line = [Tile(to_pil(truth[row]), name)]
            for found in list(methods.values())[1:]:
                line.append(
                    Tile(to_pil(found[row]), f"{float(psnr(found[row : row + 1], truth[row : row + 1])):.1f} dB")
                )
            tiles.append(line)
    columns = ["picture", "without a model", "not steered", "FlowChef, authors", "FlowChef, default", "FLAIR"]
    return contact_sheet(tiles, title="Held-out scenes", columns=columns, tile=112)


def write_page() -> None:
    figures = read_result("steering_flow")["tasks"]
    names = list(dict.fromkeys(_row(name) for rows in figures.values() for name in rows))
    lines = [
        [name, *(next(cell(row) for found, row in rows.items() if _row(found) == name) for rows in figures.values())]
        for name in names
    ]
    write_between(PAGE, BEGIN, END, table(["", *figures], lines))


def _row(name: str) -> str:
    return name.partition(" (")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="scenes of the training split; nothing is written")
    parser.add_argument("--page-only", action="store_true", help="write the page from the figures of the last run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page_only:
        split = "train" if options.tune else "held_out"
        figures, shown = measure(options.count, options.seed, split, options.batch)
        if options.tune:
            return
        settings = {
            "count": options.count,
            "seed": options.seed,
            "batch": options.batch,
            "split": split,
            "steps": STEPS,
        }
        settings |= {"guidance_scale": GUIDANCE_SCALE, "noise_std": NOISE_STD, "model": MODEL.name}
        write_result("steering_flow", {"settings": settings, "tasks": figures})
        draw(shown).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(SHEET, optimize=True)
    write_page()


if __name__ == "__main__":
    main()
