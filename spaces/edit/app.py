"""Edits a picture by words: Guide-and-Rescale, or prompt-to-prompt on an inverted picture. The picture is inverted once for any words."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from diffusers_ext import GuideAndRescalePipeline, NullTextInversionPipeline
from diffusers_ext.attention import controller_for
from diffusers_ext.hub import DEFAULT_MODEL_NAME, native_size
from diffusers_ext.imaging import fit_square
from diffusers_ext.serving import Kept, SharedPipeline, still_picture, whole_number, words
from diffusers_ext.serving.app import MODEL_GROUP, answering, launch, on_gpu, page, shown
from diffusers_ext.serving.checks import choice, number
from diffusers_ext.serving.fields import before_after, buttons, result_field, upload_field
from diffusers_ext.serving.models import shared_model
from diffusers_ext.serving.work import Report


# What is shown -> inversion under prompt-to-prompt; None is Guide-and-Rescale.
METHODS = {"Guide-and-Rescale": None, "Prompt-to-prompt, direct": "direct", "Prompt-to-prompt, null-text": "null_text"}
MAX_STEPS = 50
HERE = Path(__file__).parent
EXAMPLES = [
    ["star.png", "a yellow star on a blue background", "a red star on a blue background"],
    ["heart.png", "a purple heart on a yellow striped background", "a purple heart on a teal striped background"],
    ["tulip.png", "a tulip on a teal dotted background", "a tulip on an orange dotted background"],
    ["house.png", "a house on a purple background", "a mushroom on a purple background"],
]

guided = shared_model(GuideAndRescalePipeline, DEFAULT_MODEL_NAME)
inverted = SharedPipeline(
    NullTextInversionPipeline(**guided.pipeline.components, requires_safety_checker=False), beside=guided
)
inversions: Kept[Any] = Kept(16)


def run(
    picture: Image.Image, source: str, prompt: str, method: str, steps: int, scale: float, report: Report
) -> tuple[Image.Image, str]:
    """One edit, and what it cost."""
    inversion_method = METHODS[method]
    key = (hashlib.sha256(picture.tobytes()).digest(), picture.size, source, method, steps)
    # Only null-text optimisation depends on the scale.
    key += (scale,) if inversion_method == "null_text" else ()
    model = guided if inversion_method is None else inverted
    with model.request(report, "inverting") as pipe:
        begin = time.perf_counter()

        def invert() -> Any:
            if inversion_method is None:
                return pipe.invert(picture, source, num_inference_steps=steps)
            extra = {"guidance_scale": scale} if inversion_method == "null_text" else {}
            return pipe.invert(picture, source, method=inversion_method, num_inference_steps=steps, **extra)

        inversion, was_kept = inversions.get(key, invert)
        between = time.perf_counter()
    with model.request(report, "editing") as pipe:
        if inversion_method is None:
            result = pipe(prompt=prompt, inversion=inversion, num_inference_steps=steps, guidance_scale=scale)
        else:
            controller = controller_for(pipe.tokenizer, [source, prompt])
            result = pipe(prompt=prompt, inversion=inversion, controller=controller, guidance_scale=scale)
        end = time.perf_counter()
    spent = result.network_evaluations + (0 if was_kept else inversion.network_evaluations)
    first = "inversion kept from before" if was_kept else f"inverted in {between - begin:.1f} s"
    return result.images[0], f"**{method}**: {first}, edited in {end - between:.1f} s, {spent} network evaluations."


def checked(
    picture: Any, source: Any, prompt: Any, steps: Any, scale: Any
) -> tuple[Image.Image, str, str, int, float]:
    """What a visitor sent, or a sentence about what is wrong with it."""
    steps = whole_number(steps, "number of steps", 4, MAX_STEPS)
    scale = number(scale, "guidance scale", 1.5, 15.0)
    source, prompt = words(source, "description of the picture"), words(prompt, "description of the result")
    return fit_square(still_picture(picture), native_size(guided.pipeline)), source, prompt, steps, scale


@on_gpu(60)
@answering
def edit(
    picture: str | None,
    source: str,
    prompt: str,
    method: str = "Guide-and-Rescale",
    steps: float = 30,
    scale: float = 7.5,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[Any]:
    """Edits a picture: before and after, where they differ, and what it cost."""
    method = choice(method, "method", tuple(METHODS))
    before, source, prompt, steps, scale = checked(picture, source, prompt, steps, scale)
    after, cost = yield from shown(
        lambda report: run(before, source, prompt, method, int(steps), scale, report), progress, outputs=3
    )
    yield (before, after), ImageChops.difference(before, after), cost


@on_gpu(120)
@answering
def compare(
    picture: str | None,
    source: str,
    prompt: str,
    steps: float = 30,
    scale: float = 7.5,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[Any]:
    """The same edit by every method, side by side."""
    before, source, prompt, steps, scale = checked(picture, source, prompt, steps, scale)

    def work(report: Report) -> tuple[list[tuple[Image.Image, str]], str]:
        pictures, costs = [(before, "before")], []
        for method in METHODS:
            after, cost = run(before, source, prompt, method, int(steps), scale, report)
            pictures.append((after, method.rpartition(", ")[2]))
            costs.append(f"* {cost}")
        return pictures, "\n".join(costs)

    pictures, costs = yield from shown(work, progress, outputs=2)
    yield pictures, costs


def build() -> gr.Blocks:
    """The page."""
    with page("Edit a picture by words") as blocks:
        gr.Markdown(
            "# Edit a picture by words\nSay what the picture shows and what it shall show; all else stays. "
            "The first edit of a picture inverts it, further words reuse that."
        )
        with gr.Row():
            with gr.Column():
                picture = upload_field("Picture", height=260)
                source = gr.Textbox(label="It shows", placeholder="a yellow star on a blue background", max_length=300)
                prompt = gr.Textbox(
                    label="It shall show", placeholder="a red star on a blue background", max_length=300
                )
                method = gr.Radio(list(METHODS), value="Guide-and-Rescale", label="Method")
                with gr.Accordion("Settings", open=False):
                    steps = gr.Slider(4, MAX_STEPS, value=30, step=1, label="Steps")
                    scale = gr.Slider(1.5, 15, value=7.5, step=0.5, label="Guidance scale")
                go, every, stop = buttons("Edit", "Compare all")
            with gr.Column():
                slider = before_after()
                cost = gr.Markdown()
                difference = result_field("What changed", height=180)
        gallery = gr.Gallery(label="Every method", format="png", columns=4, height=300, elem_classes="pixels")
        costs = gr.Markdown()
        inputs = [picture, source, prompt]
        gr.Examples([[str(HERE / "examples" / row[0]), *row[1:]] for row in EXAMPLES], inputs, label="Examples")
        edits = go.click(
            edit, [*inputs, method, steps, scale], [slider, difference, cost], api_name="edit",
            concurrency_id=MODEL_GROUP, show_progress_on=slider,
        )  # fmt: skip
        compares = every.click(
            compare,
            [*inputs, steps, scale],
            [gallery, costs],
            api_name="compare",
            concurrency_id=MODEL_GROUP,
            show_progress_on=gallery,
        )
        stop.click(None, cancels=[edits, compares])
    return blocks


if __name__ == "__main__":
    launch(build())
