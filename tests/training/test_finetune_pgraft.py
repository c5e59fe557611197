import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.data import FolderSource
from diffusers_ext.training.distillation import accepted, rewards
from diffusers_ext.training.distillation.accepted import AcceptedSamples, chosen_samples, mean_reward, switching
from diffusers_ext.training.distillation.pgraft import switched
from diffusers_ext.training.distillation.rewards import make_reward
from diffusers_ext.training.distillation.teachers import Teacher

from .conftest import load_script, log_entries


Train = Callable[..., Path]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def arguments(picture_folder: Path) -> list[str]:
    return [
        f"--train_data_dir={picture_folder}", "--resolution=16", "--train_batch_size=4", "--num_threads=1",
        "--report_to=none", "--lr_warmup_steps=0", "--num_prompts=3", "--samples_per_prompt=4", "--teacher_steps=4",
        "--teacher_guidance_scale=2", "--validation_prompts", "a red square", "--lora_rank=2", "--max_train_steps=2",
        "--tuned_share=0.5", "--reward=brightness",
    ]  # fmt: skip


@pytest.fixture
def train(teachers: dict[str, Path], arguments: list[str], tmp_path: Path) -> Train:
    """Runs finetune_pgraft.py in this process and returns its folder."""
    script = load_script("finetune_pgraft")
    script.VALIDATION_ITEMS = 4

    def run(name: str, *more: str, teacher: str = "epsilon") -> Path:
        common = [*arguments, f"--pretrained_teacher_model={teachers[teacher]}", f"--output_dir={tmp_path / name}"]
        script.main(script.parse_args([*common, *more]))
        return tmp_path / name

    return run


@pytest.fixture
def make_samples(
    teachers: dict[str, Path], picture_folder: Path, arguments: list[str], tmp_path: Path
) -> Callable[..., AcceptedSamples]:
    """Samples of the tiny teacher, not made yet."""
    script = load_script("finetune_pgraft")
    teacher, source = Teacher(str(teachers["epsilon"])), FolderSource(picture_folder, 0, 16)

    def make(*more: str) -> AcceptedSamples:
        args = script.parse_args([*arguments, "--pretrained_teacher_model=x", f"--output_dir={tmp_path}", *more])
        return AcceptedSamples(args, source, teacher, make_reward(args.reward))

    return make


