"""What commands write is there whole or not at all."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.reports import save_image, versions, write_json


def test_a_picture_survives_the_trip_to_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = save_image(Image.fromarray(pixels), tmp_path / "new" / "out.PNG")
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")])
def test_the_ending_decides_the_format(tmp_path, suffix, kind):
    with Image.open(save_image(Image.new("RGB", (8, 8)), tmp_path / f"out{suffix}")) as image:
        assert image.format == kind


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.svg"])
def test_an_unknown_ending_writes_nothing(tmp_path, name):
    with pytest.raises(ValueError, match=r"ends in \.png, \.jpg"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "folder" / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = write_json({"a": 1}, tmp_path / "report.json")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="report.json cannot be saved: No space left on device"):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_json_holds_only_what_other_readers_understand(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json({"psnr": float("nan")}, tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_versions_are_named():
    assert set(versions()) == {"diffusers_ext", "diffusers", "torch", "python"} and all(versions().values())
