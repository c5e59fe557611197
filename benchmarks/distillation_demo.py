"""Few-step students of the demo models beside their teachers: called by `distillation.py`.

Pictures are made for captions of object, colour and background triples that were never trained on, from the same noise for every row of a
family. Their distance from renderings of other such scenes is Frechet's, in the mean of the judge's last convolution (128 numbers), a
network that was trained on renderings alone; the judge also reads what the pictures show.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ATTRIBUTES, ROOT, load_judge, right, share
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.models import AttributeJudge
from diffusers_ext.students import with_student


PIPELINES = ROOT / "pipelines"
DIFFUSION, FLOW = PIPELINES / "emoji-scenes-64", PIPELINES / "emoji-scenes-flow"
COUNT, REFERENCES, BATCH, SEED = 512, 4_096, 64, 40_000
GUIDANCE = 3.0


@dataclass(frozen=True)
class Row:
    """A sampler of pictures.

    Args:
        name: For the table.
        teacher: Folder of a pipeline.
        steps: Of sampling.
        guidance_scale: Above 1 it makes two passes a step, but for a network that is told it.
        student: Folder of a distilled network, with its scheduler.
        solver: Class of another scheduler, and what its config says besides.
        passes: Of the network in a step.
    """

    name: str
    teacher: Path
    steps: int
    guidance_scale: float = GUIDANCE
    student: Path | None = None
    solver: tuple[type, dict[str, Any]] | None = None
    passes: int = 2

    def pipeline(self) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(self.teacher, dtype=torch.float32)
        if self.student is not None:
            pipe = with_student(pipe, self.student)
        if self.solver is not None:
            family, options = self.solver
            pipe.scheduler = family.from_config(pipe.scheduler.config, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def rows() -> list[Row]:
    second = DPMSolverMultistepScheduler, {"solver_order": 2}
    unipc = UniPCMultistepScheduler, {}
    found = [Row("emoji-scenes-64, its sampler", DIFFUSION, 20)]
    found += [Row("emoji-scenes-64, DPM++ 2M", DIFFUSION, n, solver=second) for n in (2, 4)]
    found += [Row("emoji-scenes-64, UniPC", DIFFUSION, n, solver=unipc) for n in (2, 4)]
    found += [Row("emoji-scenes-agd", DIFFUSION, 20, student=PIPELINES / "emoji-scenes-agd", passes=1)]
    found += [Row("emoji-scenes-flow, Euler", FLOW, n) for n in (1, 2, 4, 20)]
    found += [Row("emoji-scenes-flow, DPM++ 2M", FLOW, n, solver=second) for n in (2, 4)]
    found += [Row("emoji-scenes-flow, UniPC", FLOW, n, solver=unipc) for n in (2, 4)]
    for folder, steps in (("emoji-scenes-reflow", (1, 2, 4)),):
        found += [Row(folder, FLOW, n, 1.0, PIPELINES / folder, passes=1) for n in steps]
    return found


@torch.no_grad()
def features(judge: AttributeJudge, pictures: torch.Tensor) -> torch.Tensor:
    """(n, 128) of pictures (n, 3, 64, 64) in [-1, 1]."""
    return torch.cat([judge.trunk(part).mean((2, 3)) for part in pictures.split(BATCH)])


@torch.no_grad()
def sample(row: Row, captions: list[str]) -> tuple[torch.Tensor, float]:
    """Pictures in [-1, 1] and seconds of the processor."""
    pipe, parts = row.pipeline(), []
    began = time.process_time()
    for first in range(0, len(captions), BATCH):
        made = pipe(
            captions[first : first + BATCH], num_inference_steps=row.steps, guidance_scale=row.guidance_scale,
            generator=torch.Generator().manual_seed(SEED + first), output_type="pt",
        ).images  # fmt: skip
        parts.append(made * 2.0 - 1.0)
    return torch.cat(parts), time.process_time() - began


def run(chosen: list[Row] | None = None, count: int = COUNT) -> dict[str, Any]:
    """Figures of each row."""
    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    judge = load_judge(scenes)
    drawn = scenes.sample(count, SEED, "held_out")
    captions = scenes.captions(drawn)
    reference = []
    for first in range(0, REFERENCES, 512):
        reference.append(features(judge, scenes.render(scenes.sample(512, SEED + 1_000 + first, "held_out"))[0]))
    wanted = torch.cat(reference)

    def figures(pictures: torch.Tensor) -> dict[str, Any]:
        read = right(judge, pictures, drawn)
        spoken = drawn.colour > 0
        return {
            "frechet": round(float(frechet_distance(features(judge, pictures), wanted)), 4),
            **{name: share(read[name][spoken] if name == "colour" else read[name]) for name in ATTRIBUTES},
            "all four": share(torch.stack([read[name] for name in ATTRIBUTES]).all(0)),
        }

    truth = scenes.render(drawn)[0]
    pipe = StableDiffusionPipeline.from_pretrained(DIFFUSION, dtype=torch.float32)
    with torch.no_grad():
        restored = [pipe.vae(part).sample.clamp(-1.0, 1.0) for part in truth.split(BATCH)]
    found: dict[str, Any] = {"renderings": figures(truth), "reconstructions": figures(torch.cat(restored))}
    for row in chosen or rows():
        pictures, seconds = sample(row, captions)
        found[f"{row.name}, {row.steps}"] = {
            **figures(pictures), "evaluations": row.passes * row.steps, "pictures_per_second": round(count / seconds, 2)
        }  # fmt: skip
        print(row.name, row.steps, found[f"{row.name}, {row.steps}"], flush=True)
    settings = {"count": count, "references": REFERENCES, "seed": SEED, "guidance_scale": GUIDANCE}
    return {"settings": settings, "rows": found}
