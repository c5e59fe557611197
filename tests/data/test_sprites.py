import colorsys
import json

import numpy as np
import pytest

from diffusers_ext.data.sprites import (
    SHEETS,
    SpriteSheet,
    hsv_to_rgb,
    hue_cluster,
    recolour,
    recolourable,
    rgb_to_hsv,
)
from diffusers_ext.data.words import DEMO_OBJECTS, FAMILIES, OBJECT_COLOURS, OBJECTS


@pytest.fixture(scope="module")
def noto() -> SpriteSheet:
    return SpriteSheet.load()


def test_hsv_agrees_with_the_standard_library():
    rgb = np.random.default_rng(0).random((200, 3))
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in rgb]) * [360.0, 1.0, 1.0]
    np.testing.assert_allclose(rgb_to_hsv(rgb), expected, atol=1e-9)
    np.testing.assert_allclose(hsv_to_rgb(rgb_to_hsv(rgb)), rgb, atol=1e-12)


@pytest.mark.parametrize("colour", OBJECT_COLOURS)
def test_recolouring_moves_the_cluster_to_the_named_colour_and_nothing_else(noto, colour):
    apple = noto.sprites["red-apple"]
    cluster, _ = hue_cluster(apple)
    painted = recolour(apple, colour)
    assert np.array_equal(painted[~cluster], apple[~cluster])
    assert np.array_equal(painted[..., 3], apple[..., 3])
    hue, saturation, _ = OBJECT_COLOURS[colour]
    hsv = rgb_to_hsv(painted[cluster][:, :3] / 255.0)
    if saturation > 0.1:
        distance = np.abs((hsv[:, 0] - hue + 180.0) % 360.0 - 180.0)
        assert np.median(distance) < 12.0
    assert abs(hsv[:, 1].mean() - saturation) < 0.08


def test_an_unknown_colour_is_refused_with_the_palette(noto):
    with pytest.raises(ValueError, match="colour='mauve' is not in the palette; use one of red, orange"):
        recolour(noto.sprites["star"], "mauve")


def test_a_drawing_without_colour_is_left_alone():
    grey = np.full((96, 96, 4), 128, np.uint8)
    assert np.array_equal(recolour(grey, "red"), grey)
    assert not recolourable(grey)


def test_every_demo_object_can_be_recoloured(noto):
    slugs = {word: slug for slug, word in OBJECTS.items()}
    assert all(recolourable(noto.sprites[slugs[word]]) for word in DEMO_OBJECTS)


@pytest.mark.parametrize("vendor", ["noto", "twemoji", "fluent"])
def test_training_vendors_drew_every_object(vendor):
    assert SpriteSheet.load(SHEETS / f"{vendor}.json").objects() == tuple(OBJECTS.values())


def test_families_are_drawn_whole_by_noto(noto):
    assert all(slug in noto.sprites for groups in FAMILIES.values() for group in groups for slug, _ in group)


def test_a_sheet_survives_saving(noto, tmp_path):
    again = SpriteSheet.load(noto.save(tmp_path))
    assert list(again.sprites) == list(noto.sprites) and again.licence == noto.licence == "Apache-2.0"
    assert all(np.array_equal(again.sprites[slug], noto.sprites[slug]) for slug in noto.sprites)


def test_a_missing_or_mismatched_sheet_is_one_sentence(noto, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a sprite sheet; build one with"):
        SpriteSheet.load(tmp_path / "none.json")
    index = noto.save(tmp_path)
    meta = json.loads(index.read_text())
    index.write_text(json.dumps({**meta, "slugs": meta["slugs"][:20]}))
    with pytest.raises(ValueError, match="its index describes 20 sprites"):
        SpriteSheet.load(index)
