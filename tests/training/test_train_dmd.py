import hashlib
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.distillation.cdm import covering_range
from diffusers_ext.training.distillation.dmd import few_step_timesteps
from diffusers_ext.training.distillation.f_divergence import DensityRatioWeights
from diffusers_ext.training.distillation.flow_pairs import solver_levels
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks, fake_loss, student_loss
from diffusers_ext.training.distillation.matching_methods import ContinuousMatching, RegularizedMatching
from diffusers_ext.training.distillation.parameterization import NoiseSchedule
from diffusers_ext.training.distillation.stable_diffusion import Teacher, few_step_scheduler

from .conftest import SCRIPTS, load_script, log_entries


TRANSLATION_STEPS = load_script("train_dmd").TRANSLATION_STEPS
Train = Callable[..., Path]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def arguments(teachers: dict[str, Path], picture_folder: Path) -> list[str]:
    return [
        f"--pretrained_teacher_model={teachers['v_prediction']}", f"--train_data_dir={picture_folder}", "--resolution=16",
        "--train_batch_size=2", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0", "--lora_rank=2",
        "--validation_prompts", "a red square", "--num_denoising_steps=2", "--fake_update_ratio=2", "--max_train_steps=2",
    ]  # fmt: skip


@pytest.fixture
def train(arguments: list[str], tmp_path: Path) -> Train:
    """Runs train_dmd.py in this process and returns its folder."""
    script = load_script("train_dmd")

    def run(name: str, *more: str) -> Path:
        script.main(script.parse_args([*arguments, f"--output_dir={tmp_path / name}", *more]))
        return tmp_path / name

    return run


def digests(folder: Path) -> dict[str, str]:
    newest = list_checkpoints(folder)[-1][1]
    files = [*sorted(newest.glob("*.safetensors")), folder / WEIGHTS]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


OPTIONS = {
    "full": ["--gan_weight=0"],
    "lora": ["--use_lora"],
    "fdistill": ["--use_lora", "--method=fdistill", "--divergence=kl", "--no-backward_simulation"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_trained_folder_is_a_stock_pipeline(train: Train, options: list[str]):
    folder = train("run", *options, "--learning_rate=1e-3")
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
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(train: Train, options: list[str]):
    common = [*options, "--learning_rate=1e-3"]
    whole = train("whole", *common)
    train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    assert digests(train("parts", *common, "--resume_from_checkpoint=latest")) == digests(whole)


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
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, more: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *more)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def flow_options(teachers: dict[str, Path], *more: str) -> list[str]:
    return ["--method=cdm", f"--pretrained_teacher_model={teachers['flow']}", "--longest_schedule=3", *more]


@pytest.mark.parametrize("lora", [[], ["--use_lora"]], ids=["full", "lora"])
def test_a_student_of_cdm_is_a_stock_pipeline_of_a_flow(train: Train, teachers: dict[str, Path], lora: list[str]):
    folder = train("run", *flow_options(teachers, *lora, "--learning_rate=1e-3"))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert pipe.scheduler.config.prediction_type == "flow_prediction" and pipe.scheduler.config.solver_order == 1
    images = pipe("a red square", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())
    before = StableDiffusionPipeline.from_pretrained(teachers["flow"]).unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert (folder / "pytorch_lora_weights.safetensors").is_file() == bool(lora)
    assert {"student_loss", "fake_loss"} <= log_entries(folder)[0].keys()
    card = (folder / "README.md").read_text()
    assert "by CDM" in card and "num_inference_steps=2, guidance_scale=1)" in card


def test_a_resumed_run_of_cdm_ends_with_the_bits_of_an_uninterrupted_one(train: Train, teachers: dict[str, Path]):
    # a pull that is felt: it moves weights between the optimiser's steps
    common = flow_options(teachers, "--use_lora", "--learning_rate=1e-3", "--fake_pull=0.1")
    whole = train("whole", *common)
    train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    assert digests(train("parts", *common, "--resume_from_checkpoint=latest")) == digests(whole)


def test_methods_and_teachers_that_do_not_fit_are_refused(train: Train, teachers: dict[str, Path]):
    with pytest.raises(
        ValueError, match="predicts v_prediction on a diffusion schedule, and CDM matches flows; give a"
    ):
        train("cdm", "--method=cdm")
    with pytest.raises(
        ValueError, match="the teacher predicts a flow, which LCMScheduler cannot sample; give a teacher"
    ):
        train("dmd2", f"--pretrained_teacher_model={teachers['flow']}")
    teacher = Teacher(str(teachers["flow"]))
    with pytest.raises(ValueError, match="guidance_scale=0.5 must be a number in"):
        ContinuousMatching(teacher, 0, 2, 0.5)
    with pytest.raises(ValueError, match="longest_schedule=0 must be a number in"):
        ContinuousMatching(teacher, 0, 2, 8.0, 0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 12])
