import hashlib
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.data import FolderSource
from diffusers_ext.training.distillation import flow_pairs
from diffusers_ext.training.distillation.flow_pairs import (
    FlowPairs,
    euler_path,
    euler_scheduler,
    even_levels,
    measure_flow,
    solver_levels,
)
from diffusers_ext.training.distillation.reflow import exponential_times, interpolate, reflow_loss
from diffusers_ext.training.distillation.teachers import DistilledUNet, Teacher

from .conftest import load_script


Train = Callable[..., Path]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
SHAPE = (4, 8, 8)


@pytest.fixture
def train(teachers: dict[str, Path], picture_folder: Path, tmp_path: Path) -> Train:
    """Runs train_reflow.py in this process and returns its folder."""
    script = load_script("train_reflow")
    script.VALIDATION_ITEMS = 4

    def run(name: str, *arguments: str, teacher: str | Path = "flow") -> Path:
        folder = tmp_path / name
        common = [
            f"--pretrained_teacher_model={teachers.get(teacher, teacher)}", f"--train_data_dir={picture_folder}", "--resolution=16",
            "--train_batch_size=4", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0", "--num_pairs=10",
            "--teacher_steps=3", "--validation_prompts", "a red square", "--lora_rank=2", "--max_train_steps=2",
            f"--output_dir={folder}",
        ]  # fmt: skip
        script.main(script.parse_args([*common, *arguments]))
        return folder

    return run


@pytest.fixture
def make_pairs(teachers: dict[str, Path], picture_folder: Path, tmp_path: Path) -> Callable[..., FlowPairs]:
    """Pairs of the tiny flow, not simulated yet."""
    teacher = Teacher(str(teachers["flow"]))
    source = FolderSource(picture_folder, 0, 16)

    def make(**changes: object) -> FlowPairs:
        args = Namespace(**{
            "output_dir": str(tmp_path), "seed": 0, "num_pairs": 10, "teacher_steps": 4, "teacher_guidance_scale": 3.0,
            "inverted_share": 0.0, "dataset_name": None, "train_data_dir": str(picture_folder), "vendors": None,
            "objects": None, "resolution": 16, "image_column": "file_name", **changes,
        })  # fmt: skip
        return FlowPairs(args, source, teacher, euler_scheduler(teacher), SHAPE)

    return make


def picture(pipe: StableDiffusionPipeline, steps: int = 2) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red square", num_inference_steps=steps, guidance_scale=1.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def pair_file(folder: Path) -> Path:
    (file,) = folder.glob("pairs-*.safetensors")
    return file


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "options",
    [
        ["--export_dtype=fp16", "--teacher_guidance_scale=1"],
        ["--use_lora", "--time_density=uniform", "--no-normalize_loss", "--high_pass=1"],
    ],
    ids=["full", "lora"],
)
def test_the_trained_folder_is_a_stock_pipeline_with_a_card(train: Train, options: list[str]):
    folder = train("run", *options)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is DPMSolverMultistepScheduler
    config = pipe.scheduler.config
    assert (config.solver_order, config.use_flow_sigmas, config.prediction_type) == (1, True, "flow_prediction")
    images = picture(pipe)
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())
    texts = [path.read_text() for path in folder.rglob("*.json") if "checkpoint" not in str(path)]
    assert not any(str(folder.parent.parent) in text or "diffusers_ext" in text for text in texts)
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1)" in card and "| straightness S, 0 is straight |" in card
    with_lora = "--use_lora" in options
    assert ("Guidance of 3 is part of the weights" in card) == with_lora, "the other has no guidance"
    assert ("pytorch_lora_weights.safetensors" in card) == ("\n- lora\n" in card) == with_lora


def test_the_lora_file_on_the_teacher_gives_the_pictures_of_the_merged_pipeline(
    train: Train, teachers: dict[str, Path]
):
    folder = train("run", "--use_lora", "--learning_rate=1e-2", "--max_train_steps=3")
    merged = StableDiffusionPipeline.from_pretrained(folder)
    adapted = StableDiffusionPipeline.from_pretrained(teachers["flow"])
    untrained = picture(adapted)
    adapted.load_lora_weights(folder)
    torch.testing.assert_close(picture(adapted), picture(merged), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(merged), untrained, atol=1e-3)
    trained = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(".lora_" in name for name in trained), "only the adapter is trained and saved"


