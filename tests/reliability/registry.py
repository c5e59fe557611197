"""What the reliability probes run over. A new scheduler, pipeline, function or script is put under all of them here.

To plug in:
* a scheduler: one line in `SCHEDULERS`;
* a pipeline: a `PipelineSubject` in `PIPELINES` (how to build a tiny one, one good call, how to load a saved one);
* a public class or function: a `Function` in `functions.py`;
* a training script: a `Script` in `SCRIPTS` with the arguments of a run of a few seconds.

Values of a fuzzed argument are drawn from two lists, `good` and `bad`. A value that is a `Made` is computed anew for each draw
from the draw's own random numbers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from tests.helpers.tiny_models import IMAGE_SIZE, tiny_components


ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Made:
    """A value computed for each draw."""

    label: str
    make: Callable[[random.Random], Any]


@dataclass(frozen=True)
class Argument:
    """What may, and what must not, be passed for one argument."""

    good: Sequence[Any]
    bad: Sequence[Any]


@dataclass(frozen=True)
class Function:
    """A callable under the fuzzer: `call(**good)` works, and each argument may be replaced by a draw.

    Paths must lie in the sandbox's scratch folder wherever the callable writes.
    """

    name: str
    call: Callable[..., Any]
    arguments: Mapping[str, Argument]
    is_model: bool = False


@dataclass(frozen=True)
class WrongCall:
    """One wrong call: what to run, and what (as patterns) the answer must say of the argument and its value."""

    subject: str
    mistake: str
    call: Callable[[], Any]
    argument: str
    value: str


@dataclass(frozen=True)
class PipelineSubject:
    """A pipeline class: how to build a tiny one, and a call of it that a slow core does in a fraction of a second."""

    name: str
    build: Callable[[], DiffusionPipeline]
    good: Callable[[], dict[str, Any]]
    load: Callable[[str], DiffusionPipeline]


@dataclass(frozen=True)
class Script:
    """A training script: importable module with `main(argv)`, and the arguments of a run of `steps` short steps.

    `arguments(folder)` gives everything but `--resume_from_checkpoint`; the run saves a checkpoint after every step into
    `folder` and keeps all of them.
    """

    name: str
    module: str
    steps: int
    arguments: Callable[[Path], list[str]]


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers: class name -> settings that it is built with. Ours are asserted on, stock ones are the anchor.
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {}

STOCK_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


def sample_picture(seed: int = 0, size: int = IMAGE_SIZE) -> Image.Image:
    """Noise as a picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def build_guide_and_rescale() -> DiffusionPipeline:
    from diffusers_ext import GuideAndRescalePipeline

    pipeline = GuideAndRescalePipeline(**tiny_components(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_guide_and_rescale(folder: str) -> DiffusionPipeline:
    from diffusers_ext import GuideAndRescalePipeline

    pipeline = GuideAndRescalePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def good_edit() -> dict[str, Any]:
    return {
        "image": sample_picture(), "source_prompt": "a", "prompt": "b", "num_inference_steps": 2, "guidance_scale": 3.0,
        "output_type": "np",
    }  # fmt: skip


PIPELINES: tuple[PipelineSubject, ...] = (
    PipelineSubject("GuideAndRescalePipeline", build_guide_and_rescale, good_edit, load_guide_and_rescale),
)


@cache
def shared_pipeline(name: str) -> DiffusionPipeline:
    """One pipeline for all draws: a call that spoils it for the next one shows up as a fault there."""
    return next(subject for subject in PIPELINES if subject.name == name).build()


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------

SCRIPTS: tuple[Script, ...] = ()
