import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import MRRestorationPipeline
from diffusers_ext.schedulers import MRScheduler
from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.data import FolderSource
from diffusers_ext.training.restoration import (
    RestorationPairs,
    new_restoration_unet,
    restoration_loss,
    training_timesteps,
)

from .conftest import load_script, log_entries, losses


TINY = [
    "--resolution=16", "--unet_channels", "8", "8", "--layers_per_block=1", "--train_batch_size=4", "--num_threads=1",
    "--report_to=none", "--num_validation_images=2", "--validation_nfes", "1", "2", "--logging_steps=1",
]  # fmt: skip


@pytest.fixture
def train(picture_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs train_mr_restoration.py in this process and returns its folder."""
    script = load_script("train_mr_restoration")

    def run(name: str, *arguments: str) -> Path:
        output_dir = tmp_path / name
        given = [*TINY, f"--train_data_dir={picture_folder}", f"--output_dir={output_dir}", *arguments]
        script.main(script.parse_args(given))
        return output_dir

    return run


def parts(prediction_type: str = "epsilon") -> tuple[MRScheduler, dict[str, torch.Tensor]]:
    """A scheduler, and a batch at two timesteps."""
    scheduler, generator = MRScheduler(prediction_type=prediction_type), torch.Generator().manual_seed(0)
    clean, mean, noise = (torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    timesteps = torch.tensor([20, 90])
    sample = scheduler.add_noise(clean, noise, timesteps, mean)
    return scheduler, {"sample": sample, "clean": clean, "noise": noise, "timesteps": timesteps, "mean": mean}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_loss_is_the_distance_from_the_true_answer(prediction_type: str, norm: str):
    scheduler, batch = parts(prediction_type)
    truth = scheduler.get_target(batch["clean"], batch["noise"], batch["timesteps"], batch["mean"])
    assert float(restoration_loss(scheduler, truth, **batch, norm=norm)) == 0.0
    unit = 1.0 if prediction_type == "epsilon" else scheduler.process.sigma_inf
    off = restoration_loss(scheduler, truth + 0.3 * unit, **batch, norm=norm)
    assert float(off) == pytest.approx(0.3 if norm == "l1" else 0.09, rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_all_heads_alike(prediction_type: str):
    scheduler, batch = parts(prediction_type)
    levels = [scheduler.process.level(float(t)) for t in batch["timesteps"]]
    ratios = [(scheduler.process.sigma_inf * level.alpha / level.sigma) ** 2 for level in levels]
    wrong = batch["clean"] + 0.1
    # an error of 0.1 in the clean picture, said by each head
    alpha, sigma = scheduler._levels(batch["timesteps"], wrong)
    eps = (batch["sample"] - alpha * wrong - (1 - alpha) * batch["mean"]) / sigma
    answer = {"epsilon": eps, "sample": wrong}.get(prediction_type)
    if answer is None:
        answer = scheduler.get_velocity(wrong, eps, batch["timesteps"], batch["mean"])
    expected = np.mean([min(ratio, 5.0) for ratio in ratios]) * (0.1 / scheduler.process.sigma_inf) ** 2
    loss = restoration_loss(scheduler, answer, **batch, snr_gamma=5.0)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_clean_loss_counts_the_error_of_the_clean_picture_alone(prediction_type: str):
    scheduler, batch = parts(prediction_type)
    wrong = batch["clean"] + 0.1
    alpha, sigma = scheduler._levels(batch["timesteps"], wrong)
    eps = (batch["sample"] - alpha * wrong - (1 - alpha) * batch["mean"]) / sigma
    velocity = scheduler.get_velocity(wrong, eps, batch["timesteps"], batch["mean"])
    answer = {"epsilon": eps, "sample": wrong, "v_prediction": velocity}[prediction_type]
    for norm, power in (("l1", 1), ("l2", 2)):
        loss = restoration_loss(scheduler, answer, **batch, kind="clean", norm=norm)
        assert float(loss) == pytest.approx((0.1 / scheduler.process.sigma_inf) ** power, rel=1e-4)
    with pytest.raises(ValueError, match="snr_gamma=5.0 with loss 'clean' would weigh twice"):
        restoration_loss(scheduler, answer, **batch, kind="clean", snr_gamma=5.0)


@pytest.mark.parametrize("start_share", [0.0, 0.5, 0.9])
def test_timesteps_are_even_but_for_the_share_at_the_start(start_share: float):
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    timesteps = training_timesteps(uniform, 100, start_share)
    shares = torch.bincount(timesteps, minlength=101).double() / 100_000
    assert shares[0] == 0 and float(shares[100]) == pytest.approx(start_share + (1 - start_share) / 100, abs=1e-4)
    assert torch.allclose(shares[1:100], torch.full((99,), (1 - start_share) / 100).double(), atol=1e-4)
    assert training_timesteps(torch.tensor([1.0 - 2**-24]), 7, start_share).item() == 7


def test_the_optimum_loss_is_smallest_near_the_true_noise():
    scheduler, batch = parts()
    values = [
        float(restoration_loss(scheduler, scale * batch["noise"], **batch, kind="optimum"))
        for scale in (0.5, 1.0, 1.5)
    ]
    assert values[1] < 0.3 * min(values[0], values[2])
    with pytest.raises(ValueError, match="loss 'optimum' is defined for prediction_type='epsilon'"):
        restoration_loss(MRScheduler(prediction_type="sample"), batch["noise"], **batch, kind="optimum")
    with pytest.raises(ValueError, match="loss 'best' with 'l2' is unknown"):
        restoration_loss(scheduler, batch["noise"], **batch, kind="best")


def test_a_new_network_answers_in_the_size_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(1, 6, 16, 16, generator=generator)
    answers = []
    for scale in (1.0, 0.1):
        torch.manual_seed(3)
        answers.append(new_restoration_unet((8, 8), (1, 1), output_scale=scale)(seen, 5.0).sample / scale)
    torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-5)
    torch.manual_seed(3)
    scaled = new_restoration_unet((8, 8), (1, 1), input_scale=0.5)
    half = torch.cat([0.5 * seen[:, :3], seen[:, 3:]], 1)
    torch.testing.assert_close(scaled(half, 5.0).sample, answers[0], atol=1e-6, rtol=1e-5)


def test_the_trained_folder_loads_and_restores_any_size(train: Callable[..., Path]):
    folder = train("run", "--max_train_steps=3", "--export_dtype=fp16")
    pipe = MRRestorationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is MRScheduler and pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe(Image.new("RGB", (19, 30)), num_inference_steps=2).images[0].size == (19, 30)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    average = load_file(folder / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(value, average[name].half()) for name, value in weights.items())
    entry = log_entries(folder)[-1]
    assert {"psnr_degraded", "psnr_1", "psnr_2", "ssim_1"} <= set(entry)
    assert "| 2 |" in (folder / "README.md").read_text() and (folder / "samples.png").is_file()


def test_resuming_is_exact(train: Callable[..., Path]):
    whole = train("whole", "--max_train_steps=6", "--checkpointing_steps=3", "--checkpoints_total_limit=9")
    part = train("part", "--max_train_steps=6", "--max_train_seconds=0.001", "--checkpointing_steps=3")
    assert list_checkpoints(part)[-1][0] < 6
    train("part", "--max_train_steps=6", "--checkpointing_steps=3", "--resume_from_checkpoint=latest")
    digests = [
        hashlib.sha256((folder / "checkpoint-6" / "ema.safetensors").read_bytes()).hexdigest()
        for folder in (whole, part)
    ]
    assert digests[0] == digests[1]


def test_training_lowers_the_loss(train: Callable[..., Path]):
    folder = train(
        "run", "--max_train_steps=60", "--learning_rate=4e-3", "--logging_steps=20", "--degradations", "noise"
    )
    trace = losses(folder)
    assert trace[60] < 0.8 * trace[1]


def test_given_pairs_are_read_from_a_second_column(picture_folder: Path, tmp_path: Path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i, 90, 90)).save(folder / f"clean-{i}.png")
        Image.new("RGB", (16, 16), (20 * i, 45, 45)).save(folder / f"dark-{i}.png")
        lines.append(json.dumps({"file_name": f"clean-{i}.png", "degraded": f"dark-{i}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    script = load_script("train_mr_restoration")
    output = tmp_path / "run"
    script.main(
        script.parse_args(
            [
                *TINY,
                f"--train_data_dir={folder}",
                f"--output_dir={output}",
                "--degraded_column=degraded",
                "--max_train_steps=1",
            ]
        )
    )
    source, degraded = (FolderSource(folder, 0, 16, column, None) for column in ("file_name", "degraded"))
    clean, mean, how = RestorationPairs(source, 0, None, degraded).draw(0, 4)
    torch.testing.assert_close(mean, clean / 2, rtol=0, atol=0.01)
    assert how == ["given"] * 4


def test_pairs_are_a_function_of_seed_and_step(picture_folder: Path):
    source = FolderSource(picture_folder, 0, 16, "file_name", None)
    first, again = (RestorationPairs(source, 0).draw(3, 8) for _ in range(2))
    assert torch.equal(first[1], again[1]) and first[2] == again[2]
    other = RestorationPairs(source, 0).draw(4, 8)
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--degraded_column=x", "--dataset_name=emoji-scenes"], "give its folder with --train_data_dir"),
        (["--start_share=1", "--dataset_name=emoji-scenes"], "leaves no other timestep"),
        (["--loss_target=clean", "--snr_gamma=5", "--dataset_name=emoji-scenes"], "has weights of its own"),
        (["--loss_target=optimum", "--dataset_name=emoji-scenes"], "defined for --prediction_type epsilon"),
        (["--validation_nfes", "200", "--dataset_name=emoji-scenes"], "--validation_nfes 200 is more than"),
        (["--degradations", "fog", "--dataset_name=emoji-scenes"], "invalid choice: 'fog'"),
        ([], "give exactly one of --dataset_name and --train_data_dir"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        load_script("train_mr_restoration").parse_args(["--output_dir=run", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err
