import json

import pytest
import torch
from editing_folder import fitting, read_folder, tensors_of
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (80, 60), "red").save(tmp_path / "wall.png")
    mask = Image.new("L", (80, 60), 0)
    mask.paste(255, (0, 0, 40, 60))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def write(folder, *entries) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")


def entry(**changed):
    return {"file_name": "wall.png", "source_prompt": "a red wall", "prompt": "a blue wall", **changed}


def test_a_folder_is_read_with_and_without_masks(folder):
    write(folder, entry(), entry(mask="mask.png"))
    plain, masked = read_folder(folder)
    assert plain.mask is None and masked.mask.size == (80, 60) and plain.prompt == "a blue wall"


def test_pictures_keep_their_shape_and_get_sides_that_every_method_takes():
    assert fitting((512, 512), 64) == (64, 64)
    assert fitting((800, 600), 512) == (512, 384)
    assert fitting((1000, 10), 64) == (64, 32)


def test_a_mask_is_one_where_the_edit_may_be_and_zero_everywhere_without_one(folder):
    write(folder, entry(mask="mask.png"), entry())
    masked, plain = read_folder(folder)
    image, mask = tensors_of(masked, 64)
    assert image.shape == (1, 3, 64, 64) and mask.shape == (1, 1, 64, 64)
    assert mask[..., :30].min() == 1 and mask[..., 34:].max() == 0
    assert torch.equal(tensors_of(plain, 64)[1], torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "wall.png"}', "line 1 .* has no source_prompt, prompt"),
        ("not json", "line 1 .* is not JSON"),
        ('["wall.png"]', "has no file_name"),
        ("", "holds no line"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


def test_a_mask_of_another_size_is_refused(folder):
    Image.new("L", (10, 10)).save(folder / "small.png")
    write(folder, entry(mask="small.png"))
    with pytest.raises(ValueError, match="the mask is .* pixels"):
        read_folder(folder)


def test_a_folder_without_metadata_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.jsonl"):
        read_folder(tmp_path)


def test_a_folder_is_edited_and_measured(folder, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the feature distance comes with the extra `bench`")
    from editing_folder import edit_folder

    from diffusers_ext.hub import resolve_model

    write(folder, entry(mask="mask.png"))
    output = tmp_path / "out"
    result = edit_folder(folder, resolve_model(), output, steps=2)
    written = json.loads((output / "measures.json").read_text())
    assert written["masks"] == 1 and len(written["methods"]) == 4
    for name, row in written["methods"].items():
        assert row["forward"]["mean"] > 0 and row["psnr_outside"]["mean"] > 5, name
    assert result["settings"]["steps"] == 2
    assert len(list(output.glob("wall-*.png"))) == 4 and (output / "sheet.png").is_file()
