"""A list of jobs: either every line has an output of its own, or one sentence says which lines are wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusers_ext.batching import Fields, Job, SpecError, folder_jobs, read_spec, seed_for
from diffusers_ext.batching.records import digest


FIELDS = Fields(
    owner="PaintPipeline",
    arguments=frozenset({"prompt", "num_inference_steps", "timesteps", "strength"}),
    files=("file", "mask"),
    required=("prompt",),
    defaults={"strength": 1.0},
)
DRAWING = Fields(owner="DrawPipeline", arguments=frozenset({"prompt"}), required=("prompt",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(b"")
    return tmp_path / "in"


def spec(folder: Path, *lines: Any) -> Path:
    path = folder.parent / "jobs.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_line_becomes_a_job_with_its_own_settings_over_those_of_all(folder: Path) -> None:
    path = spec(
        folder,
        {"file": "a.png", "prompt": "a cat", "seed": 3},
        "",
        {"file": "sub/b.jpg", "name": "b/one", "prompt": "a dog", "strength": 0.5, "mask": "m.png"},
    )
    first, second = read_spec(path, FIELDS, folder, settings={"num_inference_steps": 4})
    assert first == Job("a", 3, {"file": "a.png"}, {"prompt": "a cat", "num_inference_steps": 4, "strength": 1.0})
    assert second.name == "b/one" and second.files == {"file": "sub/b.jpg", "mask": "m.png"}
    assert second.settings["strength"] == 0.5 and second.seed == seed_for(0, "sub/b.jpg")


def test_a_byte_order_mark_and_windows_line_ends_are_understood(folder: Path) -> None:
    path = folder.parent / "jobs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"file": "a.png", "prompt": "\xc3\xa4"}\r\n\r\n{"file": "b.png", "prompt": ""}\r\n')
    assert [job.settings["prompt"] for job in read_spec(path, FIELDS, folder)] == ["ä", ""]


def test_a_seed_depends_on_the_run_and_the_name_and_on_no_order(folder: Path) -> None:
    lines = [{"file": f"{i}.png", "prompt": "x"} for i in range(50)]
    jobs = {job.name: job.seed for job in read_spec(spec(folder, *lines), FIELDS, folder, seed=5)}
    again = {job.name: job.seed for job in read_spec(spec(folder, *lines[::-1]), FIELDS, folder, seed=5)}
    other = {job.name: job.seed for job in read_spec(spec(folder, *lines), FIELDS, folder, seed=6)}
    assert jobs == again and len({*jobs.values(), *other.values()}) == 100
    assert all(0 <= seed < 2**48 for seed in jobs.values())
    (drawn,) = read_spec(spec(folder, {"name": "a", "prompt": "x"}), DRAWING)
    assert drawn.seed == seed_for(0, "a")


WRONG = {
    "no JSON": ("{file: 1}", "line 1: it is not JSON"),
    "no object": ([1], "line 1: it holds a list, not an object"),
    "a key twice": ('{"file": "a.png", "prompt": "x", "prompt": "y"}', "prompt is there twice"),
    "not a number": ('{"file": "a.png", "prompt": "x", "strength": NaN}', "NaN is not a number of JSON"),
    "an unknown key": ({"file": "a.png", "prompt": "x", "stepz": 1}, "stepz is not an argument of PaintPipeline"),
    "a short name": ({"file": "a.png", "prompt": "x", "steps": 1}, "use num_inference_steps"),
    "no file": ({"prompt": "x"}, "line 1: file is missing"),
    "no prompt": ({"file": "a.png"}, "line 1: prompt is missing"),
    "several prompts": ({"file": "a.png", "prompt": ["x", "y"]}, "prompt=['x', 'y'] is not text"),
    "a number for a file": ({"file": 3, "prompt": "x"}, "file=3 is not the name of a file"),
    "above the folder": ({"file": "../outside.png", "prompt": "x"}, "file='../outside.png' leads out"),
    "above and back": ({"file": "sub/../a.png", "prompt": "x"}, "leads out of its folder"),
    "from the root": ({"file": "/etc/passwd", "prompt": "x"}, "file='/etc/passwd' leads out"),
    "a mask above": ({"file": "a.png", "mask": "../outside.png", "prompt": "x"}, "mask='../outside.png' leads out"),
    "a link out": ({"file": "link.png", "prompt": "x"}, "link.png leads out of"),
    "an output above": ({"file": "a.png", "name": "../x", "prompt": "x"}, "name='../x' leads out"),
    "an output hidden": ({"file": "a.png", "name": "b/.x", "prompt": "x"}, "begins with a full stop"),
    "an output too long": ({"file": "a.png", "name": "x" * 121, "prompt": "x"}, "longer than 120 bytes"),
    "an odd output": ({"file": "a.png", "name": "x//y", "prompt": "x"}, "not a plain path"),
    "a control character": ({"file": "a.png", "name": "x\ny", "prompt": "x"}, "not a plain path"),
    "a seed below": ({"file": "a.png", "prompt": "x", "seed": -1}, "seed=-1 is not a whole number"),
    "a seed that is true": ({"file": "a.png", "prompt": "x", "seed": True}, "seed=True is not a whole number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_with_the_cure(folder: Path, case: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    line, said = WRONG[case]
    with pytest.raises(SpecError, match=re.escape(said)):
        read_spec(spec(folder, line), FIELDS, folder)


def test_all_wrong_lines_are_said_at_once_up_to_five(folder: Path) -> None:
    with pytest.raises(SpecError, match="line 1: .*; line 3: ") as caught:
        read_spec(spec(folder, {}, {"file": "a.png", "prompt": "x"}, "no"), FIELDS, folder)
    assert "more" not in str(caught.value)
    with pytest.raises(SpecError, match="and 4 more"):
        read_spec(spec(folder, *[{}] * 9), FIELDS, folder)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a", "b", "a"), "line 3: it would write a.png like line 1"),
        (("a", "A"), "line 2: it would write A.png like line 1"),
        (("a", "a.png/b"), "line 2: a.png/b needs a folder where line 1 writes a file"),
        (("failures.jsonl/b",), "needs a folder where the list of failures"),
    ],
    ids=str,
)
def test_two_jobs_never_write_the_same_file(folder: Path, names: tuple[str, ...], said: str) -> None:
    lines = [{"file": "a.png", "name": name, "prompt": "x"} for name in names]
    with pytest.raises(SpecError, match=re.escape(said)):
        read_spec(spec(folder, *lines), FIELDS, folder)


def test_a_list_that_holds_nothing_or_is_none_is_said(folder: Path) -> None:
    with pytest.raises(SpecError, match="holds no job"):
        read_spec(spec(folder, "", " "), FIELDS, folder)
    with pytest.raises(OSError, match="nowhere.jsonl cannot be read: No such file"):
        read_spec("nowhere.jsonl", FIELDS, folder)
    (folder / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not text in UTF-8"):
        read_spec(folder / "bytes", FIELDS, folder)
    with pytest.raises(SpecError, match="line 1: name is missing"):
        read_spec(spec(folder, {"prompt": "x"}), DRAWING)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 1}, "--set seed=... cannot be the same for all jobs; give --seed"),
        ({"name": "a"}, "--set name=... cannot be the same"),
        ({"steps": 1}, "--set steps=...: steps is not an argument"),
        ({"prompt": 3}, "--set prompt=...: prompt=3 is not text"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_all_jobs_is_said_once(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        read_spec(spec(folder, {"file": "a.png", "prompt": "x"}), FIELDS, folder, settings=settings)


def test_a_folder_gives_a_job_for_each_picture_in_it_in_the_order_of_names(folder: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", "words.txt", "m.png", "out/old.png", ".git/d.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name, format="PNG")
    settings = {"prompt": "x", "mask": "m.png"}
    jobs = folder_jobs(folder, FIELDS, settings=settings, without=[folder / "out"])
    assert [(job.name, job.files["file"]) for job in jobs] == [("a", "a.JPG"), ("b", "b.png"), ("sub/c", "sub/c.webp")]
    assert all(job.files["mask"] == "m.png" and job.settings == {"prompt": "x", "strength": 1.0} for job in jobs)


def test_a_folder_that_cannot_be_a_list_is_said(folder: Path) -> None:
    with pytest.raises(SpecError, match="holds no picture"):
        folder_jobs(folder, FIELDS, settings={"prompt": "x"})
    with pytest.raises(SpecError, match="prompt is missing; give it with --set prompt="):
        folder_jobs(folder, FIELDS)
    for name in ("a.png", "a.jpg"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(SpecError, match=r"a\.png: it would write a\.png like a\.jpg.*or name the outputs with --spec"):
        folder_jobs(folder, FIELDS, settings={"prompt": "x"})


def test_the_digest_changes_with_everything_that_changes_the_picture_and_with_nothing_else() -> None:
    setup = {"command": "batch edit", "model_sha256": "1", "dtype": "float32"}
    job = Job("a", 3, {"file": "a.png"}, {"prompt": "x", "strength": 1.0})
    inputs = {"file": "00"}
    plain = digest(setup, job, inputs)
    changed = [
        digest({**setup, "dtype": "float16"}, job, inputs),
        digest(setup, Job("a", 4, job.files, job.settings), inputs),
        digest(setup, Job("a", 3, job.files, {**job.settings, "prompt": "y"}), inputs),
        digest(setup, job, {"file": "01"}),
    ]
    assert len({plain, *changed}) == 5
    # The order of keys is no setting, nor is what a file is called.
    turned = {"strength": 1.0, "prompt": "x"}
    assert digest(dict(reversed(setup.items())), Job("b", 3, {"file": "b.png"}, turned), inputs) == plain
