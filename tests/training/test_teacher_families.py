"""The distillation scripts with teachers of other families than Stable Diffusion 1.x and 2.x."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import scheduling_flow_match_lcm
from safetensors.torch import load_file

from diffusers_ext.training.distillation import guided_points
from diffusers_ext.training.distillation.families import FAMILIES
from diffusers_ext.training.distillation.families.flows import in_tokens
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks
from diffusers_ext.training.distillation.matching_methods import matching_sampler
from diffusers_ext.training.distillation.teachers import Teacher
from tests.helpers.tiny_flows import flow_scheduler, tiny_flux_components, tiny_sd3_components
from tests.helpers.tiny_models import tiny_stable_diffusion_xl

from .conftest import load_script


PARTS = {"xl": "unet", "xl-flow": "unet", "sd3": "transformer", "flux": "transformer", "flux-dev": "transformer"}
CLASSES = {"xl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}


@pytest.fixture(scope="session")
def family_teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    tiny_stable_diffusion_xl().save_pretrained(folder / "xl")
    flow = tiny_stable_diffusion_xl()
    flow.scheduler = flow_scheduler()
    flow.save_pretrained(folder / "xl-flow")
    StableDiffusion3Pipeline(**tiny_sd3_components()).save_pretrained(folder / "sd3")
    parts = tiny_flux_components()
    FluxPipeline(**parts).save_pretrained(folder / "flux")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts["transformer"] = FluxTransformer2DModel.from_config(parts["transformer"].config, guidance_embeds=True)
    FluxPipeline(**parts).save_pretrained(folder / "flux-dev")
    return {name: folder / name for name in PARTS}


@pytest.fixture
def run(family_teachers: dict[str, Path], picture_folder: Path, tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """Runs a script in this process, looks after its teacher, and returns its folder."""

    def train(name: str, teacher: str, *arguments: str) -> Path:
        script, made, folder = load_script(name), [], tmp_path / "run"
        monkeypatch.setattr(script, "VALIDATION_ITEMS", 4, raising=False)
        monkeypatch.setattr(guided_points, "HELD_OUT_RUNS", 2)

        class Watched(script.Teacher):
            def __init__(self, *inputs: Any):
                super().__init__(*inputs)
                made.append(self)

        monkeypatch.setattr(script, "Teacher", Watched)
        script.main(
            script.parse_args([
                f"--pretrained_teacher_model={family_teachers[teacher]}", f"--train_data_dir={picture_folder}",
                "--resolution=32", "--train_batch_size=2", "--num_threads=1", "--report_to=none", "--lr_warmup_steps=0",
                "--lora_rank=2", "--max_train_steps=2", "--learning_rate=1e-2", "--validation_prompts", "a red square",
                f"--output_dir={folder}", *arguments,
            ])
        )  # fmt: skip
        given = weights(family_teachers[teacher] / PARTS[teacher])
        after = {key.replace(".base_layer.", "."): value for key, value in made[0].unet.state_dict().items()}
        assert all(torch.equal(value, after[key]) for key, value in given.items()), "the teacher has changed"
        assert any(
            not torch.equal(value, given[key])
            for key, value in weights(folder / PARTS[teacher]).items()
            if key in given
        )
        return folder

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def picture(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, **options}
    if "image" in options:
        del call["height"], call["width"]
    with torch.random.fork_rng():
        # the pipelines of flows do not hand their generator to the scheduler
        torch.manual_seed(0)
        images = pipe("a red square", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert images.shape == (1, 3, 32, 32) and bool(torch.isfinite(images).all())
    return images


def check_lora(folder: Path, teacher: Path, **options: Any) -> None:
    """The adapter on the stock teacher, with the student's scheduler, paints what the student paints."""
    student, pipe = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = type(student.scheduler).from_config(student.scheduler.config)
    plain = picture(pipe, **options)
    pipe.load_lora_weights(folder)
    wanted = picture(student, **options)
    torch.testing.assert_close(picture(pipe, **options), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)


LCM = ["--method=lcm", "--w_min=1", "--w_max=3", "--num_ddim_timesteps=10", "--num_inference_steps=2"]
XL_RUNS = {
    "lcm": ("train_consistency", [*LCM, "--unet_time_cond_proj_dim=16"]),
    "lcm-lora": ("train_consistency", [*LCM, "--use_lora", "--cache_latents=8"]),
    "slct": ("train_consistency", ["--method=slct", "--num_inference_steps=2"]),
    "ctm": ("train_consistency", ["--method=ctm", "--unet_time_cond_proj_dim=16", "--num_inference_steps=2"]),
    "dmd2": ("train_dmd", ["--method=dmd2", "--num_denoising_steps=2", "--fake_update_ratio=1", "--gan_weight=0"]),
    "fdistill-lora": ("train_dmd", ["--method=fdistill", "--use_lora", "--num_denoising_steps=2", "--fake_update_ratio=1"]),
}  # fmt: skip


