import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_ext import CTMPipeline, CTMScheduler
from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.distillation.lcm import guidance_embedding
from diffusers_ext.training.distillation.methods import TIMESTEP_SHARE, LatentConsistencyTraining
from diffusers_ext.training.distillation.teachers import (
    DistilledUNet,
    Teacher,
    few_step_scheduler,
    with_guidance_input,
)

from .conftest import load_script, losses


Train = Callable[..., Path]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
# what only one method has
OWN = {
    "lcm": ["--w_min=1", "--w_max=4", "--unet_time_cond_proj_dim=16"],
    "slct": ["--start_levels=4", "--end_levels=16"],
    "ctm": ["--w_min=2", "--w_max=2", "--unet_time_cond_proj_dim=16"],
    "guess": [],
}


@pytest.fixture
def train(teachers: dict[str, Path], picture_folder: Path, tmp_path: Path) -> Train:
    """Runs train_consistency.py in this process and returns its folder."""
    script = load_script("train_consistency")

    def run(name: str, *arguments: str, teacher: str = "v_prediction") -> Path:
        folder = tmp_path / name
        common = [
            f"--pretrained_teacher_model={teachers[teacher]}", f"--train_data_dir={picture_folder}", "--resolution=16",
            "--train_batch_size=4", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0", "--num_inference_steps=2",
            "--validation_prompts", "a red square", "--lora_rank=2", "--max_train_steps=2", f"--output_dir={folder}",
            *OWN[next((word.removeprefix("--method=") for word in arguments if word.startswith("--method=")), "lcm")],
        ]  # fmt: skip
        script.main(script.parse_args([*common, *arguments]))
        return folder

    return run


def picture(pipe: StableDiffusionPipeline, scale: float) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red square", num_inference_steps=4, guidance_scale=scale, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        ("epsilon", ["--use_lora"]),
        ("v_prediction", []),
        ("epsilon", ["--method=slct"]),
        ("v_prediction", ["--method=slct", "--use_lora", "--distance=pseudo_huber", "--noise_coupling=none"]),
        ("v_prediction", ["--method=ctm"]),
    ],
    ids=["lcm lora", "lcm", "slct", "slct lora", "ctm"],
)
def test_the_trained_folder_is_a_stock_pipeline(train: Train, teacher: str, options: list[str]):
    folder = train("run", *options, teacher=teacher)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is LCMScheduler
    assert pipe.scheduler.config.prediction_type == teacher
    images = picture(pipe, 1.0 if options else 3.0)
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())
    told = not options or options == ["--method=ctm"]
    assert pipe.unet.config.time_cond_proj_dim == (16 if told else None)
    texts = [path.read_text() for path in folder.rglob("*.json") if "checkpoint" not in str(path)]
    assert not any(str(folder.parent.parent) in text or "diffusers_ext" in text for text in texts)


def test_a_full_student_is_told_the_guidance_in_one_pass(train: Train):
    pipe = StableDiffusionPipeline.from_pretrained(train("run", "--learning_rate=1e-2", "--max_train_steps=3"))
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    weak, strong = picture(pipe, 2.0), picture(pipe, 5.0)
    assert calls == [1] * 8, "no second pass without the prompt"
    assert not torch.equal(weak, strong)


def test_the_lora_file_on_the_teacher_gives_the_pictures_of_the_merged_pipeline(
    train: Train, teachers: dict[str, Path]
):
    folder = train("run", "--use_lora", "--learning_rate=1e-2", "--max_train_steps=3")
    merged = StableDiffusionPipeline.from_pretrained(folder)
    adapted = StableDiffusionPipeline.from_pretrained(teachers["v_prediction"])
    plain = picture(adapted, 1.0)
    adapted.scheduler = LCMScheduler.from_config(merged.scheduler.config)
    untrained = picture(adapted, 1.0)
    adapted.load_lora_weights(folder)
    torch.testing.assert_close(picture(adapted, 1.0), picture(merged, 1.0), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(merged, 1.0), untrained, atol=1e-3)
    assert not torch.equal(plain, untrained)


