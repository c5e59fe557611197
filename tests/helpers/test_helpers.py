"""The helpers that other tests rely on: no network, golden files, tiny pipelines and fresh processes."""

import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import golden as golden_files
from .fresh_process import digest, facts, run_fresh
from .golden import GoldenFile, golden_path
from .network import NetworkAccessError, is_loopback
from .tiny_models import (
    IMAGE_SIZE,
    LATENT_SIZE,
    MAX_LENGTH,
    VOCABULARY_SIZE,
    tiny_components,
    tiny_latents,
    tiny_stable_diffusion,
    tiny_stable_diffusion_xl,
    tiny_tokenizer,
)


def test_a_connection_to_another_machine_is_refused_by_name_and_by_address() -> None:
    with pytest.raises(NetworkAccessError, match="huggingface.co"):
        urllib.request.urlopen("http://huggingface.co", timeout=5)
    with pytest.raises(NetworkAccessError, match="192.0.2.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        with pytest.raises(NetworkAccessError, match="192.0.2.1"):
            datagrams.sendto(b"", ("192.0.2.1", 53))


def test_this_machine_may_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5):
            connection, _ = server.accept()
            connection.close()
    assert [is_loopback(host) for host in ("localhost", "::1", "127.0.0.9", None, b"localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("localhost.example.org", "10.0.0.1", "::")] == [False] * 3


def test_a_golden_file_gives_its_arrays_and_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_files, "GOLDEN", tmp_path)
    np.savez(tmp_path / "topic.npz", noise=np.arange(3.0))
    file = GoldenFile(golden_path("topic.npz"))
    assert file["noise"].tolist() == [0.0, 1.0, 2.0]
    assert file.tensor("noise", torch.float16).dtype == torch.float16
    assert (list(file), len(file)) == (["noise"], 1)
    with pytest.raises(KeyError, match="topic.npz has no array 'latents'; it has noise"):
        file["latents"]


def test_a_golden_file_that_is_not_there_is_named_with_its_neighbours(golden: Callable[[str], GoldenFile]) -> None:
    with pytest.raises(FileNotFoundError, match="editing/nothing.npz.*guide_and_rescale_nonstyle.npz"):
        golden("editing/nothing.npz")
    with pytest.raises(ValueError, match="leads out"):
        golden("../secrets.npz")
    with pytest.raises(ValueError, match="not an .npz"):
        golden("editing/README.md")


def test_the_tokenizer_spells_every_text() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY_SIZE
    text = "a red heart, 50 % größer"
    ids = tokenizer(text).input_ids
    assert ids[0] == VOCABULARY_SIZE - 2 and ids[-1] == VOCABULARY_SIZE - 1
    assert max(ids) < VOCABULARY_SIZE
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    padded = tokenizer(["a", "a much longer prompt than fits"], padding="max_length", truncation=True).input_ids
    assert [len(row) for row in padded] == [MAX_LENGTH, MAX_LENGTH]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_tiny_pipelines_paint(prediction_type: str) -> None:
    pipeline = tiny_stable_diffusion(prediction_type)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    images = pipeline("a red heart", num_inference_steps=2, latents=tiny_latents(), output_type="pt").images
    assert images.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.isfinite(images).all() and images.std() > 0


def test_the_tiny_sdxl_pipeline_paints() -> None:
    pipeline = tiny_stable_diffusion_xl()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = pipeline("a red heart", num_inference_steps=2, output_type="pt", **size).images
    assert images.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert pipeline.unet.config.sample_size == LATENT_SIZE


def test_equal_seeds_give_equal_weights_and_spare_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = tiny_components(seed=1), tiny_components(seed=1), tiny_components(seed=2)
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first["unet"].parameters(), second["unet"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first["unet"].conv_in.weight, other["unet"].conv_in.weight)


def test_digests_tell_values_types_and_shapes_apart() -> None:
    x = torch.arange(6.0)
    different = [x, x.double(), x.reshape(2, 3), x + 1, x.to(torch.bfloat16), [x, x]]
    assert len({digest(item) for item in different}) == len(different)
    assert digest(x) == digest(torch.arange(6.0)) and digest(x.numpy()) == digest(np.arange(6, dtype=np.float32))


def test_a_fresh_process_knows_only_what_it_imported_and_has_no_network() -> None:
    code = """
import os, socket
print("loaded", "diffusers_ext" in sys.modules or "torch" in sys.modules)
print("threads", os.environ["OMP_NUM_THREADS"])
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except RuntimeError as error:
    print("network", type(error).__name__)
"""
    assert facts(run_fresh(code, imports=("json",))) == {
        "loaded": "False", "threads": str(torch.get_num_threads()), "network": "NetworkAccessError",
    }  # fmt: skip


def test_a_failed_fresh_process_is_an_assertion_with_its_error() -> None:
    with pytest.raises(AssertionError, match="(?s)only json imported failed.*Missing is in none of the imported"):
        run_fresh("_loaded('Missing')", imports=("json",))


def test_the_default_profile_of_hypothesis_repeats_its_examples() -> None:
    if os.environ.get("HYPOTHESIS_PROFILE", "ci") != "ci":
        pytest.skip("another profile was asked for")
    runs: list[list[int]] = []
    for _ in range(2):
        runs.append([])

        @settings(max_examples=10)
        @given(st.integers())
        def collect(number: int) -> None:
            runs[-1].append(number)

        collect()
    assert runs[0] == runs[1] and len(runs[0]) > 1


def test_the_profiles_are_registered() -> None:
    assert settings.get_profile("ci").derandomize
    examples = [settings.get_profile(name).max_examples for name in ("dev", "ci", "nightly")]
    assert examples == sorted(examples)
    assert not settings.get_profile("nightly").derandomize
