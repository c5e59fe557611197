import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.guidance import relative_error
from diffusers_ext.training.distillation.guided_points import GuidanceStudent, GuidedPoints, make_points, sample_runs
from diffusers_ext.training.distillation.lcm import guidance_embedding
from diffusers_ext.training.distillation.teachers import Teacher

from .conftest import load_script, log_entries


Train = Callable[..., Path]
Arguments = Callable[..., list[str]]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
PROMPTS = ["a red square on blue", "a green square on white"]
SCALES = torch.tensor([1.0, 6.0])
SHAPE = (4, 8, 8)


@pytest.fixture
def arguments(teachers: dict[str, Path], picture_folder: Path, tmp_path: Path) -> Arguments:
    """Arguments of a run in a folder of that name."""

    def make(name: str, *more: str, teacher: str = "v_prediction") -> list[str]:
        return [
            f"--pretrained_teacher_model={teachers[teacher]}", f"--train_data_dir={picture_folder}", "--resolution=16",
            "--train_batch_size=8", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0", "--num_trajectories=8",
            "--trajectory_steps=3", "--w_max=6", "--validation_prompts", "a red square", "--lora_rank=2",
            "--max_train_steps=2", "--unet_time_cond_proj_dim=16", f"--output_dir={tmp_path / name}", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def train(arguments: Arguments, tmp_path: Path) -> Train:
    """Runs train_guidance_distillation.py in this process and returns its folder."""
    script = load_script("train_guidance_distillation")

    def run(name: str, *more: str, teacher: str = "v_prediction") -> Path:
        script.main(script.parse_args(arguments(name, *more, teacher=teacher)))
        return tmp_path / name

    return run


@pytest.fixture
def sampled(arguments: Arguments, teachers: dict[str, Path], tmp_path: Path) -> Callable[..., list[Path]]:
    """Only samples the guided runs, or reads them, and returns their files."""
    script, teacher = load_script("train_guidance_distillation"), Teacher(str(teachers["v_prediction"]))

    def run(*more: str) -> list[Path]:
        args = script.parse_args(arguments("run", *more))
        make_points(args, teacher, make_source(args, torch.device("cpu")), Accelerator(cpu=True))
        return sorted((tmp_path / "run").glob("guided-*"))

    return run


def picture(pipe: StableDiffusionPipeline, scale: float, **options: object) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red square", num_inference_steps=3, guidance_scale=scale, output_type="pt",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "options"), [("epsilon", ["--use_lora"]), ("v_prediction", []), ("flow", ["--use_lora"])]
)
def test_the_trained_folder_is_a_stock_pipeline_with_the_teachers_scheduler(
    train: Train, teachers: dict[str, Path], teacher: str, options: list[str]
):
    folder = train("run", *options, teacher=teacher)
    pipe, taught = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(teachers[teacher])
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is type(taught.scheduler)
    assert pipe.scheduler.config == taught.scheduler.config
    assert pipe.unet.config.time_cond_proj_dim == 16
    assert bool(torch.isfinite(picture(pipe, 4.0)).all())
    before, after = load_file(teachers[teacher] / WEIGHTS), load_file(folder / WEIGHTS)
    assert after.keys() - before.keys() == {"time_embedding.cond_proj.weight"} and before.keys() < after.keys()
    assert float(after["time_embedding.cond_proj.weight"].abs().max()) > 0
    texts = [path.read_text() for path in folder.rglob("*.json") if "checkpoint" not in str(path)]
    assert not any(str(folder.parent.parent) in text or "diffusers_ext" in text for text in texts)