@pytest.mark.parametrize(("script", "options"), XL_RUNS.values(), ids=XL_RUNS)
def test_a_student_of_sdxl_of_few_steps_is_a_stock_pipeline(
    run: Callable[..., Path], family_teachers: dict[str, Path], script: str, options: list[str]
):
    folder = run(script, "xl", *options)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionXLPipeline and type(pipe.scheduler) is LCMScheduler
    assert (pipe.unet.config.time_cond_proj_dim == 16) == ("--unet_time_cond_proj_dim=16" in options)
    weak, strong = picture(pipe), picture(pipe, guidance_scale=3.0)
    assert not torch.equal(weak, strong)
    card = (folder / "README.md").read_text()
    assert "import StableDiffusionXLPipeline" in card and "\n- stable-diffusion-xl\n" in card and "CTMP" not in card
    assert (folder / "pytorch_lora_weights.safetensors").is_file() == ("--use_lora" in options)
    if "--use_lora" in options:
        check_lora(folder, family_teachers["xl"])


def test_a_translator_of_sdxl_is_a_stock_image_to_image_pipeline(run: Callable[..., Path], picture_folder: Path):
    folder = run("train_dmd", "xl", "--method=rdmd", f"--source_data_dir={picture_folder}", "--fake_update_ratio=1")
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionXLImg2ImgPipeline
    picture(pipe, image=torch.rand(1, 3, 32, 32), strength=0.5)


@pytest.mark.parametrize("options", [[], ["--use_lora"]], ids=["full", "lora"])
def test_a_student_of_sdxl_is_told_the_guidance_in_one_pass(run: Callable[..., Path], options: list[str]):
    folder = run(
        "train_guidance_distillation", "xl", "--num_trajectories=4", "--trajectory_steps=2", "--w_max=5",
        "--unet_time_cond_proj_dim=16", *options,
    )  # fmt: skip
    pipe, rows = StableDiffusionXLPipeline.from_pretrained(folder), []
    pipe.unet.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    assert not torch.equal(picture(pipe), picture(pipe, guidance_scale=5.0)) and rows == [1] * 4


CDM = ["--method=cdm", "--num_denoising_steps=2", "--fake_update_ratio=1", "--longest_schedule=3"]
REFLOW = ["--num_pairs=4", "--teacher_steps=3", "--num_inference_steps=2"]
FLOW_RUNS = {
    "sd3-reflow": ("sd3", "train_reflow", [*REFLOW, "--export_dtype=fp16"]),
    "sd3-reflow-lora": ("sd3", "train_reflow", [*REFLOW, "--use_lora"]),
    "sd3-cdm": ("sd3", "train_dmd", CDM),
    "sd3-cdm-lora": ("sd3", "train_dmd", [*CDM, "--use_lora"]),
    "flux-reflow": ("flux", "train_reflow", [*REFLOW, "--teacher_guidance_scale=1"]),
    "flux-cdm-lora": ("flux", "train_dmd", [*CDM, "--use_lora"]),
    "flux-dev-reflow-lora": ("flux-dev", "train_reflow", [*REFLOW, "--use_lora", "--teacher_guidance_scale=4"]),
    "flux-dev-cdm": ("flux-dev", "train_dmd", [*CDM, "--real_guidance_scale=4"]),
    "xl-flow-reflow": ("xl-flow", "train_reflow", REFLOW),
}


@pytest.mark.parametrize(("teacher", "script", "options"), FLOW_RUNS.values(), ids=FLOW_RUNS)
def test_a_student_of_a_flow_is_a_stock_pipeline(
    run: Callable[..., Path], family_teachers: dict[str, Path], teacher: str, script: str, options: list[str]
):
    folder, scale = run(script, teacher, *options), 4.0 if teacher == "flux-dev" else 1.0
    pipe = DiffusionPipeline.from_pretrained(folder)
    solver = DPMSolverMultistepScheduler if teacher == "xl-flow" else FlowMatchEulerDiscreteScheduler
    assert type(pipe) is CLASSES[teacher.split("-")[0]] and type(pipe.scheduler) is solver
    picture(pipe, guidance_scale=scale)
    card = (folder / "README.md").read_text()
    assert f"import {type(pipe).__name__}\n" in card and f"num_inference_steps=2, guidance_scale={scale:g})" in card
    if "--use_lora" in options:
        check_lora(folder, family_teachers[teacher], guidance_scale=scale)


DMD2 = ["--method=dmd2", "--num_denoising_steps=2", "--fake_update_ratio=1", "--gan_weight=0"]
MATCHING_RUNS = {
    "sd3": ("sd3", 2, DMD2),
    "flux-dev-lora": ("flux-dev", 2, [*DMD2, "--use_lora", "--real_guidance_scale=4"]),
    "xl-flow": ("xl-flow", 1, [*DMD2, "--num_denoising_steps=1", "--gan_weight=1e-3"]),
}


