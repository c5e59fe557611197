import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.text_to_image import new_unet

from .conftest import SCRIPTS, exported_digests, killed_after, losses, start


SCRIPT = SCRIPTS / "train_text_to_image.py"
CONFIGS = SCRIPTS / "configs"
Train = Callable[..., Path]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_trained_folder_is_a_stock_pipeline(train: Train, prediction_type: str):
    folder = train("run", "--max_train_steps=3", f"--prediction_type={prediction_type}")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "_name_or_path" not in index
    assert not any("diffusers_ext" in str(value) for value in index.values())
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = "flow_prediction" if prediction_type == "flow" else prediction_type
    assert pipe.scheduler.config.prediction_type == expected
    images = pipe(
        "a red square", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())


def test_the_exported_weights_are_the_averaged_ones(train: Train):
    folder = train("run", "--max_train_steps=4", "--ema_decay=0.5")
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, average[f"unet.{name}"])
    newest = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert any(not torch.equal(newest[name], value) for name, value in average.items())


def test_training_lowers_the_loss_also_on_cached_latents(train: Train):
    folder = train(
        "run", "--max_train_steps=60", "--cache_latents=23", "--learning_rate=4e-3", "--logging_steps=20",
        "--lr_warmup_steps=5", "--train_batch_size=4", "--prediction_type=v_prediction",
    )  # fmt: skip
    trace = losses(folder)
    assert trace[60] < 0.9 * trace[1]
    assert len(list(folder.glob("latents-*.safetensors"))) == 1


def test_half_precision_export_loads_plainly_and_is_half_the_size(train: Train):
    full, half = train("full", "--max_train_steps=1"), train("half", "--max_train_steps=1", "--export_dtype=fp16")
    name = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(half / name).values()} == {torch.float16}
    assert StableDiffusionPipeline.from_pretrained(half).unet.dtype == torch.float32
    for key, value in load_file(half / name).items():
        assert torch.equal(value, load_file(full / name)[key].half())
    assert str(half) not in (half / "model_index.json").read_text()


def test_a_trained_pipeline_can_be_trained_further(train: Train):
    first = train("first", "--max_train_steps=2")
    second = train(
        "second", f"--pretrained_model_name_or_path={first}", "--max_train_steps=2", "--pretrained_vae", str(first)
    )
    tensors = load_file(second / "checkpoint-2" / "model.safetensors")
    assert all(name.startswith("unet.") for name in tensors), "the text encoder is frozen when fine-tuning"
    name = Path("text_encoder") / "model.safetensors"
    before, after = load_file(first / name), load_file(second / name)
    assert all(torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.parametrize(
    "option",
    [
        ["--noise_coupling=immiscible"],
        ["--noise_coupling=immiscible_knn"],
        ["--noise_coupling=optimal_transport"],
        ["--snr_gamma=1"],
        ["--gradient_accumulation_steps=2"],
    ],
)
def test_options_of_the_objective_change_the_training_and_nothing_else(train: Train, option: list[str]):
    plain, other = train("plain", "--max_train_steps=2"), train("other", "--max_train_steps=2", *option)
    assert exported_digests(plain) != exported_digests(other)
    assert (
        load_file(plain / "checkpoint-2/model.safetensors").keys()
        == load_file(other / "checkpoint-2/model.safetensors").keys()
    )


def test_dropping_every_prompt_makes_captions_meaningless(
    train: Train, text_to_image_arguments: list[str], tmp_path: Path
):
    trained = train("trained", "--max_train_steps=3", "--proportion_empty_prompts=1", "--learning_rate=1e-2")
    words = load_file(trained / "checkpoint-3" / "optimizer.safetensors")
    moved = words["exp_avg.text_encoder.embeddings.token_embedding.weight"].abs().sum(1).nonzero().flatten().tolist()
    assert moved == [0, 1], "only start and end tokens were seen"


def test_a_run_that_is_out_of_time_leaves_a_checkpoint_and_a_pipeline(train: Train):
    folder = train("run", "--max_train_steps=5000", "--max_train_seconds=0.5")
    step = list_checkpoints(folder)[-1][0]
    assert 0 < step < 5000
    assert (folder / "samples" / f"step-{step:07d}.png").is_file() and (folder / "model_index.json").is_file()


def test_the_card_shows_samples_and_settings_and_no_secret(train: Train):
    folder = train("run", "--max_train_steps=1", "--hub_token=hf_secret")
    card = (folder / "README.md").read_text()
    assert "![samples](samples.png)" in card and (folder / "samples.png").is_file()
    assert "| `prediction_type` | `epsilon` |" in card and "library_name: diffusers" in card
    kept = [path for path in folder.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert kept == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--snr_gamma=5", "--prediction_type=flow"], "--snr_gamma is not defined for --prediction_type flow"),
        (["--proportion_empty_prompts=1.5"], "1.5 must lie between 0 and 1"),
        (["--prediction_type=sample"], "invalid choice: 'sample'"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"unet_channels=\[16, 20\] must be multiples of norm_num_groups=16"):
        new_unet((16, 20), 4, 8, 16)
    with pytest.raises(ValueError, match="latents of 6 pixels cannot be halved 2 times"):
        new_unet((16, 16, 16), 4, 6, 16)
    with pytest.raises(ValueError, match="must name two levels or more"):
        new_unet((16,), 4, 8, 16)


@pytest.mark.reliability
def test_a_killed_and_resumed_run_has_the_bits_of_an_uninterrupted_one(
    train: Train, text_to_image_arguments: list[str], tmp_path: Path
):
    common = ["--max_train_steps=60", "--checkpointing_steps=8", "--logging_steps=1", "--validation_steps=20"]
    killed = tmp_path / "killed"
    killed_after(25, SCRIPT, [*text_to_image_arguments, *common], killed)
    assert 0 < list_checkpoints(killed)[-1][0] < 60 and not (killed / "model_index.json").exists()

    assert exported_digests(train("killed", *common, "--resume_from_checkpoint=latest")) == exported_digests(
        train("whole", *common)
    )


@pytest.mark.reliability
def test_two_processes_train_on_the_batch_of_one(train: Train, text_to_image_arguments: list[str], tmp_path: Path):
    common = ["--max_train_steps=3", "--logging_steps=1", "--validation_steps=0"]
    folder = tmp_path / "two"
    options = [*text_to_image_arguments, *common, "--train_batch_size=4", f"--output_dir={folder}"]
    process = start(SCRIPT, options, CONFIGS / "cpu_2_gloo.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]

    one, two = losses(train("one", *common, "--train_batch_size=8")), losses(folder)
    assert two[1] == pytest.approx(one[1], rel=1e-6)
    # later steps sum the same gradients in another order
    assert [two[2], two[3]] == pytest.approx([one[2], one[3]], rel=1e-4)
    StableDiffusionPipeline.from_pretrained(folder)
