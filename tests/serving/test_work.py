"""Work in a thread: its result, its errors, and that it ends when nobody waits any more."""

import threading
import time
from typing import Any

import pytest
import torch

from diffusers_ext import MRRestorationPipeline, RestorationUNet2DModel
from diffusers_ext.schedulers import MRScheduler
from diffusers_ext.serving import Done, Kept, SharedPipeline, Step, StoppedError, VisitorError, in_steps
from diffusers_ext.serving import work as work_module


def counting(log: list[int], steps: int = 1000, pause: float = 0.01) -> Any:
    def work(report: Any) -> str:
        for i in range(steps):
            report(i / steps, "counting")
            log.append(i)
            time.sleep(pause)
        return "all"

    return work


def test_the_steps_come_before_the_result() -> None:
    *steps, last = in_steps(counting([], steps=30))
    assert last == Done("all") and all(isinstance(step, Step) for step in steps)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions) and steps[-1].words == "counting"


def test_closing_ends_the_work_at_its_next_step() -> None:
    log: list[int] = []
    running = in_steps(counting(log))
    next(running)
    running.close()
    ended = len(log)
    time.sleep(0.1)
    assert 0 < len(log) == ended < 100


def test_work_that_nobody_looks_at_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "_PATIENCE", 0.6)
    log: list[int] = []
    running = in_steps(counting(log))
    next(running)
    time.sleep(1.2)
    with pytest.raises(StoppedError):
        list(running)
    assert len(log) < 100


def test_work_ends_at_its_next_step_when_its_visitor_is_gone_though_nobody_closed_it() -> None:
    log: list[int] = []
    running = in_steps(counting(log), gone=lambda: len(log) == 5)
    with pytest.raises(StoppedError):
        list(running)
    assert len(log) == 5


def test_work_that_takes_too_long_is_told_what_to_do() -> None:
    with pytest.raises(VisitorError, match="longer than 0 seconds: use fewer steps"):
        list(in_steps(counting([]), longest=0.2))


def test_an_error_of_the_work_arrives() -> None:
    def work(report: Any) -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        list(in_steps(work))


def tiny_restoration() -> MRRestorationPipeline:
    torch.manual_seed(0)
    unet = RestorationUNet2DModel(block_out_channels=(8, 8), layers_per_block=1)
    return MRRestorationPipeline(unet, MRScheduler(prediction_type="v_prediction"))


@pytest.mark.parametrize("exclusive", [True, False])
def test_requests_on_eight_threads_give_what_they_give_one_by_one(exclusive: bool) -> None:
    shared = SharedPipeline(tiny_restoration(), exclusive=exclusive)
    reports: list[float] = []

    def restore(seed: int) -> torch.Tensor:
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with shared.request(lambda fraction, _: reports.append(fraction)) as pipe:
            generator = torch.Generator().manual_seed(seed)
            return pipe(image, num_inference_steps=2 + seed % 3, generator=generator, output_type="pt").images

    expected = [restore(seed) for seed in range(8)]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: restore(i)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))
    assert reports.count(1.0) == 16
    assert shared.pipeline.scheduler.num_inference_steps is None, "the shared scheduler was used"


def test_a_request_that_is_stopped_frees_the_model_for_the_next() -> None:
    first = SharedPipeline(tiny_restoration())
    second = SharedPipeline(first.pipeline, beside=first)

    def stopped(fraction: float, _: str) -> None:
        raise StoppedError

    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(StoppedError), first.request(stopped) as pipe:
        pipe(image, num_inference_steps=2)
    with second.request(lambda *_: None) as pipe:
        assert len(pipe(image, num_inference_steps=2).images) == 1
        # Who waits is told so at once, and may leave.
        with pytest.raises(StoppedError), first.request(stopped):
            pass


def test_kept_results_are_made_once_and_the_oldest_goes() -> None:
    kept: Kept[int] = Kept(2)
    made: list[str] = []

    def get(key: str) -> tuple[int, bool]:
        return kept.get(key, lambda: made.append(key) or len(made))

    assert get("a") == (1, False) and get("a") == (1, True)
    get("b"), get("a"), get("c")
    assert get("a")[1] and not get("b")[1]
    assert made == ["a", "b", "c", "b"]
