import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ext.training.sequences import Segment, SequenceFolder, WindowSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recording of twelve rows: a = t, b = 10 t, c = 100 t."""
    lines = ["c,a,unused,b", *(f"{100 * t},{t},x,{10 * t}" for t in range(12))]
    (tmp_path / "walk.csv").write_text("\n".join(lines) + "\n")
    write_index(tmp_path)
    return tmp_path


def write_index(folder: Path, **changes: object) -> None:
    recording = {"file": "walk.csv", "train": [[0, 4], [4, 8]], "test": [[9, 12]]}
    index = {"frames": ["a", "b"], "condition": ["c"], "frame_rate": 64.0, "recordings": [recording], **changes}
    (folder / "sequences.json").write_text(json.dumps(index))


def test_columns_are_found_by_name_and_rows_by_number(folder: Path):
    data = SequenceFolder(folder)
    first, second = data.segments["train"]
    assert first.frames.tolist() == [[t, 10 * t] for t in range(4)] and first.frames.dtype == torch.float32
    assert second.condition.tolist() == [[100 * t] for t in range(4, 8)]
    (test,) = data.segments["test"]
    assert test.frames[:, 0].tolist() == [9, 10, 11] and data.frame_rate == 64.0


def test_tensors_are_read_like_columns(folder: Path):
    from_csv = SequenceFolder(folder)
    time = torch.arange(12.0)[:, None]
    save_file({"frames": torch.cat([time, 10 * time], 1), "condition": 100 * time}, folder / "walk.safetensors")
    recording = {"file": "walk.safetensors", "train": [[0, 4], [4, 8]], "test": [[9, 12]]}
    write_index(folder, recordings=[recording])
    for split, parts in SequenceFolder(folder).segments.items():
        for part, other in zip(parts, from_csv.segments[split], strict=True):
            assert torch.equal(part.frames, other.frames) and torch.equal(part.condition, other.condition)


def test_a_recording_may_have_no_condition(folder: Path):
    write_index(folder, condition=[])
    data = SequenceFolder(folder)
    assert data.condition_names == [] and data.segments["train"][0].condition is None
    assert set(data.statistics()) == {"frame_mean", "frame_std"}
    assert WindowSource(data.segments["train"], 0, 3).draw(0, 2)[1] is None


def test_statistics_are_those_of_the_training_rows_alone(folder: Path):
    statistics = SequenceFolder(folder).statistics()
    # t = 0 ... 7: mean 3.5, variance (8^2 - 1) / 12
    assert statistics["frame_mean"] == pytest.approx([3.5, 35.0]) and statistics["condition_mean"] == [350.0]
    assert statistics["frame_std"] == pytest.approx([5.25**0.5, 10 * 5.25**0.5])


def test_windows_stay_within_a_segment_and_come_with_their_condition(folder: Path):
    source = WindowSource(SequenceFolder(folder).segments["train"], seed=0, length=3)
    frames, condition = source.draw(0, 64)
    assert frames.shape == (64, 3, 2) and torch.equal(100 * frames[..., :1], condition)
    # two starts in each of the two segments, all equally often
    assert torch.bincount(frames[:, 0, 0].long()).tolist() == [16, 16, 0, 0, 16, 16]
    assert bool((frames[:, 1:, 0] - frames[:, :-1, 0] == 1).all())


def test_windows_are_a_function_of_seed_and_step():
    segments = [Segment(torch.arange(400.0)[:, None], None)]
    draws = [
        WindowSource(segments, seed, 5).draw(step, 4)[0][:, 0, 0].tolist()
        for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))
    ]
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]


def test_a_window_longer_than_all_segments_is_refused():
    with pytest.raises(ValueError, match="has 9 frames, but the longest of the segments has 8 rows"):
        WindowSource([Segment(torch.zeros(8, 1), None)], 0, 9)
    assert WindowSource([Segment(torch.zeros(8, 1), None)], 0, 8).draw(0, 2)[0].shape == (2, 8, 1)


def recordings(**changes: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, recordings=[{"file": "walk.csv", "train": [[0, 4]], **changes}])


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "sequences.json").unlink(), FileNotFoundError, "sequences.json does not exist"),
        (written("sequences.json", "{"), OSError, "sequences.json"),
        (written("sequences.json", "[]"), OSError, "sequences.json"),
        (lambda folder: write_index(folder, frames="a"), ValueError, "frames='a' is not usable"),
        (lambda folder: write_index(folder, frames=["a", "a"]), ValueError, "names a channel twice"),
        (lambda folder: write_index(folder, frames=["a", "d"]), ValueError, "no column 'd'; it has c, a, unused, b"),
        (lambda folder: write_index(folder, frames=["a", "unused"]), ValueError, "row 0: could not convert"),
        (lambda folder: write_index(folder, frame_rate=0), ValueError, "frame_rate=0 is not usable"),
        (lambda folder: write_index(folder, recordings=[]), ValueError, r"recordings=\[\] is not usable"),
        (lambda folder: write_index(folder, recordings=["walk.csv"]), ValueError, "'walk.csv' is no recording"),
        (recordings(file="gone.csv"), FileNotFoundError, "gone.csv does not exist, but sequences.json names it"),
        (recordings(file="sequences.json"), ValueError, "unknown format; use .csv or .safetensors"),
        (recordings(train=[]), ValueError, "no rows to train on"),
        (recordings(train=[[0, 13]]), ValueError, r"train row range \[0, 13\].*within 0 and 12"),
        (recordings(train=[[4, 4]]), ValueError, r"train row range \[4, 4\]"),
        (recordings(train=[0, 4]), ValueError, "train row range 0 of"),
        (recordings(train=4), ValueError, "train=4 of"),
        (recordings(test=[[3, 6]]), ValueError, r"rows \[3, 6\] of walk.csv are in test and, partly, in train"),
        (written("walk.csv", ""), ValueError, "no column 'a'; it has no line"),
        (written("walk.csv", "a,b,c\n"), ValueError, "has no rows"),
        (written("walk.csv", "a,b,c\n1,2,3\n1,2\n"), ValueError, "row 1: list index out of range"),
        (written("walk.csv", "a,b,c\n" + 11 * "1,2,3\n" + "1,nan,3\n"), ValueError, "frames of row 11 is infinite"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(folder: Path, spoil: Callable, error: type[Exception], message: str):
    spoil(folder)
    with pytest.raises(error, match=message):
        SequenceFolder(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"frames": torch.zeros(4, 2)}, r"condition has the shape None; give a tensor of \(4, 1\)"),
        ({"frames": torch.zeros(4, 2), "condition": torch.zeros(3, 1)}, r"condition has the shape \(3, 1\)"),
        ({"frames": torch.zeros(4, 3), "condition": torch.zeros(4, 1)}, r"frames has the shape \(4, 3\)"),
        ({"frames": torch.zeros(0, 2), "condition": torch.zeros(0, 1)}, r"frames has the shape \(0, 2\)"),
        (None, "is no safetensors file"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, tensors: dict | None, message: str):
    write_index(folder, recordings=[{"file": "walk.safetensors", "train": [[0, 4]]}])
    if tensors is None:
        (folder / "walk.safetensors").write_bytes(b"no tensors")
    else:
        save_file(tensors, folder / "walk.safetensors")
    with pytest.raises(ValueError, match=message):
        SequenceFolder(folder)


def test_a_channel_at_rest_cannot_be_brought_to_variance_one(folder: Path):
    (folder / "walk.csv").write_text("a,b,c\n" + "".join(f"{t},7,{t}\n" for t in range(12)))
    with pytest.raises(ValueError, match="channel 'b' never changes"):
        SequenceFolder(folder).statistics()
