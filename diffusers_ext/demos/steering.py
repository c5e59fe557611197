"""The steering sheet: scenes that were never trained on, painted, enlarged, sharpened and edited with the demo flow model.

Each row is one call of [`FlowChefPipeline`] with the caption as prompt; beside it stand what the same noise gives without steering, and the
picture that it should have become. Its scenes were chosen for being easy to read; `benchmarks/steering_flow.py` has figures of scenes that
were not.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import FlowChefPipeline
from ..data import DEMO_OBJECTS, EmojiScenes, Scenes
from ..hub import FLOW_MODEL_NAME, load_pipeline, native_size, resolve_model
from ..imaging import to_pil, to_tensor
from ..metrics import psnr
from ..reports import check_output_folder, write_sheet
from ..sheets import PAPER, Tile, contact_sheet
from ..steering import GaussianBlur, SuperResolution
from ..steering_tasks import EDIT_GUIDANCE_SCALE, GUIDANCE_SCALE, task_arguments


STEPS = 30
NOISE_STD = 0.02
FACTOR, BLUR = 4, 2.0
COLUMNS = ("given", "not steered", "steered", "as it should be")


@dataclass(frozen=True)
class Panel:
    """A row of the sheet.

    Args:
        task (`str`): One of `diffusers_ext.steering_tasks.TASKS`.
        words (`str`): What is done, for the sheet.
        seed (`int`): Which scene of the held-out split.
        edit (`tuple[str, str]`, *optional*): A label and its new word, for the task `"edit"`.
    """

    task: str
    words: str
    seed: int
    edit: tuple[str, str] | None = None


PANELS = (
    Panel("inpaint", "a square is missing", 10),
    Panel("upscale", "16 pixels wide", 30),
    Panel("deblur", "a blur of 2 pixels", 8),
    Panel("edit", "its object is exchanged", 17, ("object", "heart")),
)


def run_steering_demo(
    output: str | os.PathLike[str] = "demo",
    *,
    model: str | os.PathLike[str] | None = None,
    steps: int = STEPS,
    device: str | torch.device | None = None,
    panels: Sequence[Panel] = PANELS,
) -> dict[str, Any]:
    """Spoils pictures, steers a flow model to what is left of them, and writes a sheet and the figures.

    Args:
        output (`str` or `os.PathLike`, *optional*, defaults to `"demo"`):
            Folder for `steering.png` and `steering.json`; it is made if needed.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of a flow model in the layout of Stable Diffusion; that of this project by default, which alone knows the
            words of the scenes.
        steps (`int`, *optional*, defaults to 30):
            Steps of sampling.
        device (`str` or `torch.device`, *optional*):
            Where to compute.
        panels (`Sequence[Panel]`, *optional*):
            The rows.

    Returns:
        `dict`: What `steering.json` holds: for each row the PSNR in dB to the true picture, steered and not, and seconds.

    Raises:
        ValueError: If `output` is a file, or a word of a scene is unknown.
        OSError: If there is no such model, or the folder cannot be written.
    """
    folder = check_output_folder(output)
    resolved = resolve_model(model, FLOW_MODEL_NAME)
    pipe = load_pipeline(FlowChefPipeline, resolved, device=device)
    pipe.set_progress_bar_config(disable=True)
    size = native_size(pipe)
    world = EmojiScenes(resolution=size, objects=DEMO_OBJECTS)
    rows, notes = [], []
    reports: list[dict[str, Any]] = []
    for panel in panels:
        source = world.sample(1, panel.seed, "held_out")
        given, arguments, prompt, truth = _problem(world, panel, source, size)
        scale = GUIDANCE_SCALE if panel.edit is None else EDIT_GUIDANCE_SCALE
        settings: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "height": size,
            "width": size,
        }
        began = time.perf_counter()
        pictures = []
        for more in ({}, arguments):
            result: Any = pipe(prompt, **settings, **more, generator=torch.Generator().manual_seed(0))
            pictures.append(result.images[0])
        seconds = time.perf_counter() - began
        values = [round(float(psnr(to_tensor(picture)[None], truth)), 2) for picture in pictures]
        made = [Tile(picture, f"{value:.1f} dB") for picture, value in zip(pictures, values, strict=True)]
        # the pixels of a small picture are to be seen as such
        shown = given.resize((size, size), Image.Resampling.NEAREST)
        last = Tile(to_pil(truth[0]), prompt, compare=world.captions(source)[0])
        rows.append([Tile(shown, panel.words), *made, last])
        evaluations = 2 * steps * len(pictures)
        notes.append(f"{seconds:.1f} s, {evaluations} network evaluations")
        reports.append(
            {
                "task": panel.task,
                "prompt": prompt,
                "psnr_not_steered": values[0],
                "psnr_steered": values[1],
                "seconds": round(seconds, 3),
                "network_evaluations": evaluations,
            }
        )
    subtitle = (
        f"FlowChef, {Path(resolved).name}, {steps} steps on {pipe.device.type}; the prompt is the line under the last picture. "
        "PSNR to that picture. The model was not trained on any of the scenes."
    )
    sheet = contact_sheet(rows, title="A flow steered to pictures", subtitle=subtitle, columns=COLUMNS, notes=notes)
    return write_sheet(
        sheet,
        folder / "steering.png",
        folder / "steering.json",
        model=resolved,
        steps=steps,
        device=str(pipe.device),
        pictures=reports,
        seconds=round(sum(row["seconds"] for row in reports), 3),
        network_evaluations=sum(row["network_evaluations"] for row in reports),
    )


def _problem(
    world: EmojiScenes, panel: Panel, source: Scenes, size: int
) -> tuple[Image.Image, dict[str, Any], str, torch.Tensor]:
    """What is shown as given, the arguments of a call, its prompt, and the true picture (1, 3, size, size)."""
    (clean, inside), (prompt,) = world.render(source), world.captions(source)
    picture = to_pil(clean[0])
    if panel.task == "inpaint":
        mask = Image.new("L", (size, size), 0)
        mask.paste(255, (size // 4, size // 4, size - size // 4, size - size // 4))
        given = picture.copy()
        given.paste(PAPER, mask=mask)
        return given, task_arguments("inpaint", given, size, mask=mask), prompt, clean
    if panel.edit is not None:
        target = _edited(world, source, *panel.edit)
        truth, also_inside = world.render(target)
        union = torch.maximum(inside, also_inside)[0, 0] > 0
        mask = Image.fromarray(union.byte().numpy() * np.uint8(255))
        arguments = task_arguments("edit", picture, size, mask=mask, source=prompt)
        return picture, arguments, world.captions(target)[0], truth
    if panel.task == "upscale":
        given = to_pil(SuperResolution(FACTOR).A(clean)[0])
        return given, task_arguments("upscale", given, size, factor=FACTOR, noise_std=NOISE_STD), prompt, clean
    given = to_pil(GaussianBlur(2 * round(3 * BLUR) + 1, BLUR).A(clean)[0])
    return given, task_arguments("deblur", given, size, blur=BLUR, noise_std=NOISE_STD), prompt, clean


def _edited(world: EmojiScenes, source: Scenes, label: str, word: str) -> Scenes:
    return source.replace(**{label: torch.tensor([world.number(label, word)])})