def sample_file(folder: Path) -> Path:
    (file,) = folder.glob("accepted-*.safetensors")
    return file


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quiet(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: StableDiffusionPipeline, **more: object) -> torch.Tensor:
    return pipe(
        "a red square", num_inference_steps=4, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


KINDS = {
    "epsilon": ["--export_dtype=fp16", "--temperature=0.01"],
    "v_prediction": ["--reward=colourfulness"],
    "flow": ["--use_lora", "--keep=3"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tuned_folder_is_a_stock_pipeline_with_its_base_beside_it(
    train: Train, teachers: dict[str, Path], kind: str
):
    folder = train("run", *KINDS[kind], "--learning_rate=1e-3", teacher=kind)
    pipe, source = DiffusionPipeline.from_pretrained(folder), StableDiffusionPipeline.from_pretrained(teachers[kind])
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is type(source.scheduler)
    assert bool(torch.isfinite(latents_of(quiet(pipe))).all())
    base = UNet2DConditionModel.from_pretrained(folder, subfolder="base_unet").state_dict()
    exact = "--export_dtype=fp16" not in KINDS[kind]
    assert all(
        torch.equal(base[name], value if exact else value.half().float())
        for name, value in source.unet.state_dict().items()
    )
    assert any(not torch.equal(base[name], value) for name, value in pipe.unet.state_dict().items()), "it was tuned"
    assert (folder / "pytorch_lora_weights.safetensors").is_file() == ("--use_lora" in KINDS[kind])
    texts = [path.read_text() for path in folder.rglob("*.json") if "checkpoint" not in str(path)]
    assert not any(str(folder.parent.parent) in text or "diffusers_ext" in text for text in texts)
    card = (folder / "README.md").read_text()
    assert "at timesteps of 500 or more" in card and "| those trained on |" in card
    assert "reward" in log_entries(folder)[-1]


def test_grafting_all_timesteps_needs_no_switch(train: Train):
    folder = train("run", "--tuned_share=1")
    card = (folder / "README.md").read_text()
    assert "at all timesteps (GRAFT)" in card and "callback_on_step_end" not in card
    assert not (folder / "base_unet").exists()


@pytest.mark.parametrize("lora", [[], ["--use_lora"]], ids=["full", "lora"])
def test_the_lines_of_the_card_sample_the_tuned_network_above_the_switch_and_the_base_below(
    train: Train, teachers: dict[str, Path], monkeypatch, lora: list[str]
):
    folder = train("run", *lora, "--learning_rate=3e-2", "--max_train_steps=3")
    monkeypatch.chdir(folder.parent)  # the card names the folder as a repository would be named
    lines = re.findall(r"```python\n(from diffusers .*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    place: dict = {}
    exec(lines, place)
    pipe, call = quiet(place["pipe"]), {"callback_on_step_end": place["switch"]}
    found = latents_of(pipe, **call)
    again = latents_of(pipe, **call)
    assert torch.equal(found, again), "a call leaves the pipeline as it was"

    tuned = quiet(StableDiffusionPipeline.from_pretrained(folder))
    base = quiet(StableDiffusionPipeline.from_pretrained(teachers["epsilon"]))
    asked: list[tuple[int, str]] = []
    words = torch.cat(tuned.encode_prompt("a red square", "cpu", 1, True)[::-1])

    def network(pipe: StableDiffusionPipeline, name: str) -> Callable:
        def denoise(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            asked.append((int(timestep), name))
            without, with_prompt = pipe.unet(sample.repeat(2, 1, 1, 1), timestep, words).sample.chunk(2)
            return without + 2.0 * (with_prompt - without)

        return denoise

    denoise = switched(network(tuned, "tuned"), network(base, "base"), 500)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tuned.scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in tuned.scheduler.timesteps:
            sample = tuned.scheduler.step(denoise(sample, timestep), timestep, sample).prev_sample
    assert asked == [(751, "tuned"), (501, "tuned"), (251, "base"), (1, "base")]
    # a LoRA at work is not merged, which rounds otherwise
    torch.testing.assert_close(found, sample, rtol=0, atol=1e-4 if lora else 0)
    apart = [float((latents_of(other) - found).abs().max()) for other in (tuned, base)]
    assert min(apart) > 1e-3, "neither network alone paints this"


def test_the_switch_counts_steps_and_not_timesteps():
    class Pipe:
        unet, scheduler = "tuned", type("Scheduler", (), {"timesteps": torch.tensor([900, 600, 600, 300, 300])})

    used, callback = [], switching("tuned", "base", 500)
    for step, timestep in enumerate(Pipe.scheduler.timesteps):
        used.append(Pipe.unet)
        assert callback(Pipe, step, timestep, {"latents": step}) == {"latents": step}
    assert used == ["tuned", "tuned", "tuned", "base", "base"] and Pipe.unet == "tuned"


@pytest.mark.parametrize("options", [["--temperature=0.01"], ["--use_lora"]], ids=["full", "lora"])
def test_a_resumed_run_reuses_the_samples_and_ends_with_the_bits_of_an_uninterrupted_one(
    train: Train, monkeypatch, options: list[str]
):
    common = [*options, "--learning_rate=1e-3"]
    whole = train("whole", *common)
    parts = train("parts", *common, "--max_train_seconds=1e-9")
    assert [step for step, _ in list_checkpoints(parts)] == [1]
    assert sample_file(whole).name == sample_file(parts).name
    assert sha256(sample_file(whole)) == sha256(sample_file(parts))
    monkeypatch.setattr(AcceptedSamples, "_sample", lambda *_: pytest.fail("the samples are there already"))
    train("parts", *common, "--resume_from_checkpoint=latest")
    for name in (WEIGHTS, "checkpoint-2/model.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert sha256(whole / name) == sha256(parts / name)


def test_the_best_samples_of_each_prompt_are_kept_with_their_prompt(
    make_samples: Callable[..., AcceptedSamples], teachers: dict[str, Path]
):
    samples = make_samples("--keep=2")
    samples.prepare(Accelerator(cpu=True))
    tensors = load_file(samples.file)
    assert len(samples) == 6 and tensors["rewards"].shape == (3, 4)
    best = tensors["rewards"].topk(2, dim=1).indices.sort(dim=1).values
    assert tensors["rows"].reshape(3, 2).tolist() == (best + 4 * torch.arange(3)[:, None]).tolist()
    kept, every = samples.mean_rewards()
    assert kept > every

    # the rewards are those of what the stock pipeline shows of these latents
    pipe = StableDiffusionPipeline.from_pretrained(teachers["epsilon"])
    with torch.no_grad():
        shown = pipe.vae.decode(tensors["latents"].float() / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    again = rewards.brightness(shown, [""] * 6)
    torch.testing.assert_close(again, tensors["rewards"].flatten()[tensors["rows"]])

    clean, input_ids = samples.draw(0, 6)
    assert clean.dtype == torch.float32 and clean.shape == (6, 4, 8, 8)
    for row in range(6):
        (which,) = (tensors["latents"].float() == clean[row]).flatten(1).all(1).nonzero().flatten().tolist()
        assert torch.equal(input_ids[row], samples.input_ids[which // 2])


def test_samples_do_not_depend_on_how_many_are_made_at_a_time_and_go_on_after_an_interruption(
    make_samples: Callable[..., AcceptedSamples], monkeypatch
):
    samples, accelerator = make_samples(), Accelerator(cpu=True)
    samples.prepare(accelerator)
    whole = load_file(samples.file)
    samples.file.unlink()
    monkeypatch.setattr(accepted, "SAMPLE_BATCH", 5)
    monkeypatch.setattr(accepted, "SAVE_SECONDS", 0.0)
    made, sample = [], AcceptedSamples._sample

    def interrupted(self: AcceptedSamples, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        if made == [0, 5]:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(int(rows[0]))
        return sample(self, rows)

    monkeypatch.setattr(AcceptedSamples, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_samples().prepare(accelerator)
    make_samples().prepare(accelerator)
    assert made == [0, 5, "interrupted", 10], "nothing is sampled twice"
    parts = load_file(samples.file)
    assert torch.equal(parts["rows"], whole["rows"])
    torch.testing.assert_close(parts["latents"].float(), whole["latents"].float(), rtol=2e-3, atol=2e-3)
    assert [path.name for path in samples.file.parent.iterdir() if path.is_file()] == [samples.file.name]


def test_the_name_of_the_file_tells_what_the_samples_depend_on(make_samples: Callable[..., AcceptedSamples]):
    changes = [
        [], ["--seed=1"], ["--num_prompts=4"], ["--samples_per_prompt=5"], ["--keep=2"], ["--temperature=1"],
        ["--teacher_steps=5"], ["--teacher_guidance_scale=3"], ["--reward=colourfulness"],
    ]  # fmt: skip
    names = [make_samples(*change).file.name for change in changes]
    assert len(set(names)) == len(names) and make_samples().file.name == names[0]
    samples = make_samples()
    with torch.no_grad():
        samples.teacher.pipeline.vae.decoder.conv_out.bias += 1e-3
    assert make_samples().file.name != names[0], "the reward is of pictures"


def test_damaged_and_foreign_files_are_refused(make_samples: Callable[..., AcceptedSamples]):
    samples, accelerator = make_samples(), Accelerator(cpu=True)
    samples.prepare(accelerator)
    tensors = {name: value.clone() for name, value in load_file(samples.file).items()}
    content = samples.file.read_bytes()
    samples.file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{samples.file.name} is damaged; remove it to sample the teacher again"):
        make_samples().prepare(accelerator)
    for change in ({"rewards": tensors["rewards"][:2]}, {"rows": tensors["rows"] + 99}, {"rows": tensors["rows"][:1]}):
        save_file({**tensors, **change}, samples.file)
        with pytest.raises(ValueError, match="does not hold the accepted samples of this run; remove it"):
            make_samples().prepare(accelerator)


def test_a_teacher_that_makes_no_numbers_is_refused(make_samples: Callable[..., AcceptedSamples]):
    samples = make_samples()
    with torch.no_grad():
        samples.teacher.unet.conv_out.bias[0] = float("inf")
    with pytest.raises(ValueError, match="the teacher's samples are not finite; lower teacher_guidance_scale"):
        samples.prepare(Accelerator(cpu=True))
    assert not samples.file.exists()


def test_a_low_temperature_accepts_the_best_alone_and_a_high_one_accepts_all():
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    best = scores == scores.amax(1, keepdim=True)
    assert torch.equal(chosen_samples(scores, None, 1e-9, 0), best)
    assert bool(chosen_samples(scores, None, 1e9, 0).all())
    some = chosen_samples(scores, None, 0.2, 0)
    assert bool(some[best].all()) and 5 < int(some.sum()) < 200
    assert float(scores[some].mean()) > float(scores.mean())
    with pytest.raises(ValueError, match="keep=None and temperature=None are two ways to choose; give one of them"):
        chosen_samples(scores, None, None, 0)


def test_training_moves_the_reward_of_new_samples_to_where_the_reward_points(
    train: Train, teachers: dict[str, Path], monkeypatch
):
    monkeypatch.setitem(rewards.REWARDS, "darkness", lambda images, captions: -rewards.brightness(images, captions))
    common = [
        "--num_prompts=12", "--samples_per_prompt=12", "--keep=1", "--teacher_guidance_scale=1",
        "--train_batch_size=16",
        "--learning_rate=3e-3", "--max_train_steps=40", "--ema_decay=0.9", "--tuned_share=0.5",
    ]  # fmt: skip
    found = {"teacher": quiet(StableDiffusionPipeline.from_pretrained(teachers["epsilon"]))}
    found |= {
        name: quiet(StableDiffusionPipeline.from_pretrained(train(name, *common, f"--reward={name}")))
        for name in ("brightness", "darkness")
    }
    prompts = ["a red square on blue", "a white square on green"] * 16
    means = {}
    for name, pipe in found.items():
        callback = switching(pipe.unet, found["teacher"].unet, 500)
        means[name] = mean_reward(
            pipe, make_reward("brightness"), prompts, 7, num_inference_steps=4, guidance_scale=1.0,
            callback_on_step_end=callback,
        )  # fmt: skip
    assert means["brightness"] > means["teacher"]
    assert means["brightness"] > means["darkness"] + 0.01


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep=1", "--temperature=1"], "--keep and --temperature are two ways to choose samples; leave one out"),
        (["--keep=4"], "--samples_per_prompt 4 with --keep 4 rejects nothing; sample more, or keep fewer"),
        (["--samples_per_prompt=1"], "--samples_per_prompt 1 with --keep 1 rejects nothing; sample more"),
        (["--tuned_share=0"], "--tuned_share 0 trains nothing; give a share above 0"),
        (["--temperature=0"], "0 must be a number above 0"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train: Train, capsys, more: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *more)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_steps_that_begin_below_the_switch_and_unknown_rewards_are_refused(train: Train, tmp_path: Path):
    with pytest.raises(ValueError, match="tunes timesteps from 900, and the 4 teacher_steps begin at 751, below it"):
        train("run", "--tuned_share=0.1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded .*; give one of brightness, colourfulness, or the folder"):
        train("run", f"--reward={tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists(), "refused before anything is made"
