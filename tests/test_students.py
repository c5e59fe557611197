import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from PIL import Image

from diffusers_ext.demos.distillation import run_distillation_demo
from diffusers_ext.hub import ModelFamilyError, ModelNotFoundError
from diffusers_ext.students import with_student

from .helpers.tiny_flows import flow_scheduler, tiny_flow_components


@pytest.fixture
def teacher() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(**tiny_flow_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Another network of the same shape, with a scheduler of its own."""
    folder = tmp_path / "student"
    tiny_flow_components(seed=1)["unet"].save_pretrained(folder)
    flow_scheduler(solver_order=2).save_pretrained(folder / "scheduler")
    return folder


def test_a_student_samples_with_its_own_network_and_scheduler_and_shares_the_rest(
    teacher: StableDiffusionPipeline, student: Path
):
    before = teacher.unet, teacher.scheduler
    made = with_student(teacher, student)
    weights = UNet2DConditionModel.from_pretrained(student).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in made.unet.state_dict().items())
    assert type(made) is StableDiffusionPipeline and made.scheduler.config.solver_order == 2
    assert made.vae is teacher.vae and made.text_encoder is teacher.text_encoder
    assert (teacher.unet, teacher.scheduler) == before
    image = made("a b", num_inference_steps=1, guidance_scale=1, height=16, width=16).images[0]
    assert isinstance(image, Image.Image)


def test_without_a_scheduler_of_its_own_the_student_has_the_teacher_s(
    teacher: StableDiffusionPipeline, tmp_path: Path
):
    tiny_flow_components(seed=1)["unet"].save_pretrained(tmp_path / "student")
    assert with_student(teacher, tmp_path / "student").scheduler is teacher.scheduler


def test_a_scheduler_of_another_class_is_found_by_its_name(teacher: StableDiffusionPipeline, student: Path):
    UniPCMultistepScheduler().save_pretrained(student / "scheduler")
    assert type(with_student(teacher, student).scheduler) is UniPCMultistepScheduler
    config = student / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    with pytest.raises(ModelFamilyError, match="is a UNet2DModel, which diffusers .* does not have"):
        with_student(teacher, student)


def test_what_is_no_student_of_this_teacher_is_refused(
    teacher: StableDiffusionPipeline, student: Path, tmp_path: Path
):
    with pytest.raises(ModelNotFoundError, match=r"holds no network: config.json is missing"):
        with_student(teacher, tmp_path)
    (student / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no distilled network that can be read"):
        with_student(teacher, student)
    wide = UNet2DConditionModel.from_config({**teacher.unet.config, "cross_attention_dim": 16})
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelFamilyError, match="has cross_attention_dim=16 and that of the pipeline"):
        with_student(teacher, tmp_path / "wide")


def test_the_sheet_shows_teacher_and_student_and_says_what_each_cost(
    teacher: StableDiffusionPipeline, student: Path, tmp_path: Path
):
    teacher.save_pretrained(tmp_path / "teacher")
    report = run_distillation_demo(
        tmp_path / "demo", model=tmp_path / "teacher", student=student, steps=5, device="cpu", prompts=["a b", "c"]
    )
    assert sorted(os.listdir(tmp_path / "demo")) == ["distillation.json", "distillation.png"]
    assert json.loads((tmp_path / "demo" / "distillation.json").read_text()) == report
    assert [row["network_evaluations_a_picture"] for row in report["columns"]] == [10, 8, 4, 1]
    assert report["network_evaluations"] == 2 * (10 + 8 + 4 + 1)
    with Image.open(report["sheet"]) as sheet:
        assert sheet.width > sheet.height / 2