@pytest.mark.parametrize(("teacher", "steps", "options"), MATCHING_RUNS.values(), ids=MATCHING_RUNS)
def test_distribution_matching_makes_stock_pipelines_of_flows(
    run: Callable[..., Path], family_teachers: dict[str, Path], teacher: str, steps: int, options: list[str]
):
    folder, scale = run("train_dmd", teacher, *options), 4.0 if teacher == "flux-dev" else 1.0
    pipe = DiffusionPipeline.from_pretrained(folder)
    solver = DPMSolverMultistepScheduler if teacher == "xl-flow" else FlowMatchLCMScheduler
    assert type(pipe) is CLASSES[teacher.split("-")[0]] and type(pipe.scheduler) is solver
    picture(pipe, guidance_scale=scale, num_inference_steps=steps)
    if "--use_lora" in options:
        check_lora(folder, family_teachers[teacher], guidance_scale=scale)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_distribution_matching_trains_is_what_the_stock_pipeline_paints(
    family_teachers: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    teacher = Teacher(str(family_teachers[name]), "cpu", FAMILIES, 32)
    scheduler, timesteps = matching_sampler(teacher, 3)
    networks = MatchingNetworks(teacher, 3, None, timesteps=timesteps)
    path = torch.randn(
        3, 1, teacher.pipeline.vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    words = teacher.embeddings(teacher.tokens(["a red square"]))
    trained = networks.generated(MatchingBatch(words, path, 2, path[0], torch.zeros(1)))
    # the noise that the scheduler adds is that of the path; none counts in its last step
    added = chain(path[1:], path[:1])
    inward = in_tokens if name == "flux" else torch.clone
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *args, **kwargs: inward(next(added)))
    pipe = teacher.student_pipeline(networks.student, scheduler)
    painted = pipe(
        "a red square", num_inference_steps=3, guidance_scale=1.0, height=32, width=32, latents=inward(path[0]),
        output_type="latent",
    ).images  # fmt: skip
    assert pipe.scheduler.timesteps.tolist() == timesteps
    torch.testing.assert_close(inward(trained.detach()), painted, rtol=1e-4, atol=1e-4)


def test_random_levels_of_a_flow_are_shifted_as_its_scheduler_shifts(family_teachers: dict[str, Path]):
    teacher = Teacher(str(family_teachers["sd3"]), "cpu", FAMILIES, 32)
    shift = teacher.pipeline.scheduler.config.shift
    networks = MatchingNetworks(teacher, 1, None)
    uniform = torch.tensor([0.0, 0.25, 0.5, 1.0])
    wanted = shift * uniform / (1 + (shift - 1) * uniform) * 1000
    torch.testing.assert_close(networks.random_timesteps(uniform), wanted)
    networks.shift = 3.0
    torch.testing.assert_close(networks.random_timesteps(uniform), torch.tensor([0.0, 500.0, 750.0, 1000.0]))
    torch.testing.assert_close(networks.random_timesteps(torch.tensor([0.0]), 0.5), torch.tensor([750.0]))


def test_a_second_round_starts_at_the_student_of_the_first(run: Callable[..., Path], tmp_path: Path):
    first = run("train_reflow", "sd3", *REFLOW).rename(tmp_path / "first")
    second = run("train_reflow", "sd3", *REFLOW, f"--pretrained_student_model={first}", "--learning_rate=1e-9")
    for key, value in weights(first / "transformer").items():
        torch.testing.assert_close(weights(second / "transformer")[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("script", "teacher", "options", "message"),
    [
        ("train_consistency", "sd3", LCM, "is a StableDiffusion3Pipeline; give a StableDiffusionPipeline or"),
        ("train_guidance_distillation", "flux", [], "train_reflow.py and train_dmd.py take it"),
        (
            "train_dmd",
            "flux",
            [],
            "gan=True needs the bottleneck of a UNet, which a FluxTransformer2DModel lacks; .*--gan_weight 0",
        ),
        (
            "train_dmd",
            "xl-flow",
            DMD2,
            "num_denoising_steps=2 needs a scheduler that adds new noise to a flow, .* give 1, or --method cdm",
        ),
        ("train_dmd", "xl", CDM, "the teacher predicts epsilon on a diffusion schedule, and CDM matches flows"),
        (
            "finetune_pgraft",
            "xl",
            ["--reward=brightness"],
            "a StableDiffusionXLPipeline; give a StableDiffusionPipeline$",
        ),
    ],
)
def test_a_family_that_a_method_cannot_teach_is_refused(
    run: Callable[..., Path], script: str, teacher: str, options: list[str], message: str
):
    with pytest.raises(ValueError, match=message):
        run(script, teacher, *options)
