from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)

from diffusers_ext.training.distillation.dmd import few_step_timesteps
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks
from diffusers_ext.training.distillation.matching_methods import RegularizedMatching
from diffusers_ext.training.distillation.teachers import Teacher

from .conftest import exported_digests, load_script


TRANSLATION_STEPS = load_script("train_dmd").TRANSLATION_STEPS
Train = Callable[..., Path]


def translation_options(picture_folder: Path, *more: str) -> list[str]:
    return ["--method=rdmd", "--use_lora", f"--source_data_dir={picture_folder}", "--learning_rate=1e-3", *more]


def test_a_translator_is_a_stock_pipeline_and_a_resumed_run_of_it_has_equal_bits(
    train_dmd: Train, picture_folder: Path
):
    common = translation_options(picture_folder)
    folder = train_dmd("whole", *common)
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
    train_dmd("parts", *common, "--max_train_seconds=1e-9")
    assert exported_digests(train_dmd("parts", *common, "--resume_from_checkpoint=latest")) == exported_digests(folder)


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
