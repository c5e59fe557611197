from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.distillation.cdm import covering_range
from diffusers_ext.training.distillation.flow_pairs import solver_levels
from diffusers_ext.training.distillation.matching import MatchingNetworks
from diffusers_ext.training.distillation.matching_methods import ContinuousMatching
from diffusers_ext.training.distillation.parameterization import NoiseSchedule
from diffusers_ext.training.distillation.teachers import Teacher

from .conftest import exported_digests, log_entries


Train = Callable[..., Path]


def flow_options(teachers: dict[str, Path], *more: str) -> list[str]:
    return ["--method=cdm", f"--pretrained_teacher_model={teachers['flow']}", "--longest_schedule=3", *more]


@pytest.mark.parametrize("lora", [[], ["--use_lora"]], ids=["full", "lora"])
def test_a_student_of_cdm_is_a_stock_pipeline_of_a_flow(train_dmd: Train, teachers: dict[str, Path], lora: list[str]):
    folder = train_dmd("run", *flow_options(teachers, *lora, "--learning_rate=1e-3"))
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


def test_a_resumed_run_of_cdm_ends_with_the_bits_of_an_uninterrupted_one(train_dmd: Train, teachers: dict[str, Path]):
    # a pull that is felt: it moves weights between the optimiser's steps
    common = flow_options(teachers, "--use_lora", "--learning_rate=1e-3", "--fake_pull=0.1")
    whole = train_dmd("whole", *common)
    train_dmd("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    assert exported_digests(train_dmd("parts", *common, "--resume_from_checkpoint=latest")) == exported_digests(whole)


def test_methods_and_teachers_that_do_not_fit_are_refused(train_dmd: Train, teachers: dict[str, Path]):
    with pytest.raises(
        ValueError, match="predicts v_prediction on a diffusion schedule, and CDM matches flows; give a"
    ):
        train_dmd("cdm", "--method=cdm")
    with pytest.raises(
        ValueError,
        match="num_denoising_steps=2 needs a scheduler that adds new noise to a flow, .*; give 1, or --method cdm",
    ):
        train_dmd("dmd2", f"--pretrained_teacher_model={teachers['flow']}")
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
    reads_guidance = False

    def __init__(self, teacher: Teacher, conditional: float, unconditional: float):
        self.schedule, self.pipeline, self.family = teacher.schedule, teacher.pipeline, teacher.family
        self.scales = conditional, unconditional

    def denoise(self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.scales[0] * sample

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
