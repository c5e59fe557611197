import json
import math
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn

from diffusers_ext.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint
from diffusers_ext.training.data import prefetched
from diffusers_ext.training.ema import WeightAverage
from diffusers_ext.training.rates import learning_rate_factor
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, TrainingDivergedError, make_accelerator

from .conftest import largest_file, losses


Settings = Callable[..., Namespace]


class Line(nn.Module):
    """y = w x + b, with dropout to show that it is reproduced too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.dropout(x))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def no_validation(step: int) -> tuple[dict[str, float], None]:
    return {}, None


def fit(args: Namespace, loss: Callable = loss_of) -> Trainer:
    trainer = Trainer(args, Accelerator(cpu=True), Line())

    def make_batches(step: int) -> list[torch.Tensor]:
        x = torch.randn(trainer.global_batch_size, 4, generator=stream(args.seed, step, "x"))
        return [x[rows] for rows in trainer.own_rows()]

    trainer.fit(make_batches, loss, no_validation)
    return trainer


def test_rate_rises_stays_and_falls():
    rate = [learning_rate_factor(step, 100, "linear", warmup=10, decay_fraction=0.3) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9:71] == [1.0] * 62
    assert rate[85] == pytest.approx(0.5) and rate[99] == pytest.approx(1 / 30)


def test_cosine_falls_to_the_given_end():
    rate = [learning_rate_factor(step, 1000, "cosine", end=0.03) for step in (0, 500, 999)]
    assert rate == pytest.approx([1.0, 0.515, 0.03], abs=1e-4)


def test_constant_never_falls():
    assert {learning_rate_factor(step, 10, "constant", end=0.0) for step in range(10)} == {1.0}


def test_average_of_constant_steps_has_its_closed_form():
    weights = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weights.weight)
    average = WeightAverage(weights, decay=0.5)
    nn.init.ones_(weights.weight)
    # warm-up: decays 2/11, 3/12, 4/13, then (1 + n) / (10 + n) until .5 is reached; what is left of the start is their product
    for step in range(1, 20):
        average.update(step)
    left = math.prod(min(0.5, (1 + step) / (10 + step)) for step in range(1, 20))
    assert float(average.state_dict()["weight"]) == pytest.approx(1.0 - left)


def test_averaged_weights_are_lent_and_returned_bit_for_bit():
    weights = nn.Linear(3, 3)
    average = WeightAverage(weights, decay=0.9)
    with torch.no_grad():
        weights.weight += 1.0
    own, shadow = weights.weight.detach().clone(), average.state_dict()["weight"].clone()
    with pytest.raises(RuntimeError, match="interrupted"), average.applied():
        assert torch.equal(weights.weight, shadow)
        raise RuntimeError("interrupted")
    assert torch.equal(weights.weight, own)


def test_frozen_parameters_are_neither_averaged_nor_saved(settings: Settings, tmp_path: Path):
    args = settings(max_train_steps=1)
    module = Line()
    module.line.bias.requires_grad_(False)
    trainer = Trainer(args, Accelerator(cpu=True), module)
    trainer.fit(lambda step: [torch.ones(1, 4)], loss_of, no_validation)
    tensors, _ = load_checkpoint(tmp_path / "run" / "checkpoint-1")
    assert list(tensors["model"]) == list(tensors["ema"]) == ["line.weight"]


def test_average_of_another_network_is_refused():
    with pytest.raises(ValueError, match="1 names differ, e.g. bias"):
        WeightAverage(nn.Linear(1, 1), 0.9).load_state_dict({"weight": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"decay=1.0 must be in \[0, 1\)"):
        WeightAverage(nn.Linear(1, 1), 1.0)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(settings: Settings):
    def no_dropout_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.dropout.p = 0.0
        return loss_of(model, x)

    common = {"max_train_steps": 5, "checkpointing_steps": 100}
    one = fit(settings(train_batch_size=8, output_dir=settings().output_dir + "1", **common), no_dropout_loss)
    split = settings(
        train_batch_size=2, gradient_accumulation_steps=4, output_dir=settings().output_dir + "4", **common
    )
    four = fit(split, no_dropout_loss)
    torch.testing.assert_close(one.module.line.weight, four.module.line.weight)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_global_batch_without_gap_or_overlap(settings: Settings, world: int):
    rows = []
    for rank in range(world):
        trainer = Trainer.__new__(Trainer)
        trainer.args = settings(train_batch_size=8 // world, gradient_accumulation_steps=3)
        trainer.accelerator = Namespace(num_processes=world, process_index=rank)
        assert trainer.global_batch_size == 24
        # in every forward pass the processes together hold the rows that one process would
        rows.append([list(range(24))[part] for part in trainer.own_rows()])
    passes = [sorted(sum((own[i] for own in rows), [])) for i in range(3)]
    assert passes == [list(range(0, 8)), list(range(8, 16)), list(range(16, 24))]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(settings: Settings, tmp_path: Path, workers: int):
    common = {"max_train_steps": 20, "checkpointing_steps": 7, "dataloader_num_workers": workers}
    whole = fit(settings(output_dir=str(tmp_path / "whole"), **common))
    fit(settings(output_dir=str(tmp_path / "parts"), **common, max_train_seconds=1e-9))
    assert [step for step, _ in list_checkpoints(tmp_path / "parts")] == [1]
    resumed = fit(settings(output_dir=str(tmp_path / "parts"), **common, resume_from_checkpoint="latest"))
    assert torch.equal(whole.module.line.weight, resumed.module.line.weight)
    manifests = [(tmp_path / run / "checkpoint-20" / "manifest.sha256.json") for run in ("whole", "parts")]
    digests = [json.loads(path.read_text())["files"] for path in manifests]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert digests[0][name] == digests[1][name]


def test_a_finished_run_resumes_into_nothing(settings: Settings):
    first = fit(settings(max_train_steps=3))
    again = fit(settings(max_train_steps=3, resume_from_checkpoint="latest"))
    assert again.step == 3
    assert torch.equal(first.module.line.weight, again.module.line.weight)


def test_a_changed_argument_is_reported_on_resume(settings: Settings, caplog):
    fit(settings(max_train_steps=2))
    fit(settings(max_train_steps=3, learning_rate=1e-3, resume_from_checkpoint="latest"))
    assert "learning_rate was 0.0008 and is 0.001 from here on" in caplog.text


def test_a_new_run_does_not_start_in_the_folder_of_another(settings: Settings):
    fit(settings(max_train_steps=2))
    with pytest.raises(
        CheckpointError, match="already holds checkpoint-2 of another run; add --resume_from_checkpoint"
    ):
        fit(settings(max_train_steps=2))


def test_a_checkpoint_of_another_network_is_refused(settings: Settings):
    args = settings(max_train_steps=1)
    fit(args)
    args.resume_from_checkpoint = "latest"
    with pytest.raises(CheckpointError, match="belongs to another network: 2 tensors differ, e.g. line.weight"):
        Trainer(args, Accelerator(cpu=True), nn.ModuleDict({"line": nn.Linear(5, 2)}))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(settings: Settings, tmp_path: Path):
    def exploding(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return loss_of(model, x) * (math.nan if exploding.calls.pop() == 0 else 1.0)

    exploding.calls = [0] * 10 + [1] * 5
    args = settings(max_train_steps=15, checkpointing_steps=4, logging_steps=100)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 8; resume from the last checkpoint"):
        fit(args, exploding)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4]


def test_weights_that_are_not_finite_are_not_saved_even_if_the_loss_was(settings: Settings, tmp_path: Path):
    def sharp(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        sharp.calls += 1
        # the root of 0 is 0, and its slope is no number
        return loss_of(model, x) + (model.line.weight * (sharp.calls != 8)).sum().square().sqrt()

    sharp.calls = 0
    with pytest.raises(
        TrainingDivergedError, match=r"the weights are not finite \(line.weight and 1 others\) at step 8"
    ):
        fit(settings(max_train_steps=12, checkpointing_steps=4, logging_steps=100), sharp)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4]
    assert all(
        bool(torch.isfinite(value).all())
        for value in load_checkpoint(tmp_path / "run" / "checkpoint-4")[0]["model"].values()
    )


def test_a_half_written_checkpoint_is_passed_over_and_the_run_ends_as_if_it_had_never_been(
    settings: Settings, tmp_path: Path, caplog
):
    common = {"max_train_steps": 12, "checkpointing_steps": 4}
    whole = fit(settings(output_dir=str(tmp_path / "whole"), **common))
    fit(settings(output_dir=str(tmp_path / "parts"), **common))
    newest = tmp_path / "parts" / "checkpoint-12"
    (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:100])
    (tmp_path / "parts" / ".checkpoint-16.somewhere-1-00000000000000ff.tmp").mkdir()
    resumed = fit(settings(output_dir=str(tmp_path / "parts"), **common, resume_from_checkpoint="latest"))
    assert "checkpoint-12 is passed over" in caplog.text
    assert torch.equal(whole.module.line.weight, resumed.module.line.weight)
    assert load_checkpoint(newest)[1]["step"] == 12, "it is complete now"


@pytest.mark.reliability
def test_a_disk_that_fills_up_during_a_run_loses_nothing_that_was_saved(settings: Settings, tmp_path: Path):
    common = {"max_train_steps": 8, "checkpointing_steps": 4, "logging_steps": 100}
    whole = fit(settings(output_dir=str(tmp_path / "whole"), **common))

    def filling(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        filling.calls += 1
        if filling.calls == 6:
            full.__enter__()
        return loss_of(model, x)

    filling.calls, full = 0, largest_file(100)
    with pytest.raises(OSError, match="can be resumed from (its last|the) checkpoint (before )?once this is cured"):
        try:
            fit(settings(output_dir=str(tmp_path / "full"), **common), filling)
        finally:
            full.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != "log.jsonl"] == ["checkpoint-4"]
    resumed = fit(settings(output_dir=str(tmp_path / "full"), **common, resume_from_checkpoint="latest"))
    assert torch.equal(whole.module.line.weight, resumed.module.line.weight)


def test_a_log_and_a_picture_that_cannot_be_written_are_named(settings: Settings, tmp_path: Path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(
        OSError, match=r"log.jsonl cannot be written: Is a directory; the run can be resumed from its last"
    ):
        fit(settings(max_train_steps=2))
    trainer = Trainer(settings(output_dir=str(tmp_path / "other")), Accelerator(cpu=True), Line())
    sheet = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    with largest_file(5000), pytest.raises(OSError, match=r"step-0000000.png cannot be saved: File too large"):
        trainer.validate(lambda step: ({}, sheet))
    assert list((tmp_path / "other" / "samples").iterdir()) == [], "no half of it is left"


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_training_is_refused_before_anything_is_made(settings: Settings, monkeypatch, kind: DistributedType):
    message = f"distributed_type={kind.value} spreads weights or moments over processes.*use data parallelism"
    with pytest.raises(ValueError, match=message):
        Trainer(settings(), Namespace(distributed_type=kind), Line())
    # what the launcher sets
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.value}", "true")
    with pytest.raises(ValueError, match=message):
        make_accelerator(settings())


def test_every_logged_loss_is_a_mean_over_its_steps(settings: Settings, tmp_path: Path):
    fit(settings(max_train_steps=6, logging_steps=1, output_dir=str(tmp_path / "each")))
    fit(settings(max_train_steps=6, logging_steps=3, output_dir=str(tmp_path / "three")))
    each, three = losses(tmp_path / "each"), losses(tmp_path / "three")
    assert list(three) == [1, 3, 6]
    assert three[6] == pytest.approx((each[4] + each[5] + each[6]) / 3)


def test_sigterm_stops_with_a_checkpoint(settings: Settings, tmp_path: Path):
    def asked_to_stop(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(model, x)

    assert fit(settings(max_train_steps=50), asked_to_stop).step < 50
    assert len(list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_however_many_are_made_ahead(depth: int):
    assert list(prefetched(lambda step: step * step, range(3, 9), depth)) == [9, 16, 25, 36, 49, 64]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failing_batch_fails_the_run_with_its_own_error(depth: int):
    batches = prefetched(lambda step: 1 // (2 - step), range(5), depth)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_run_that_ends_early_stops_its_thread():
    batches = prefetched(lambda step: step, range(10**9), 2)
    assert next(batches) == 0
    batches.close()
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