def test_the_levels_of_the_stock_scheduler_are_among_those_of_the_walks(teachers: dict[str, Path], steps: int):
    method = ContinuousMatching(Teacher(str(teachers["flow"])), 0, steps, 8.0, longest_schedule=3)
    wanted, _ = solver_levels(method.scheduler, steps)
    drawn = [method.draws((256, 1, 1, 1), step)[0] for step in range(12)]
    assert {levels.shape[1] for levels in drawn} == {2, 3, 4}
    assert all(bool((levels[:, 0] == wanted[0]).all() and (levels[:, -1] == wanted[-1]).all()) for levels in drawn)
    inner = torch.cat([levels[:, 1:-1].flatten() for levels in drawn])
    assert all(float((inner - level).abs().min()) < 0.01 for level in wanted[1:-1])
    low, high = covering_range(wanted)
    assert low <= float(inner.min()) and float(inner.max()) <= high < float(wanted[0])


def test_the_walk_is_what_the_stock_pipeline_samples(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["flow"]))
    method = ContinuousMatching(teacher, 0, 4, 8.0)
    networks = MatchingNetworks(teacher, 4, None)
    levels, timesteps = solver_levels(method.scheduler, 4)
    start = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = teacher.embeddings(teacher.tokens(["a red square"] * 5))
    # rows 0 ... 3 stop before step 0 ... 3, the last one goes on to the end of a walk with one step more
    walk = torch.cat([levels, torch.zeros(1)]).expand(5, -1)
    reached, sigma = method.walk(networks, words, walk, torch.arange(5), start)
    assert torch.equal(sigma, levels)
    sample, passed = start, [start]
    method.scheduler.set_timesteps(4)
    for level, timestep in zip(levels, method.scheduler.timesteps):
        # the pipeline tells whole timesteps, the walk the levels themselves
        assert 0 <= float(level * 1000 - timestep) < 1
        prediction = teacher.unet(sample, level * 1000, words).sample
        sample = method.scheduler.step(prediction, timestep, sample).prev_sample
        passed.append(sample)
    torch.testing.assert_close(reached, torch.stack([passed[i][i] for i in range(5)]), rtol=1e-4, atol=1e-5)


