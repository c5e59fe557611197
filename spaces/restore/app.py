"""Restores a degraded picture in a few network evaluations of mean-reverting diffusion; with a clean picture it shows the decibels."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.hub import RESTORATION_MODEL_NAME
from diffusers_ext.imaging import to_tensor
from diffusers_ext.metrics import psnr
from diffusers_ext.serving import VisitorError, shrunk, still_picture, whole_number
from diffusers_ext.serving.app import MODEL_GROUP, answering, launch, on_gpu, page, shown
from diffusers_ext.serving.checks import number, seed_number
from diffusers_ext.serving.fields import before_after, buttons, seed_field, upload_field
from diffusers_ext.serving.models import shared_model
from diffusers_ext.serving.work import Report


MAX_SIDE = 512
MAX_STEPS = 20
HERE = Path(__file__).parent
EXAMPLES = ("noise", "rain", "scratches", "darkness")

# Its scheduler is all that a call changes, so requests need not wait for each other.
model = shared_model(MRRestorationPipeline, RESTORATION_MODEL_NAME, exclusive=False)


@on_gpu(60)
@answering
def restore(
    picture: str | None,
    clean: str | None = None,
    steps: float = 5,
    noise_scale: float = 0.0,
    seed: float = 0,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[Any]:
    """Restores a picture: before and after, and what it cost and gained."""
    steps = whole_number(steps, "number of network evaluations", 1, MAX_STEPS)
    noise_scale = number(noise_scale, "noise scale", 0.0, 1.0)
    seed = seed_number(seed)
    degraded = shrunk(still_picture(picture), MAX_SIDE)
    truth = None if clean is None else shrunk(still_picture(clean, "clean picture"), MAX_SIDE)
    if truth is not None and truth.size != degraded.size:
        raise VisitorError(
            f"The clean picture has {_size(truth)} pixels, the degraded one {_size(degraded)}: use equal ones."
        )

    def work(report: Report) -> tuple[Image.Image, str]:
        begin = time.perf_counter()
        with model.request(report, "restoring") as pipe:
            generator = torch.Generator().manual_seed(seed)
            result = pipe(degraded, num_inference_steps=steps, noise_scale=noise_scale, generator=generator)
        restored = result.images[0]
        cost = f"{result.network_evaluations} network evaluations, {time.perf_counter() - begin:.1f} s, {_size(restored)} pixels"
        if truth is not None:
            cost += f"; **{_decibels(degraded, truth):.2f} dB before, {_decibels(restored, truth):.2f} dB after**"
        return restored, f"{cost}."

    restored, cost = yield from shown(work, progress, outputs=2)
    yield (degraded, restored), cost


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"


def _decibels(picture: Image.Image, truth: Image.Image) -> float:
    return float(psnr(to_tensor(picture)[None], to_tensor(truth)[None]))


def build() -> gr.Blocks:
    """The page."""
    with page("Restore a picture") as blocks:
        gr.Markdown(
            "# Restore a picture\nTakes noise, rain, scratches and darkness out of a picture. Move the slider of network evaluations and "
            "see what each buys; with the clean picture beside it, in decibels."
        )
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    picture = upload_field("Degraded picture", height=220)
                    clean = upload_field("Clean picture, if there is one", height=220)
                steps = gr.Slider(1, MAX_STEPS, value=5, step=1, label="Network evaluations")
                with gr.Accordion("Settings", open=False):
                    noise_scale = gr.Slider(
                        0,
                        1,
                        value=0,
                        step=0.1,
                        label="Noise scale",
                        info="0: one smooth result; 1: a sample with fine texture",
                    )
                    seed = seed_field()
                go, stop = buttons("Restore")
            with gr.Column():
                slider = before_after()
                cost = gr.Markdown()
        rows = [[str(HERE / "examples" / f"{name}{end}.png") for end in ("", "-clean")] for name in EXAMPLES]
        gr.Examples(rows, [picture, clean], label="Examples")
        inputs, outputs = [picture, clean, steps, noise_scale, seed], [slider, cost]
        same: dict[str, Any] = {"concurrency_id": MODEL_GROUP, "concurrency_limit": 2, "show_progress_on": slider}
        clicked = go.click(restore, inputs, outputs, api_name="restore", **same)
        moved = steps.release(restore, inputs, outputs, api_visibility="private", trigger_mode="always_last", **same)
        stop.click(None, cancels=[clicked, moved])
    return blocks


if __name__ == "__main__":
    launch(build())
