"""Damaged files, kills and full disks: what was saved loads, and what is not whole is refused with a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ext.integrity import (
    MANIFEST_NAME,
    CheckedLoadingMixin,
    DamagedFileError,
    UnsafeFileError,
    check_weights,
    verify_manifest,
    write_manifest,
)
from tests.helpers.tiny_models import tiny_components

from .damaged import CHANGED, pickle_only, probe, sound_folder
from .outcomes import NOT_FINITE, OK, RAW, REFUSED
from .programs import run_probe
from .registry import PIPELINES, SCRIPTS, PipelineSubject


pytestmark = pytest.mark.reliability
each_pipeline = pytest.mark.parametrize("subject", PIPELINES, ids=lambda subject: subject.name)
each_suffix = pytest.mark.parametrize("suffix", [".safetensors", ".json"])


class Checked(CheckedLoadingMixin, StableDiffusionPipeline):
    """A pipeline with nothing of its own."""


def checked() -> Checked:
    return Checked(**tiny_components(), requires_safety_checker=False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checked().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Damage -----------------------------------------------------------------------------------------------------------------


def assert_all_refused(subject: PipelineSubject, folder: Path, suffix: str, count: int) -> None:
    tally = probe(subject, sound_folder(subject, folder), suffix, count)
    assert tally.total == count
    assert set(tally.counts) <= {OK, REFUSED}, "\n".join(tally.faults)
    assert tally.counts[OK] <= count // 50, "hardly any mutation leaves a file as it was"


@each_pipeline
@each_suffix
def test_forty_damaged_files_are_refused_with_their_name(
    subject: PipelineSubject, suffix: str, tmp_path: Path
) -> None:
    assert_all_refused(subject, tmp_path / "model", suffix, 40)


@pytest.mark.slow
@each_pipeline
@each_suffix
def test_two_hundred_damaged_files_are_refused_with_their_name(
    subject: PipelineSubject, suffix: str, tmp_path: Path
) -> None:
    assert_all_refused(subject, tmp_path / "model", suffix, 200)


def assert_nothing_spoilt(subject: PipelineSubject, folder: Path, suffix: str, count: int) -> None:
    tally = probe(subject, sound_folder(subject, folder, manifest=False), suffix, count)
    assert tally.counts[NOT_FINITE] == 0, "\n".join(tally.faults)
    # A setting that fits the weights and not itself shows only when the network runs, and torch then says so.
    assert tally.counts[RAW] <= count // 100, "\n".join(tally.faults)
    silent = [fault for fault in tally.faults if fault.startswith(CHANGED)]
    # Without digests nobody can tell a flipped bit from a trained one; a weight that is missing or NaN can be told.
    assert not [line for line in silent if "renamed" in line or "NaN" in line or "truncated in" in line], silent


@each_pipeline
@each_suffix
def test_without_a_manifest_nothing_missing_or_infinite_is_loaded(
    subject: PipelineSubject, suffix: str, tmp_path: Path
) -> None:
    assert_nothing_spoilt(subject, tmp_path / "model", suffix, 28)


@pytest.mark.slow
@each_pipeline
@each_suffix
def test_without_a_manifest_nothing_missing_or_infinite_is_loaded_in_two_hundred(
    subject: PipelineSubject, suffix: str, tmp_path: Path
) -> None:
    assert_nothing_spoilt(subject, tmp_path / "model", suffix, 200)


@each_pipeline
def test_a_folder_of_pickles_is_not_read(subject: PipelineSubject, tmp_path: Path) -> None:
    message = pickle_only(subject, sound_folder(subject, tmp_path / "model"))
    assert "is a pickle and is not read" in message and "safe_serialization=True" in message


# Loading ----------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_has_a_manifest_of_all_its_files_and_stock_diffusers_loads_it(saved: Path) -> None:
    listed = set(json.loads((saved / MANIFEST_NAME).read_text())["files"])
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert listed == found - {MANIFEST_NAME}
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    stock = StableDiffusionPipeline.from_pretrained(saved)
    assert torch.equal(stock.unet.conv_in.weight, checked().unet.conv_in.weight)


def test_a_card_may_change_without_breaking_the_manifest(saved: Path) -> None:
    (saved / "README.md").write_text("a card")
    assert verify_manifest(saved)
    assert Checked.from_pretrained(saved).unet is not None


def test_a_wanted_change_is_taken_over_with_write_manifest(saved: Path) -> None:
    config = saved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(DamagedFileError, match="scheduler_config.json is damaged.*write_manifest"):
        Checked.from_pretrained(saved)
    write_manifest(saved)
    assert Checked.from_pretrained(saved).scheduler.config.prediction_type == "v_prediction"


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "unet" / "config.json").unlink()
    with pytest.raises(DamagedFileError, match="unet/config.json is missing"):
        Checked.from_pretrained(saved)


def test_a_manifest_that_points_out_of_its_folder_is_refused(saved: Path) -> None:
    (saved / MANIFEST_NAME).write_text(json.dumps({"files": {"../../etc/passwd": "0" * 64}}))
    with pytest.raises(DamagedFileError, match="no table of files"):
        verify_manifest(saved)


def test_a_folder_without_manifest_is_not_verified_but_loads(saved: Path) -> None:
    (saved / MANIFEST_NAME).unlink()
    assert verify_manifest(saved) is False
    assert Checked.from_pretrained(str(saved)).config._name_or_path == str(saved)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("spoil", [lambda t: t * float("nan"), lambda t: t / 0, None], ids=["NaN", "inf", "missing"])
def test_a_weight_that_is_missing_or_not_finite_is_named(
    saved: Path, component: str, spoil: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    (saved / MANIFEST_NAME).unlink()
    file = next((saved / component).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensor = tensors.pop(name)
    if spoil is not None:
        tensors[name] = spoil(tensor + 1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match=component) as caught:
        Checked.from_pretrained(saved)
    assert name in str(caught.value)


def test_components_that_are_passed_are_neither_read_nor_checked_in_the_folder(saved: Path) -> None:
    shutil.rmtree(saved / "unet")
    (saved / MANIFEST_NAME).unlink()
    unet = checked().unet
    assert Checked.from_pretrained(saved, unet=unet).unet is unet


def test_loading_pickles_on_request_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="use_safetensors=False would unpickle"):
        Checked.from_pretrained(saved, use_safetensors=False)
    with pytest.raises(UnsafeFileError, match="is a pickle"):
        (saved / MANIFEST_NAME).unlink()
        weights = next((saved / "unet").glob("*.safetensors"))
        weights.rename(weights.with_suffix(".bin"))
        Checked.from_pretrained(saved)


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "a/b/c", "", "~/absent"])
def test_a_missing_folder_is_said_to_be_missing_without_asking_the_network(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; give a folder"):
        Checked.from_pretrained(path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "_diffusers_version", "3.x"), ("tokenizer/tokenizer_config.json", "model_max_length", 16.5),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30), ("vae/config.json", "scaling_factor", 0),
        ("scheduler/scheduler_config.json", "beta_end", -7.5), ("unet/config.json", "sample_size", float("nan")),
        ("model_index.json", "unet", "UNet2DConditionModel"), ("model_index.json", "unet", ["diffusers", "NoSuchClass"]),
        ("vae/config.json", "block_out_channels", None), ("text_encoder/config.json", "hidden_act", 5),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_right_is_refused_with_its_file(saved: Path, file: str, key: str, value: Any) -> None:
    (saved / MANIFEST_NAME).unlink()
    content = json.loads((saved / file).read_text())
    (saved / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(DamagedFileError, match=f"{file.split('/')[0]}|config.json of a component"):
        Checked.from_pretrained(saved)


def test_the_family_hook_is_asked_before_weights_are_read(saved: Path) -> None:
    class Choosy(Checked):
        @classmethod
        def _check_family(cls, index: dict[str, Any], source: str) -> None:
            raise ValueError(f"{source} is a {index['_class_name']}")

    next((saved / "unet").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(ValueError, match="is a Checked"):
        Choosy.from_pretrained(saved)


def test_from_pipe_shares_the_components(saved: Path) -> None:
    stock = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    assert Checked.from_pipe(stock).unet is stock.unet


def test_check_weights_looks_at_every_float_type() -> None:
    class Holder(torch.nn.Module):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("tensor", tensor)

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex64):
        check_weights({"a": Holder(torch.ones(3).to(dtype))})
        with pytest.raises(DamagedFileError, match="a: tensor 'tensor'.*not finite"):
            check_weights({"a": Holder(torch.tensor([1.0, float("nan")]).to(dtype))})
    check_weights({"a": Holder(torch.zeros(0))})
    with pytest.raises(DamagedFileError, match="a: tensor 'tensor' is not in the .safetensors file"):
        check_weights({"a": Holder(torch.zeros(3, device="meta"))})


# Saving -----------------------------------------------------------------------------------------------------------------


def test_saving_over_a_folder_keeps_what_is_not_the_pipelines(saved: Path) -> None:
    (saved / "README.md").write_text("a card")
    (saved / "unet" / "notes.txt").write_text("mine")
    pipeline = checked()
    torch.nn.init.ones_(pipeline.unet.conv_in.weight)
    pipeline.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "a card" and (saved / "unet" / "notes.txt").read_text() == "mine"
    assert verify_manifest(saved)
    assert bool((Checked.from_pretrained(saved).unet.conv_in.weight == 1).all())


def test_shards_of_an_earlier_save_do_not_shadow_the_new_weights(tmp_path: Path) -> None:
    pipeline = checked()
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert list((tmp_path / "model" / "unet").glob("*.index.json")), "the first save is meant to be in shards"
    torch.nn.init.ones_(pipeline.unet.conv_in.weight)
    pipeline.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model" / "unet").glob("*-of-*"))
    assert bool((Checked.from_pretrained(tmp_path / "model").unet.conv_in.weight == 1).all())


def test_another_variant_is_kept_beside_and_both_are_verified(saved: Path) -> None:
    checked().to(torch.float16).save_pretrained(saved, variant="fp16")
    names = {path.name for path in (saved / "unet").iterdir()}
    assert {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"} <= names
    assert Checked.from_pretrained(saved, variant="fp16", dtype=torch.float16).unet.dtype == torch.float16
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFileError, match="diffusion_pytorch_model.safetensors is damaged"):
        Checked.from_pretrained(saved)


def test_a_component_that_cannot_be_saved_is_refused_and_stays_in_the_pipeline(tmp_path: Path) -> None:
    class Foreign:
        """A scheduler of a library that diffusers does not know."""

    pipeline = checked()
    pipeline.scheduler = Foreign()
    with pytest.raises(ValueError, match="scheduler is a .*Foreign, which cannot be saved"):
        pipeline.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(pipeline.scheduler, Foreign) and pipeline.config["scheduler"][1] == "Foreign"
    pipeline.scheduler = tiny_components()["scheduler"]
    pipeline.save_pretrained(tmp_path / "model")
    assert torch.equal(
        Checked.from_pretrained(tmp_path / "model").scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod
    )


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization=False would write pickles"):
        checked().save_pretrained(tmp_path / "model", safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_saving_into_the_working_folder_is_refused_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("keep")
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path):
        with pytest.raises(ValueError):
            checked().save_pretrained(place)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_full_disk_leaves_the_former_files_and_a_sentence() -> None:
    results = run_probe("disk_full")
    assert len(results) >= 4
    for name, result in results.items():
        assert result["error"] == "sentence" and result["as before"] and result["former loads"], (name, result)


def assert_kills_survived(what: str, kills: int, least_inside: int, *more: str) -> None:
    results = run_probe("kill", what, "--kills", str(kills), *more)
    assert results
    for name, result in results.items():
        assert result["sound"] == kills and not result["faults"], (name, result)
    # over all of them: the save of a small pipeline is over in a moment, and most kills miss it
    inside = {name: result["inside a save"] for name, result in results.items()}
    assert sum(inside.values()) >= least_inside, f"the kills were meant to hit saves: {inside}"


def test_three_kills_while_a_pipeline_is_overwritten_lose_nothing() -> None:
    assert_kills_survived("pipeline", 3, 1)


@pytest.mark.slow
def test_twenty_kills_while_a_pipeline_is_overwritten_lose_nothing() -> None:
    assert_kills_survived("pipeline", 20, 7)


def test_three_kills_of_a_training_run_are_resumed_bit_for_bit() -> None:
    assert_kills_survived("training", 3, 0, "--only", SCRIPTS[0].name)


@pytest.mark.slow
def test_twenty_kills_of_a_training_run_are_resumed_bit_for_bit() -> None:
    assert_kills_survived("training", 20, 5)
