"""Fuzzed calls, the seven wrong calls, and a state that stays usable after them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .functions import FUNCTIONS
from .fuzz import fuzz_all, run_draw, summed
from .outcomes import EMPTY, NOT_FINITE, OK, RAW, REFUSED, VAGUE, classify, kind_of_result
from .registry import PIPELINES, PipelineSubject
from .sandbox import sandbox, scratch
from .wrong_calls import own_calls, table


pytestmark = pytest.mark.reliability


@pytest.fixture(autouse=True)
def in_sandbox() -> Iterator[Path]:
    with sandbox() as folder:
        yield folder


def assert_only_results_and_refusals(draws: int) -> None:
    total = summed(fuzz_all(draws))
    assert total.total == draws
    assert total.counts[OK] > draws // 10 and total.counts[REFUSED] > draws // 10
    assert set(total.counts) == {OK, REFUSED}, "\n".join(total.faults)


def test_a_thousand_fuzzed_calls_give_a_result_or_a_sentence() -> None:
    assert_only_results_and_refusals(1000)


@pytest.mark.slow
def test_five_thousand_fuzzed_calls_give_a_result_or_a_sentence() -> None:
    assert_only_results_and_refusals(5000)


def test_every_wrong_call_is_answered_with_argument_value_and_cure() -> None:
    _, tally = table(own_calls())
    assert set(tally.counts) == {"clear"}, "\n".join(tally.faults)


@pytest.mark.parametrize("subject", PIPELINES, ids=lambda subject: subject.name)
def test_a_pipeline_gives_the_same_after_any_number_of_wrong_calls(subject: PipelineSubject) -> None:
    pipeline: Any = subject.build()
    before = subject.made(pipeline)
    callback = "callback_on_chunk_end" if subject.result == "frames" else "callback_on_step_end"
    for change in ({"num_inference_steps": 0}, {"guiders": [5]}, {"latents": 3}, {callback: _fail}):
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
            subject.made(pipeline, **change)
    assert np.array_equal(subject.made(pipeline), before)


def _fail(*arguments: Any) -> None:
    raise ZeroDivisionError("a callback of the caller's")


def test_a_draw_can_be_repeated_from_its_number() -> None:
    subject = next(subject for subject in FUNCTIONS if subject.name == "FeatureEnergy")
    assert [run_draw(subject, number) for number in range(20)] == [run_draw(subject, number) for number in range(20)]
    assert len({run_draw(subject, number)[1] for number in range(20)}) > 10


def test_the_fuzzer_tells_outcomes_apart() -> None:
    def raising(error: Exception) -> Any:
        raise error

    arguments = {"steps": -1}
    assert classify(lambda: 1.0, arguments)[0] == OK
    assert classify(lambda: float("nan"), arguments)[0] == NOT_FINITE
    assert classify(lambda: [np.zeros(3), [np.array([np.inf])]], arguments)[0] == NOT_FINITE
    assert classify(lambda: np.zeros((0, 3)), arguments)[0] == EMPTY
    assert classify(lambda: raising(ValueError("steps=-1 is negative")), arguments)[0] == RAW, (
        "not raised by the library"
    )
    assert classify(lambda: raising(ValueError("steps=-1 is negative")), arguments, package="tests")[0] == REFUSED
    assert classify(lambda: raising(RuntimeError("steps=-1")), arguments, package="tests")[0] == RAW
    assert kind_of_result({"a": [1, "text"]}) == OK


def test_a_refusal_must_name_argument_and_value() -> None:
    from diffusers_ext.imaging import check_image

    picture = np.zeros((4, 4, 2))
    assert classify(lambda: check_image(picture), {"image": picture})[0] == REFUSED
    assert classify(lambda: check_image(picture), {"steps": 5})[0] == VAGUE


def test_the_fuzzer_refuses_to_run_outside_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="is not a sandbox"):
        scratch()
    with pytest.raises(RuntimeError, match="is not a sandbox"):
        fuzz_all(10)
