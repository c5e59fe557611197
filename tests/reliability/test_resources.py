"""Hostile pictures, memory over many calls, and equal results everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

from .determinism import digests
from .programs import run_probe
from .registry import PIPELINES


pytestmark = pytest.mark.reliability

# A picture may not cost more than this, whatever it says of itself. Processor time: a busy machine is no fault of ours.
SECONDS, MEGABYTES = 0.1, 20.0


def test_hostile_pictures_are_opened_or_refused_in_a_sentence_and_cost_next_to_nothing() -> None:
    results: dict[str, dict[str, Any]] = run_probe("hostile_pictures")
    assert len(results) >= 18
    for name, result in results.items():
        assert result["outcome"] in ("opened", "refused"), (name, result)
        assert result["wanted"] in ("either", result["outcome"]), (name, result)
        assert result["megabytes"] <= MEGABYTES, (name, result)
        assert result["seconds"] <= SECONDS, (name, result)
        assert len(result["said"].splitlines()) == 1, (name, result)
    bomb = results["100 MP PNG"]
    assert bomb["kilobytes"] < 20 and "10000x10000" in bomb["said"]


def assert_no_growth(calls: int) -> None:
    for name, result in run_probe("memory", str(calls)).items():
        assert result["megabytes"] <= 1.0, (name, result)


def test_eighty_calls_do_not_grow_the_memory() -> None:
    assert_no_growth(80)


@pytest.mark.slow
def test_a_thousand_calls_do_not_grow_the_memory() -> None:
    assert_no_growth(1000)


def test_two_processes_and_a_reloaded_pipeline_give_the_same_bits(tmp_path: Path) -> None:
    for subject in PIPELINES:
        subject.build().save_pretrained(tmp_path / subject.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = digests()
    finally:
        torch.set_num_threads(threads)
    there = run_probe("determinism", str(tmp_path))
    assert there["built"] == here
    assert there["reloaded"] == here
