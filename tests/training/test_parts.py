import errno
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_ext import atomic
from diffusers_ext.training.parts import make_in_parts

from .conftest import largest_file


def squares(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"square": rows.double().square()[:, None].expand(-1, 1000)}


def run(file: Path, make=squares, save_seconds: float = 60.0) -> dict[str, torch.Tensor]:
    make_in_parts(
        file, make, lambda made: {"half": made["square"] / 2}, (5, 12), Accelerator(cpu=True), what="squares", size=3,
        save_seconds=save_seconds,
    )  # fmt: skip
    return load_file(file)


def test_rows_come_in_order_and_no_part_reaches_across_an_end(tmp_path: Path):
    asked: list[list[int]] = []

    def make(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.append(rows.tolist())
        return squares(rows)

    found = run(tmp_path / "run" / "file.safetensors", make)
    assert torch.equal(found["half"][:, 0], torch.arange(12).double().square() / 2)
    assert asked == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9, 10], [11]]


@pytest.mark.reliability
def test_a_full_disk_is_named_and_loses_nothing_that_was_kept(tmp_path: Path):
    file, kept = tmp_path / "file.safetensors", ".file.unfinished"

    # of 12 rows of 8 kB each nine can be kept, and the file has no place
    with (
        largest_file(75_000),
        pytest.raises(OSError, match="cannot be saved: File too large; what was there before is"),
    ):
        run(file, save_seconds=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    done = len(load_file(tmp_path / kept)["square"])
    assert done == 8
    made: list[int] = []

    def make(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        made.extend(rows.tolist())
        return squares(rows)

    found = run(file, make)
    assert made == list(range(done, 12)), "nothing is made twice"
    assert torch.equal(found["half"][:, 0], torch.arange(12).double().square() / 2)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_no_space_left_is_said_as_such(tmp_path: Path, monkeypatch):
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", no_space)
    with pytest.raises(
        OSError, match="file.safetensors cannot be saved: No space left on device; what was there before"
    ):
        run(tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="the teacher's samples are not finite; lower teacher_guidance_scale"):
        run(tmp_path / "file.safetensors", lambda rows: {"square": 1.0 / rows.double()})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_rest_of_an_interrupted_run_is_refused(tmp_path: Path):
    (tmp_path / ".file.unfinished").write_bytes(b"half")
    with pytest.raises(ValueError, match="file.unfinished is damaged; remove it to make the squares again"):
        run(tmp_path / "file.safetensors")
