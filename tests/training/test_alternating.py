import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from diffusers_ext.training.alternating import AlternatingTrainer, Player, player_of
from diffusers_ext.training.checkpoints import CheckpointError, list_checkpoints
from diffusers_ext.training.distillation.dmd import dmd_gradient, surrogate_loss
from diffusers_ext.training.distillation.f_divergence import DensityRatioWeights
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import TrainingDivergedError

from .conftest import log_entries


Settings = Callable[..., Namespace]
MEAN, DEVIATION, SPREAD = 0.7, 0.5, 0.8
RATIO = 3


class Pair(nn.Module):
    """A linear generator and a network that learns the posterior mean of its noised output; closed forms of a Gaussian."""

    def __init__(self):
        super().__init__()
        self.student, self.fake = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer, slope, shift in ((self.student, 1.5, -1.0), (self.fake, 0.5, 0.0)):
            nn.init.constant_(layer.weight, slope)
            nn.init.constant_(layer.bias, shift)
        self.double()


def student_loss(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
    x = pair.student(batch[:, :1])
    sample = x.detach() + SPREAD * batch[:, 1:]
    real = (DEVIATION**2 * sample + SPREAD**2 * MEAN) / (DEVIATION**2 + SPREAD**2)
    with torch.no_grad():
        fake = pair.fake(sample)
    return surrogate_loss(x, dmd_gradient(x, real, fake))


def fake_loss(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = pair.student(batch[:, :1])
    return (pair.fake(x + SPREAD * batch[:, 1:]) - x).square().mean()


def train(args: Namespace, losses: dict | None = None, states: dict | None = None) -> AlternatingTrainer:
    pair = Pair()
    players = {
        "fake": player_of(pair, "fake", 5 * args.learning_rate, turns=RATIO),
        "student": player_of(pair, "student", args.learning_rate, averaged=True),
    }
    trainer = AlternatingTrainer(args, Accelerator(cpu=True), pair, players, states)

    def make_batches(step: int) -> dict[str, list[list[torch.Tensor]]]:
        batches = {}
        for name in players:
            drawn = [
                torch.randn(
                    trainer.global_batch_size,
                    2,
                    generator=stream(args.seed, step, f"{name}-{turn}"),
                    dtype=torch.float64,
                )
                for turn in trainer.own_turns(name)
            ]
            batches[name] = [[x[rows] for rows in trainer.own_rows()] for x in drawn]
        return batches

    trainer.fit(make_batches, losses or {"student": student_loss, "fake": fake_loss}, lambda step: ({}, None))
    return trainer


def weights(trainer: AlternatingTrainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.module.parameters()])


def test_the_student_of_a_gaussian_teacher_becomes_its_distribution(settings: Settings, tmp_path: Path):
    trainer = train(settings(max_train_steps=120, learning_rate=0.05, train_batch_size=256, adam_weight_decay=0.0))
    student = trainer.average.state_dict()
    assert float(student["student.bias"]) == pytest.approx(MEAN, abs=0.05)
    assert abs(float(student["student.weight"])) == pytest.approx(DEVIATION, abs=0.05)
    assert set(student) == {"student.weight", "student.bias"}, "only the student is averaged"
    entry = log_entries(tmp_path / "run")[-1]
    assert {"student_loss", "fake_loss", "learning_rate", "images_per_second"} <= entry.keys()


def test_accumulated_batches_give_the_updates_of_one_large_batch(settings: Settings, tmp_path: Path):
    common = {"max_train_steps": 6, "checkpointing_steps": 100}
    one = train(settings(train_batch_size=32, output_dir=str(tmp_path / "one"), **common))
    four = train(
        settings(train_batch_size=8, gradient_accumulation_steps=4, output_dir=str(tmp_path / "four"), **common)
    )
    torch.testing.assert_close(weights(one), weights(four), rtol=0, atol=1e-12)
    assert not torch.equal(weights(one), torch.cat([p.detach().flatten() for p in Pair().parameters()]))


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(settings: Settings, tmp_path: Path):
    common = {"max_train_steps": 20, "checkpointing_steps": 7}
    whole = train(settings(output_dir=str(tmp_path / "whole"), **common))
    train(settings(output_dir=str(tmp_path / "parts"), **common, max_train_seconds=1e-9))
    assert [step for step, _ in list_checkpoints(tmp_path / "parts")] == [1]
    resumed = train(settings(output_dir=str(tmp_path / "parts"), **common, resume_from_checkpoint="latest"))
    assert torch.equal(weights(whole), weights(resumed))
    digests = [
        json.loads((tmp_path / run / "checkpoint-20" / "manifest.sha256.json").read_text())["files"]
        for run in ("whole", "parts")
    ]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert digests[0][name] == digests[1][name]


def test_each_player_moves_in_its_own_turns_only(settings: Settings):
    moved: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def watching(name: str, loss: Callable) -> Callable:
        def compute(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
            assert {key.split(".")[0] for key, value in pair.named_parameters() if value.requires_grad} == {name}
            moved.append((name, pair.student.weight.detach().clone(), pair.fake.weight.detach().clone()))
            return loss(pair, batch)

        return compute

    train(
        settings(max_train_steps=2),
        {"student": watching("student", student_loss), "fake": watching("fake", fake_loss)},
    )
    assert [name for name, _, _ in moved] == ["fake", "fake", "fake", "student"] * 2
    students, fakes = torch.cat([entry[1] for entry in moved]), torch.cat([entry[2] for entry in moved])
    assert students.diff(dim=0).ne(0).flatten().tolist() == [False, False, False, True, False, False, False]
    assert fakes.diff(dim=0).ne(0).flatten().tolist() == [True, True, True, False, True, True, True]


def test_a_loss_that_runs_through_the_other_network_does_not_move_it(settings: Settings):
    def adversarial(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
        return pair.fake(pair.student(batch[:, :1])).mean()

    def idle(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
        return 0.0 * pair.fake(batch[:, :1]).mean()

    trainer = train(settings(max_train_steps=1, adam_weight_decay=0.0), {"student": adversarial, "fake": idle})
    assert trainer.module.fake.weight.tolist() == [[0.5]] and trainer.module.student.weight.tolist() != [[1.5]]


def test_gradients_are_clipped_for_each_player_by_itself(settings: Settings, tmp_path: Path):
    def huge(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
        return 1e6 * (fake_loss(pair, batch) + pair.fake.bias.sum())

    def first_moments(name: str, loss: Callable) -> tuple[float, torch.Tensor]:
        """Norm of the clipped gradient of the fake score, and the gradient of the student, after one round."""
        args = settings(max_train_steps=1, max_grad_norm=0.5, adam_beta1=0.0, output_dir=str(tmp_path / name))
        trainer = train(args, {"student": lambda pair, x: pair.student(x[:, :1]).square().mean(), "fake": loss})
        state, pair = trainer.optimizer.optimizer.state, trainer.module
        fake, student = (
            [state[p]["exp_avg"].flatten() for p in part.parameters()] for part in (pair.fake, pair.student)
        )
        return float(torch.cat(fake).norm()), torch.cat(student)

    plain, exploding = first_moments("plain", fake_loss), first_moments("huge", huge)
    assert exploding[0] == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(plain[1], exploding[1]), "the student is not held back by the other's gradient"


def test_what_a_method_remembers_is_part_of_the_checkpoint(settings: Settings):
    remembered = DensityRatioWeights("kl", bins=2, ema_rate=0.5)
    remembered(torch.tensor([0.3, 0.7]), torch.tensor([0.1, 0.9]))
    train(settings(max_train_steps=1), states={"ratios": remembered})
    fresh = DensityRatioWeights("kl", bins=2, ema_rate=0.5)
    train(settings(max_train_steps=2, resume_from_checkpoint="latest"), states={"ratios": fresh})
    assert torch.equal(fresh.state_dict()["means"], remembered.state_dict()["means"])


def test_a_checkpoint_without_what_the_method_remembers_is_refused(settings: Settings):
    train(settings(max_train_steps=1))
    with pytest.raises(CheckpointError, match="holds no ratios; give the arguments that it was trained with"):
        train(settings(max_train_steps=2, resume_from_checkpoint="latest"), states={"ratios": DensityRatioWeights()})


def test_a_loss_that_is_not_finite_is_named(settings: Settings):
    def exploding(pair: Pair, batch: torch.Tensor) -> torch.Tensor:
        return fake_loss(pair, batch) * math.nan

    with pytest.raises(TrainingDivergedError, match="the fake_loss is nan at step 1; resume from the last checkpoint"):
        train(settings(max_train_steps=2), {"student": student_loss, "fake": exploding})


def test_two_networks_under_a_sharded_optimiser_are_refused(settings: Settings):
    pair = Pair()
    players = {name: player_of(pair, name, 1e-3, averaged=True) for name in ("student", "fake")}
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(
            ValueError, match=f"distributed_type={kind.value} spreads weights or moments over processes"
        ):
            AlternatingTrainer(settings(), Namespace(distributed_type=kind), pair, players)


def test_players_that_do_not_fit_the_module_are_refused(settings: Settings):
    pair, accelerator = Pair(), Accelerator(cpu=True)
    student, fake = (player_of(pair, name, 1e-3, averaged=True) for name in ("student", "fake"))
    for players, message in (
        ({"student": student}, "parameter fake.bias belongs to no player"),
        ({"student": student, "fake": fake, "twice": fake}, "parameter fake.bias belongs to fake, twice"),
        ({"student": student, "fake": fake, "new": Player(frozenset({"x"}), 1.0)}, "parameter x is not trainable"),
        ({"student": student, "fake": Player(fake.names, 1e-3, turns=0)}, "turns=0 of fake must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            AlternatingTrainer(settings(), accelerator, pair, players)
    quiet = {name: player_of(pair, name, 1e-3) for name in ("student", "fake")}
    with pytest.raises(ValueError, match="no player is averaged; mark one, or give --no-use_ema"):
        AlternatingTrainer(settings(), accelerator, pair, quiet)
    with pytest.raises(ValueError, match="prefix='head' has no trainable parameters in Pair"):
        player_of(pair, "head", 1e-3)
