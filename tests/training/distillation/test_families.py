import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from torch import nn

from diffusers_ext.training.adapters import SharedBase
from diffusers_ext.training.distillation.families import FAMILIES, UNETS, family_named
from diffusers_ext.training.distillation.families.conditions import pack, unpack
from diffusers_ext.training.distillation.flow_pairs import euler_path, euler_scheduler, guided_velocity, solver_levels
from diffusers_ext.training.distillation.lcm import guided
from diffusers_ext.training.distillation.matching import MatchingNetworks
from diffusers_ext.training.distillation.teachers import DistilledUNet, Teacher
from tests.helpers.tiny_flows import tiny_flux_components, tiny_sd3_components
from tests.helpers.tiny_models import tiny_stable_diffusion, tiny_stable_diffusion_xl


PROMPTS = ["a red square on blue", "a green square"]
SHAPE = (2, 4, 16, 16)


def xl(force_zeros: bool = True) -> DiffusionPipeline:
    pipeline = tiny_stable_diffusion_xl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    return pipeline


def flux(dev: bool = False) -> DiffusionPipeline:
    parts = tiny_flux_components()
    if dev:
        torch.manual_seed(1)
        parts["transformer"] = FluxTransformer2DModel.from_config(
            parts["transformer"].config, guidance_embeds=True
        ).eval()
    return FluxPipeline(**parts)


MAKERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_stable_diffusion, "xl": xl, "xl-empty": lambda: xl(False), "sd3": lambda: StableDiffusion3Pipeline(**tiny_sd3_components()),
    "flux": flux, "flux-dev": lambda: flux(True),
}  # fmt: skip


