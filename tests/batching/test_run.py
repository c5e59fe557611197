"""A batch in one process: what is done is left alone, what failed is listed, what is wrong is said before it runs."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import FlowChefPipeline, MRRestorationPipeline
from diffusers_ext.atomic import remove_unfinished
from diffusers_ext.batching import BatchReport, find_capability, run_batch
from diffusers_ext.batching.capabilities import CAPABILITIES, GUIDED
from diffusers_ext.batching.run import DTYPES
from diffusers_ext.cli import METHODS, main
from diffusers_ext.commands import batch as command
from tests.helpers.tiny_flows import tiny_flow_components
from tests.helpers.tiny_models import tiny_stable_diffusion
from tests.helpers.tiny_restoration import tiny_restoration


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_restoration().save_pretrained(folder / "restore")
    tiny_stable_diffusion().save_pretrained(folder / "edit")
    FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False).save_pretrained(folder / "steer")
    return {name: str(folder / ("edit" if name == "sample" else name)) for name in CAPABILITIES}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in/sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(random.integers(0, 256, (9, 14, 3), dtype=np.uint8)).save(Path("in") / name)
    return Path("in")


def contents(folder: Path | str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def failures(folder: Path | str) -> dict[str, str]:
    lines = (Path(folder) / "failures.jsonl").read_text().splitlines()
    return {line["name"]: line["error"] for line in map(json.loads, lines)}


def test_every_picture_of_a_folder_is_restored_and_keeps_its_settings(
    pictures: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["batch", "restore", "in", "out", "--model", models["restore"], "--device", "cpu", "--set", "strength=0.6"]
    assert main([*words, "--seed", "4"]) == 0
    assert "out  3 done, 0 were there, 0 failed" in capsys.readouterr().out
    assert set(contents("out")) == {
        ".batch.json", "a.json", "a.png", "b.json", "b.png", "sub/c.json", "sub/c.png",
    }  # fmt: skip
    record = json.loads(Path("out/sub/c.json").read_text())
    expected = {
        "file": "sub/c.png", "picture": "c.png", "picture_size": [14, 9], "command": "batch restore",
        "dtype": "float32",
        "settings": {"num_inference_steps": 5, "strength": 0.6, "noise_scale": 0.0}, "network_evaluations": 3,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert record["picture_sha256"] == hashlib.sha256(Path("out/sub/c.png").read_bytes()).hexdigest()
    assert record["inputs_sha256"] == {"file": hashlib.sha256(Path("in/sub/c.png").read_bytes()).hexdigest()}
    # The seed is the documented one, and with the settings it gives the picture again.
    assert record["seed"] == int(hashlib.sha256(b"4/sub/c.png").hexdigest()[:12], 16)
    pipe = MRRestorationPipeline.from_pretrained(models["restore"])
    again = pipe(Image.open("in/sub/c.png"), **record["settings"]).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(Image.open("out/sub/c.png")))


def test_a_second_run_does_only_what_is_missing_damaged_or_changed(pictures: Path, models: dict[str, str]) -> None:
    def run(**more: Any) -> tuple[int, int]:
        report = run_batch("restore", "out", "in", model=models["restore"], device="cpu", **more)
        assert not report.failed and report.is_main
        return report.done, report.skipped

    assert run() == (3, 0) and run() == (0, 3)
    whole = contents("out")
    Path("out/a.json").unlink()
    assert run() == (1, 2)
    Path("out/a.png").write_bytes(whole["a.png"][:-20])
    Path("out/b.json").write_text("{")
    Path("out/sub/c.png").unlink()
    assert run() == (3, 0) and contents("out") == whole
    # Another input of the same name, other settings, another seed, another precision: each is another job.
    Image.new("RGB", (9, 9), "red").save("in/a.png")
    assert run() == (1, 2)
    assert run(settings={"strength": 0.5}) == (3, 0)
    assert run(settings={"strength": 0.5}, seed=1) == (3, 0)
    assert run(settings={"strength": 0.5}, seed=1, dtype="bfloat16") == (3, 0)
    assert run(settings={"strength": 0.5}, seed=1, dtype="bfloat16") == (0, 3)


def test_the_same_model_elsewhere_is_the_same_and_another_one_is_not(
    pictures: Path, models: dict[str, str], tmp_path: Path
) -> None:
    run_batch("restore", "out", "in", model=models["restore"], device="cpu")
    tiny_restoration().save_pretrained(tmp_path / "copy")
    assert run_batch("restore", "out", "in", model=tmp_path / "copy", device="cpu").skipped == 3
    other = tiny_restoration(prediction_type="epsilon")
    other.save_pretrained(tmp_path / "copy")
    assert run_batch("restore", "out", "in", model=tmp_path / "copy", device="cpu").done == 3


def test_bad_inputs_are_listed_and_stop_nothing_and_leave_the_list_once_they_are_good(
    pictures: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = Path("in/a.png").read_bytes()
    Path("in/a.png").write_bytes(b"")
    Path("in/b.png").write_text("words")
    Path("in/cut.png").write_bytes(good[:100])
    Image.new("L", (10_000, 10_000)).save("in/huge.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save("in/moving.gif", save_all=True, append_images=frames[1:])
    Path("elsewhere.png").write_bytes(good)
    Path("in/out.png").symlink_to(Path("elsewhere.png").resolve())
    words = ["batch", "restore", "in", "out", "--model", models["restore"], "--device", "cpu"]
    assert main(words) == 3
    captured = capsys.readouterr()
    assert "1 done, 0 were there, 6 failed" in captured.out and "listed in out/failures.jsonl" in captured.err
    said = failures("out")
    for name, part in {
        "a": "is empty", "b": "not a picture", "cut": "is damaged", "huge": "10000x10000 pixels",
        "moving": "is animated", "out": "leads out of in",
    }.items():  # fmt: skip
        assert part in said[name] and "\n" not in said[name]
    assert list(said) == sorted(said) and set(contents("out")) >= {"sub/c.png", "sub/c.json"}

    Path("in/a.png").write_bytes(good)
    assert main(words) == 3
    assert set(failures("out")) == {"b", "cut", "huge", "moving", "out"} and Path("out/a.png").is_file()
    for name in ("b.png", "cut.png", "huge.png", "moving.gif", "out.png"):
        Path("in", name).unlink()
    capsys.readouterr()
    assert main(words) == 0 and not Path("out/failures.jsonl").exists()
    assert "0 done, 2 were there, 0 failed" in capsys.readouterr().out


def test_a_file_of_the_list_that_is_not_there_fails_and_a_wrong_value_too(
    pictures: Path, models: dict[str, str]
) -> None:
    lines = [{"file": "gone.png"}, {"file": "a.png", "strength": 7}, {"file": "a.png", "name": "good"}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = run_batch("restore", "out", "in", spec="jobs.jsonl", model=models["restore"], device="cpu")
    assert (report.jobs, report.done, report.skipped) == (3, 1, 0)
    said = {line["name"]: line["error"] for line in report.failed}
    assert "does not exist" in said["gone"] and "strength=7" in said["a"] and said == failures("out")


def test_a_picture_that_cannot_be_written_ends_the_run(
    pictures: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("out/a.png cannot be saved: No space left on device")

    monkeypatch.setattr("diffusers_ext.batching.run.write_output", full)
    assert main(["batch", "restore", "in", "out", "--model", models["restore"], "--device", "cpu"]) == 2
    assert "No space left" in capsys.readouterr().err and set(contents("out")) == {".batch.json"}


def test_what_a_network_makes_of_a_job_cannot_end_the_run(
    pictures: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = MRRestorationPipeline.__call__

    def failing(self: Any, image: Image.Image, **more: Any) -> Any:
        if image.getpixel((0, 0)) == Image.open("in/b.png").getpixel((0, 0)):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return call(self, image, **more)

    # Looked at before the call is replaced, since what a job may say is read from its signature.
    kind = find_capability("restore", model=models["restore"])
    monkeypatch.setattr(MRRestorationPipeline, "__call__", failing)
    monkeypatch.setattr("diffusers_ext.batching.run.find_capability", lambda *_, **__: kind)
    report = run_batch("restore", "out", "in", device="cpu")
    assert report.done == 2
    (line,) = report.failed
    assert line["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate" and line["name"] == "b"


def test_an_interrupt_leaves_what_was_finished_and_the_next_run_does_the_rest(
    pictures: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["batch", "restore", "in", "out", "--model", models["restore"], "--device", "cpu"]
    move = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if Path(target).name == "b.png":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_ext.atomic.os.replace", interrupted)
        assert main(words) == 130
    assert "interrupted" in capsys.readouterr().err
    assert set(contents("out")) == {".batch.json", "a.json", "a.png"}
    assert main(words) == 0 and "2 done, 1 were there" in capsys.readouterr().out


def test_a_batch_of_one_gives_what_the_command_for_one_picture_gives(pictures: Path, models: dict[str, str]) -> None:
    words = ["--device", "cpu"]
    mask = Image.new("L", (14, 9), 0)
    mask.paste(255, (0, 0, 7, 9))
    mask.save("in/m.png")
    cases: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
        "restored": ("restore", {}, [], []),
        "guided": ("edit", {"source_prompt": "a", "prompt": "b", "num_inference_steps": 3},
                   ["--source", "a", "--prompt", "b", "--steps", "3"], []),
        "friendly": ("edit", {"source_prompt": "a cat", "prompt": "a dog", "num_inference_steps": 9},
                     ["--source", "a cat", "--prompt", "a dog", "--steps", "9"], ["--method", "edit-friendly"]),
        "small": ("steer", {"task": "upscale", "prompt": "a", "num_inference_steps": 2, "factor": 2},
                  ["--task", "upscale", "--prompt", "a", "--steps", "2", "--factor", "2"], []),
        "led": ("steer",
                {"task": "edit", "prompt": "a", "source_prompt": "b", "mask": "m.png", "num_inference_steps": 2},
                ["--task", "edit", "--prompt", "a", "--source", "b", "--mask", "in/m.png", "--steps", "2"], []),
    }  # fmt: skip
    for name, (capability, job, options, both) in cases.items():
        Path("job.jsonl").write_text(json.dumps({"file": "a.png", "name": name, "seed": 0, **job}))
        of_model = ["--model", models[capability], *words, *both]
        assert main(["batch", capability, "in", "out", "--spec", "job.jsonl", *of_model]) == 0, name
        assert main([capability, "in/a.png", "--output", f"{name}.png", *options, *of_model]) == 0
        assert np.array_equal(np.asarray(Image.open(f"out/{name}.png")), np.asarray(Image.open(f"{name}.png"))), name


def test_pictures_are_sampled_from_a_list_and_each_depends_on_its_own_seed_alone(
    pictures: Path, models: dict[str, str]
) -> None:
    def run(folder: str, *lines: dict[str, Any]) -> BatchReport:
        Path("jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        settings = {"num_inference_steps": 2}
        return run_batch("sample", folder, spec="jobs.jsonl", settings=settings, model=models["sample"], device="cpu")

    first, second = {"name": "x/one", "prompt": "a cat"}, {"name": "two", "prompt": "a dog"}
    bad = {"name": "bad", "prompt": "a", "guidance_scale": "much"}
    report = run("there", first, bad, second)
    assert report.done == 2 and [line["name"] for line in report.failed] == ["bad"]
    assert run("back", second, first).done == 2
    there, back = contents("there"), contents("back")
    assert there.pop("failures.jsonl") and there == back
    assert there["x/one.png"] != there["two.png"]
    # The state of the process's own generator is no setting either.
    torch.manual_seed(12345)
    run("alone", second)
    assert contents("alone")["two.png"] == there["two.png"]


def test_threads_are_set_for_the_run_and_given_back(
    pictures: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        raise ValueError("seen")

    kind = replace(find_capability("restore", model=models["restore"]), call=look)
    monkeypatch.setattr("diffusers_ext.batching.run.find_capability", lambda *_, **__: kind)
    report = run_batch("restore", "out", "in", device="cpu", threads=2)
    assert seen == [2, 2, 2] and len(report.failed) == 3 and torch.get_num_threads() == before


def test_files_that_a_killed_process_had_not_finished_are_removed_and_no_others(
    pictures: Path, models: dict[str, str]
) -> None:
    run_batch("restore", "out", "in", model=models["restore"], device="cpu")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = os.uname().nodename
    host = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    dead = [Path(f"out/.a.png.{host}-{pid}-0123456789abcdef.tmp") for pid in (ended.pid, os.getpid())]
    alive = [
        Path(f"out/.a.png.{host}-{os.getppid()}-0123456789abcdef.tmp"),
        Path(f"out/.a.png.other_{host}-{ended.pid}-0123456789abcdef.tmp"),
        Path("out/.mine.tmp"),
    ]
    for path in (*dead, *alive):
        path.write_text("half")
    assert run_batch("restore", "out", "in", model=models["restore"], device="cpu").skipped == 3
    assert not any(path.exists() for path in dead) and all(path.exists() for path in alive)
    remove_unfinished("out")
    assert all(path.exists() for path in alive)


# -- wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["restore", "nowhere", "out"], "INPUT_FOLDER='nowhere' is not a folder"),
        (["restore", "in/a.png", "out"], "INPUT_FOLDER='in/a.png' is not a folder"),
        (["restore", "in", "in/a.png"], "OUTPUT_FOLDER='in/a.png' is a file"),
        (["restore", "in", "mine"], "OUTPUT_FOLDER='mine' holds files that no batch wrote"),
        (["restore", "in", "in"], "OUTPUT_FOLDER='in' holds the pictures that are read"),
        (["restore", "in/sub", "in"], "OUTPUT_FOLDER='in' holds the pictures that are read"),
        (["restore", "in", "out", "--set", "steps"], "--set 'steps' is not KEY=VALUE"),
        (["restore", "in", "out", "--set", "steps=3"], "use num_inference_steps"),
        (["restore", "in", "out", "--spec", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["restore", "in", "out", "--threads", "0"], "threads=0"),
        (["restore", "in", "out", "--device", "abacus"], "abacus"),
        (["edit", "in", "out"], "source_prompt is missing"),
        (["edit", "in", "out", "--method", "direct", "--set", "inversion_method=ddim"], "inversion_method is not an"),
        (["steer", "in", "out", "--set", "prompt=x"], "task is missing"),
        (["sample", "out", "--spec", "twice.jsonl"], "line 2: it would write a.png like line 1"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_sentence_before_anything_runs(
    pictures: Path, models: dict[str, str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/a.png").write_text("mine")
    Path("twice.jsonl").write_text('{"name": "a", "prompt": "x"}\n{"name": "a", "prompt": "y"}\n')
    before = contents(".")
    assert main(["batch", *words, "--model", models[words[0]]]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert contents(".") == before and not Path("out").exists()


def test_a_model_that_draws_nothing_from_words_is_refused(pictures: Path, models: dict[str, str]) -> None:
    Path("jobs.jsonl").write_text('{"name": "a"}')
    with pytest.raises(ValueError, match="is a MRRestorationPipeline, which draws no pictures from words"):
        run_batch("sample", "out", spec="jobs.jsonl", model=models["restore"])
    with pytest.raises(ValueError, match="name='paint' is not a capability"):
        run_batch("paint", "out", "in")
    with pytest.raises(ValueError, match="method='null-text' has no effect on restore"):
        find_capability("restore", method="null-text")
    with pytest.raises(ValueError, match="method='magic' is not known; use one of guide-and-rescale, "):
        find_capability("edit", method="magic")


def test_several_processes_that_cannot_join_do_not_each_do_everything(
    pictures: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # one process, as before a launch that went wrong
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and Accelerate cannot join them"):
        run_batch("restore", "out", "in", model=models["restore"], device="cpu")
    assert not Path("out").exists()


def test_the_names_of_the_command_are_those_of_the_library() -> None:
    assert tuple(command.WHAT) == CAPABILITIES and command.DTYPES == tuple(DTYPES) and METHODS[0] == GUIDED
