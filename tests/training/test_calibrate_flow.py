"""The script that measures a flow for FLAIR, on a model of random weights."""

from pathlib import Path

import pytest
import torch

from diffusers_ext import FLAIRScheduler, FlowChefPipeline
from diffusers_ext.data import DEMO_OBJECTS
from tests.helpers.tiny_flows import tiny_flow_components
from training.calibrate_flow import main, parse_args


SET = "--dataset_name emoji-scenes --vendors noto --objects apple star --resolution 32".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FlowChefPipeline(**tiny_flow_components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


def test_the_table_is_that_of_the_network(model: Path, tmp_path: Path) -> None:
    words = [*SET, "--pretrained_model", str(model), "--output_dir", str(tmp_path / "flair"), "--levels", "3"]
    for run in ("flair", "again"):
        words[words.index("--output_dir") + 1] = str(tmp_path / run)
        main(parse_args([*words, "--num_pictures", "6", "--batch_size", "4"]))
    found, again = (FLAIRScheduler.from_pretrained(tmp_path / run).config for run in ("flair", "again"))
    assert found.velocity_errors == again.velocity_errors and len(found.velocity_errors) == 3
    # The weights are random: v knows neither noise nor data, and |v - (eps - x0)|^2 is |v|^2 + 1 + |x0|^2 without cross terms.
    assert all(1.0 < error < 10.0 for error in found.velocity_errors)


def test_the_velocity_of_the_pipeline_is_that_of_its_unet() -> None:
    parts = tiny_flow_components()
    plain = FlowChefPipeline(**parts, requires_safety_checker=False)
    turned = FlowChefPipeline(**parts, requires_safety_checker=False, velocity="data_minus_noise")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    embeds = plain.encode_prompt(["a", "b"], "cpu", 1, False)[0]
    with torch.no_grad():
        expected = plain.unet(latents, 300.0, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(plain.velocity(latents, 0.3, embeds), expected)
    torch.testing.assert_close(turned.velocity(latents, 0.3, embeds), -expected)


def test_demo_names_the_objects_of_the_demo_models(tmp_path: Path) -> None:
    args = parse_args(
        [
            "--dataset_name",
            "emoji-scenes",
            "--objects",
            "demo",
            "--pretrained_model",
            "x",
            "--output_dir",
            str(tmp_path),
        ]
    )
    assert args.objects == list(DEMO_OBJECTS)


@pytest.mark.parametrize(
    "wrong", [["--levels", "1"], ["--dataset_name", "emoji-scenes", "--train_data_dir", "x"]], ids=str
)
def test_wrong_words_end_in_a_sentence(wrong: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse_args([*SET, "--pretrained_model", "x", "--output_dir", str(tmp_path), *wrong])
    assert "give" in capsys.readouterr().err
