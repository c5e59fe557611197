import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.training.data import EmojiSource, FolderSource

from .conftest import COLOURS


OBJECTS = ["apple", "star", "car", "fish"]


def test_a_folder_source_reads_pictures_and_captions_of_the_same_line(picture_folder: Path):
    source = FolderSource(picture_folder, seed=0, resolution=16)
    items = source.draw(step=0, count=8)
    for image, caption in zip(source.images(items), source.captions(items)):
        colour = torch.tensor(COLOURS[caption.split()[1]]) / 127.5 - 1.0
        assert (image - colour[:, None, None]).abs().amax(0).min() < 0.06, caption
    assert source.images(items).shape == (8, 3, 16, 16)


def test_an_epoch_of_a_folder_holds_every_training_picture_once(picture_folder: Path):
    source = FolderSource(picture_folder, seed=0, resolution=16)
    drawn = torch.cat([source.draw(step, 1) for step in range(23)]).tolist()
    assert sorted(drawn) == [i for i in range(24) if i != 19]
    assert source.draw(0, 2, "held_out").tolist() == [19, 19]


def test_pictures_are_resized_by_their_shorter_side_and_cropped_to_the_centre(tmp_path: Path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "wide.png", "text": "white"}))
    source = FolderSource(tmp_path, seed=0, resolution=8)
    assert source.images(source.draw(0, 1)).mean() > 0.95


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "holds no metadata.jsonl"),
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ('{"file_name": "a.png", "text": "a"}\n{"file": "a.png"}', "line 2 has no column 'file_name'; it has file"),
        ("[]", "line 1 has no column"),
        (
            '{"file_name": "a.png", "text": "a"}\n\n{"file_name": "b.png"}',
            "metadata.jsonl, line 3 has no column 'text'",
        ),
        ('{"file_name": "a.png", "text": null}', "line 1 has no caption: text=None; write one, or remove the line"),
        ('{"file_name": "a.png", "text": " "}', "line 1 has no caption: text=' '; write one, or remove the line"),
        ('{"file_name": "a.png", "text": ["a"]}', r"line 1 has no caption: text=\['a'\]; write one"),
        ('{"file_name": null, "text": "a"}', "line 1 names no picture: file_name=None; give its path"),
    ],
)
def test_faulty_metadata_is_named_with_its_line(tmp_path: Path, lines: str | None, message: str):
    if lines is not None:
        (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path, seed=0)


def test_captions_that_are_not_asked_for_may_be_missing(picture_folder: Path, tmp_path: Path):
    lines = [json.dumps({"file_name": f"{i}.png"}) for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((picture_folder / f"{i}.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = FolderSource(tmp_path, seed=0, resolution=16, caption_column=None)
    assert source.captions(source.draw(0, 2)) == ["", ""]


def test_emoji_scenes_of_a_step_are_always_the_same_and_never_those_of_another():
    source = EmojiSource(seed=1, resolution=32, objects=OBJECTS)
    first, again, other = source.draw(5, 6), source.draw(5, 6), source.draw(6, 6)
    assert torch.equal(source.images(first), source.images(again))
    assert not torch.equal(source.images(first), source.images(other))
    assert source.captions(first, 5) == source.captions(again, 5)


def test_a_slice_of_the_global_batch_is_rendered_as_within_it():
    source = EmojiSource(seed=1, resolution=32, objects=OBJECTS)
    items = source.draw(0, 6)
    torch.testing.assert_close(source.images(items)[2:4], source.images(items[2:4]), atol=1e-6, rtol=0)


def test_the_vocabulary_of_emoji_scenes_covers_its_captions():
    source = EmojiSource(seed=0, resolution=32, vendors=["noto", "twemoji"], objects=OBJECTS)
    known = {word for sentence in source.vocabulary() for word in sentence.split()}
    spoken = {word for caption in source.captions(source.draw(0, 500)) for word in caption.split()}
    assert spoken <= known
    assert {"noto", "style", "striped", "teal"} <= spoken