def test_the_lora_changes_neither_the_teacher_nor_what_is_beside_it(train: Train, teachers: dict[str, Path]):
    folder = train("run", "--use_lora", "--learning_rate=1e-2")
    before, after = load_file(teachers["v_prediction"] / WEIGHTS), load_file(folder / WEIGHTS)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") for name in changed)
    trained = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert all(".lora_" in name for name in trained), "only the adapter is trained and saved"
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, other = load_file(teachers["v_prediction"] / part), load_file(folder / part)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_exported_weights_are_the_averaged_ones(train: Train):
    folder = train("run", "--max_train_steps=4", "--learning_rate=1e-3", "--ema_decay=0.9")
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    exported = load_file(folder / WEIGHTS)
    assert exported.keys() == {name.removeprefix("unet.") for name in average}
    assert all(torch.equal(value, average[f"unet.{name}"]) for name, value in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--huber_c=0.1"],
        ["--huber_c=0.1", "--use_lora"],
        # at levels that stay, since the loss grows with them
        ["--method=slct", "--start_levels=8", "--end_levels=8", "--distance=pseudo_huber"],
        ["--method=ctm", "--huber_c=0.1", "--w_min=4", "--w_max=4", "--learning_rate=1e-3", "--max_train_steps=40"],
    ],
    ids=["lcm", "lcm lora", "slct", "ctm"],
)
def test_training_lowers_the_loss(train: Train, options: list[str]):
    folder = train(
        "run", "--max_train_steps=24", "--learning_rate=4e-3", "--logging_steps=8", "--cache_latents=23",
        "--train_batch_size=8", "--validation_steps=0", "--lora_rank=16", *options,
    )  # fmt: skip
    trace = losses(folder)
    assert trace[max(trace)] < 0.8 * trace[1]


@pytest.mark.parametrize(
    "options", [[], ["--use_lora"], ["--method=slct"], ["--method=ctm"]], ids=["lcm", "lcm lora", "slct", "ctm"]
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(train: Train, options: list[str]):
    common = [*options, "--learning_rate=1e-3"]
    whole = train("whole", *common)
    train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(whole.parent / "parts")] == [1]
    parts = train("parts", *common, "--resume_from_checkpoint=latest")

    def digests(folder: Path) -> list[str]:
        files = [
            folder / WEIGHTS,
            folder / "checkpoint-2/model.safetensors",
            folder / "checkpoint-2/optimizer.safetensors",
        ]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    assert digests(whole) == digests(parts)


def test_accumulated_batches_train_like_one_large_batch(train: Train):
    one = train("one", "--train_batch_size=8")
    four = train("four", "--train_batch_size=2", "--gradient_accumulation_steps=4")
    first, second = (load_file(folder / "checkpoint-2" / "model.safetensors") for folder in (one, four))
    # the first moments of AdamW are proportional to the gradient
    for name, value in load_file(one / "checkpoint-2" / "optimizer.safetensors").items():
        if name.startswith("exp_avg."):
            other = load_file(four / "checkpoint-2" / "optimizer.safetensors")[name]
            torch.testing.assert_close(value, other, rtol=2e-3, atol=1e-6)
            break
    assert first.keys() == second.keys()


def test_half_precision_export_loads_plainly(train: Train):
    folder = train("run", "--use_lora", "--export_dtype=fp16")
    assert {value.dtype for value in load_file(folder / WEIGHTS).values()} == {torch.float16}
    assert bool(torch.isfinite(picture(StableDiffusionPipeline.from_pretrained(folder), 1.0)).all())


