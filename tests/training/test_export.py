from argparse import Namespace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from diffusers_ext.training import export

from .conftest import largest_file


def write_parts(text: str):
    def write(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text(text)
        (folder / "model_index.json").write_text(text)

    return write


def test_a_model_is_installed_beside_the_files_of_the_run(tmp_path: Path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    export.install_model(write_parts("one"), tmp_path)
    export.install_model(write_parts("two"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-5",
        "log.jsonl",
        "model_index.json",
        "unet",
    ]
    assert (tmp_path / "unet" / "weights").read_text() == (tmp_path / "model_index.json").read_text() == "two"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("out of memory")])
def test_a_model_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, error: Exception):
    export.install_model(write_parts("one"), tmp_path)

    def failing(folder: Path) -> None:
        write_parts("two")(folder)
        raise error

    with pytest.raises(type(error), match="No space left on device|out of memory"):
        export.install_model(failing, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "unet"]
    assert (tmp_path / "unet" / "weights").read_text() == "one"


@pytest.mark.reliability
def test_a_disk_that_is_too_full_for_the_weights_leaves_the_model_before(tmp_path: Path):
    def weights(value: float, size: int):
        def write(folder: Path) -> None:
            save_file({"weight": torch.full((size,), value)}, folder / "weights.safetensors")
            (folder / "model_index.json").write_text("{}")

        return write

    export.install_model(weights(1.0, 10), tmp_path)
    # safetensors has an error of its own for it
    with (
        largest_file(50_000),
        pytest.raises(OSError, match=f"the model could not be saved in {tmp_path}: .*too large"),
    ):
        export.install_model(weights(2.0, 100_000), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "weights.safetensors"]
    assert load_file(tmp_path / "weights.safetensors")["weight"].tolist() == [1.0] * 10


def test_an_output_folder_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="the model could not be saved in .*taken"):
        export.install_model(write_parts("one"), tmp_path / "taken")


def test_a_grid_is_filled_row_by_row():
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    sheet = export.picture_grid(colours[:, :, None, None].expand(3, 3, 4, 6), columns=2)
    assert sheet.size == (12, 8)
    corners = [sheet.getpixel(place) for place in [(0, 0), (11, 0), (0, 7), (11, 7)]]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_a_card_is_valid_and_written_without_asking_the_hub(tmp_path: Path):
    args = Namespace(seed=3, hub_token="hf_secret", output_dir="somewhere", snr_gamma=None)
    export.write_card(tmp_path, "my-model", "What it is.", args, ["text-to-image"], license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.tags == ["text-to-image"]
    assert "| `seed` | `3` |" in card.text and "# my-model" in card.text
    assert "secret" not in card.text and "somewhere" not in card.text and "snr_gamma" not in card.text


def test_only_the_model_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = {}
    monkeypatch.setattr(export, "create_repo", lambda name, **rest: Namespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(export, "upload_folder", lambda **rest: calls.update(rest) or "https://hub/commit")
    args = Namespace(hub_model_id=None, output_dir=str(tmp_path / "my-model"), hub_token="token")
    assert export.push_folder(args) == "https://hub/commit"
    assert calls["repo_id"] == "me/my-model" and calls["token"] == "token"
    present = [
        "README.md", "model_index.json", "samples.png", "unet/config.json", "checkpoint-5/model.safetensors", "log.jsonl",
        "logs/training/events", "latents-0a.safetensors", "accepted-0a.safetensors", "samples/step-1.png",
        ".model-x/unet/config.json",
    ]  # fmt: skip
    sent = list(filter_repo_objects(present, ignore_patterns=calls["ignore_patterns"]))
    assert sent == ["README.md", "model_index.json", "samples.png", "unet/config.json"]
