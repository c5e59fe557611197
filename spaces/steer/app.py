"""Steers a flow model to a picture: paints anew what a brush has marked, enlarges a small picture, sharpens a blurred
one."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageChops

from diffusers_ext import FlowChefPipeline
from diffusers_ext.hub import FLOW_MODEL_NAME, native_size
from diffusers_ext.imaging import fit_square, to_pil, to_tensor
from diffusers_ext.metrics import psnr
from diffusers_ext.serving import VisitorError, painted, still_picture, whole_number, words
from diffusers_ext.serving.app import MODEL_GROUP, answering, launch, on_gpu, page, shown
from diffusers_ext.serving.checks import choice, number, seed_number, within_margins
from diffusers_ext.serving.fields import buttons, mask_field, result_field, seed_field
from diffusers_ext.serving.models import shared_model
from diffusers_ext.serving.work import Report
from diffusers_ext.sheets import PAPER
from diffusers_ext.steering_tasks import GUIDANCE_SCALE, task_arguments


# What is shown -> the task of `steering_tasks`, and the factor of an enlargement.
TASKS: dict[str, tuple[str, int]] = {
    "Paint inside the mask": ("inpaint", 1),
    "Enlarge x2": ("upscale", 2),
    "Enlarge x4": ("upscale", 4),
    "Sharpen": ("deblur", 1),
}
MAX_STEPS = 60
MAX_LAYERS = 4
NOISE_STD = 0.02
HERE = Path(__file__).parent
EXAMPLES = [
    ["fish", "Paint inside the mask", "a yellow star on a teal striped background", False],
    ["tulip", "Paint inside the mask", "a mushroom on a yellow dotted background", False],
    ["house", "Enlarge x4", "a blue house on a purple checkered background", True],
    ["butterfly", "Sharpen", "a red butterfly on a teal background", True],
]

model = shared_model(FlowChefPipeline, FLOW_MODEL_NAME)


def given(editor: Any, task: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture of an editor, and for a task that needs it what was painted on it, white."""
    parts = editor if isinstance(editor, dict) else {}
    picture = still_picture(parts.get("background"))
    box = within_margins(parts.get("background"))
    if task != "inpaint":
        return picture.crop(box), None
    layers = parts.get("layers") or []
    if len(layers) > MAX_LAYERS:
        raise VisitorError(f"There are {len(layers)} layers of a mask: use at most {MAX_LAYERS}.")
    mask = Image.new("L", picture.size, 0)
    for path in layers:
        layer = painted(path)
        if abs(layer.width / layer.height - picture.width / picture.height) > 0.02:
            raise VisitorError(
                f"The mask has {layer.width} x {layer.height} pixels, the picture {picture.width} x {picture.height}: "
                "use equal proportions."
            )
        mask = ImageChops.lighter(mask, layer.resize(picture.size, Image.Resampling.NEAREST))
    return picture.crop(box), mask.crop(box)


def problem(
    picture: Image.Image, mask: Image.Image | None, task: str, factor: int, blur: float, spoil: bool
) -> tuple[Image.Image, Image.Image, dict[str, Any]]:
    """The picture as the model sees it, what was measured of it, and the arguments of the pipeline."""
    size = native_size(model.pipeline)
    square = fit_square(picture, size)
    settings: dict[str, Any] = {
        "inpaint": {},
        "upscale": {"noise_std": NOISE_STD, "factor": factor},
        "deblur": {"noise_std": NOISE_STD, "blur": blur},
    }[task]
    source = picture
    if spoil and task != "inpaint":
        operator = task_arguments(task, square, size, **settings)["operator"]
        source = to_pil(operator.A(to_tensor(square)[None])[0])
    arguments = task_arguments(task, source, size, mask=mask, **settings)
    if task != "inpaint":
        return square, arguments["measurement"], arguments
    hole = arguments["mask_image"]
    low, high = hole.getextrema()
    if not high:
        raise VisitorError("Nothing is painted: mark with the brush what shall be new, in the middle of the picture.")
    if low:
        raise VisitorError("All of the picture is painted: leave a part of it as it is.")
    known = square.copy()
    known.paste(PAPER, mask=hole)
    return square, known, arguments


