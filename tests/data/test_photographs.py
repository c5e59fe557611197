"""The photographs of scikit-image, where it is installed, and the answer where it is not."""

import importlib.util

import pytest
import torch

from diffusers_ext.data import photographs
from diffusers_ext.data.photographs import (
    HELD_OUT_PHOTOGRAPHS,
    PACKAGED_SIDE,
    TRAINING_PHOTOGRAPHS,
    PhotographCrops,
    held_out_crops,
    packaged_crops,
    photograph,
)
from diffusers_ext.imaging import to_tensor


installed = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")


def test_no_photograph_is_both_trained_and_tested_on() -> None:
    assert not set(TRAINING_PHOTOGRAPHS) & set(HELD_OUT_PHOTOGRAPHS)


@installed
@pytest.mark.parametrize("name", [*TRAINING_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS])
def test_a_photograph_is_there_and_in_colour(name: str) -> None:
    picture = photograph(name)
    assert picture.mode == "RGB" and min(picture.size) >= 256


@installed
def test_training_crops_are_repeated_by_their_seed_and_cover_the_photographs() -> None:
    crops = PhotographCrops(32)
    first, second = (crops.draw(6, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (6, 3, 32, 32)
    assert 0.0 <= float(first.min()) and float(first.max()) <= 1.0
    many = crops.draw(64, torch.Generator().manual_seed(0))
    assert len({float(value) for value in many.mean((1, 2, 3))}) > 60


@installed
def test_held_out_crops_are_the_middle_of_each_photograph() -> None:
    crops = held_out_crops(64)
    assert sorted(crops) == ["astronaut", "chelsea", "coffee"]
    assert all(crop.shape == (1, 3, 64, 64) for crop in crops.values())
    with pytest.raises(ValueError, match="size=4096 does not fit"):
        held_out_crops(4096)


@installed
def test_packaged_crops_are_those_of_the_photographs() -> None:
    packaged, fresh = packaged_crops(), held_out_crops(PACKAGED_SIDE)
    assert list(packaged) == list(fresh)
    for name, picture in packaged.items():
        torch.testing.assert_close(to_tensor(picture)[None] / 2 + 0.5, fresh[name], atol=0.5 / 255 + 1e-6, rtol=0)


def test_others_of_unknown_licence_are_refused() -> None:
    with pytest.raises(ValueError, match="name='motorcycle_left.png' is not a photograph of known licence"):
        photograph("motorcycle_left.png")
    with pytest.raises(ValueError, match="size=4 is out of range"):
        PhotographCrops(4)


def test_without_scikit_image_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="comes with scikit-image, which is not installed"):
        photograph("chelsea.png")
