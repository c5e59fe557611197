"""What visitors send: either usable, or one sentence without a path."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.serving import VisitorError, painted, shrunk, still_picture, whole_number, words
from diffusers_ext.serving.checks import choice, number, seed_number, within_margins


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(count)]


def bad_uploads(folder: Path) -> dict[str, str]:
    """File -> what is said about it."""
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Image.new("L", (10_000, 10_000)).save(folder / "huge.png")
    first, *rest = frames(3)
    for name in ("moving.gif", "moving.png", "moving.webp"):
        first.save(folder / name, save_all=True, append_images=rest)
    Image.new("RGB", (64, 64), "red").save(folder / "sound.png")
    (folder / "cut.png").write_bytes((folder / "sound.png").read_bytes()[:60])
    return {
        "text.png": "not a picture",
        "empty.png": "is empty",
        "folder.png": "is a folder",
        "drawing.svg": "not a picture",
        "huge.png": "10000x10000 pixels",
        "moving.gif": "is animated",
        "moving.png": "is animated",
        "moving.webp": "is animated",
        "cut.png": "is damaged",
        "nothing.png": "does not exist",
    }


def test_every_bad_upload_is_one_sentence_without_a_path(tmp_path: Path) -> None:
    for name, said in bad_uploads(tmp_path).items():
        with pytest.raises(VisitorError) as caught:
            still_picture(str(tmp_path / name))
        message = str(caught.value)
        assert said in message and message.startswith("The upload ") and message.endswith("."), message
        assert str(tmp_path) not in message and name not in message and "\n" not in message, message


def test_no_upload_and_what_is_no_path_are_named() -> None:
    for nothing in (None, ""):
        with pytest.raises(VisitorError, match="There is no picture yet"):
            still_picture(nothing)
    with pytest.raises(VisitorError, match="not an uploaded file"):
        still_picture({"path": "/etc/passwd"})


def test_a_sound_picture_comes_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(still_picture(tmp_path / "a.png")), pixels)


def test_a_jpeg_with_several_pictures_is_no_animation(tmp_path: Path) -> None:
    first, second = frames(2)
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert still_picture(tmp_path / "phone.jpg").size == (8, 8)


def test_a_mask_is_what_is_not_transparent_or_else_what_is_bright(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    for x, alpha in enumerate((0, 63, 64, 255)):
        layer.putpixel((x, 0), (0, 0, 0, alpha))
    layer.save(tmp_path / "layer.png")
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "grey.png")
    Image.new("RGB", (4, 1), "white").save(tmp_path / "white.png")
    for name, expected in (("layer", [0, 0, 255, 255]), ("grey", [0, 0, 255, 255]), ("white", [255] * 4)):
        mask = painted(tmp_path / f"{name}.png")
        assert mask.mode == "L" and list(mask.tobytes()) == expected, name


def test_the_margins_of_a_canvas_are_found_and_no_other_transparency(tmp_path: Path) -> None:
    canvas = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    canvas.paste((200, 10, 10, 255), (0, 4, 16, 12))
    canvas.save(tmp_path / "wide.png")
    holed = canvas.copy()
    holed.putpixel((8, 8), (0, 0, 0, 0))
    holed.save(tmp_path / "holed.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "sound.png")
    boxes = {name: within_margins(tmp_path / f"{name}.png") for name in ("wide", "holed", "clear", "sound")}
    assert boxes == {"wide": (0, 4, 16, 12), **dict.fromkeys(("holed", "clear", "sound"), (0, 0, 16, 16))}


def test_a_bad_mask_is_answered_as_a_bad_upload_is(tmp_path: Path) -> None:
    for name, said in bad_uploads(tmp_path).items():
        with pytest.raises(VisitorError, match="^The mask ") as caught:
            painted(str(tmp_path / name))
        assert said in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (100, 50)), ((400, 100), (128, 32)), ((1, 4000), (1, 128)), ((128, 128), (128, 128))],
)
def test_a_large_picture_is_scaled_to_the_longer_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shrunk(Image.new("RGB", size), 128).size == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "5", None, [5], 0, 21, 3.7])
def test_what_is_no_whole_number_in_range_is_refused(value: object) -> None:
    with pytest.raises(VisitorError, match="number of steps"):
        whole_number(value, "number of steps", 1, 20)


def test_numbers_in_range_are_returned_in_their_kind() -> None:
    assert whole_number(5.0, "steps", 1, 20) == 5 and isinstance(whole_number(5.0, "steps", 1, 20), int)
    assert number(1, "scale", 0.0, 1.0) == 1.0
    assert seed_number(2**31 - 1) == 2**31 - 1
    with pytest.raises(VisitorError, match="seed"):
        seed_number(2**31)


def test_text_is_trimmed_and_bounded() -> None:
    assert words("  a star ", "prompt") == "a star"
    assert words("", "prompt", empty=True) == ""
    for text, said in ((" ", "is empty"), ("x" * 301, "has 301 characters"), (None, "is not text")):
        with pytest.raises(VisitorError, match=said):
            words(text, "prompt")


def test_a_choice_is_one_of_those_offered() -> None:
    assert choice("a", "method", ("a", "b")) == "a"
    for value in ("c", None, ["a"], {}):
        with pytest.raises(VisitorError, match="not one of a, b"):
            choice(value, "method", ("a", "b"))
