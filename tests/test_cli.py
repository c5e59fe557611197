"""The command: a picture and its settings, or one sentence and exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_ext
from diffusers_ext.cli import METHODS, main
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.demos.editing import SCENES, DemoScene, describe, run_demo
from diffusers_ext.imaging import fit_square, open_image
from diffusers_ext.inversion import INVERSIONS
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_stable_diffusion, tiny_stable_diffusion_xl


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_stable_diffusion().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def other_family(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "xl"
    tiny_stable_diffusion_xl().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def world() -> EmojiScenes:
    return EmojiScenes(resolution=16, objects=DEMO_OBJECTS)


@pytest.fixture
def picture(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return Path("photo.png")


def run(*words: object) -> int:
    return main([str(word) for word in words])


def edit(picture: object, model: object, *more: object, steps: int = 2) -> int:
    return run("edit", picture, "--source", "a", "--prompt", "b", "--model", model, "--steps", steps, *more)


def test_edit_writes_the_picture_and_every_setting(picture, model, capsys):
    assert edit(picture, model, "--guidance-scale", 3, "--rescale-range", 0.5, 2, "--device", "cpu", steps=4) == 0
    with Image.open("photo-edited.png") as image:
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    report = json.loads(Path("photo-edited.json").read_text())
    expected = {
        "picture": "photo.png",
        "picture_size": [60, 40],
        "edited_size": [IMAGE_SIZE, IMAGE_SIZE],
        "outputs": ["photo-edited.png"],
        "model": model,
        "preset": "edit",
        "source_prompt": "a",
        "prompt": ["b"],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "rescale_range": [0.5, 2.0],
        "guidance_end": 0.6,
        "alignment": "matched",
        "device": "cpu",
    }
    assert expected.items() <= report.items()
    assert report["seconds"] > 0 and report["versions"]["diffusers_ext"] == diffusers_ext.__version__
    # Inversion 4; a first step where nothing differs yet, so 2; one guided step of 4; two plain steps of 2.
    assert report["network_evaluations"] == 4 + 2 + 4 + 2 * 2
    assert sorted(os.listdir()) == ["photo-edited.json", "photo-edited.png", "photo.png"]
    assert "14 network evaluations" in capsys.readouterr().out


def test_the_settings_file_reproduces_the_picture(picture, model):
    assert edit(picture, model, "--guidance-end", 1, "--alignment", "official", "--output", "once.png") == 0
    report = json.loads(Path("once.json").read_text())
    pipe = diffusers_ext.GuideAndRescalePipeline.from_pretrained(model)
    names = "source_prompt prompt num_inference_steps guidance_scale rescale_range guidance_end alignment".split()
    source = fit_square(open_image(picture), report["edited_size"][0])
    again = pipe(image=source, **{name: report[name] for name in names}).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(Image.open("once.png")))


def test_several_prompts_give_numbered_pictures_and_one_settings_file(picture, model, capsys):
    assert edit(picture, model, "--prompt", "c", "--prompt", "", "--output", "new/out.jpg", "--json") == 0
    assert sorted(os.listdir("new")) == ["out-1.jpg", "out-2.jpg", "out-3.jpg", "out.json"]
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("new/out.json").read_text()) and printed["prompt"] == ["b", "c", ""]


@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
def test_an_edit_by_attention_can_be_repeated_from_its_settings_file(picture, model, method):
    prompts = ["--source", "a red cat", "--prompt", "a red dog", "--prompt", "a tan cat"]
    words = ["edit", picture, *prompts, "--model", model, "--steps", 9, "--method", method, "--guidance-scale", 3]
    assert run(*words) == 0
    report = json.loads(Path("photo-edited.json").read_text())
    assert report["method"] == method and report["controller"] == "AttentionReplace" and "preset" not in report
    assert report["skip"] == (1 if method == "edit-friendly" else 0)
    pipe = diffusers_ext.NullTextInversionPipeline.from_pretrained(model)
    names = "source_prompt prompt num_inference_steps guidance_scale inversion_method skip".split()
    controller = diffusers_ext.AttentionReplace(pipe.tokenizer, [report["source_prompt"], *report["prompt"]])
    noise = torch.Generator().manual_seed(report["seed"])
    source = fit_square(open_image(picture), report["edited_size"][0])
    settings = {name: report[name] for name in names}
    again = pipe(image=source, controller=controller, generator=noise, **settings).images
    for image, path in zip(again, report["outputs"], strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_prompts_of_different_lengths_are_refined_and_options_of_the_other_method_are_refused(picture, model, capsys):
    words = ["edit", picture, "--source", "a cat", "--prompt", "a red cat", "--model", model, "--steps", 2]
    assert run(*words, "--method", "negative-prompt") == 0
    assert json.loads(Path("photo-edited.json").read_text())["controller"] == "AttentionRefine"
    capsys.readouterr()
    for option in (
        ["--preset", "stylize"],
        ["--rescale-range", 1, 2],
        ["--guidance-end", 0.5],
        ["--alignment", "matched"],
    ):
        assert run(*words, "--method", "direct", *option) == 2
        assert f"{option[0]} has no effect with --method direct; leave it out" in capsys.readouterr().err


def test_the_methods_of_the_command_are_those_of_the_library():
    assert {name.replace("-", "_") for name in METHODS[1:]} == set(INVERSIONS)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", 0], "num_inference_steps=0"),
        (["--steps", 2000], "num_inference_steps=2000"),
        (["--steps", -1], "num_inference_steps=-1"),
        (["--guidance-scale", "nan"], "guidance_scale=nan"),
        (["--rescale-range", 3, 1], "rescale_range"),
        (["--guidance-end", 2], "guidance_end=2"),
        (["--device", "abacus"], "abacus"),
        (["--output", "out.pdf"], r"\.png"),
        (["--output", "photo.png"], "is the picture itself"),
        (["--model", "no/where/here"], "no/where/here does not exist"),
        (["--model", "nobody/nothing"], "nobody/nothing is neither a folder nor in the local Hub cache"),
        (["--model", "."], "model_index.json is missing"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(picture, model, capsys, more, words):
    assert edit(picture, model, *more) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err) and captured.err.count("\n") == 1 and not captured.out
    assert "Traceback" not in captured.err and os.listdir() == ["photo.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["edit"], "required: PICTURE"),
        (["edit", "photo.png", "--source", "a"], "required: --prompt"),
        (["edit", "photo.png", "--source", "a", "--prompt", "b", "--preset", "sketch"], "invalid choice: 'sketch'"),
        (["edit", "photo.png", "--source", "a", "--prompt", "b", "--steps", "many"], "invalid int value: 'many'"),
        (["edit", "photo.png", "--source", "a", "--prompt", "b", "--guidance", "3"], "unrecognized arguments"),
    ],
)
def test_words_that_are_not_understood_are_named(picture, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(words)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and message in captured.err and captured.err.count("\n") == 1


def test_files_that_are_no_pictures_are_one_sentence(picture, model, capsys):
    Path("words.png").write_text("words")
    for name, words in (("words.png", "not a picture"), ("none.png", "does not exist"), (".", "is a folder")):
        assert edit(name, model) == 2
        assert words in capsys.readouterr().err


def test_a_model_of_another_family_is_one_sentence(picture, other_family, capsys):
    assert edit(picture, other_family) == 2
    error = capsys.readouterr().err
    assert "StableDiffusionXLPipeline" in error and "GuideAndRescalePipeline needs" in error and error.count("\n") == 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "I;16", "1", "CMYK"])
@pytest.mark.parametrize("size", [(33, 47), (1, 1)])
def test_pictures_of_every_mode_and_size_are_edited(tmp_path, monkeypatch, model, mode, size):
    monkeypatch.chdir(tmp_path)
    Image.new(mode, size).save("odd.tiff")
    assert edit("odd.tiff", model, steps=1) == 0
    assert Path("odd-edited.png").is_file()


def test_debug_shows_where_an_error_comes_from(picture, model):
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        edit(picture, model, "--steps", 0, "--debug")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried"), 2, "ran out of memory"),
        (RuntimeError("odd\nthing"), 1, "unexpected RuntimeError: odd thing; --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_nobody_foresaw_is_one_sentence_too(picture, model, monkeypatch, capsys, error, code, words):
    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(diffusers_ext.GuideAndRescalePipeline, "__call__", fail)
    assert edit(picture, model) == code
    captured = capsys.readouterr().err
    assert words in captured and captured.count("\n") == 1 and os.listdir() == ["photo.png"]


def test_the_command_is_quiet_in_a_process_of_its_own(picture, model):
    words = ["edit", "photo.png", "--source", "a", "--prompt", "b", "--model", model, "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_ext.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(diffusers_ext.__file__).parent.parent)},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"diffusers-ext {diffusers_ext.__version__}\n"


def test_demo_scenes_are_in_the_domain_of_the_demo_model_and_change_one_label_each(world):
    prompts = []
    for scene in SCENES:
        source, target = describe(world, scene)
        prompts += world.captions(source) + world.captions(target)
        assert len(target) == len(scene.edits) == 3
        for i, (changed, _) in enumerate(scene.edits):
            differing = [name for name in vars(source) if getattr(source, name)[0] != getattr(target, name)[i]]
            assert differing == [changed]
    assert len(set(prompts)) == 4 * len(SCENES)


def test_a_scene_with_an_unknown_word_is_refused(world):
    scene = DemoScene({"object": "star", "colour": "beige", "background": "blue", "pattern": "plain"}, (), seed=0)
    with pytest.raises(ValueError, match="colour='beige' is not drawn here"):
        describe(world, scene)


def test_demo_writes_a_sheet_one_picture_a_scene_and_the_figures(tmp_path, model):
    report = run_demo(tmp_path / "demo", model=model, steps=4, device="cpu", scenes=SCENES[:2])
    assert sorted(os.listdir(tmp_path / "demo")) == ["01-star.png", "02-heart.png", "demo.json", "sheet.png"]
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == report
    # A scene: inversion 4, reconstruction without guidance 4, and three edits as in the test of `edit`, 10 each.
    assert [scene["network_evaluations"] for scene in report["scenes"]] == [4 + 4 + 3 * 10] * 2
    for scene in report["scenes"]:
        assert all(edit["prompt"] != scene["source_prompt"] for edit in scene["edits"])
        assert all(0 < edit["psnr_unedited"] < 60 for edit in scene["edits"])
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        assert sheet.width > 5 * 192


def test_demo_does_not_write_over_a_file(tmp_path, capsys):
    (tmp_path / "demo").write_text("mine")
    assert run("demo", "--output", tmp_path / "demo") == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "demo").read_text() == "mine"
