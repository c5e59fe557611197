import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.imaging import open_image
from diffusers_ext.training import pictures
from diffusers_ext.training.data import FolderSource
from diffusers_ext.training.pictures import seems_whole, unreadable_pictures
from diffusers_ext.training.restoration import make_pairs


FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}


def save_picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path, FORMATS[path.suffix[1:]])
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def folder_of(folder: Path, names: list[str], **columns: str) -> Path:
    lines = [json.dumps({"file_name": name, "text": f"picture {i}", **columns}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """25 pictures, of which number 2 is empty, 5 cut off, 7 no picture, 11 not there and 19, held out, cut off."""
    for i in range(25):
        save_picture(tmp_path / f"{i}.{'jpg' if i in (5, 6) else 'png'}", seed=i)
    (tmp_path / "2.png").write_bytes(b"")
    cut(tmp_path / "5.jpg", 0.7)
    (tmp_path / "7.png").write_text("no picture")
    (tmp_path / "11.png").unlink()
    cut(tmp_path / "19.png", 0.9)
    return folder_of(tmp_path, [f"{i}.{'jpg' if i in (5, 6) else 'png'}" for i in range(25)])


@pytest.mark.parametrize("suffix", FORMATS)
def test_whole_pictures_of_every_format_are_readable(tmp_path: Path, suffix: str):
    assert unreadable_pictures([save_picture(tmp_path / f"a.{suffix}")]) == {}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_off_pictures_are_found(tmp_path: Path, suffix: str, share: float):
    whole, path = save_picture(tmp_path / f"whole.{suffix}"), cut(save_picture(tmp_path / f"a.{suffix}"), share)
    assert list(unreadable_pictures([whole, path])) == [1]


def test_most_pictures_are_not_decoded(tmp_path: Path, monkeypatch):
    paths = [save_picture(tmp_path / name) for name in ("a.png", "b.jpg")]
    monkeypatch.setattr(pictures, "open_image", lambda path: pytest.fail(f"{path} was decoded"))
    assert unreadable_pictures(paths) == {}


def test_data_behind_the_end_of_a_jpeg_do_not_make_it_unreadable(tmp_path: Path):
    path = save_picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(10_000))
    assert not seems_whole(path) and unreadable_pictures([path]) == {}


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a device, pipe or socket" in unreadable_pictures([tmp_path / "pipe.png"])[0]


def test_damage_between_intact_ends_of_a_jpeg_is_not_seen_before_it_is_decoded(tmp_path: Path):
    # what the docstring admits; a decoder may make something of it or not
    path = save_picture(tmp_path / "a.jpg")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    assert seems_whole(path) and open_image(path).size == (40, 40)


def test_unreadable_pictures_are_left_out_counted_and_named(spoilt: Path, caplog):
    source = FolderSource(spoilt, seed=0, resolution=16)
    assert list(source.unreadable) == [2, 5, 7, 11, 19]
    assert f"5 of 25 pictures of {spoilt} cannot be read: " in caplog.text
    assert (
        "2.png is empty; " in caplog.text
        and "7.png" in caplog.text
        and "; and 2 more. They are left out" in caplog.text
    )
    assert "--strict makes this an error" in caplog.text and "19.png" not in caplog.text
    drawn = torch.cat([source.draw(step, 1) for step in range(20)])
    assert sorted(drawn.tolist()) == [i for i in range(25) if i not in (2, 5, 7, 11, 19)]
    assert source.images(drawn).shape == (20, 3, 16, 16)


def test_a_picture_does_not_change_its_split_because_another_is_damaged(tmp_path: Path):
    names = [f"{i}.png" for i in range(40)]
    for i, name in enumerate(names):
        save_picture(tmp_path / name, seed=i)
    folder_of(tmp_path, names)
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "39.png").write_bytes(b"")
    source = FolderSource(tmp_path, seed=0, resolution=16)
    assert source.draw(0, 2, "held_out").tolist() == [19, 19]
    assert 19 not in source.draw(0, 37).tolist() and 20 in source.draw(0, 37).tolist()


def test_strict_refuses_the_first_unreadable_picture(spoilt: Path):
    with pytest.raises(
        ValueError, match=r"5 of 25 pictures .* Repair them or remove their lines, or leave out --strict"
    ):
        FolderSource(spoilt, seed=0, resolution=16, strict=True)


def test_a_folder_without_a_readable_picture_is_refused(spoilt: Path):
    folder_of(spoilt, ["2.png", "7.png", "11.png"])
    with pytest.raises(ValueError, match=r"has no training picture that can be read, of 3 .*2.png is empty\); check"):
        FolderSource(spoilt, seed=0, resolution=16)


def test_all_processes_learn_of_what_each_has_found(spoilt: Path, monkeypatch):
    """Each process with its share, one after the other in the place of two at a time."""
    paths = [spoilt / json.loads(line)["file_name"] for line in (spoilt / "metadata.jsonl").read_text().splitlines()]
    alone = unreadable_pictures(paths)
    found: dict[int, dict[int, str]] = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for _ in range(2):
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)

            def gather(shares: list, own: dict[int, str], rank: int = rank) -> None:
                found[rank] = own
                shares[:] = [found.get(0), found.get(1)]

            monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
            answer = unreadable_pictures(paths)
    assert answer == alone and list(answer) == sorted(answer)
    assert set(found[0]) == {2} and set(found[1]) == {5, 7, 11, 19}


def test_pairs_of_which_one_picture_cannot_be_read_are_left_out(spoilt: Path):
    lines = [{"file_name": "0.png", "degraded": "1.png"}, {"file_name": "3.png", "degraded": "2.png"}]
    (spoilt / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source = FolderSource(spoilt, 0, 16, caption_column=None)
    args = Namespace(
        train_data_dir=str(spoilt), seed=0, resolution=16, degraded_column="degraded", degradations=None,
        photograph_share=0.0, strict=False,
    )  # fmt: skip
    pairs = make_pairs(args, source)
    assert source.draw(0, 2).tolist() == [0, 0]
    assert pairs.draw(0, 2)[0].shape == (2, 3, 16, 16)
