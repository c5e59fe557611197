"""One pipeline in several threads: right pictures or a refusal, never others."""

import copy
import inspect
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusers_ext.pipelines.one_at_a_time import PipelineBusyError, one_at_a_time
from tests.helpers.fresh_process import digest
from tests.reliability.registry import PIPELINES, PipelineSubject


THREADS, CALLS = 4, 32
WAIT = 60.0  # seconds, for threads that hang


class Slow:
    """A pipeline whose call lasts until it is told to end."""

    def __init__(self, unet: object = None) -> None:
        self.unet = unet
        self.began, self.go_on = threading.Event(), threading.Event()

    @one_at_a_time("unet")
    def __call__(self, wait: bool = True, fail: bool = False) -> str:
        """Docstring."""
        self.began.set()
        if wait:
            assert self.go_on.wait(WAIT)
        if fail:
            raise ValueError("failed")
        return "done"

    @one_at_a_time("unet")
    def outer(self) -> str:
        return self(wait=False)


@pytest.fixture
def busy():
    """A pipeline that is in a call in another thread."""
    slow = Slow(unet=object())
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(slow)
        assert slow.began.wait(WAIT)
        yield slow
        slow.go_on.set()
        assert result.result(WAIT) == "done"


def test_another_thread_is_refused_and_told_why(busy: Slow) -> None:
    with pytest.raises(PipelineBusyError, match="Slow, or its unet, is at work in another thread; wait until"):
        busy(wait=False)


def test_a_pipeline_with_the_same_network_is_refused_and_one_with_its_own_is_not(busy: Slow) -> None:
    with pytest.raises(PipelineBusyError):
        Slow(busy.unet)(wait=False)
    assert Slow(object())(wait=False) == "done"
    # a component that is not there is no common one
    assert Slow(None)(wait=False) == "done"


def test_a_shallow_copy_with_other_parts_is_another_pipeline(busy: Slow) -> None:
    other = copy.copy(busy)
    other.unet = object()
    assert other(wait=False) == "done"


def test_after_a_call_and_after_an_error_the_next_one_is_welcome() -> None:
    slow = Slow(object())
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="failed"):
            pool.submit(slow, wait=False, fail=True).result(WAIT)
        assert pool.submit(slow.outer).result(WAIT) == "done"
    assert slow(wait=False) == "done"


def test_the_signature_and_the_docstring_stay() -> None:
    assert list(inspect.signature(Slow.__call__).parameters) == ["self", "wait", "fail"]
    assert Slow.__call__.__doc__ == "Docstring."


@pytest.mark.parametrize("subject", PIPELINES, ids=lambda subject: subject.name)
def test_four_threads_share_a_pipeline_and_no_result_is_wrong(subject: PipelineSubject) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline = subject.build()
        wanted = digest(subject.made(pipeline))

        def call(_: int) -> str:
            try:
                made = subject.made(pipeline)
            except PipelineBusyError:
                return "refused"
            return "right" if digest(made) == wanted else "wrong"

        with ThreadPoolExecutor(THREADS) as pool:
            counted = Counter(pool.map(call, range(CALLS)))
        assert counted["wrong"] == 0 and counted["right"] >= 1, counted
        assert counted["right"] + counted["refused"] == CALLS
        assert digest(subject.made(pipeline)) == wanted, "the pipeline is spoiled"
    finally:
        torch.set_num_threads(threads)