def test_a_student_begins_at_the_weights_of_an_earlier_one(train: Train, teachers: dict[str, Path], tmp_path: Path):
    first = train("first", "--learning_rate=1e-2")
    second = train("second", "--learning_rate=1e-12", f"--pretrained_student_model={first}")
    begun, reached = (load_file(folder / WEIGHTS) for folder in (first, second))
    teacher = load_file(teachers["flow"] / WEIGHTS)
    assert all(torch.allclose(begun[name], reached[name], atol=1e-6) for name in begun)
    assert any(not torch.allclose(teacher[name], reached[name], atol=1e-4) for name in begun), "not at the teacher"
    unet = UNet2DConditionModel.from_pretrained(first, subfolder="unet")
    other = UNet2DConditionModel.from_config({**unet.config, "in_channels": 5})
    other.save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(
        ValueError, match=r"has conv_in.weight of shape .*; give a student that was made of this teacher"
    ):
        train("third", f"--pretrained_student_model={tmp_path / 'other'}")


@pytest.mark.parametrize(
    "options", [["--teacher_guidance_scale=1", "--inverted_share=0.3"], ["--use_lora"]], ids=["full", "lora"]
)
def test_a_resumed_run_reuses_the_pairs_and_ends_with_the_bits_of_an_uninterrupted_one(
    train: Train, monkeypatch, options: list[str]
):
    common = [*options, "--learning_rate=1e-3"]
    whole = train("whole", *common)
    parts = train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(parts)] == [1]
    assert sha256(pair_file(whole)) == sha256(pair_file(parts)) and pair_file(whole).name == pair_file(parts).name
    monkeypatch.setattr(FlowPairs, "_simulate", lambda *_: pytest.fail("the pairs are there already"))
    train("parts", *common, "--resume_from_checkpoint=latest")
    for name in (WEIGHTS, "checkpoint-2/model.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert sha256(whole / name) == sha256(parts / name)
    if "--use_lora" not in options:
        average, exported = load_file(whole / "checkpoint-2/ema.safetensors"), load_file(whole / WEIGHTS)
        assert exported.keys() == {name.removeprefix("unet.") for name in average}
        assert all(torch.equal(value, average[f"unet.{name}"]) for name, value in exported.items())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pairs_are_what_the_stock_pipeline_makes_of_their_noise(
    make_pairs: Callable[..., FlowPairs], teachers: dict[str, Path], picture_folder: Path, scale: float
):
    pairs = make_pairs(teacher_guidance_scale=scale)
    pairs.prepare(Accelerator(cpu=True))
    tensors = load_file(pairs.file)
    noise, clean = tensors["noise"].float(), tensors["clean"].float()
    assert noise.shape == clean.shape == (10, *SHAPE)
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1.0, abs=0.05)
    source = FolderSource(picture_folder, 0, 16)
    prompts = source.captions(source.draw(0, 10))
    assert len(set(prompts)) > 1
    pipe = StableDiffusionPipeline.from_pretrained(teachers["flow"])
    pipe.set_progress_bar_config(disable=True)
    reached = pipe(
        prompts, num_inference_steps=4, guidance_scale=scale, latents=noise, output_type="latent", height=16, width=16
    ).images
    torch.testing.assert_close(clean, reached, rtol=1e-3, atol=1e-3)  # kept in half precision
    assert float((clean - noise).square().mean()) > 0.01, "the flow does something"