def told_apart(pipeline: Any) -> Any:
    """The second and third tokenizer pad with other tokens than the first, as the published ones do."""
    for name, token in (("tokenizer_2", "!"), ("tokenizer_3", "?")):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).pad_token = token
    return pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of each kind, as it is published."""
    folder = tmp_path_factory.mktemp("families")
    for name, make in MAKERS.items():
        told_apart(make()).save_pretrained(folder / name)
    return {name: folder / name for name in MAKERS}


def loaded(folders: dict[str, Path], name: str, **options: Any) -> tuple[Teacher, Any]:
    """The teacher and the stock pipeline of a folder."""
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.set_progress_bar_config(disable=True)
    return teacher_of(folders[name], **options), pipeline


def teacher_of(folder: Path, **options: Any) -> Teacher:
    return Teacher(str(folder), "cpu", FAMILIES, 32, **options)


@torch.no_grad()
def stock_embeddings(name: str, pipeline: Any) -> list[torch.Tensor | None]:
    """Prompt embeddings, negative ones, pooled ones and negative ones of the stock pipeline."""
    if name.startswith("sd3"):
        return list(pipeline.encode_prompt(PROMPTS, None, None))
    if name.startswith("flux"):
        positive, negative = pipeline.encode_prompt(PROMPTS), pipeline.encode_prompt(["", ""])
        return [positive[0], negative[0], positive[1], negative[1]]
    found = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return [*found, None, None][:4]


@pytest.mark.parametrize("name", MAKERS)
def test_the_condition_is_what_the_stock_pipeline_encodes(folders: dict[str, Path], name: str):
    teacher, pipeline = loaded(folders, name, guidance_scale=3.0)
    positive, negative, pooled, negative_pooled = stock_embeddings(name, pipeline)
    words = teacher.embeddings(teacher.tokens(PROMPTS))
    found, empty = (words,), (teacher.empty.expand_as(words),)
    if pooled is not None:
        lengths = [pooled.shape[1], len(teacher.numbers)] if teacher.numbers else [pooled.shape[1]]
        found, empty = unpack(words, *lengths), unpack(teacher.empty.expand_as(words), *lengths)
        assert torch.equal(found[1], pooled)
        torch.testing.assert_close(empty[1], negative_pooled)
    assert torch.equal(found[0], positive)
    # encoded once, not in a batch, which is another rounding
    torch.testing.assert_close(empty[0], negative)
    if name.startswith("xl"):
        time_ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 8)
        assert torch.equal(found[2], time_ids.expand(2, -1)) and torch.equal(empty[2], found[2])
        assert bool(empty[0].any()) == (name == "xl-empty")
    assert teacher.numbers == [3.0] or name != "flux-dev"


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd", "xl", "xl-empty"])
def test_a_unet_is_called_as_the_stock_pipeline_calls_it(folders: dict[str, Path], name: str, guidance_scale: float):
    teacher, pipeline = loaded(folders, name)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    wanted = pipeline(
        PROMPTS, latents=noise, guidance_scale=guidance_scale, num_inference_steps=3, height=32, width=32,
        output_type="latent",
    ).images  # fmt: skip
    scheduler, sample, words = teacher.pipeline.scheduler, noise, teacher.embeddings(teacher.tokens(PROMPTS))
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            both = teacher.predictions(sample, timestep.expand(2), words)
        sample = scheduler.step(guided(*both, torch.full((2,), guidance_scale - 1.0)), timestep, sample).prev_sample
    torch.testing.assert_close(sample, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd3", "flux", "flux-dev"])
def test_eulers_method_on_a_flow_ends_where_the_stock_pipeline_ends(
    folders: dict[str, Path], name: str, guidance_scale: float
):
    teacher, pipeline = loaded(folders, name, guidance_scale=guidance_scale)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"guidance_scale": guidance_scale}
    if name.startswith("flux"):
        # of the packing the stock pipeline is the truth, and of guidance in two passes its true_cfg_scale
        packed = FluxPipeline._pack_latents(noise, 2, 4, 16, 16)
        call = call if name == "flux-dev" else {"true_cfg_scale": guidance_scale, "negative_prompt": ["", ""]}
    else:
        packed = noise
    wanted = pipeline(
        PROMPTS, latents=packed, num_inference_steps=3, height=32, width=32, output_type="latent", **call
    ).images
    if name.startswith("flux"):
        wanted = FluxPipeline._unpack_latents(wanted, 32, 32, 2)
    velocity = guided_velocity(teacher, teacher.embeddings(teacher.tokens(PROMPTS)), guidance_scale)
    levels = solver_levels(euler_scheduler(teacher), 3, teacher.family)
    with torch.no_grad():
        found, _ = euler_path(velocity, noise, *levels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # and so does the pipeline of a student before training
    untrained = teacher.student_pipeline(teacher.unet, euler_scheduler(teacher))
    again = untrained(PROMPTS, latents=packed, num_inference_steps=3, height=32, width=32, output_type="pt", **call)
    plain = pipeline(PROMPTS, latents=packed, num_inference_steps=3, height=32, width=32, output_type="pt", **call)
    torch.testing.assert_close(again.images, plain.images, rtol=1e-5, atol=1e-5)


def test_a_network_that_reads_the_guidance_makes_one_pass_and_is_told_it(folders: dict[str, Path]):
    teacher, other = (teacher_of(folders["flux-dev"], guidance_scale=scale) for scale in (4.0, 2.0))
    assert teacher.reads_guidance and teacher.student_scale == 4.0
    told: list[tuple[int, torch.Tensor]] = []
    teacher.unet.register_forward_pre_hook(
        lambda _module, inputs, named: told.append((len(inputs[0]), named["guidance"])), with_kwargs=True
    )
    words, timesteps = teacher.embeddings(teacher.tokens(PROMPTS)), torch.tensor([200.0, 900.0])
    conditional, unconditional = teacher.predictions(torch.ones(SHAPE), timesteps, words)
    assert [count for count, _ in told] == [2] and told[0][1].tolist() == [4.0, 4.0]
    assert torch.equal(conditional, unconditional)
    assert not torch.equal(
        conditional, other.denoise(torch.ones(SHAPE), timesteps, other.embeddings(other.tokens(PROMPTS)))
    )
    plain = teacher_of(folders["flux"], guidance_scale=4.0)
    assert not plain.reads_guidance and plain.student_scale == 1.0


@pytest.mark.parametrize("name", ["sd", "xl", "sd3", "flux"])
def test_encoding_is_the_inverse_of_what_the_stock_pipeline_does_before_decoding(folders: dict[str, Path], name: str):
    teacher, pipeline = loaded(folders, name)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[torch.Tensor] = []
    pipeline.vae.decode = lambda latents, **_: seen.append(latents) or (torch.zeros(2, 3, 32, 32),)
    # the last latents of a run are exchanged for those of the pictures
    latents = teacher.encode(images)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 16, 16) if name.startswith("flux") else latents
    pipeline(
        PROMPTS, num_inference_steps=1, height=32, width=32, guidance_scale=1.0,
        callback_on_step_end=lambda *_: {"latents": packed},
    )  # fmt: skip
    torch.testing.assert_close(seen[0], teacher.pipeline.vae.encode(images).latent_dist.mode(), rtol=1e-5, atol=1e-5)


def test_channels_of_an_autoencoder_with_mean_and_deviation_are_normalised(folders: dict[str, Path], tmp_path: Path):
    pipeline = tiny_stable_diffusion_xl()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipeline.save_pretrained(tmp_path / "xl")
    teacher, plain = Teacher(str(tmp_path / "xl"), "cpu", FAMILIES), Teacher(str(folders["xl"]), "cpu", FAMILIES)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mode, scale = plain.pipeline.vae.encode(images).latent_dist.mode(), plain.pipeline.vae.config.scaling_factor
    mean, deviation = (torch.tensor(values)[:, None, None] for values in ([0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]))
    # the pipeline multiplies by the deviation and adds the mean
    torch.testing.assert_close(teacher.encode(images) * deviation / scale + mean, mode, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "xl", "sd3", "flux"])
def test_all_parts_of_a_teacher_are_frozen(folders: dict[str, Path], name: str):
    teacher = teacher_of(folders[name])
    modules = [part for part in teacher.pipeline.components.values() if isinstance(part, nn.Module)]
    assert set(modules) == {teacher.unet, teacher.pipeline.vae, *teacher.text_encoders}
    assert not any(part.training or any(value.requires_grad for value in part.parameters()) for part in modules)
    assert family_named(type(teacher.pipeline).__name__).pipeline_class is teacher.family.pipeline_class


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_lora_is_on_all_linear_maps_of_a_transformers_blocks_but_those_of_norms(folders: dict[str, Path], name: str):
    teacher = teacher_of(folders[name])
    linear = {
        key for key, layer in teacher.unet.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks." in key and ".norm" not in key
    }  # fmt: skip
    base = SharedBase(teacher.unet, ["student"], 2, teacher.family.lora_layers)
    adapted = {key.split(".lora_A")[0] for key in base.state_dict("student") if ".lora_A" in key}
    assert linear and adapted == linear | {"proj_out"}


def test_a_unet_gets_its_input_for_the_guidance_even_if_its_published_config_is_older_than_that(
    folders: dict[str, Path], tmp_path: Path
):
    copied = Path(shutil.copytree(folders["sd"], tmp_path / "sd"))
    file = copied / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["time_cond_proj_dim"]
    file.write_text(json.dumps(config))
    student = DistilledUNet(Teacher(str(copied)), None, 16)
    assert student.unet.config.time_cond_proj_dim == 16 and student.unet.time_embedding.cond_proj is not None


def test_vectors_are_packed_below_the_states_and_come_out_again():
    generator = torch.Generator().manual_seed(0)
    for lengths in ([3], [4], [5, 6], [1, 1, 9]):
        states = torch.randn(3, 7, 4, generator=generator)
        vectors = [torch.randn(3, length, generator=generator) for length in lengths]
        condition = pack(states, *vectors)
        rows = -(-sum(lengths) // 4)
        assert condition.shape == (3, 7 + rows, 4) and torch.equal(condition[:, :7], states)
        assert not bool(condition[:, 7:].flatten(1)[:, sum(lengths) :].any()), "zeros to the end of the row"
        assert all(map(torch.equal, unpack(condition, *lengths), [states, *vectors]))


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=r"vectors have shapes \[\(3, 2\)\]; give one or more of \(2, length\)"):
        pack(torch.zeros(2, 1, 4), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"vectors have shapes \[\]; give one or more"):
        pack(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 4\), and vectors of 5 numbers alone take 2 rows"):
        unpack(torch.zeros(2, 2, 4), 5)


def test_what_a_family_cannot_do_is_refused_in_one_sentence(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(
        ValueError, match="is a FluxPipeline; give a StableDiffusionPipeline or StableDiffusionXLPipeline "
        r"\(train_reflow.py and train_dmd.py take it\)$",
    ):  # fmt: skip
        Teacher(str(folders["flux"]), "cpu", UNETS)
    for name in ("StableDiffusionXLImg2ImgPipeline", ["pipeline_mr_restoration", "MRRestorationPipeline"]):
        index = '["pipeline_mr_restoration", "MRRestorationPipeline"]' if isinstance(name, list) else f'"{name}"'
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": {index}}}')
        with pytest.raises(
            ValueError, match="pretrained_teacher_model=.*Pipeline.*; give a StableDiffusionPipeline, "
            "StableDiffusionXLPipeline, StableDiffusion3Pipeline or FluxPipeline$",
        ):  # fmt: skip
            Teacher(str(tmp_path), "cpu", FAMILIES)
    with pytest.raises(ValueError, match="resolution=38 must be a multiple of 4, because a FluxPipeline .* is 40"):
        Teacher(str(folders["flux"]), "cpu", FAMILIES, 38)
    with pytest.raises(
        ValueError, match="gan=True needs the bottleneck of a UNet, which a SD3Transformer2DModel lacks"
    ):
        MatchingNetworks(Teacher(str(folders["sd3"]), "cpu", FAMILIES), 2, None, gan=True)
    assert family_named("DiffusionPipeline") is None
