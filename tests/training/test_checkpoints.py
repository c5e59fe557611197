import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from diffusers_ext.training.checkpoints import (
    CheckpointError,
    find_checkpoint,
    latest_complete,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

from .conftest import largest_file


def contents(step: int, size: int = 100) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((size,), float(step))},
        "ema": {"weight": torch.full((size,), -float(step))},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    tensors = {
        "model": {"a.b": torch.randn(2, 3).to(memory_format=torch.contiguous_format), "step": torch.tensor(4.0)}
    }
    folder = save_checkpoint(tmp_path, 12, tensors, {"args": {"seed": 1}})
    loaded, state = load_checkpoint(folder)
    assert folder.name == "checkpoint-12"
    assert torch.equal(loaded["model"]["a.b"], tensors["model"]["a.b"]) and loaded["model"]["step"] == 4.0
    assert state == {"args": {"seed": 1}, "step": 12}


def test_channels_last_weights_keep_their_values(tmp_path: Path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 0, {"model": {"weight": weight}}, {}))
    assert torch.equal(loaded["model"]["weight"], weight)


def test_nothing_in_a_checkpoint_needs_unpickling(tmp_path: Path):
    assert {path.suffix for path in save_checkpoint(tmp_path, 1, contents(1), {}).iterdir()} == {
        ".safetensors",
        ".json",
    }


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    for step in (2, 10, 9, 100):
        save_checkpoint(tmp_path, step, contents(step), {}, total_limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]


def test_an_early_checkpoint_is_not_removed_by_its_own_rotation(tmp_path: Path):
    for step in (10, 20, 5):
        save_checkpoint(tmp_path, step, contents(step), {}, total_limit=2)
    assert 5 in [step for step, _ in list_checkpoints(tmp_path)]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    save_checkpoint(tmp_path, 3, contents(1), {})
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, contents(2), {}))
    assert loaded["model"]["weight"][0] == 2.0
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("victim", ["model.safetensors", "state.json", "manifest.sha256.json"])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_latest_passes_over_a_harmed_checkpoint_with_a_warning(tmp_path: Path, caplog, victim: str, harm: str):
    save_checkpoint(tmp_path, 1, contents(1), {})
    newest = save_checkpoint(tmp_path, 2, contents(2), {})
    if harm == "missing":
        (newest / victim).unlink()
    elif victim == "manifest.sha256.json":
        (newest / victim).write_text("{")
    else:
        damage(newest / victim)
    assert latest_complete(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2 is passed over" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        load_checkpoint(newest)


def test_files_and_foreign_folders_are_no_checkpoints(tmp_path: Path):
    (tmp_path / "checkpoint-7").write_text("")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    assert list_checkpoints(tmp_path) == [] and latest_complete(tmp_path) is None


def test_resume_finds_latest_names_and_paths(tmp_path: Path):
    folder = save_checkpoint(tmp_path, 4, contents(4), {})
    assert find_checkpoint("latest", tmp_path) == folder
    assert find_checkpoint("checkpoint-4", tmp_path) == folder
    assert find_checkpoint(str(folder), tmp_path / "elsewhere") == folder
    assert find_checkpoint("latest", tmp_path / "elsewhere") is None
    with pytest.raises(CheckpointError, match="resume_from_checkpoint='checkpoint-5' does not exist"):
        find_checkpoint("checkpoint-5", tmp_path)


@pytest.mark.reliability
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path):
    save_checkpoint(tmp_path, 1, contents(1), {})
    with largest_file(50_000), pytest.raises(CheckpointError, match="checkpoint-2") as failure:
        save_checkpoint(tmp_path, 2, contents(2, size=100_000), {}, total_limit=1)
    assert failure.value.__cause__.errno in (errno.EFBIG, None)
    assert names(tmp_path) == ["checkpoint-1"]
    assert load_checkpoint(latest_complete(tmp_path))[1]["step"] == 1


@pytest.mark.reliability
def test_a_place_that_cannot_be_written_is_named_in_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run/checkpoint-1") as failure:
        save_checkpoint(tmp_path / "file" / "run", 1, contents(1), {})
    assert "\n" not in str(failure.value)


def save_forever(folder: Path, first: int) -> None:
    for step in range(first, first + 10_000):
        save_checkpoint(folder, step, contents(step, size=20_000), {}, total_limit=2)


@pytest.mark.reliability
def test_twenty_kills_during_saving_always_leave_a_complete_checkpoint(tmp_path: Path):
    rng, context, last = random.Random(0), multiprocessing.get_context("fork"), 0
    save_checkpoint(tmp_path, 0, contents(0), {})
    for _ in range(20):
        worker = context.Process(target=save_forever, args=(tmp_path, last + 1), daemon=True)
        worker.start()
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        tensors, state = load_checkpoint(latest_complete(tmp_path))
        assert state["step"] >= last
        last = state["step"]
        assert set(tensors["model"]["weight"].tolist()) == {float(last)}
        assert set(tensors["ema"]["weight"].tolist()) == {-float(last)}
    assert last > 0
    save_checkpoint(tmp_path, last + 1, contents(last + 1), {}, total_limit=2)
    assert len(list_checkpoints(tmp_path)) == 2


def test_state_must_be_json_and_nothing_is_left_when_it_is_not(tmp_path: Path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, contents(1), {"object": object()})
    assert names(tmp_path) == []