def test_pairs_of_real_pictures_lead_back_to_the_pictures(
    make_pairs: Callable[..., FlowPairs], teachers: dict[str, Path], picture_folder: Path
):
    pairs = make_pairs(teacher_guidance_scale=1.0, inverted_share=0.3, teacher_steps=20, num_pairs=4)
    pairs.prepare(Accelerator(cpu=True))
    assert pairs.inverted == 2
    tensors = load_file(pairs.file)
    noise, clean = tensors["noise"][4:].float(), tensors["clean"][4:].float()
    source = FolderSource(picture_folder, 0, 16)
    items = source.draw(1, 2)
    pipe = StableDiffusionPipeline.from_pretrained(teachers["flow"])
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe.vae.encode(source.images(items)).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(clean, pictures, rtol=1e-3, atol=1e-3)
    back = pipe(
        source.captions(items), num_inference_steps=20, guidance_scale=1.0, latents=noise, output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    # each way has the error of Euler's method, which is small against the way
    assert float((back - clean).square().mean()) < 0.03 * float((noise - clean).square().mean())


def test_a_batch_holds_pairs_with_their_own_prompts(make_pairs: Callable[..., FlowPairs]):
    pairs = make_pairs(teacher_guidance_scale=1.0, inverted_share=0.4, num_pairs=6)
    pairs.prepare(Accelerator(cpu=True))
    tensors = load_file(pairs.file)
    whole = torch.cat([tensors["clean"], tensors["noise"]], 1).float()
    real = 0
    for step in range(10):
        clean, noise, input_ids = pairs.draw(step, 20)
        assert clean.dtype == noise.dtype == torch.float32
        rows = (torch.cat([clean, noise], 1)[:, None] == whole).flatten(2).all(2)
        assert bool((rows.sum(1) == 1).all()), "each sample is one of the pairs"
        rows = rows.int().argmax(1)
        assert torch.equal(input_ids, tensors["input_ids"][rows])
        real += int((rows >= 6).sum())
    assert real / 200 == pytest.approx(0.4, abs=0.1)


def test_the_name_of_the_pair_file_tells_what_the_pairs_depend_on(make_pairs: Callable[..., FlowPairs]):
    changes = [
        {}, {"seed": 1}, {"num_pairs": 11}, {"teacher_steps": 5}, {"teacher_guidance_scale": 2.0},
        {"teacher_guidance_scale": 1.0}, {"teacher_guidance_scale": 1.0, "inverted_share": 0.1},
    ]  # fmt: skip
    names = [make_pairs(**change).file.name for change in changes]
    assert len(set(names)) == len(names)
    assert make_pairs().file.name == names[0]
    one = make_pairs()
    with torch.no_grad():
        one.teacher.unet.conv_out.bias += 1e-3
    assert make_pairs().file.name != names[0]


def test_an_interrupted_simulation_goes_on_and_leaves_no_half_file(make_pairs: Callable[..., FlowPairs], monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(flow_pairs, "PAIR_BATCH", 3)
    pairs = make_pairs()
    folder = pairs.file.parent
    pairs.prepare(accelerator)
    whole = pairs.file.read_bytes()
    assert [path.name for path in folder.iterdir() if path.is_file()] == [pairs.file.name]
    pairs.file.unlink()
    monkeypatch.setattr(flow_pairs, "SAVE_SECONDS", 0.0)
    simulated: list[int] = []

    def run(limit: int) -> None:
        def path(velocity, start, *levels):
            if len(simulated) == limit:
                raise KeyboardInterrupt
            simulated.append(len(start))
            return euler_path(velocity, start, *levels)

        monkeypatch.setattr(flow_pairs, "euler_path", path)
        make_pairs().prepare(accelerator)

    with pytest.raises(KeyboardInterrupt):
        run(limit=2)
    assert not pairs.file.exists()
    run(limit=100)
    assert simulated == [3, 3, 3, 1], "nothing is simulated twice"
    assert pairs.file.read_bytes() == whole
    assert [path.name for path in folder.iterdir() if path.is_file()] == [pairs.file.name]


def test_a_damaged_pair_file_is_refused(make_pairs: Callable[..., FlowPairs]):
    accelerator = Accelerator(cpu=True)
    pairs = make_pairs()
    pairs.prepare(accelerator)
    content = pairs.file.read_bytes()
    pairs.file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{pairs.file.name} is damaged; remove it to simulate the pairs again"):
        make_pairs().prepare(accelerator)
    tensors = load_file_bytes(content, pairs.file)
    save_file({name: value[:7] for name, value in tensors.items()}, pairs.file)
    with pytest.raises(ValueError, match="does not hold 10 pairs of this run; remove it"):
        make_pairs().prepare(accelerator)
    save_file({"clean": tensors["clean"]}, pairs.file)
    with pytest.raises(ValueError, match="does not hold 10 pairs of this run; remove it"):
        make_pairs().prepare(accelerator)


def load_file_bytes(content: bytes, file: Path) -> dict[str, torch.Tensor]:
    file.write_bytes(content)
    return {name: value.clone() for name, value in load_file(file).items()}


def test_a_teacher_that_makes_no_numbers_is_refused(make_pairs: Callable[..., FlowPairs]):
    pairs = make_pairs()
    with torch.no_grad():
        pairs.teacher.unet.conv_out.bias[0] = math.inf
    with pytest.raises(ValueError, match="the teacher's samples are not finite; lower teacher_guidance_scale"):
        pairs.prepare(Accelerator(cpu=True))
    assert not pairs.file.exists()


def test_a_teacher_that_is_no_flow_is_refused(train: Train):
    with pytest.raises(
        ValueError, match="predicts epsilon on a diffusion schedule, and ReFlow straightens flows; give a"
    ):
        train("run", teacher="epsilon")


def test_real_pictures_with_guidance_are_refused(make_pairs: Callable[..., FlowPairs]):
    with pytest.raises(ValueError, match="inverted_share=0.1 needs teacher_guidance_scale=1, not 3"):
        make_pairs(inverted_share=0.1)


def test_before_training_the_student_is_the_teacher(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["flow"]))
    sample = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps, words = torch.tensor([400.5, 999.0]), teacher.embeddings(teacher.tokens(["a red square", ""]))
    wanted = teacher.unet(sample, timesteps, words).sample
    for student in (DistilledUNet(teacher, None, None), DistilledUNet(teacher, 2, None)):
        assert torch.equal(student(sample, timesteps, words), wanted)
        assert any(parameter.requires_grad for parameter in student.parameters())


def gaussian_flow(mean: float, deviation: float) -> flow_pairs.Velocity:
    """The exact flow from N(0, 1) to N(mean, deviation^2)."""

    def velocity(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = (timesteps / 1000)[:, None].double()
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        return -mean + (sigma - (1 - sigma) * deviation**2) / variance * (x - (1 - sigma) * mean)

    return velocity


def test_the_measures_of_a_gaussian_flow_are_its_closed_forms():
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    flow = gaussian_flow(1.5, 0.4)
    metrics, ends = measure_flow(flow, noise, 400, even_levels(1))
    # the exact ends are m + tau eps; one Euler step goes to -v(eps, 1) + eps = m: it is off by tau eps
    torch.testing.assert_close(ends, 1.5 + 0.4 * noise, rtol=0, atol=0.01)
    assert metrics["straightness"] == pytest.approx(0.17168, rel=0.01)
    assert metrics["few_step_error"] == pytest.approx(0.4**2, rel=0.02)
    # backwards the noise comes out again
    sigmas, _ = even_levels(400)
    back, _ = euler_path(flow, ends, sigmas.flip(0), 1000 * sigmas.flip(0)[:-1])
    torch.testing.assert_close(back, noise, rtol=0, atol=0.03)
    # reflowed, x_sigma = (1 - sigma)(m + tau eps) + sigma eps tells eps, and with it the velocity of the pair

    def reflowed(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = (timesteps / 1000)[:, None].double()
        eps = (x - (1 - sigma) * 1.5) / ((1 - sigma) * 0.4 + sigma)
        return eps - (1.5 + 0.4 * eps)

    straight, _ = measure_flow(reflowed, noise, 20, even_levels(1), wanted=1.5 + 0.4 * noise)
    assert straight["straightness"] < 1e-10 and straight["few_step_error"] < 1e-10


def test_the_levels_of_a_path_are_those_of_the_stock_scheduler(teachers: dict[str, Path]):
    scheduler = euler_scheduler(Teacher(str(teachers["flow"])))
    for steps in (1, 2, 7):
        sigmas, timesteps = solver_levels(scheduler, steps)
        assert len(timesteps) == steps and float(sigmas[0]) == pytest.approx(0.999) and float(sigmas[-1]) == 0.0
        assert bool((sigmas[:-1] * 1000 - timesteps).abs().max() < 1.0)
    assert scheduler.num_inference_steps is None, "asking changes nothing"


def test_wrong_calls_are_answered_in_one_sentence(teachers: dict[str, Path]):
    with pytest.raises(ValueError, match=r"sigmas of shape \(2,\) and timesteps of shape \(2,\) are no path"):
        euler_path(lambda x, t: x, torch.ones(1, 1), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="steps=0 must be"):
        even_levels(0)
    with pytest.raises(ValueError, match="steps=1001 must be"):
        solver_levels(euler_scheduler(Teacher(str(teachers["flow"]))), 1001)


def test_reflow_straightens_the_paths_to_eight_gaussians():
    angles = torch.arange(8) * math.pi / 4
    centres = 2.0 * torch.stack([angles.cos(), angles.sin()], 1)

    def teacher(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(x - E[x_0 | x]) / sigma of the mixture of N(centre, .15^2)."""
        sigma = (timesteps / 1000)[:, None]
        variance = (1 - sigma) ** 2 * 0.15**2 + sigma**2
        away = x[:, None] - (1 - sigma[..., None]) * centres
        weights = (-away.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        clean = centres + ((1 - sigma) * 0.15**2 / variance)[..., None] * away
        return (x - (weights * clean).sum(1)) / sigma

    def noise_of(count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))

    held_out = noise_of(2000, 1)
    before, wanted = measure_flow(teacher, held_out, 40, even_levels(1))
    noise = noise_of(8000, 2)
    clean, _ = euler_path(teacher, noise, *even_levels(40))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 2)
    )

    def student(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([x, timesteps[:, None] / 1000], 1))

    steps = 600
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        rows = torch.randint(len(noise), (256,), generator=generator)
        sigma = exponential_times(torch.rand(256, generator=generator))
        x, velocity = interpolate(clean[rows], noise[rows], sigma)
        reflow_loss(student(x, 1000 * sigma), velocity).backward()
        optimizer.step()
        optimizer.zero_grad()
    after, _ = measure_flow(student, held_out, 40, even_levels(1), wanted)
    assert after["straightness"] < before["straightness"] / 5
    assert after["few_step_error"] < before["few_step_error"] / 5


@pytest.mark.slow
def test_training_straightens_the_paths_and_keeps_their_ends(train: Train, teachers: dict[str, Path], tmp_path: Path):
    bent = StableDiffusionPipeline.from_pretrained(teachers["flow"])
    with torch.no_grad():
        bent.unet.conv_out.weight *= 16.0  # an untrained network is a weak, and so a straight, flow
    bent.save_pretrained(tmp_path / "bent")
    folder = train(
        "run", "--max_train_steps=150", "--learning_rate=2e-3", "--num_pairs=128", "--teacher_steps=8",
        "--train_batch_size=16", "--teacher_guidance_scale=2", "--ema_decay=0.9", "--num_inference_steps=1",
        teacher=tmp_path / "bent",
    )  # fmt: skip
    card = (folder / "README.md").read_text()
    table = [
        line.split("|") for line in card.splitlines() if line.startswith(("| straightness", "| squared distance"))
    ]
    (_, _, before, after, _), (_, _, far, near, _) = table
    assert float(after) < 0.5 * float(before) and float(near) < 0.5 * float(far)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_inference_steps=4"], "--num_inference_steps 4 is more than the 3 of --teacher_steps; choose fewer"),
        (["--time_base=1"], "--time_base 1 must be above 1; for even times give --time_density uniform"),
        (["--inverted_share=0.1"], "--inverted_share 0.1 needs --teacher_guidance_scale 1"),
        (["--time_density=cosh"], "invalid choice: 'cosh'"),
        (["--use_lora", "--pretrained_student_model=x"], "--pretrained_student_model x needs weights of its own"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
