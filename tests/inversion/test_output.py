"""An inversion on disk: whole or refused, and only used where it fits."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusers_ext.inversion.output as output_module
from diffusers_ext import InversionOutput
from diffusers_ext.inversion import model_fingerprint
from diffusers_ext.manifest import DamagedFileError
from tests.helpers.tiny_models import tiny_unet


UNET = tiny_unet()
CONFIG = {
    "method": "ddim",
    "alignment": "matched",
    "num_inference_steps": 3,
    "image_size": [30, 32],
    "scheduler": {"beta_start": 0.00085, "steps_offset": 1},
    "model": model_fingerprint({"unet": UNET}),
}


def inversion(**changes: Any) -> InversionOutput:
    latents = torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fields = {
        "latents": latents,
        "timesteps": torch.tensor([1, 334, 667]),
        "prompt": ["a", ""],
        "network_evaluations": 6,
    }
    return InversionOutput(**{**fields, "config": copy.deepcopy(CONFIG), **changes})


def test_it_comes_back_as_it_was_saved(tmp_path):
    saved = inversion()
    saved.save_pretrained(tmp_path / "new" / "folder")
    loaded = InversionOutput.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(loaded.latents, saved.latents) and torch.equal(loaded.timesteps, saved.timesteps)
    assert (loaded.prompt, loaded.config, loaded.network_evaluations) == (saved.prompt, saved.config, 6)
    loaded.check_fits(CONFIG, ["a", ""])


def test_half_precision_latents_keep_their_type(tmp_path):
    inversion(latents=inversion().latents.bfloat16()).save_pretrained(tmp_path)
    assert InversionOutput.from_pretrained(tmp_path).latents.dtype == torch.bfloat16


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "inversion-notes.safetensors").write_text("mine")
    (tmp_path / "picture.png").write_text("mine")
    inversion().save_pretrained(tmp_path)
    inversion(latents=inversion().latents + 1).save_pretrained(tmp_path)
    assert torch.equal(InversionOutput.from_pretrained(tmp_path).latents, inversion().latents + 1)
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "inversion-notes.safetensors").read_text() == (tmp_path / "picture.png").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../precious.safetensors", "inversion-/../../precious.safetensors", "precious.safetensors"]
)
def test_a_forged_config_cannot_have_another_file_removed(tmp_path, name):
    folder = tmp_path / "saved"
    inversion().save_pretrained(folder)
    for place in (tmp_path, folder):
        (place / "precious.safetensors").write_text("mine")
    path = folder / "inversion_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "file": name}))
    inversion(latents=inversion().latents + 1).save_pretrained(folder)
    assert all((place / "precious.safetensors").exists() for place in (tmp_path, folder))


@pytest.mark.parametrize("kept", [0, 1])
def test_a_save_that_breaks_off_leaves_the_former_inversion(tmp_path, monkeypatch, kept):
    inversion().save_pretrained(tmp_path)
    write, calls = output_module.atomic_write, []

    def breaks(path: Path, data: bytes) -> Path:
        calls.append(path)
        if len(calls) > kept:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(output_module, "atomic_write", breaks)
    with pytest.raises(OSError, match="No space left"):
        inversion(latents=inversion().latents + 1).save_pretrained(tmp_path)
    assert torch.equal(InversionOutput.from_pretrained(tmp_path).latents, inversion().latents)


@pytest.mark.reliability
def test_damage_anywhere_in_the_files_is_noticed(tmp_path):
    inversion().save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    config = tmp_path / "inversion_config.json"
    good_weights, good_config = weights.read_bytes(), config.read_bytes()
    damaged = [(weights, good_weights[:n]) for n in (0, 7, 100, len(good_weights) - 1)]
    damaged += [
        (weights, good_weights[:n] + bytes([good_weights[n] ^ 4]) + good_weights[n + 1 :]) for n in (0, 50, 900)
    ]
    damaged += [(config, good_config[:n]) for n in range(0, len(good_config) - 2, 97)]
    damaged += [(config, text) for text in (b"null", b"[]", b"\xff\xfe", b'{"file": 3}', b"{}", b"[" * 100000)]
    content = json.loads(good_config)
    for key in content:
        for value in (None, "x", -1, [], {}, [None], float("nan")):
            if value != content[key] and key not in ("network_evaluations", "method", "alignment"):
                damaged.append((config, json.dumps({**content, key: value}).encode()))
    for path, data in damaged:
        path.write_bytes(data)
        with pytest.raises((DamagedFileError, ValueError)) as caught:
            # Only use shows whether a scheduler's or a model's entries are those of the model at hand.
            InversionOutput.from_pretrained(tmp_path).check_fits(CONFIG, None)
        assert "\n" not in str(caught.value)
        weights.write_bytes(good_weights)
        config.write_bytes(good_config)
    assert InversionOutput.from_pretrained(tmp_path).prompt == ["a", ""]


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(DamagedFileError, match="holds no inversion: inversion_config.json is missing"):
        InversionOutput.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file; give a folder"):
        inversion().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    "change, prompt, answer",
    [
        ({"num_inference_steps": 50}, None, "num_inference_steps=3, the call has 50"),
        ({"alignment": "official"}, None, "alignment='matched', the call has 'official'"),
        ({"scheduler": {"beta_start": 0.1, "steps_offset": 1}}, None, "beta_start=0.00085 there, 0.1 here"),
        ({"model": model_fingerprint({"unet": tiny_unet(layers_per_block=2)})}, None, "its unet differs"),
        ({}, ["a", "b"], r"source_prompt=\['a', ''\], the call has \['a', 'b'\]"),
    ],
)
def test_it_is_refused_where_it_does_not_fit(change, prompt, answer):
    with pytest.raises(ValueError, match=answer):
        inversion().check_fits({**CONFIG, **change}, prompt)


def test_a_model_is_recognised_by_its_weights_and_in_another_precision():
    other = copy.deepcopy(UNET)
    inversion().check_fits({**CONFIG, "model": model_fingerprint({"unet": other})}, None)
    for dtype in (torch.float16, torch.bfloat16):
        inversion().check_fits({**CONFIG, "model": model_fingerprint({"unet": copy.deepcopy(other).to(dtype)})}, None)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.001)
    with pytest.raises(ValueError, match="its unet differs"):
        inversion().check_fits({**CONFIG, "model": model_fingerprint({"unet": other})}, None)


@pytest.mark.parametrize(
    "change, answer",
    [
        ({"config": {}}, "config has no 'method'"),
        ({"latents": torch.zeros(4, 2, 4, 8)}, "latents is not a tensor of shape"),
        ({"latents": torch.zeros(3, 2, 4, 8, 8)}, "3 states and 3 timesteps for 3 steps"),
        ({"timesteps": None}, "timesteps is not a tensor of shape"),
        ({"prompt": ["a"]}, "1 prompts for 2 pictures"),
        ({"prompt": "ab"}, "prompt is not a list of str"),
        ({"latents": torch.full((4, 2, 4, 8, 8), float("nan"))}, "not finite"),
        ({"config": {**CONFIG, "image_size": [0, 3]}}, r"image_size=\[0, 3\]"),
    ],
)
def test_what_is_wrong_in_itself_is_said(change, answer):
    with pytest.raises(ValueError, match=answer):
        inversion(**change).check_fits(CONFIG, None)


def extras(**changes: Any) -> InversionOutput:
    fields = {
        "null_embeddings": torch.randn(3, 2, 5, 8),
        "noise_maps": torch.randn(3, 2, 4, 8, 8),
        "offsets": torch.zeros(3, 2, 4, 8, 8),
        "backward_passes": 4,
        "config": {**copy.deepcopy(CONFIG), "method": "null_text", "settings": {"guidance_scale": 7.5}},
    }
    return inversion(**{**fields, **changes})


def test_what_a_method_stores_comes_back_with_its_settings(tmp_path):
    saved = extras()
    saved.save_pretrained(tmp_path)
    loaded = InversionOutput.from_pretrained(tmp_path)
    for name in ("null_embeddings", "noise_maps", "offsets"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert loaded.backward_passes == 4 and loaded.inverted.settings == {"alignment": "matched", "guidance_scale": 7.5}
    loaded.check_fits(CONFIG, ["a", ""], guidance_scale=7.5)
    with pytest.raises(ValueError, match="made for guidance_scale=7.5, the call has 3.0; use the same value"):
        loaded.check_fits(CONFIG, None, guidance_scale=3.0)
    inversion().check_fits(CONFIG, None, guidance_scale=3.0)


def test_a_file_of_the_first_format_is_still_read(tmp_path):
    inversion().save_pretrained(tmp_path)
    path = tmp_path / "inversion_config.json"
    content = json.loads(path.read_text())
    del content["backward_passes"]
    path.write_text(json.dumps({**content, "format_version": 1}))
    loaded = InversionOutput.from_pretrained(tmp_path)
    assert torch.equal(loaded.latents, inversion().latents) and loaded.null_embeddings is None
    path.write_text(json.dumps({**content, "format_version": 3}))
    with pytest.raises(DamagedFileError, match=r"of another version \(format_version=3\)"):
        InversionOutput.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, answer",
    [
        (
            {"null_embeddings": torch.zeros(2, 2, 5, 8)},
            r"null_embeddings of shape \(2, 2, 5, 8\) does not belong to 3 steps",
        ),
        ({"null_embeddings": torch.zeros(3, 1, 5, 8)}, "does not belong to 3 steps of 2 pictures"),
        ({"null_embeddings": None}, "method='null_text' has null_embeddings, which are missing"),
        ({"noise_maps": torch.zeros(3, 2, 4, 8, 7)}, "noise_maps of shape"),
        ({"offsets": torch.full((3, 2, 4, 8, 8), float("inf"))}, "offsets holds values that are not finite"),
        ({"offsets": "x"}, "offsets is not a tensor"),
        ({"backward_passes": -1}, "backward_passes=-1 is not a number of passes"),
        ({"config": {**CONFIG, "settings": 5}}, "settings in config is not a dict"),
    ],
)
def test_what_is_wrong_with_the_extras_is_said(change, answer, tmp_path):
    with pytest.raises(ValueError, match=answer):
        extras(**change).check_fits(CONFIG, None)