class LinearNetworks:
    """Velocities that are multiples of the sample: every step of the method is then a formula."""

    def __init__(self, schedule: NoiseSchedule, student: float, fake: float):
        self.schedule, self.weight, self.fake = schedule, torch.tensor(student, requires_grad=True), torch.tensor(fake)

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.weight * sample

    def judge(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.fake * sample, None


class LinearTeacher:
    def __init__(self, teacher: Teacher, conditional: float, unconditional: float):
        self.schedule, self.pipeline, self.scales = teacher.schedule, teacher.pipeline, (conditional, unconditional)

    def unet(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> Namespace:
        return Namespace(sample=self.scales[0] * sample)

    def predictions(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor):
        return self.scales[0] * sample, self.scales[1] * sample


def test_loss_and_gradient_of_each_term_are_the_closed_forms(teachers: dict[str, Path]):
    k, p, q, r = 0.7, 0.4, 0.9, -0.3  # student, teacher with and without the prompt, fake score
    method = ContinuousMatching(LinearTeacher(Teacher(str(teachers["flow"])), p, q), 0, 4, 5.0)
    networks = LinearNetworks(method.teacher.schedule, k, r)
    step = next(step for step in range(99) if method.draws((6, 1, 1, 1), step)[0].shape[1] == 5)
    drawn = method.draws((6, 2, 3, 3), step)
    drawn[4][:2] = torch.tensor([[1e-3], [1.0 - 1e-3]])  # levels that are to be kept off the ends
    levels, index, start, noise, uniform = (part.double() for part in drawn)
    found = method.terms(networks, torch.zeros(6, 1, 1), *drawn)
    assert list(found) == ["CA", "DM", "CDM"]
    assert sorted(set(index.tolist())) == [0, 1, 2, 3], "each step of the walk is trained in a batch of this size"

    def column(values: list[float] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64)[:, None, None, None]

    # Euler's steps multiply by 1 + k (sigma_k+1 - sigma_k)
    sigma = column([float(levels[row, int(i)]) for row, i in enumerate(index)])
    factors = 1 + k * levels.diff(dim=1)
    here = start * column([float(factors[row, : int(i)].prod()) for row, i in enumerate(index)])
    off = column(uniform[:, 3].clamp(0.02, 0.98))
    there = here * (1 + k * (off - sigma))

    def scaled(push: torch.Tensor, clean: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return push / (clean - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)

    def noised(clean: torch.Tensor, i: int, top: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        level = (column(uniform[:, i]) * top).clamp(0.02, 0.98)
        return level, (1 - level) * clean + level * noise[:, i]

    on, away = here * (1 - sigma * k), there * (1 - off * k)
    level, x = noised(on, 0, sigma)
    # D_cond - D_uncond = level (q - p) x, alpha = 5 - 1
    wanted = {"CA": (on, -sigma * here, scaled(-4.0 * level * (q - p) * x, on, (1 - level * p) * x))}
    for name, i, clean, slope in (("DM", 1, on, -sigma * here), ("CDM", 2, away, -off * there)):
        level, x = noised(clean, i)
        # D_fake - D_real = level (p - r) x
        wanted[name] = (clean, slope, scaled(level * (p - r) * x, clean, (1 - level * p) * x))
    for name, (_, slope, direction) in wanted.items():
        assert float(found[name].detach()) == pytest.approx(float(direction.square().mean()), rel=1e-5)
        gradient = torch.autograd.grad(found[name], networks.weight, retain_graph=True)[0]
        assert float(gradient) == pytest.approx(float((2 * direction * slope).mean()), rel=1e-4, abs=1e-6)
    total = method.student_loss(networks, torch.zeros(6, 1, 1), None, *drawn)
    assert float(total.detach()) == pytest.approx(float(sum(found.values()).detach()), rel=1e-6)

    # the fake score: flow matching on the clean samples of the walk
    level, x = noised(on, 1)
    error = r * x - (noise[:, 1] - on)
    loss = method.fake_loss(networks, torch.zeros(6, 1, 1), None, *drawn)
    assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-5)


def test_without_guidance_there_is_no_first_term_and_nothing_to_learn_before_training(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["flow"]))
    method, networks = ContinuousMatching(teacher, 0, 2, 1.0, 3), MatchingNetworks(teacher, 2, 2)
    words = teacher.embeddings(teacher.tokens(["a red square"] * 3))
    found = method.terms(networks, words, *method.draws((3, 4, 8, 8), 0))
    assert list(found) == ["DM", "CDM"] and all(float(value.detach()) < 1e-8 for value in found.values())
    guided = ContinuousMatching(teacher, 0, 2, 8.0, 3).terms(networks, words, *method.draws((3, 4, 8, 8), 0))
    assert float(guided["CA"].detach()) > 1e-6


@pytest.mark.parametrize("lora_rank", [2, None])
def test_each_loss_of_cdm_reaches_its_own_network(teachers: dict[str, Path], lora_rank: int | None):
    teacher = Teacher(str(teachers["flow"]))
    method, networks = ContinuousMatching(teacher, 0, 2, 8.0, 3), MatchingNetworks(teacher, 2, lora_rank)
    words = teacher.embeddings(teacher.tokens(["a red square"] * 3))
    drawn, named = method.draws((3, 4, 8, 8), 0), dict(networks.named_parameters())
    for player, loss in (("student", method.student_loss), ("fake", method.fake_loss)):
        own = networks.players(1e-3, 1e-3, 2)[player].names
        for name, value in named.items():
            value.requires_grad_(name in own)
            value.grad = None
        loss(networks, words, None, *drawn).backward()
        reached = {name for name, value in named.items() if value.grad is not None and bool(value.grad.any())}
        assert reached and reached <= own
        for name, value in named.items():
            value.requires_grad_(lora_rank is None or ".lora_" in name)


@pytest.mark.parametrize("lora_rank", [2, None])
def test_the_pull_takes_the_fake_score_its_share_of_the_way_to_the_student(
    teachers: dict[str, Path], lora_rank: int | None
):
    teacher = Teacher(str(teachers["flow"]))
    networks = MatchingNetworks(teacher, 2, lora_rank)
    players = networks.players(1e-3, 1e-3, 2, fake_pull=0.25)
    assert players["student"].after_turn is None and networks.players(1e-3, 1e-3, 2)["fake"].after_turn is None
    named = dict(networks.named_parameters())
    with torch.no_grad():
        for value in named.values():
            if value.requires_grad:
                value.normal_(generator=torch.Generator().manual_seed(value.numel()))
        for name in players["student"].names:
            named[name].add_(1.0)
    before = {name: value.detach().clone() for name, value in named.items()}
    players["fake"].after_turn()
    moved = {name for name, value in named.items() if not torch.equal(value, before[name])}
    assert moved == players["fake"].names
    for name in players["student"].names:
        fake = name.replace(".student.", ".fake.") if lora_rank else name.replace("student.", "fake.", 1)
        torch.testing.assert_close(named[fake], 0.75 * before[fake] + 0.25 * before[name])
    with pytest.raises(ValueError, match=r"fake_pull=2.0 must be a number in \[0, 1\]"):
        networks.pull_fake(2.0)


def translation_options(picture_folder: Path, *more: str) -> list[str]:
    return ["--method=rdmd", "--use_lora", f"--source_data_dir={picture_folder}", "--learning_rate=1e-3", *more]


def test_a_translator_is_a_stock_pipeline_and_a_resumed_run_of_it_has_equal_bits(train: Train, picture_folder: Path):
    common = translation_options(picture_folder)
    folder = train("whole", *common)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionImg2ImgPipeline and type(pipe.scheduler) is LCMScheduler
    passed = []
    handle = pipe.unet.register_forward_pre_hook(lambda _module, inputs: passed.append(int(inputs[1])))
    picture, call = torch.rand(1, 3, 16, 16), {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    images = pipe("a red square", image=picture, strength=0.5, **call).images
    handle.remove()
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())
    assert passed == [few_step_timesteps(2)[-1]], "one pass, at the timestep that was trained"
    assert "strength=0.5, num_inference_steps=2, guidance_scale=1)" in (folder / "README.md").read_text()
    train("parts", *common, "--max_train_seconds=1e-9")
    assert digests(train("parts", *common, "--resume_from_checkpoint=latest")) == digests(folder)


@pytest.mark.parametrize("steps", TRANSLATION_STEPS)
def test_the_translator_that_is_trained_is_what_the_stock_scheduler_samples(teachers: dict[str, Path], steps: int):
    teacher = Teacher(str(teachers["v_prediction"]))
    method = RegularizedMatching(teacher, 0, steps, 4.0, 0.25)
    networks = MatchingNetworks(teacher, steps, None, backward_simulation=method.backward_simulation)
    words, source = teacher.embeddings(teacher.tokens(["a red square"] * 3)), torch.randn(3, 4, 8, 8)
    path, last, *_ = method.draws((3, 4, 8, 8), 0)
    trained = networks.generated(MatchingBatch(words, path.transpose(0, 1), int(last[0]), path[:, 0], last, source))
    method.scheduler.set_timesteps(steps)
    pipe = teacher.student_pipeline(teacher.unet, method.scheduler, method.family)
    # what the model card says, with the digits that it says
    timesteps, count = pipe.get_timesteps(steps, float(f"{1 / steps:g}"), "cpu")
    assert count == 1
    sample = method.scheduler.add_noise(source, path[:, 0], timesteps.expand(3))
    prediction = teacher.unet(sample, timesteps[0], words).sample
    done = method.scheduler.step(prediction, timesteps[0], sample).denoised
    # the boundary scaling of the scheduler at timestep 99 is 1 - 1e-7 and 3e-7
    torch.testing.assert_close(trained, done, rtol=1e-4, atol=1e-4)


def test_the_transport_term_is_its_weight_times_the_mean_squared_move(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    networks = MatchingNetworks(teacher, 2, 2, backward_simulation=False)
    words, source = teacher.embeddings(teacher.tokens(["a red square"] * 3)), torch.randn(3, 4, 8, 8)
    free, costly = (RegularizedMatching(teacher, 0, 2, 4.0, weight) for weight in (0.0, 0.5))
    drawn = free.draws((3, 4, 8, 8), 0)
    with torch.no_grad():
        batch = MatchingBatch(words, drawn[0].transpose(0, 1), 1, drawn[2], drawn[3], source)
        move = float((networks.generated(batch) - source).square().mean())
        losses = [float(method.student_loss(networks, words, source, *drawn)) for method in (free, costly)]
    assert losses[1] - losses[0] == pytest.approx(0.5 * move, rel=1e-5) and move > 1e-3
    with pytest.raises(ValueError, match="transport_lambda needs the latents that are moved; give real"):
        costly.student_loss(networks, words, None, *drawn)
    with pytest.raises(ValueError, match="num_denoising_steps=1 must be a number in"):
        RegularizedMatching(teacher, 0, 1, 4.0, 0.5)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("method", ["fdistill", "cdm"])
def test_two_processes_train_on_the_batch_of_one(
    train: Train, arguments: list[str], teachers: dict[str, Path], tmp_path: Path, method: str
):
    common = ["--use_lora", "--max_train_steps=1", "--logging_steps=1", "--validation_steps=0"]
    common += flow_options(teachers) if method == "cdm" else ["--method=fdistill"]
    folder = tmp_path / "two"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file={SCRIPTS / 'configs' / 'cpu_2_gloo.yaml'}",
        "--main_process_port=0", str(SCRIPTS / "train_dmd.py"), *arguments, *common, f"--output_dir={folder}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    one = train("one", *common, "--train_batch_size=4")
    first, second = (log_entries(run)[0] for run in (one, folder))
    for name in ("student_loss", "fake_loss"):
        assert second[name] == pytest.approx(first[name], rel=1e-4)
    ours, theirs = (load_file(run / "checkpoint-1" / "model.safetensors") for run in (one, folder))
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    # AdamW divides by the gradient's own size: where that is rounding, so is the direction of a step of 5e-5
    assert apart <= 3 * 2 * 5e-5
    mean = sum(float((ours[name] - theirs[name]).abs().sum()) for name in ours) / sum(v.numel() for v in ours.values())
    assert mean < 1e-6
