"""A flow model and the student that was distilled from it, side by side: the same words, the same noise, and the
seconds of each."""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ext.hub import FLOW_MODEL_NAME
from diffusers_ext.serving import SharedPipeline, whole_number, words
from diffusers_ext.serving.app import MODEL_GROUP, answering, launch, on_gpu, page, shown
from diffusers_ext.serving.checks import number, seed_number
from diffusers_ext.serving.fields import buttons, result_field, seed_field
from diffusers_ext.serving.models import shared_model, shared_student
from diffusers_ext.serving.work import Report


# What stands above the pictures of the student, and its steps.
STUDENT_STEPS = {"4 steps": 4, "1 step": 1}
MAX_STEPS = 60
EXAMPLES = [
    ["a blue mushroom on a yellow dotted background"],
    ["a red star on a teal background"],
    ["a butterfly on a purple striped background"],
    ["a green apple on an orange checkered background"],
]

teacher = shared_model(
    StableDiffusionPipeline, FLOW_MODEL_NAME, variable="TEACHER_ID", revision_variable="TEACHER_REVISION"
)
student = shared_student(teacher)


def sample(
    model: SharedPipeline, prompt: str, steps: int, scale: float, seed: int, report: Report
) -> tuple[Image.Image, float, int]:
    """A picture, its seconds from the words to the pixels, and its network evaluations."""
    with model.request(report, f"sampling in {steps} {'step' if steps == 1 else 'steps'}") as pipe:
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        result = pipe(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator)
        seconds = time.perf_counter() - begin
    return result.images[0], seconds, steps * (2 if scale > 1 else 1)


@on_gpu(60)
@answering
def compare(
    prompt: str,
    steps: float = 30,
    scale: float = 4.0,
    seed: float = 0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[Any]:
    """The teacher's picture, those of the student, and what each of them cost."""
    prompt = words(prompt, "prompt")
    steps = whole_number(steps, "number of steps", 4, MAX_STEPS)
    scale = number(scale, "guidance scale", 1.0, 10.0)
    seed = seed_number(seed)
    calls = [("teacher", teacher, steps, scale)]
    calls += [(label, student, count, 1.0) for label, count in STUDENT_STEPS.items()]
    pictures: list[Any] = [gr.skip()] * len(calls)
    costs: dict[int, str] = {}
    # The fastest first, so that there is something to look at while the teacher is at work.
    for i in reversed(range(len(calls))):
        label, model, count, guidance = calls[i]

        def work(report: Report, model: Any = model, count: int = count, guidance: float = guidance) -> Any:
            return sample(model, prompt, count, guidance, seed, report)

        pictures[i], seconds, evaluations = yield from shown(work, progress, outputs=len(calls) + 1)
        costs[i] = f"* **{label}**: {seconds:.2f} s, {evaluations} network evaluation{'s' * (evaluations > 1)}"
        yield *pictures, "\n".join(costs[key] for key in sorted(costs))


def build() -> gr.Blocks:
    """The page."""
    with page("Many steps, four, one") as blocks:
        gr.Markdown(
            "# Many steps, four, one\nA flow model, and a student that was distilled from it to sample in four steps "
            "or in one. All begin with the same noise."
        )
        prompt = gr.Textbox(
            label="It shall show", placeholder="a blue mushroom on a yellow dotted background", max_length=300
        )
        with gr.Accordion("Settings", open=False):
            steps = gr.Slider(4, MAX_STEPS, value=30, step=1, label="Steps of the teacher")
            scale = gr.Slider(1, 10, value=4, step=0.5, label="Guidance scale of the teacher")
            seed = seed_field()
        go, stop = buttons("Compare")
        with gr.Row():
            pictures = [result_field(label) for label in ("Teacher", *STUDENT_STEPS)]
        costs = gr.Markdown()
        gr.Examples(EXAMPLES, [prompt], label="Examples")
        compares = go.click(
            compare,
            [prompt, steps, scale, seed],
            [*pictures, costs],
            api_name="distilled",
            concurrency_id=MODEL_GROUP,
            show_progress_on=pictures,
        )
        stop.click(None, cancels=[compares])
    return blocks


if __name__ == "__main__":
    launch(build())
