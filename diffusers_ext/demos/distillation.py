"""The sheet of the distilled model: the same words and the same noise by the teacher, and by its student in four steps and in one."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..hub import FLOW_MODEL_NAME, load_pipeline, native_size, resolve_model
from ..reports import check_output_folder, write_sheet
from ..sheets import Tile, contact_sheet
from ..students import CONFIG_NAME, STUDENT_MODEL_NAME, with_student


STEPS = 20
GUIDANCE_SCALE = 3.0
FEW = (4, 1)
# Triples of object, colour and background that neither was trained on.
PROMPTS = (
    "a blue cat face on an orange background",
    "a red umbrella on an orange dotted background",
    "a green tulip on a blue checkered background",
    "a yellow guitar on a red checkered background",
    "a pink apple on a white striped background",
)


def run_distillation_demo(
    output: str | os.PathLike[str] = "demo",
    *,
    model: str | os.PathLike[str] | None = None,
    student: str | os.PathLike[str] | None = None,
    steps: int = STEPS,
    device: str | torch.device | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:
    """Samples a teacher and its student side by side, and writes a sheet and the figures.

    Args:
        output (`str` or `os.PathLike`, *optional*, defaults to `"demo"`):
            Folder for `distillation.png` and `distillation.json`; it is made if needed.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of the teacher; the demo flow by default.
        student (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of the student's network; that of the demo flow by default.
        steps (`int`, *optional*, defaults to 20):
            Steps of the teacher.
        device (`str` or `torch.device`, *optional*):
            Where to compute.
        prompts (`Sequence[str]`, *optional*):
            A row each.

    Returns:
        `dict`: What `distillation.json` holds: for each column the steps, network evaluations and seconds of a picture.

    Raises:
        ValueError: If `output` is a file.
        OSError: If there is no such model, or the folder cannot be written.
    """
    folder = check_output_folder(output)
    resolved = resolve_model(model, FLOW_MODEL_NAME)
    learned = resolve_model(student, STUDENT_MODEL_NAME, index=CONFIG_NAME)
    teacher = load_pipeline(StableDiffusionPipeline, resolved, device=device)
    few = with_student(teacher, learned)
    size = native_size(teacher)
    # (pipeline, steps, guidance scale, its words above the column)
    columns = [
        (teacher, steps, GUIDANCE_SCALE, f"teacher, {2 * steps} evaluations"),
        (teacher, FEW[0], GUIDANCE_SCALE, f"teacher, {2 * FEW[0]}"),
        *((few, count, 1.0, f"student, {count}") for count in FEW),
    ]
    pictures: list[list[Image.Image]] = []
    reports: list[dict[str, Any]] = []
    for pipe, count, scale, words in columns:
        pipe.set_progress_bar_config(disable=True)
        made, began = [], time.perf_counter()
        for number, prompt in enumerate(prompts):
            result: Any = pipe(
                prompt, num_inference_steps=count, guidance_scale=scale, height=size, width=size,
                generator=torch.Generator().manual_seed(number),
            )  # fmt: skip
            made.append(result.images[0])
        seconds = (time.perf_counter() - began) / max(len(prompts), 1)
        evaluations = count * (2 if scale > 1.0 else 1)
        pictures.append(made)
        reports.append(
            {
                "column": words,
                "steps": count,
                "guidance_scale": scale,
                "network_evaluations_a_picture": evaluations,
                "seconds_a_picture": round(seconds, 3),
            }
        )
    rows = [
        [Tile(column[number], prompt if i == 0 else "") for i, column in enumerate(pictures)]
        for number, prompt in enumerate(prompts)
    ]
    costs = ", ".join(f"{report['seconds_a_picture']:.2f}" for report in reports)
    subtitle = (
        f"{Path(resolved).name} and {Path(learned).name}, {teacher.device.type}; a row has one noise. Seconds a picture, from "
        f"the left: {costs}. Neither was trained on these combinations."
    )
    sheet = contact_sheet(
        rows, title="The same in fewer steps", subtitle=subtitle, columns=[words for *_, words in columns]
    )
    return write_sheet(
        sheet,
        folder / "distillation.png",
        folder / "distillation.json",
        model=resolved,
        student=learned,
        device=str(teacher.device),
        columns=reports,
        seconds=round(sum(report["seconds_a_picture"] for report in reports) * len(prompts), 3),
        network_evaluations=sum(report["network_evaluations_a_picture"] for report in reports) * len(prompts),
    )
