from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.training.checkpoints import list_checkpoints

from .conftest import SCRIPTS, exported_digests, killed_after, log_entries, start


Train = Callable[..., Path]
SCRIPT = SCRIPTS / "train_dmd.py"
IN_FLOAT64 = Path(__file__).with_name("float64_run.py")
TWO = SCRIPTS / "configs" / "cpu_2_gloo.yaml"


def finished(script: Path, arguments: list[str], folder: Path, config: Path | None = None) -> Path:
    process = start(script, [*arguments, f"--output_dir={folder}"], config)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("method", ["fdistill", "cdm"])
def test_two_processes_train_on_the_batch_of_one(
    train_dmd: Train, dmd_arguments: list[str], teachers: dict[str, Path], tmp_path: Path, method: str
):
    common = ["--use_lora", "--max_train_steps=1", "--logging_steps=1", "--validation_steps=0", f"--method={method}"]
    if method == "cdm":
        common += [f"--pretrained_teacher_model={teachers['flow']}", "--longest_schedule=3"]
    two = finished(SCRIPT, [*dmd_arguments, *common], tmp_path / "two", TWO)
    one = train_dmd("one", *common, "--train_batch_size=4")
    first, second = (log_entries(run)[0] for run in (one, two))
    for name in ("student_loss", "fake_loss"):
        assert second[name] == pytest.approx(first[name], rel=1e-4)
    ours, theirs = (load_file(run / "checkpoint-1" / "model.safetensors") for run in (one, two))
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    # AdamW divides by the gradient's own size: where that is rounding, so is the direction of a step of 5e-5
    assert apart <= 3 * 2 * 5e-5
    mean = sum(float((ours[name] - theirs[name]).abs().sum()) for name in ours) / sum(v.numel() for v in ours.values())
    assert mean < 1e-6


@pytest.mark.slow
@pytest.mark.reliability
def test_in_float64_two_processes_make_the_update_of_one_to_rounding(dmd_arguments: list[str], tmp_path: Path):
    # an epsilon above rounding, or AdamW would make steps of full length of it
    common = [
        *dmd_arguments, "--use_lora", "--max_train_steps=1", "--fake_update_ratio=1", "--validation_steps=0",
        "--learning_rate=1e-2", "--adam_epsilon=1e-3", "--no-use_ema",
    ]  # fmt: skip
    two = finished(IN_FLOAT64, common, tmp_path / "two", TWO)
    one = finished(IN_FLOAT64, [*common, "--train_batch_size=4"], tmp_path / "one")
    ours, theirs = (load_file(run / "checkpoint-1" / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    assert {value.dtype for name, value in ours.items() if ".lora_" in name} == {torch.float64}
    for player in (".student.", ".fake."):
        moved = [name for name in ours if player in name and ".lora_B." in name]
        assert moved and all(bool(ours[name].any()) for name in moved), "both have made a step from zero"
    apart = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours if ".lora_" in name}
    assert max(apart.values()) <= 1e-12


@pytest.mark.reliability
def test_a_killed_and_resumed_run_has_the_bits_of_an_uninterrupted_one(
    train_dmd: Train, dmd_arguments: list[str], tmp_path: Path
):
    common = [
        "--use_lora", "--learning_rate=1e-3", "--max_train_steps=16", "--checkpointing_steps=3", "--logging_steps=1",
        "--validation_steps=0",
    ]  # fmt: skip
    killed = tmp_path / "killed"
    killed_after(7, SCRIPT, [*dmd_arguments, *common], killed)
    assert 0 < list_checkpoints(killed)[-1][0] < 16 and not (killed / "model_index.json").exists()
    resumed, whole = train_dmd("killed", *common, "--resume_from_checkpoint=latest"), train_dmd("whole", *common)
    assert exported_digests(resumed) == exported_digests(whole)
    names = load_file(whole / "checkpoint-16" / "model.safetensors").keys()
    for part in (".student.", ".fake.", "head."):
        assert any(part in name for name in names), "student, fake score and discriminator are among them"
    assert (whole / "checkpoint-16" / "ema.safetensors").is_file()
