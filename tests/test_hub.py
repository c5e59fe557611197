"""From what a user types to a pipeline, and one sentence for everything that can be wrong on the way."""

import json
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from diffusers_ext import hub
from diffusers_ext.hub import (
    DEFAULT_MODEL_ID,
    ModelFamilyError,
    ModelNotFoundError,
    check_family,
    load_pipeline,
    native_size,
    read_model_index,
    resolve_device,
    resolve_model,
)
from tests.helpers.tiny_models import IMAGE_SIZE, tiny_stable_diffusion, tiny_stable_diffusion_xl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_stable_diffusion().save_pretrained(path)
    return path


def test_a_folder_loads_in_float32_on_the_device(folder):
    pipe = load_pipeline(StableDiffusionPipeline, folder, device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.unet.dtype == torch.float32
    assert native_size(pipe) == IMAGE_SIZE


def test_dtype_and_components_are_passed_on(folder):
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    pipe = load_pipeline(StableDiffusionPipeline, folder, device="cpu", dtype=torch.bfloat16, scheduler=scheduler)
    assert pipe.unet.dtype == torch.bfloat16 and isinstance(pipe.scheduler, EulerDiscreteScheduler)


def test_without_a_name_the_variable_the_checkout_and_the_hub_are_asked_in_turn(folder, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_EXT_MODEL", raising=False)
    monkeypatch.setattr(hub, "_checkout_model", lambda name, index: None)
    assert resolve_model() == DEFAULT_MODEL_ID and resolve_model(None, "other") == "diffusers-ext/other"
    monkeypatch.setattr(hub, "_checkout_model", lambda name, index: str(folder) if name == "other" else None)
    assert resolve_model(None, "other") == str(folder) and resolve_model() == DEFAULT_MODEL_ID
    monkeypatch.setattr(hub, "_checkout_model", lambda name, index: str(folder))
    assert resolve_model() == str(folder)
    monkeypatch.setenv("DIFFUSERS_EXT_MODEL", "someone/else")
    assert resolve_model() == "someone/else" and resolve_model(None, "other") == str(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "nowhere", "../nowhere"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model(name)


def test_wrong_models_are_named(tmp_path, folder):
    with pytest.raises(ModelNotFoundError, match="model_index.json is missing"):
        resolve_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(folder / "model_index.json")
    with pytest.raises(ModelNotFoundError, match="model='' is empty"):
        resolve_model("")
    with pytest.raises(ModelNotFoundError, match=r"300 characters. does not exist"):
        resolve_model("x" * 300)
    with pytest.raises(ModelNotFoundError, match="model='a b/c' is neither a folder that exists nor a Hub id"):
        resolve_model("a b/c")
    with pytest.raises(TypeError, match="model=7"):
        resolve_model(7)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_index_is_answered_in_one_sentence(tmp_path, content):
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="damaged"):
        read_model_index(tmp_path)


def test_another_family_is_refused_before_any_weight_is_read(tmp_path):
    tiny_stable_diffusion_xl().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelFamilyError, match="is a StableDiffusionXLPipeline, with text_encoder_2, tokenizer_2"):
        load_pipeline(StableDiffusionPipeline, tmp_path, device="cpu")


def index(name: str, *components: str) -> dict[str, object]:
    return {"_class_name": name, **{component: ["diffusers", "Anything"] for component in components}}


SD = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
SD3 = ("transformer", "vae", "scheduler", "tokenizer", "text_encoder")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (index("StableDiffusion3Pipeline", *SD3), "is a StableDiffusion3Pipeline, without unet"),
        (index("FluxPipeline", "transformer", "vae", "scheduler"), "without text_encoder, tokenizer, unet"),
        (index("StableDiffusionUpscalePipeline", *SD, "low_res_scheduler"), "with low_res_scheduler"),
        (index("StableDiffusionInpaintPipeline", *SD), "more than noisy latents"),
        (index("StableDiffusionInstructPix2PixPipeline", *SD), "more than noisy latents"),
    ],
)
def test_models_of_other_families_are_named_with_what_sets_them_apart(found, words):
    with pytest.raises(ModelFamilyError, match=words):
        check_family(StableDiffusionPipeline, found)


@pytest.mark.parametrize(
    "found",
    [
        index("StableDiffusionPipeline", *SD),
        index("StableDiffusionPipeline", *SD, "safety_checker", "feature_extractor"),
        {
            **index("StableDiffusionImg2ImgPipeline", *SD),
            "safety_checker": [None, None],
            "requires_safety_checker": True,
        },
        {**index("x", *SD), "_class_name": ["pipeline_mine", "MyPipeline"]},
    ],
)
def test_repositories_with_the_right_components_are_accepted(found):
    assert check_family(StableDiffusionPipeline, found) is None


def test_an_unknown_device_is_named():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="is not present here"):
            resolve_device(name)


def test_what_the_hub_answers_becomes_one_sentence(monkeypatch):
    errors = huggingface_hub.errors
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    answers = {
        errors.HFValidationError("bad"): "neither a folder nor a Hub id",
        errors.GatedRepoError("gated", response=response): "is gated",
        errors.RevisionNotFoundError("rev", response=response): "no revision 'abc'",
        errors.RepositoryNotFoundError("none", response=response): "no Hub repository",
        errors.LocalEntryNotFoundError("offline"): "the Hub cannot be reached",
        errors.EntryNotFoundError("entry"): "holds no pipeline",
        ConnectionError("line one\nline two"): "cannot be fetched from the Hub: line one",
    }
    for answer, words in answers.items():

        def fail(*arguments: object, error: Exception = answer, **named: object) -> None:
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", fail)
        with pytest.raises(ModelNotFoundError, match=words) as caught:
            read_model_index("owner/name", revision="abc")
        assert "owner/name" in str(caught.value) and "\n" not in str(caught.value)


def test_the_revision_reaches_the_hub(monkeypatch, folder):
    asked = []

    def download(model: str, name: str, **named: object) -> str:
        asked.append((model, name, named["revision"]))
        return str(folder / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert read_model_index("owner/name", revision="abc") == json.loads((folder / "model_index.json").read_text())
    assert asked == [("owner/name", "model_index.json", "abc")]
