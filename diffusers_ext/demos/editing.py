"""The demo sheet: pictures whose true edits are known, edited by words with the demo model.

The scenes are drawn here, not loaded, so that the sheet needs no file but the model and each edit can be compared with the
picture that it should have become.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import GuideAndRescalePipeline
from ..data import DEMO_OBJECTS, EmojiScenes, Scenes
from ..hub import load_pipeline, native_size, resolve_model
from ..imaging import to_pil, to_tensor
from ..metrics import psnr
from ..reports import check_output_folder, save_image, write_sheet
from ..sheets import Tile, contact_sheet


COLUMNS = ("source", "reconstruction", "edit 1", "edit 2", "edit 3")


@dataclass(frozen=True)
class DemoScene:
    """A picture in words, and three edits, each a change of one label.

    Args:
        labels (`dict[str, str]`): Word for each of object, colour, background and pattern.
        edits (`tuple`): Pairs of a label's name and its new word.
        seed (`int`): Decides what the words do not say: position, size, angle, shade.
    """

    labels: dict[str, str]
    edits: tuple[tuple[str, str], ...]
    seed: int


def _scene(picture: str, edits: str, seed: int) -> DemoScene:
    object_, colour, background, pattern = (word.strip() for word in picture.split(","))
    labels = {"object": object_, "colour": colour, "background": background, "pattern": pattern}
    pairs = [edit.split(":") for edit in edits.split(",")]
    return DemoScene(labels, tuple((name.strip(), word.strip()) for name, word in pairs), seed)


SCENES = (
    _scene("star, yellow, blue, plain", "colour: red, background: green, pattern: dotted", seed=1),
    _scene("heart, purple, yellow, striped", "colour: green, background: teal, object: apple", seed=2),
    _scene("car, blue, white, plain", "colour: orange, background: pink, pattern: checkered", seed=3),
    _scene("tulip, native, teal, dotted", "colour: blue, background: orange, pattern: plain", seed=4),
    _scene("house, native, purple, plain", "background: yellow, pattern: striped, object: mushroom", seed=5),
)


def run_demo(
    output: str | os.PathLike[str] = "demo",
    *,
    model: str | os.PathLike[str] | None = None,
    steps: int = 40,
    device: str | torch.device | None = None,
    scenes: Sequence[DemoScene] = SCENES,
) -> dict[str, Any]:
    """Draws the scenes, edits them, and writes a sheet of all, a sheet of each, and the figures.

    Args:
        output (`str` or `os.PathLike`, *optional*, defaults to `"demo"`):
            Folder for `sheet.png`, one PNG a scene, and `demo.json`; it is made if needed.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of a model; the demo model by default. Only that one knows the words of the scenes.
        steps (`int`, *optional*, defaults to 40):
            Steps of inversion and of sampling.
        device (`str` or `torch.device`, *optional*):
            Where to compute.
        scenes (`Sequence[DemoScene]`, *optional*):
            What to draw and edit.

    Returns:
        `dict`: What `demo.json` holds: settings, seconds and network evaluations, and for each edit its PSNR in dB to the
        true edited picture, beside that of the unedited one.

    Raises:
        ValueError: If `output` is a file, or a word of a scene is unknown.
        OSError: If there is no such model, or the folder cannot be written.
    """
    folder = check_output_folder(output)
    resolved = resolve_model(model)
    pipe = load_pipeline(GuideAndRescalePipeline, resolved, device=device)
    pipe.set_progress_bar_config(disable=True)
    world = EmojiScenes(resolution=native_size(pipe), objects=DEMO_OBJECTS)
    begin = time.perf_counter()
    rows, notes, reports = [], [], []
    for number, scene in enumerate(tqdm(scenes, desc="demo scenes", disable=None), start=1):
        row, report = _edit_scene(pipe, world, scene, steps)
        note = f"{report['seconds']:.1f} s, {report['network_evaluations']} network evaluations"
        report["file"] = f"{number:02d}-{scene.labels['object'].replace(' ', '-')}.png"
        title = f"{scene.labels['object'].capitalize()}, edited by words"
        save_image(contact_sheet([row], title=title, columns=COLUMNS, notes=[note]), folder / report["file"])
        rows.append(row)
        notes.append(note)
        reports.append(report)
    seconds = time.perf_counter() - begin
    evaluations = sum(report["network_evaluations"] for report in reports)
    count = sum(len(scene.edits) for scene in scenes)
    subtitle = (
        f"Guide-and-Rescale, {Path(resolved).name}, {steps} steps on {pipe.device.type}: {count} edits in {seconds:.0f} s, "
        f"{evaluations} network evaluations.\n"
        "Each source is drawn, inverted once, and edited three times; the words that differ are coloured."
    )
    sheet = contact_sheet(rows, title="Pictures edited by words", subtitle=subtitle, columns=COLUMNS, notes=notes)
    return write_sheet(
        sheet,
        folder / "sheet.png",
        folder / "demo.json",
        model=resolved,
        steps=steps,
        device=str(pipe.device),
        seconds=round(seconds, 3),
        network_evaluations=evaluations,
        scenes=reports,
    )


def describe(world: EmojiScenes, scene: DemoScene) -> tuple[Scenes, Scenes]:
    """Turns words into labels.

    Args:
        world (`EmojiScenes`): Where the words have their numbers.
        scene (`DemoScene`): The picture and its edits.

    Returns:
        `tuple[Scenes, Scenes]`: The source (one scene) and its true edits (one scene each), all of equal nuisance.

    Raises:
        ValueError: If a word is unknown.
    """
    drawn = world.sample(1, seed=scene.seed, split="all")
    source = drawn.replace(
        **{label: torch.tensor([world.number(label, word)]) for label, word in scene.labels.items()}
    )
    target = source[torch.zeros(len(scene.edits), dtype=torch.long)]
    for i, (label, word) in enumerate(scene.edits):
        values = getattr(target, label).clone()
        values[i] = world.number(label, word)
        target = target.replace(**{label: values})
    return source, target


def _edit_scene(
    pipe: GuideAndRescalePipeline, world: EmojiScenes, scene: DemoScene, steps: int
) -> tuple[list[Tile], dict[str, Any]]:
    source, target = describe(world, scene)
    (source_prompt,), prompts = world.captions(source), world.captions(target)
    before, truth = (world.render(scenes)[0] for scenes in (source, target))
    picture = to_pil(before[0])

    start = time.perf_counter()
    inversion = pipe.invert(picture, source_prompt, num_inference_steps=steps)
    plain: Any = pipe(
        prompt=source_prompt, inversion=inversion, guiders=[], guidance_scale=1.0, num_inference_steps=steps
    )
    edited: Any = pipe(prompt=prompts, inversion=inversion, num_inference_steps=steps)
    seconds = time.perf_counter() - start

    reconstruction, results = plain.images[0], edited.images
    reconstruction_psnr = round(float(psnr(to_tensor(reconstruction)[None], before)), 2)
    tiles = [Tile(picture, source_prompt), Tile(reconstruction, f"{reconstruction_psnr:.1f} dB to the source")]
    tiles += [Tile(image, prompt, compare=source_prompt) for image, prompt in zip(results, prompts, strict=True)]
    edits = [
        {
            "label": label,
            "prompt": prompt,
            "psnr": round(float(psnr(to_tensor(image)[None], true[None])), 2),
            "psnr_unedited": round(float(psnr(before, true[None])), 2),
        }
        for (label, _), prompt, image, true in zip(scene.edits, prompts, results, truth, strict=True)
    ]
    evaluations = inversion.network_evaluations + plain.network_evaluations + edited.network_evaluations
    report = {
        "source_prompt": source_prompt,
        "reconstruction_psnr": reconstruction_psnr,
        "edits": edits,
        "seconds": round(seconds, 3),
        "network_evaluations": evaluations,
    }
    return tiles, report
