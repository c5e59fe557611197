"""`diffusers-ext restore` and the restoration sheet."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.cli import main
from diffusers_ext.data.degradations import DEGRADATIONS
from diffusers_ext.demos.restoration import DAMAGES, Damage, run_restoration_demo
from diffusers_ext.imaging import open_image
from tests.helpers.tiny_models import tiny_stable_diffusion
from tests.helpers.tiny_restoration import tiny_restoration


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_restoration().save_pretrained(path)
    return str(path)


@pytest.fixture
def picture(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (13, 22, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return Path("photo.png")


def restore(*words: object) -> int:
    return main(["restore", *(str(word) for word in words)])


def test_restore_writes_a_picture_of_the_same_size_and_every_setting(picture, model, capsys):
    assert restore(picture, "--model", model, "--steps", 3, "--seed", 7, "--device", "cpu") == 0
    report = json.loads(Path("photo-restored.json").read_text())
    expected = {
        "num_inference_steps": 3,
        "seed": 7,
        "strength": 1.0,
        "noise_scale": 0.0,
        "network_evaluations": 3,
        "picture_size": [22, 13],
    }
    assert expected.items() <= report.items() and "3 network evaluations" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["photo-restored.json", "photo-restored.png", "photo.png"]
    pipe = MRRestorationPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    again = pipe(open_image(picture), 3, noise_scale=0.0).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(Image.open("photo-restored.png")))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", 0], "num_inference_steps=0"),
        (["--steps", 2000], "num_inference_steps=2000"),
        (["--strength", 0], "strength=0.0"),
        (["--strength", "nan"], "strength=nan"),
        (["--output", "photo.png"], "is the picture itself"),
        (["--output", "out.pdf"], r"\.png"),
        (["--model", "no/where/here"], "no/where/here does not exist"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(picture, model, capsys, more, words):
    assert restore(picture, "--model", model, *more) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err) and captured.err.count("\n") == 1 and not captured.out
    assert os.listdir() == ["photo.png"]


def test_a_model_of_another_family_and_a_file_that_is_no_picture_are_one_sentence(picture, model, tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    assert restore(picture, "--model", tmp_path / "sd") == 2
    assert "StableDiffusionPipeline" in capsys.readouterr().err
    Path("words.png").write_text("words")
    assert restore("words.png", "--model", model) == 2
    assert "not a picture" in capsys.readouterr().err and not Path("words-restored.png").exists()


def test_the_damages_of_the_sheet_are_of_the_kinds_that_are_trained(model):
    assert {damage.spoil.__code__.co_names[0] for damage in DAMAGES} <= {*DEGRADATIONS, "gaussian_noise"}


def test_the_sheet_shows_every_picture_and_the_figures(tmp_path, model):
    report = run_restoration_demo(tmp_path / "demo", model=model, device="cpu", damages=DAMAGES[2:4], many=12)
    assert sorted(os.listdir(tmp_path / "demo")) == ["restoration.json", "restoration.png"]
    assert json.loads((tmp_path / "demo" / "restoration.json").read_text()) == report
    assert [row["network_evaluations"] for row in report["pictures"]] == [5 + 5 + 10 + 12] * 2
    assert [row["picture"] for row in report["pictures"]] == ["astronaut", "scene 1"]
    assert all(
        5 < row[name] < 60
        for row in report["pictures"]
        for name in ("psnr_degraded", "psnr_few_no_noise", "psnr_few", "psnr_more", "psnr_posterior")
    )
    with Image.open(report["sheet"]) as sheet:
        assert sheet.width > 5 * 192


def test_the_sheet_does_not_write_over_a_file(tmp_path, model):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run_restoration_demo(tmp_path / "demo", model=model)


def test_a_picture_that_is_not_damaged_has_no_finite_distance(tmp_path, model):
    damages = [Damage("chelsea", "nothing", lambda x, g: x)]
    report = run_restoration_demo(tmp_path, model=model, device="cpu", damages=damages, many=10)
    assert report["pictures"][0]["psnr_degraded"] is None
