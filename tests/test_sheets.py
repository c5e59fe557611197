"""Contact sheets: everything that was given is on them, and nothing overlaps."""

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.sheets import ACCENT, MARGIN, PAPER, Tile, changed_words, contact_sheet


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == np.array(colour)).all(-1).sum())


def test_every_tile_is_shown_whole_and_square():
    tiles = [[Tile(plain("red"), "a"), Tile(plain("lime"), "b")], [Tile(plain("blue"), "words " * 30)]]
    sheet = contact_sheet(tiles, title="Title", subtitle="one\ntwo", columns=["x", "y"], notes=["n", "m"], tile=50)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert area(sheet, colour) == 50 * 50
    edge = np.concatenate([np.asarray(sheet)[[0, -1]].reshape(-1, 3), np.asarray(sheet)[:, [0, -1]].reshape(-1, 3)])
    assert (edge == np.array(PAPER)).all()


def test_longer_texts_make_a_taller_sheet_never_a_wider_one():
    short = contact_sheet([[Tile(plain("red"), "a")]], tile=64)
    long = contact_sheet([[Tile(plain("red"), "many words " * 20)]], title="Title " * 9, notes=["note " * 40], tile=64)
    assert long.width == short.width and long.height > short.height


def test_texts_left_out_take_no_space():
    bare = contact_sheet([[Tile(plain("red"))]], tile=64)
    assert bare.size == (64 + 2 * MARGIN, 64 + 6 + 2 * MARGIN)


def test_only_changed_words_are_coloured():
    same = contact_sheet([[Tile(plain("white"), "a red star", compare="a red star")]], tile=128)
    changed = contact_sheet([[Tile(plain("white"), "a blue star", compare="a red star")]], tile=128)
    assert area(same, ACCENT) == 0 and area(changed, ACCENT) > 0


@pytest.mark.parametrize(
    ("caption", "compare", "changed"),
    [
        ("a red star", None, [False, False, False]),
        ("a blue star", "a red star", [False, True, False]),
        ("an orange car", "a blue car", [True, True, False]),
        ("a tree on a red dotted background", "a tree on a red background", [False] * 5 + [True, False]),
        ("", "a", []),
    ],
)
def test_changed_words_are_those_the_other_sentence_lacks(caption, compare, changed):
    assert changed_words(caption, compare) == changed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": []}, "no tile"),
        ({"rows": [[], []]}, "no tile"),
        ({"rows": [[Tile(plain("red"))]], "tile": 4}, "tile=4"),
        ({"rows": [[Tile(plain("red"))]], "columns": ["a", "b"]}, "2 headings"),
        ({"rows": [[Tile(plain("red"))]], "notes": ["a", "b"]}, "2 notes"),
    ],
)
def test_what_cannot_be_laid_out_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        contact_sheet(**arguments)
