"""`diffusers-ext steer`, and the arguments that a task becomes."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import FlowChefPipeline
from diffusers_ext.cli import TASKS, main
from diffusers_ext.demos.steering import PANELS, Panel, run_steering_demo
from diffusers_ext.imaging import open_image
from diffusers_ext.steering_tasks import TASKS as ALL_TASKS
from diffusers_ext.steering_tasks import task_arguments
from tests.helpers.tiny_flows import tiny_flow_components
from tests.helpers.tiny_models import tiny_stable_diffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False).save_pretrained(path)
    return str(path)


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (20, 0, 40, 40))
    mask.save("mask.png")
    return Path("photo.png")


def steer(*words: object) -> int:
    return main(["steer", *(str(word) for word in words)])


MORE: dict[str, list[str]] = {
    "inpaint": ["--mask", "mask.png"],
    "edit": ["--mask", "mask.png", "--source", "a wall", "--source-stop", "0.5"],
    "upscale": [],
    "deblur": ["--solver", "flair"],
}


def test_every_task_of_the_library_is_one_of_the_command() -> None:
    assert TASKS == ALL_TASKS == tuple(MORE)


@pytest.mark.parametrize("task", MORE)
def test_every_task_writes_a_picture_and_every_setting(
    picture: Path, model: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        picture,
        "--task",
        task,
        "--prompt",
        "a star",
        "--model",
        model,
        "--steps",
        2,
        "--device",
        "cpu",
        *MORE[task],
    ]
    assert steer(*words) == 0
    report = json.loads(Path("photo-steered.json").read_text())
    assert report["task"] == task and report["steered_size"] == [32, 32] and report["network_evaluations"] == 4
    assert Image.open("photo-steered.png").size == (32, 32) and "4 network evaluations" in capsys.readouterr().out
    pipe = FlowChefPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    mask = open_image("mask.png") if "mask.png" in MORE[task] else None
    source = {"source": "a wall", "source_stop": 0.5} if task == "edit" else {}
    arguments = task_arguments(task, open_image(picture), 32, mask=mask, **source)
    assert report["guidance_scale"] == (1.5 if task == "edit" else 3.0)
    again = pipe("a star", **arguments, num_inference_steps=2, guidance_scale=report["guidance_scale"],
                 generator=torch.Generator().manual_seed(0),
                 steering_kwargs={"solver": "flair" if task == "deblur" else "flowchef"}).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(again), np.asarray(Image.open("photo-steered.png")))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--task", "inpaint"], "mask is missing"),
        (["--task", "edit", "--mask", "mask.png"], "source=None"),
        (["--task", "inpaint", "--mask", "mask.png", "--source", "a"], "source='a'"),
        (["--task", "upscale", "--mask", "mask.png"], "mask has no effect on upscale"),
        (["--task", "upscale", "--factor", "3"], "factor=3 does not divide 32"),
        (["--task", "deblur", "--blur", "0"], "blur=0.0"),
        (["--task", "deblur", "--noise-std", "-1"], "noise_std=-1"),
        (["--task", "upscale", "--steps", "0"], "num_inference_steps=0"),
        (["--task", "inpaint", "--mask", "absent.png"], "absent.png"),
        (["--task", "upscale", "--model", "no/where/here"], "no/where/here does not exist"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(
    picture: Path, model: str, words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steer(picture, "--prompt", "a", "--model", model, *words) == 2
    captured = capsys.readouterr()
    assert re.search(answer, captured.err) and captured.err.count("\n") == 1 and not captured.out
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


def test_a_diffusion_model_is_one_sentence(
    picture: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("diffusion")
    tiny_stable_diffusion().save_pretrained(folder)
    assert steer(picture, "--prompt", "a", "--task", "upscale", "--model", folder) == 2
    assert "is not one of a flow model" in capsys.readouterr().err


def test_the_mask_is_cut_and_scaled_with_the_picture() -> None:
    picture, mask = Image.new("RGB", (80, 40), "red"), Image.new("L", (80, 40), 0)
    mask.paste(255, (40, 0, 80, 40))
    arguments: dict[str, Any] = task_arguments("inpaint", picture, 32, mask=mask)
    values = np.asarray(arguments["mask_image"])
    assert arguments["image"].size == (32, 32) and values.shape == (32, 32)
    assert set(np.unique(values)) == {0, 255} and not values[:, :15].any() and values[:, 17:].all()
    with pytest.raises(ValueError, match="40x40"):
        task_arguments("inpaint", picture, 32, mask=Image.new("L", (40, 40), 255))
    with pytest.raises(ValueError, match="task='paint'"):
        task_arguments("paint", picture, 32)


def test_what_is_under_the_mask_counts_for_an_edit_alone() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    mixed = red.copy()
    mixed.paste(blue, mask=mask)
    assert np.array_equal(task_arguments("inpaint", mixed, 32, mask=mask)["image"], red)
    assert np.array_equal(task_arguments("edit", mixed, 32, mask=mask, source="a wall")["image"], mixed)
    everything = Image.new("L", (32, 32), 255)
    assert np.array_equal(task_arguments("inpaint", mixed, 32, mask=everything)["image"], mixed)


# -- the sheet ---------------------------------------------------------------------------------------------------------


def test_the_sheet_shows_every_task_and_the_figures(tmp_path: Path, model: str) -> None:
    report = run_steering_demo(tmp_path / "demo", model=model, steps=2, device="cpu")
    assert sorted(os.listdir(tmp_path / "demo")) == ["steering.json", "steering.png"]
    assert json.loads((tmp_path / "demo" / "steering.json").read_text()) == report
    assert [row["task"] for row in report["pictures"]] == [panel.task for panel in PANELS]
    assert sorted(panel.task for panel in PANELS) == sorted(TASKS)
    for row in report["pictures"]:
        assert row["network_evaluations"] == 8
        assert all(2 < row[name] < 60 for name in ("psnr_not_steered", "psnr_steered"))
    with Image.open(report["sheet"]) as sheet:
        assert sheet.width > 4 * 192 and sheet.height > len(PANELS) * 192


def test_a_wrong_panel_and_a_file_in_the_way_are_said(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="object='dragon' is not drawn here"):
        run_steering_demo(tmp_path, model=model, steps=1, panels=[Panel("edit", "", 1, ("object", "dragon"))])
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run_steering_demo(tmp_path / "demo", model=model)
    assert os.listdir(tmp_path) == ["demo"]
