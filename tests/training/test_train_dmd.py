from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.distillation.dmd import few_step_timesteps
from diffusers_ext.training.distillation.f_divergence import DensityRatioWeights
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks, fake_loss, student_loss
from diffusers_ext.training.distillation.teachers import Teacher, few_step_scheduler

from .conftest import exported_digests, log_entries


Train = Callable[..., Path]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


OPTIONS = {
    "full": ["--gan_weight=0"],
    "lora": ["--use_lora"],
    "fdistill": ["--use_lora", "--method=fdistill", "--divergence=kl", "--no-backward_simulation"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_trained_folder_is_a_stock_pipeline(train_dmd: Train, options: list[str]):
    folder = train_dmd("run", *options, "--learning_rate=1e-3")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is LCMScheduler
    images = pipe("a red square", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())
    assert pipe.scheduler.timesteps.tolist() == few_step_timesteps(2)
    assert (folder / "pytorch_lora_weights.safetensors").is_file() == ("--use_lora" in options)
    names = set(load_file(folder / "checkpoint-2" / "model.safetensors"))
    assert any(name.startswith("head.") for name in names) == ("--gan_weight=0" not in options)
    assert {"student_loss", "fake_loss"} <= log_entries(folder)[0].keys()
    assert "guidance_scale=1)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("options", [OPTIONS["full"], OPTIONS["fdistill"]], ids=["full", "fdistill"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(train_dmd: Train, options: list[str]):
    common = [*options, "--learning_rate=1e-3"]
    whole = train_dmd("whole", *common)
    train_dmd("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    assert exported_digests(train_dmd("parts", *common, "--resume_from_checkpoint=latest")) == exported_digests(whole)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_stock_scheduler_has_the_timesteps_of_the_student(teachers: dict[str, Path], steps: int):
    scheduler = few_step_scheduler(Teacher(str(teachers["epsilon"])), steps, 10.0)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == few_step_timesteps(steps)


def networks_of(teacher: Teacher, **options: object) -> MatchingNetworks:
    return MatchingNetworks(teacher, 2, **{"lora_rank": 2, "gan": True, **options})


def batch_of(teacher: Teacher, last: int = 1) -> MatchingBatch:
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(2, 3, 4, 8, 8, generator=generator)
    noise, real, real_noise = torch.randn(3, 3, 4, 8, 8, generator=generator)
    words = teacher.embeddings(teacher.tokens(["a red square", "a blue square", ""]))
    return MatchingBatch(words, path, last, noise, torch.tensor([0.1, 0.5, 0.9]), real, real_noise)


def test_what_is_trained_is_what_the_stock_pipeline_samples(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    networks, batch = networks_of(teacher), batch_of(teacher)
    trained = networks.generated(batch)
    scheduler = few_step_scheduler(teacher, 2, 10.0)
    scheduler.set_timesteps(2)
    sample = batch.path[0]
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = teacher.unet(sample, timestep, batch.words).sample
        done = scheduler.step(prediction, timestep, sample).denoised
        if i == 0:
            sample = scheduler.add_noise(done, batch.path[1], scheduler.timesteps[1:].expand(3))
    # the boundary scalings of the scheduler differ from 1 and 0 by less than 1e-6 at these timesteps
    torch.testing.assert_close(trained, done, rtol=1e-4, atol=1e-4)


def test_before_training_the_student_gets_no_gradient_of_distribution_matching(teachers: dict[str, Path]):
    # the fake score is the teacher then, and without guidance the two agree to rounding
    teacher = Teacher(str(teachers["v_prediction"]))
    batch = batch_of(teacher)
    assert float(student_loss(networks_of(teacher), teacher, batch).detach()) < 1e-10
    other = Teacher(str(teachers["v_prediction"]))
    assert float(student_loss(networks_of(other), other, batch, guidance_scale=4.0).detach()) > 1e-6


@pytest.mark.parametrize("lora_rank", [2, None])
def test_each_loss_reaches_its_own_networks(teachers: dict[str, Path], lora_rank: int | None):
    teacher = Teacher(str(teachers["v_prediction"]))
    networks, batch = networks_of(teacher, lora_rank=lora_rank), batch_of(teacher)
    players = networks.players(1e-3, 1e-3, 5)
    named = dict(networks.named_parameters())
    assert players["fake"].turns == 5 and players["student"].averaged
    for player, loss in (
        ("student", lambda: student_loss(networks, teacher, batch, 4.0, 1e-3, DensityRatioWeights("kl"))),
        ("fake", lambda: fake_loss(networks, batch, 1e-2)),
    ):
        for name, value in named.items():
            value.requires_grad_(name in players[player].names)
            value.grad = None
        loss().backward()
        reached = {name for name, value in named.items() if value.grad is not None and bool(value.grad.any())}
        assert reached and reached <= players[player].names
        if player == "fake":
            assert any(name.startswith("head.") for name in reached)


def test_the_teacher_is_the_same_before_and_after(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    batch = batch_of(teacher)
    timesteps = torch.tensor([10, 500, 999])
    before = teacher.predictions(batch.noise, timesteps, batch.words)
    networks = networks_of(teacher)
    optimizer = torch.optim.SGD([value for value in networks.parameters() if value.requires_grad], lr=1.0)
    for _ in range(2):
        (student_loss(networks, teacher, batch, 4.0, 1.0) + fake_loss(networks, batch, 1.0)).backward()
        optimizer.step()
    after = teacher.predictions(batch.noise, timesteps, batch.words)
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    assert not torch.equal(networks.judge(batch.noise, timesteps, batch.words)[0], before[0])


def test_wrong_calls_are_answered_in_one_sentence(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    batch = batch_of(teacher)
    plain = networks_of(teacher, gan=False)
    with pytest.raises(ValueError, match="gan_weight and weights need a discriminator"):
        student_loss(plain, teacher, batch, gan_weight=1.0)
    networks = networks_of(Teacher(str(teachers["v_prediction"])))
    without = MatchingBatch(batch.words, batch.path, 1, batch.noise, batch.uniform)
    with pytest.raises(ValueError, match="the discriminator needs latents of pictures; give real and real_noise"):
        fake_loss(networks, without)
    networks.backward_simulation = False
    with pytest.raises(ValueError, match="without backward_simulation paths start from pictures; give real"):
        networks.generated(without)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method=fdistill", "--gan_weight=0"], "--method fdistill reads density ratios from the discriminator"),
        (["--num_denoising_steps=500"], "--num_denoising_steps 500 is no distillation; choose 1 to 8"),
        (["--divergence=chi"], "invalid choice: 'chi'"),
        (["--divergence=kl"], "--divergence is no option of --method dmd2; leave it out"),
        (["--method=cdm", "--gan_weight=0"], "--gan_weight is no option of --method cdm; leave it out"),
        (["--method=cdm", "--no-backward_simulation"], "--backward_simulation is no option of --method cdm"),
        (["--longest_schedule=3"], "--longest_schedule is no option of --method dmd2; leave it out"),
        (["--method=cdm", "--real_guidance_scale=0.5"], "--real_guidance_scale 0.5 is below 1, which is no guidance"),
        (["--method=cdm", "--fake_pull=2"], "2 must lie between 0 and 1"),
        (["--method=rdmd"], "--source_data_dir None is no folder with metadata.jsonl; --method rdmd needs one"),
        (["--method=rdmd", "--source_data_dir=nowhere"], "--source_data_dir nowhere is no folder with metadata.jsonl"),
        (["--method=cdm", "--cache_latents=9"], "--cache_latents is no option of --method cdm; leave it out"),
        (["--transport_lambda=1"], "--transport_lambda is no option of --method dmd2; leave it out"),
        (["--source_data_dir=nowhere"], "--source_data_dir is no option of --method dmd2; leave it out"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train_dmd: Train, capsys, more: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train_dmd("run", *more)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
