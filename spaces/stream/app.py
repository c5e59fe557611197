"""An endless stream of motion, frame by frame: an ankle's acceleration goes in while it runs, thigh and hip come out."""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch

from diffusers_ext import RollingLadderPipeline
from diffusers_ext.serving import whole_number
from diffusers_ext.serving.app import answering, launch, on_gpu, page
from diffusers_ext.serving.checks import number, seed_number
from diffusers_ext.serving.fields import buttons, seed_field
from diffusers_ext.serving.models import shared_model


FRAMES_A_SECOND = 64
SHOWN = 256
LONGEST = 60  # seconds of one stream, so that others get their turn
PIECE = 8  # frames between two drawings
CHANNELS = ("thigh forward", "thigh vertical", "thigh lateral", "hip forward", "hip vertical", "hip lateral")
COLOURS = ("#2563eb", "#0891b2", "#7c3aed", "#dc2626", "#ea580c", "#ca8a04")

# Each stream has a scheduler of its own, so visitors need not wait for each other.
model = shared_model(RollingLadderPipeline, "rolling-motion", exclusive=False)


@dataclass
class Gait:
    """How the ankle moves now. A visitor's sliders write it while the stream reads it.

    Args:
        cadence (`float`): Strides a second.
        vigour (`float`): Size of the acceleration, 1 as in the recording that the model was trained on.
    """

    cadence: float = 0.9
    vigour: float = 1.0

    def accelerations(self) -> Iterator[torch.Tensor]:
        """Forward, vertical and lateral acceleration of the shank in mg, 64 a second: an invented gait, not a recorded one."""
        config = model.pipeline.transformer.config
        mean, deviation = torch.tensor(config.condition_mean), torch.tensor(config.condition_std)
        phase = 0.0
        while True:
            swing = torch.tensor(
                [
                    math.sin(phase) + 0.5 * math.sin(2 * phase + 0.6),
                    math.sin(2 * phase) + 0.4 * math.cos(phase),
                    math.cos(phase + 0.8) + 0.3 * math.sin(3 * phase),
                ]
            )
            yield mean + self.vigour * deviation * swing
            phase = (phase + 2 * math.pi * self.cadence / FRAMES_A_SECOND) % (2 * math.pi)


def set_gait(gait: Gait, cadence: float, vigour: float) -> None:
    """Changes the gait of a stream that may be running."""
    gait.cadence = number(cadence, "cadence", 0.0, 2.0)
    gait.vigour = number(vigour, "vigour", 0.0, 2.0)


@on_gpu(LONGEST)
@answering
def stream(
    gait: Gait, cadence: float = 0.9, vigour: float = 1.0, seconds: float = 20, seed: float = 0
) -> Iterator[Any]:
    """Draws the last four seconds of the stream again and again, not faster than a person walks."""
    set_gait(gait, cadence, vigour)
    seconds = whole_number(seconds, "number of seconds", 1, LONGEST)
    seed = seed_number(seed)
    last: deque[list[float]] = deque(maxlen=SHOWN)
    made = drawn = 0
    with model.request(lambda fraction, words: None) as pipe:
        begin = time.monotonic()
        generator = torch.Generator().manual_seed(seed)
        for frames in pipe.stream(gait.accelerations(), seconds * FRAMES_A_SECOND, 10, generator=generator):
            last.extend(frames[0].tolist())
            made += frames.shape[1]
            if made - drawn < PIECE and made < seconds * FRAMES_A_SECOND:
                continue
            drawn = made
            early = made / FRAMES_A_SECOND - (time.monotonic() - begin)
            time.sleep(max(early, 0.0))
            rate = made / max(time.monotonic() - begin, 1e-6)
            yield (
                drawing(list(last)),
                f"{made} frames, {made / FRAMES_A_SECOND:.1f} s of motion, {rate:.0f} frames a second, "
                f"{pipe.network_evaluations} network evaluations; cadence {gait.cadence:g}, vigour {gait.vigour:g}.",
            )


def drawing(frames: list[list[float]]) -> str:
    """The channels of some frames as lines, one under the other, in SVG."""
    width, height, left = 760, 66, 130
    lines = []
    config = model.pipeline.transformer.config
    for channel, (name, colour) in enumerate(zip(CHANNELS, COLOURS, strict=True)):
        middle, size = config.frame_mean[channel], config.frame_std[channel]
        base = channel * height + height / 2
        points = " ".join(
            f"{left + i * (width - left) / (SHOWN - 1):.1f},{base - max(-4, min(4, (frame[channel] - middle) / size)) * 7:.1f}"
            for i, frame in enumerate(frames)
        )
        lines.append(f'<line x1="{left}" x2="{width}" y1="{base}" y2="{base}" stroke="#8884"/>')
        lines.append(f'<text x="0" y="{base + 5}" font-size="15" fill="currentColor">{name}</text>')
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    return f'<svg role="img" aria-label="motion" viewBox="0 0 {width} {height * len(CHANNELS)}">{"".join(lines)}</svg>'


def build() -> gr.Blocks:
    """The page."""
    with page("An endless stream of motion") as blocks:
        gr.Markdown(
            "# An endless stream of motion\nA rolling diffusion model hears how an ankle accelerates and draws how thigh and hip move with "
            "it, 64 frames a second. Move the sliders while it runs: what you change arrives in the frames that are on their way."
        )
        gait = gr.State(Gait())
        with gr.Row():
            with gr.Column(scale=1):
                cadence = gr.Slider(0, 2, value=0.9, step=0.1, label="Cadence", info="strides a second")
                vigour = gr.Slider(0, 2, value=1, step=0.1, label="Vigour", info="0 stands still")
                with gr.Accordion("Settings", open=False):
                    seconds = gr.Slider(1, LONGEST, value=30, step=1, label="Seconds")
                    seed = seed_field()
                start, stop = buttons("Start")
            with gr.Column(scale=2):
                picture = gr.HTML(label="Motion", elem_id="motion")
                state = gr.Markdown()
        running = start.click(
            stream, [gait, cadence, vigour, seconds, seed], [picture, state], api_name="stream",
            concurrency_limit=4, show_progress="hidden",
        )  # fmt: skip
        # Always the last: a slider that moves fast must not come to rest on a value from the middle of its way.
        gr.on(
            [cadence.input, vigour.input], set_gait, [gait, cadence, vigour], None,
            api_name="set_gait", queue=False, trigger_mode="always_last",
        )  # fmt: skip
        stop.click(None, cancels=[running])
    return blocks


if __name__ == "__main__":
    launch(build())