def test_the_card_says_how_to_sample(train: Train):
    card = (train("full") / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=3.5" in card and "trained on 2 to 5" in card
    lora = (train("lora", "--use_lora") / "README.md").read_text()
    assert "guidance_scale=1)" in lora and "pytorch_lora_weights.safetensors" in lora and "\n- lora\n" in lora


def test_a_run_of_trajectories_loads_into_their_pipeline(train: Train):
    folder = train("run", "--method=ctm", "--learning_rate=1e-2", "--max_train_steps=3")
    card = (folder / "README.md").read_text()
    assert "Guidance of 3 is part of the weights" in card and "diffusers_ext.CTMPipeline" in card
    pipe = CTMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for gamma in (0.0, 0.5):
        pipe.scheduler = CTMScheduler.from_config(pipe.scheduler.config, gamma=gamma)
        pictures.append(pipe("a red square", output_type="pt", generator=torch.Generator().manual_seed(0)).images)
        told: list[torch.Tensor] = []
        hook = pipe.unet.register_forward_hook(
            lambda _unet, _inputs, options, _output: told.append(options["timestep_cond"]), with_kwargs=True
        )
        pipe("a red square", output_type="latent", generator=torch.Generator().manual_seed(0))
        hook.remove()
        assert len(told) == 4
        # what it is told is the embedding that training has made
        for found, end in zip(told, pipe.scheduler.target_timesteps):
            torch.testing.assert_close(found, guidance_embedding(end[None] * TIMESTEP_SHARE, 16), rtol=0, atol=1e-4)
    assert not torch.allclose(*pictures, atol=1e-3)


def test_a_student_of_consistency_training_starts_as_the_teacher_and_has_no_other_input(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["epsilon"]))
    student = DistilledUNet(teacher, None, None)
    first, second = student.unet.state_dict(), teacher.unet.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.requires_grad for value in student.parameters())
    assert not any(value.requires_grad for value in teacher.unet.parameters())


def test_validation_of_consistency_training_looks_at_the_levels_of_the_end(teachers: dict[str, Path]):
    method = LatentConsistencyTraining(Teacher(str(teachers["epsilon"])), 0, 10, 4, 16, "cauchy", "none", 10.0)
    shape = (3, 4, 8, 8)
    assert [int(method.draws(shape, step)[-1][0]) for step in (0, 3, 9, 10)] == [5, 9, 17, 17]
    first, again, other = (method.draws(shape, step) for step in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first, again)) and not torch.equal(first[0], other[0])


def test_before_training_the_student_is_the_teacher(teachers: dict[str, Path]):
    teacher = Teacher(str(teachers["v_prediction"]))
    generator = torch.Generator().manual_seed(0)
    sample, timesteps, w = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([19, 999]),
        torch.tensor([2.0, 7.0]),
    )
    words = teacher.embeddings(teacher.tokens(["a red square", "a blue square"]))
    conditional, unconditional = teacher.predictions(sample, timesteps, words)
    torch.testing.assert_close(conditional, teacher.unet(sample, timesteps, words).sample)
    torch.testing.assert_close(unconditional, teacher.unet(sample, timesteps, teacher.empty.expand_as(words)).sample)
    before = torch.get_rng_state()
    full = DistilledUNet(teacher, None, 16)
    lora = DistilledUNet(teacher, 2)
    assert torch.equal(before, torch.get_rng_state())
    for student in (full, lora):
        torch.testing.assert_close(student(sample, timesteps, words, w), conditional)


def test_a_teacher_of_another_family_is_refused(teachers: dict[str, Path], tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline; give a StableDiffusionPipeline"):
        Teacher(str(tmp_path))
    with pytest.raises(ValueError, match="the teacher predicts a flow, which LCMScheduler cannot sample"):
        few_step_scheduler(Teacher(str(teachers["flow"])), 50, 10.0)


def test_a_distilled_teacher_is_refused(teachers: dict[str, Path], tmp_path: Path):
    pipe = StableDiffusionPipeline.from_pretrained(teachers["v_prediction"])
    pipe.unet = with_guidance_input(pipe.unet, 16)
    pipe.save_pretrained(tmp_path / "distilled")
    with pytest.raises(ValueError, match="it is distilled already; give the model that it was made of"):
        Teacher(str(tmp_path / "distilled"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--w_min=9"], "--w_min 9 is above --w_max 4; exchange them"),
        (["--num_ddim_timesteps=1"], "--num_inference_steps 2 is more than the 1 of --num_ddim_timesteps"),
        (["--method=guess"], "invalid choice: 'guess'"),
        (["--method=slct", "--w_min=3"], "--w_min is no option of --method slct; leave it out"),
        (["--distance=cauchy"], "--distance is no option of --method lcm; leave it out"),
        (["--method=slct", "--start_levels=20"], "--start_levels 20 is above --end_levels 16; exchange them"),
        (["--method=ctm", "--w_min=1"], "--w_min 1 --w_max 2: --method ctm builds one guidance in; give it twice"),
        (["--method=ctm", "--use_lora"], "--use_lora has no input for the level that a jump ends at"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
