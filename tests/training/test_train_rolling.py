import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
from diffusers_ext.training.checkpoints import list_checkpoints

from .conftest import load_script, log_entries, losses


TINY = [
    "--window_length=8", "--context_length=3", "--num_layers=1", "--num_attention_heads=2", "--attention_head_dim=8",
    "--train_batch_size=4", "--num_threads=1", "--report_to=none", "--logging_steps=1", "--num_validation_samples=2",
    "--num_validation_frames=40", "--condition_noise=0.1", "--amplitude_jitter=0.1", "--inertia_weight=0.1",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recording of 260 rows: two joints that swing as two sensors say, far from mean 0 and variance 1."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for t in range(260):
        u, v = math.sin(0.4 * t), math.cos(0.4 * t)
        rows.append(f"{500 + 100 * u},{20 * v},{1000 + 50 * (u + v)},{3 * (u - v)}")
    (folder / "walk.csv").write_text("\n".join(["hip,knee,ankle,foot", *rows]))
    recording = {"file": "walk.csv", "train": [[0, 200]], "test": [[200, 260]]}
    index = {"frames": ["hip", "knee"], "condition": ["ankle", "foot"], "recordings": [recording]}
    (folder / "sequences.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs train_rolling.py in this process and returns its folder."""
    script = load_script("train_rolling")

    def run(name: str, *arguments: str) -> Path:
        output_dir = tmp_path / name
        script.main(script.parse_args([*TINY, f"--train_data_dir={data}", f"--output_dir={output_dir}", *arguments]))
        return output_dir

    return run


def test_the_trained_folder_loads_and_streams_in_the_units_of_the_recording(train: Callable[..., Path]):
    folder = train("run", "--max_train_steps=3", "--export_dtype=fp16", "--ladder_curriculum", "1", "2")
    pipe = RollingLadderPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    assert config.frame_mean == pytest.approx([500, 0], abs=5) and config.frame_std == pytest.approx([71, 14], rel=0.1)
    assert config.condition_mean == pytest.approx([1000, 0], abs=5)
    assert type(pipe.scheduler) is RollingLadderScheduler and pipe.scheduler.config.ladder_step == 2
    raw = itertools.repeat([1000.0, 0.0], 60)
    frames = torch.cat(list(pipe.stream(raw, generator=torch.Generator().manual_seed(0))), 1)
    assert frames.shape == (1, 60, 2)
    # an untrained network makes noise of about variance 1, in units of the recording
    assert frames[..., 0].mean().item() == pytest.approx(500, abs=150)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    average = load_file(folder / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(value, average[name].half()) for name, value in weights.items())
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_validation_leaves_numbers_a_plot_and_a_card(train: Callable[..., Path]):
    folder = train("run", "--max_train_steps=2", "--validation_steps=1", "--ladder_curriculum", "1", "2")
    entry = log_entries(folder)[-1]
    wanted = {f"{name}_{ladder}" for name in ("r2_of_mean", "r2", "jitter") for ladder in (1, 2)} | {"seam_2"}
    assert wanted <= set(entry) and all(math.isfinite(entry[name]) for name in wanted)
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-0000001.png", "step-0000002.png"}
    card = (folder / "README.md").read_text()
    assert f"| 2 | {entry['r2_of_mean_2']:.3f} |" in card and "hip, knee from ankle, foot" in card
    assert (folder / "samples.png").read_bytes() == (folder / "samples" / "step-0000002.png").read_bytes()


def test_resuming_is_exact(train: Callable[..., Path]):
    every = [
        "--max_train_steps=6",
        "--checkpointing_steps=2",
        "--ladder_curriculum",
        "1",
        "2",
        "--short_context_share=1",
    ]
    whole = train("whole", *every, "--checkpoints_total_limit=9")
    part = train("part", *every, "--max_train_seconds=0.0001")
    assert list_checkpoints(part)[-1][0] < 6
    train("part", *every, "--resume_from_checkpoint=latest")
    for name in ("ema", "model", "optimizer"):
        digests = [
            hashlib.sha256((folder / "checkpoint-6" / f"{name}.safetensors").read_bytes()).hexdigest()
            for folder in (whole, part)
        ]
        assert digests[0] == digests[1], name


def test_batches_are_the_same_ahead_and_when_needed(train: Callable[..., Path]):
    runs = [train(f"workers-{n}", "--max_train_steps=4", f"--dataloader_num_workers={n}") for n in (0, 1)]
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_training_lowers_the_loss(train: Callable[..., Path], prediction_type: str):
    folder = train(
        "run", "--max_train_steps=60", "--learning_rate=5e-3", "--logging_steps=20", f"--prediction_type={prediction_type}",
        "--condition_noise=0", "--amplitude_jitter=0", "--context_timestep=0", "--lr_warmup_steps=5",
    )  # fmt: skip
    trace = losses(folder)
    assert trace[60] < 0.8 * trace[1]
    config = RollingLadderPipeline.from_pretrained(folder).scheduler.config
    assert config.prediction_type == prediction_type and config.context_timestep == 0


def test_a_network_is_trained_for_a_lookahead(train: Callable[..., Path]):
    # The way of a condition into the network begins at 0 and first matters in the third step.
    plain = train("plain", "--max_train_steps=4")
    whole = train("whole", "--max_train_steps=4", "--lookahead", "8")
    near = train("near", "--max_train_steps=4", "--lookahead", "2", "8")
    assert losses(whole) == losses(plain) != losses(near)
    assert "pipe.stream(condition, lookahead=2)" in (near / "README.md").read_text()
    pipe = RollingLadderPipeline.from_pretrained(near)
    pipe.set_progress_bar_config(disable=True)
    raw = itertools.repeat([1000.0, 0.0], 20)
    assert torch.cat(list(pipe.stream(raw, lookahead=2)), 1).shape == (1, 20, 2)


def test_a_model_without_condition_is_trained_and_streams(train: Callable[..., Path], data: Path):
    index = json.loads((data / "sequences.json").read_text())
    (data / "sequences.json").write_text(json.dumps({**index, "condition": []}))
    folder = train("run", "--max_train_steps=2")
    pipe = RollingLadderPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_frames=5).frames.shape == (1, 5, 2)
    assert "r2_1" not in log_entries(folder)[-1]


def test_a_trained_model_is_fine_tuned_in_its_own_units(train: Callable[..., Path], data: Path):
    first = train("first", "--max_train_steps=2")
    (data / "walk.csv").write_text((data / "walk.csv").read_text().replace("\n5", "\n6"))
    second = train("second", "--max_train_steps=1", f"--pretrained_model_name_or_path={first}")
    configs = [RollingLadderPipeline.from_pretrained(folder).transformer.config for folder in (first, second)]
    assert configs[0].frame_mean == configs[1].frame_mean
    index = json.loads((data / "sequences.json").read_text())
    (data / "sequences.json").write_text(json.dumps({**index, "frames": ["hip"]}))
    with pytest.raises(ValueError, match="the pretrained network has in_channels=2, the data 1"):
        train("third", "--max_train_steps=1", f"--pretrained_model_name_or_path={first}")


def test_rows_that_cannot_be_measured_are_refused_before_training(train: Callable[..., Path], data: Path):
    lines = (data / "walk.csv").read_text().splitlines()
    lines[201:] = [",".join(["500", *line.split(",")[1:]]) for line in lines[201:]]
    (data / "walk.csv").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="the first 40 test rows cannot be measured: recording of shape .* has the channel 0"
    ):
        train("run", "--max_train_steps=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ladder_curriculum", "1", "3"], "ladder_step=3 does not divide window_length=8; use one of 1, 2, 4, 8"),
        (["--ladder_curriculum", "2", "1"], "does not ascend"),
        (["--validation_ladders", "5"], "ladder_step=5 does not divide window_length=8"),
        (["--inertia_weight=0.7"], "--inertia_weight 0.7 is more than 0.5"),
        (["--lookahead", "4", "9"], "lookahead=9 is not usable; use numbers from 1, the longest ladder step, to 8"),
        (["--context_timestep=2000"], "context_timestep=2000.0 is out of range"),
        (["--prediction_type=sample", "--flow_shift=0.5"], "--flow_shift is of flow models"),
        (["--prediction_type=sample", "--context_timestep=0.5"], "context_timestep=0.5 is not whole"),
        (["--prediction_type=epsilon"], "invalid choice: 'epsilon'"),
        (["--train_data_dir=nowhere"], "--train_data_dir nowhere does not exist"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
):
    given = [*TINY, "--output_dir=run", f"--train_data_dir={data}", *arguments]
    with pytest.raises(SystemExit) as caught:
        load_script("train_rolling").parse_args(given)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_lookahead_of_data_without_condition_is_refused(train: Callable[..., Path], data: Path):
    index = json.loads((data / "sequences.json").read_text())
    (data / "sequences.json").write_text(json.dumps({**index, "condition": []}))
    with pytest.raises(ValueError, match=r"lookahead=\[2\] is of conditions, of which .* has none; leave it out"):
        train("run", "--max_train_steps=1", "--lookahead", "2")


def test_a_file_in_the_place_of_the_run_is_refused(data: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load_script("train_rolling").parse_args([f"--train_data_dir={data}", f"--output_dir={data / 'walk.csv'}"])
    assert "walk.csv is a file; give a folder" in capsys.readouterr().err