@on_gpu(60)
@answering
def steer(
    picture: dict[str, Any] | None,
    task: str,
    prompt: str,
    spoil: bool = False,
    steps: float = 30,
    scale: float = GUIDANCE_SCALE,
    blur: float = 2.0,
    seed: float = 0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[Any]:
    """Steers a sample to a picture: the picture, what was measured of it, the sample, and what it cost."""
    kind, factor = TASKS[choice(task, "task", tuple(TASKS))]
    prompt = words(prompt, "prompt")
    steps = whole_number(steps, "number of steps", 4, MAX_STEPS)
    scale = number(scale, "guidance scale", 1.0, 10.0)
    blur = number(blur, "blur", 0.5, 5.0)
    seed = seed_number(seed)
    spoil = bool(spoil)
    square, measured, arguments = problem(*given(picture, kind), kind, factor, blur, spoil)

    def work(report: Report) -> tuple[Image.Image, str]:
        with model.request(report, "steering") as pipe:
            begin = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            result = pipe(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator, **arguments)
            seconds = time.perf_counter() - begin
        evaluations = steps * (2 if scale > 1 else 1)
        cost = f"**{task}**: {steps} steps, {evaluations} network evaluations, {seconds:.1f} s"
        if spoil and kind != "inpaint":
            cost += f"; {float(psnr(to_tensor(result.images[0])[None], to_tensor(square)[None])):.1f} dB to the input"
        return result.images[0], f"{cost}."

    steered, cost = yield from shown(work, progress, outputs=4)
    yield square, measured, steered, cost


def build() -> gr.Blocks:
    """The page."""
    with page("Steer a flow to a picture") as blocks:
        gr.Markdown(
            "# Steer a flow to a picture\nA flow model draws what the words say and is steered, step by step, to "
            "what is known of a picture: what the brush left, a small version of it, or a blurred one. Nothing was "
            "trained for it."
        )
        with gr.Row():
            with gr.Column():
                picture = mask_field("Picture; the brush marks what shall be new")
                task = gr.Radio(list(TASKS), value="Paint inside the mask", label="Task")
                prompt = gr.Textbox(
                    label="It shall show", placeholder="a red heart on a blue background", max_length=300
                )
                spoil = gr.Checkbox(
                    label="Spoil it first",
                    info="Takes a sharp picture, makes it small or blurred, and compares the result with it",
                )
                with gr.Accordion("Settings", open=False):
                    steps = gr.Slider(4, MAX_STEPS, value=30, step=1, label="Steps")
                    scale = gr.Slider(1, 10, value=GUIDANCE_SCALE, step=0.5, label="Guidance scale")
                    blur = gr.Slider(0.5, 5, value=2, step=0.5, label="Blur", info="pixels, for Sharpen")
                    seed = seed_field()
                go, stop = buttons("Steer")
            with gr.Column():
                with gr.Row():
                    square = result_field("Input", height=220)
                    measured = result_field("Measurement", height=220)
                steered = result_field("Result", height=360)
                cost = gr.Markdown()
        gr.Examples(
            [[example(row[0]), *row[1:]] for row in EXAMPLES], [picture, task, prompt, spoil], label="Examples"
        )
        steers = go.click(
            steer,
            [picture, task, prompt, spoil, steps, scale, blur, seed],
            [square, measured, steered, cost],
            api_name="steer",
            concurrency_id=MODEL_GROUP,
            show_progress_on=steered,
        )
        stop.click(None, cancels=[steers])
    return blocks


def example(name: str) -> dict[str, Any]:
    """What the editor shows of an example: its picture and, if there is one, its mask."""
    picture, mask = HERE / "examples" / f"{name}.png", HERE / "examples" / f"{name}-mask.png"
    return {"background": str(picture), "layers": [str(mask)] if mask.is_file() else [], "composite": str(picture)}


if __name__ == "__main__":
    launch(build())
