"""The Space of teacher and student: one noise for all, each picture the library's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

from diffusers_ext.hub import ModelNotFoundError
from diffusers_ext.serving import SharedPipeline
from diffusers_ext.serving.models import shared_student
from diffusers_ext.students import with_student
from tests.helpers.fresh_process import ROOT

from .visitors import client, pixels, refused


TEACHER = ROOT / "pipelines" / "emoji-scenes-flow"
PROMPT = "a red heart on a blue background"


def test_the_pictures_are_those_of_the_library_from_one_noise(space: Callable[[str], Any]) -> None:
    module, url = space("distilled")
    *pictures, costs = client(url).predict(PROMPT, 5, 3.0, 7, api_name="/distilled")
    teacher = StableDiffusionPipeline.from_pretrained(TEACHER)
    calls = ((teacher, 5, 3.0), (with_student(teacher), 4, 1.0), (with_student(teacher), 1, 1.0))
    for picture, (pipe, steps, scale) in zip(pictures, calls, strict=True):
        expected = pipe(
            PROMPT, num_inference_steps=steps, guidance_scale=scale, generator=torch.Generator().manual_seed(7)
        )
        assert np.array_equal(pixels(picture), np.asarray(expected.images[0])), steps
    found = re.findall(r"\*\*(.+?)\*\*: ([\d.]+) s, (\d+) network evaluation", costs)
    assert [(label, int(count)) for label, _, count in found] == [("teacher", 10), ("4 steps", 4), ("1 step", 1)]
    assert list(module.STUDENT_STEPS.values()) == [4, 1]


def test_the_fastest_is_shown_first(space: Callable[[str], Any]) -> None:
    _, url = space("distilled")
    costs = [outputs[-1] for outputs in client(url).submit(PROMPT, 4, 3.0, 0, api_name="/distilled")]
    counts = [text.count("* **") for text in costs if isinstance(text, str)]
    assert counts == sorted(counts) and counts[-1] == 3
    assert any(text.startswith("* **1 step**") for text in costs if isinstance(text, str))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", 4, 3.0, 0), "prompt is empty"),
        (("x" * 301, 4, 3.0, 0), "301 characters"),
        ((PROMPT, 61, 3.0, 0), "61"),
        ((PROMPT, 4.5, 3.0, 0), "not a whole number"),
        ((PROMPT, 4, 30.0, 0), "30"),
        ((PROMPT, 4, 3.0, 2**31), "seed"),
        ((None, 4, 3.0, 0), "prompt is not text"),
    ],
)
def test_what_is_wrong_is_said(space: Callable[[str], Any], arguments: tuple[Any, ...], said: str) -> None:
    assert said in refused(space("distilled")[1], "/distilled", *arguments)


def test_the_student_of_the_variable_shares_all_other_parts_and_waits_for_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = SharedPipeline(StableDiffusionPipeline.from_pretrained(TEACHER))
    teacher.pipeline.unet.save_pretrained(tmp_path / "student")
    UniPCMultistepScheduler().save_pretrained(tmp_path / "student" / "scheduler")
    monkeypatch.setenv("STUDENT_ID", str(tmp_path / "student"))
    made = shared_student(teacher)
    assert type(made.pipeline.scheduler) is UniPCMultistepScheduler
    assert made.pipeline.unet is not teacher.pipeline.unet and made.pipeline.vae is teacher.pipeline.vae
    with teacher.request(lambda *_: None):
        assert made.busy, "a student is measured while its teacher is at work"
    monkeypatch.setenv("STUDENT_ID", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="holds no network"):
        shared_student(teacher)