@pytest.mark.parametrize("options", [[], ["--use_lora"]], ids=["full", "lora"])
def test_the_student_is_told_the_guidance_in_one_pass(train: Train, options: list[str]):
    folder = train("run", *options, "--learning_rate=1e-2", "--max_train_steps=3")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    weak, strong = picture(pipe, 1.0), picture(pipe, 5.0)
    assert rows == [1] * 6, "no second pass without the prompt"
    assert not torch.equal(weak, strong)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_pipeline_tells_the_network_what_training_told_it(teachers: dict[str, Path], scale: float):
    teacher = Teacher(str(teachers["v_prediction"]))
    student = GuidanceStudent(teacher, None, 16)
    told: list[torch.Tensor] = []
    student.unet.register_forward_pre_hook(
        lambda _module, _inputs, named: told.append(named["timestep_cond"]), with_kwargs=True
    )
    picture(teacher.student_pipeline(student.unet, teacher.pipeline.scheduler), scale)
    student(torch.zeros(1, *SHAPE), torch.tensor([1.0]), teacher.empty, torch.tensor([scale]) - 1.0)
    assert len(told) == 4
    torch.testing.assert_close(told[0], told[-1])
    torch.testing.assert_close(told[-1], guidance_embedding(torch.tensor([scale - 1.0]), 16))


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_before_training_the_student_predicts_what_the_teacher_predicts_with_the_prompt(
    teachers: dict[str, Path], rank: int | None
):
    teacher = Teacher(str(teachers["v_prediction"]))
    sample, timesteps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([19.0, 999.0])
    words = teacher.embeddings(teacher.tokens(PROMPTS))
    conditional = teacher.unet(sample, timesteps, words).sample
    before = torch.get_rng_state()
    student = GuidanceStudent(teacher, rank, 16)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(student(sample, timesteps, words, SCALES - 1.0), conditional)
    trained = {name for name, value in student.named_parameters() if value.requires_grad}
    assert "unet.time_embedding.cond_proj.weight" in trained
    assert rank is None or all(".lora_" in name or "cond_proj" in name for name in trained)
    # at guidance_scale 1 the pipeline of the teacher does not guide, and that is what the student is at first
    untrained = teacher.student_pipeline(student.plain_unet(), teacher.pipeline.scheduler)
    plain = StableDiffusionPipeline.from_pretrained(teachers["v_prediction"])
    torch.testing.assert_close(picture(untrained, 1.0), picture(plain, 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_stored_points_are_those_that_the_stock_guided_pipeline_passes_through(
    teachers: dict[str, Path], kind: str
):
    teacher = Teacher(str(teachers[kind]))
    runs = sample_runs(teacher, teacher.tokens(PROMPTS), SCALES, 4, SHAPE, seed=3)
    assert runs["sample"].shape == (2, 4, *SHAPE) and runs["sample"].dtype == torch.float16
    pipe = StableDiffusionPipeline.from_pretrained(teachers[kind])
    for run in range(2):
        visited: list[torch.Tensor] = []
        noise = runs["sample"][run, :1].float()

        def keep(_pipe, _step, _timestep, tensors, visited=visited):
            visited.append(tensors["latents"].clone())
            return tensors

        pipe(
            PROMPTS[run], latents=noise, guidance_scale=float(SCALES[run]), num_inference_steps=4, height=16, width=16,
            output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
        assert runs["timesteps"].tolist() == pipe.scheduler.timesteps.tolist()
        stored = runs["sample"][run, 1:].float()
        torch.testing.assert_close(stored, torch.cat(visited[:-1]), rtol=2e-3, atol=2e-3)


def test_the_stored_prediction_is_that_of_guidance_and_half_precision_costs_next_to_nothing(
    teachers: dict[str, Path],
):
    teacher = Teacher(str(teachers["v_prediction"]))
    input_ids = teacher.tokens(PROMPTS)
    runs = sample_runs(teacher, input_ids, SCALES, 4, SHAPE, seed=3)
    for run in range(2):
        sample, timesteps = runs["sample"][run].float(), runs["timesteps"]
        words = teacher.embeddings(input_ids[run : run + 1]).expand(4, -1, -1)
        with_words = teacher.unet(sample, timesteps, words).sample
        without = teacher.unet(sample, timesteps, teacher.empty.expand(4, -1, -1)).sample
        exact = without + SCALES[run] * (with_words - without)
        stored = runs["guided"][run].float()
        # a ten-thousandth of the hundredth that a student is asked for
        assert 0 < float(relative_error(stored, exact)) < 1e-6
        if float(SCALES[run]) == 1.0:
            torch.testing.assert_close(stored, with_words, rtol=1e-3, atol=1e-3)


def test_a_sampler_with_random_steps_draws_them_from_the_seed(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["epsilon"]))
    teacher.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(teacher.pipeline.scheduler.config)
    input_ids = teacher.tokens(PROMPTS)
    before = torch.get_rng_state()
    one, same, other = (sample_runs(teacher, input_ids, SCALES, 3, SHAPE, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one["sample"], same["sample"]) and not torch.equal(one["sample"], other["sample"])


def test_points_are_numbered_along_the_runs_and_the_last_runs_are_held_out(teachers: dict[str, Path], tmp_path: Path):
    teacher = Teacher(str(teachers["v_prediction"]))
    input_ids, file = teacher.tokens(PROMPTS), tmp_path / "guided.safetensors"
    points = GuidedPoints(file, Accelerator(cpu=True), teacher, input_ids, SCALES, 3, SHAPE, seed=0, held_out=1)
    runs = load_file(file)
    assert len(points) == 3
    batch = points[torch.tensor([2, 0])]
    assert torch.equal(batch.sample, runs["sample"][0, [2, 0]].float()) and batch.guided.dtype == torch.float32
    assert torch.equal(batch.timesteps, runs["timesteps"][[2, 0]]) and batch.scale.tolist() == [1.0, 1.0]
    held_out = points.held_out()
    assert torch.equal(held_out.guided, runs["guided"][1].float()) and held_out.scale.tolist() == [6.0] * 3
    assert torch.equal(held_out.input_ids, input_ids[[1, 1, 1]])


@pytest.mark.parametrize("options", [[], ["--use_lora"]], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(train: Train, options: list[str]):
    common = [*options, "--learning_rate=1e-3"]
    whole = train("whole", *common)
    train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    parts = train("parts", *common, "--resume_from_checkpoint=latest")
    assert len(list(parts.glob("guided-*.safetensors"))) == 1, "the guided runs are sampled once"

    def digests(folder: Path) -> list[str]:
        files = [
            next(folder.glob("guided-*.safetensors")), folder / WEIGHTS, folder / "checkpoint-2/model.safetensors",
            folder / "checkpoint-2/ema.safetensors", folder / "checkpoint-2/optimizer.safetensors",
        ]  # fmt: skip
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    assert digests(whole) == digests(parts)


@pytest.mark.parametrize(
    "options",
    [
        ["--use_lora", "--lora_rank=8", "--learning_rate=5e-3", "--max_train_steps=20"],
        pytest.param(["--learning_rate=1e-3", "--max_train_steps=40"], marks=pytest.mark.slow),
    ],
    ids=["lora", "full"],
)
def test_training_lowers_the_error_on_runs_never_trained_on(train: Train, options: list[str]):
    folder = train("run", *options, "--num_trajectories=32", "--train_batch_size=16", "--ema_decay=0.9")
    error = log_entries(folder)[-1]["relative_error"]
    card = (folder / "README.md").read_text()
    assert f"never trained on: {100 * error:.2f} %" in card
    unguided = float(card.split("without guidance the teacher is ")[1].split(" %")[0]) / 100
    assert error < 0.95 * unguided


def test_other_runs_are_stored_under_another_name(sampled: Callable[..., list[Path]]):
    for i, other in enumerate(
        ([], ["--w_max=5"], ["--trajectory_steps=2"], ["--seed=1"], ["--num_trajectories=9"], ["--use_lora"])
    ):
        assert len(sampled(*other)) == min(i + 1, 5), other


def test_a_damaged_file_of_points_is_named_with_the_cure(sampled: Callable[..., list[Path]]):
    (file,) = sampled()
    whole, tensors = file.read_bytes(), {name: value.clone() for name, value in load_file(file).items()}
    cure = "remove it to sample the guided runs again"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file.name} is damaged; {cure}"):
        sampled()
    save_file({**tensors, "guided": tensors["guided"][:5].clone()}, file)
    with pytest.raises(ValueError, match=rf"holds guided of shape \(5, 3, 4, 8, 8\), not \(32, 3, 4, 8, 8\); {cure}"):
        sampled()
    save_file({name: value for name, value in tensors.items() if name != "scale"}, file)
    with pytest.raises(ValueError, match=rf"holds scale of shape None, not \(32,\); {cure}"):
        sampled()
    tensors["sample"][0, 0, 0, 0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"holds numbers that are not finite; {cure}"):
        sampled()
    file.unlink()
    sampled()
    assert file.read_bytes() == whole, "the same runs are sampled again"


def test_half_precision_export_loads_plainly_and_the_card_says_how_to_sample(train: Train):
    folder = train("run", "--use_lora", "--export_dtype=fp16")
    assert {value.dtype for value in load_file(folder / WEIGHTS).values()} == {torch.float16}
    assert bool(torch.isfinite(picture(StableDiffusionPipeline.from_pretrained(folder), 3.0)).all())
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=3, guidance_scale=3.5)" in card and "trained on 1 to 6" in card
    assert "\n- lora\n" in card and "A negative prompt is not read" in card and card.count("samples.png") == 1


def test_a_teacher_that_leaves_half_precision_is_refused(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    teacher.unet.conv_out.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="up to 6 are not finite in half precision; lower w_max"):
        sample_runs(teacher, teacher.tokens(PROMPTS), SCALES, 2, SHAPE, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.tensor([0.5, 2.0])}, r"scale=0.5 must be a number in \[1, inf\)"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\); give \(2,\)"),
        ({"num_inference_steps": 1001}, r"num_inference_steps=1001 must be a number in \[1, 1000\]"),
    ],
)
def test_wrong_runs_are_refused(teachers: dict[str, Path], changes: dict[str, object], message: str):
    teacher = Teacher(str(teachers["v_prediction"]))
    options = {"scale": SCALES, "num_inference_steps": 2, "latent_shape": SHAPE, "seed": 0}
    with pytest.raises(ValueError, match=message):
        sample_runs(teacher, teacher.tokens(PROMPTS), **{**options, **changes})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--w_min=9"], "--w_min 9 is above --w_max 6; exchange them"),
        (["--w_min=0.5"], "--w_min 0.5 is a guidance_scale that pipelines do not apply; give 1 or more"),
        (["--unet_time_cond_proj_dim=2"], "--unet_time_cond_proj_dim 2 holds no waves; give 4 or more"),
        (["--trajectory_steps=0"], "0 must be a whole number, 1 or more"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, wrong: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *wrong)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(train: Train):
    with pytest.raises(ValueError, match="resolution=17 must be a multiple of the autoencoder's factor 2"):
        train("run", "--resolution=17")
