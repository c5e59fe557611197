import itertools

import numpy as np
import pytest
import torch

from diffusers_ext import RollingLadderScheduler
from diffusers_ext.training.plots import line_panels
from diffusers_ext.training.rolling import (
    check_curriculum,
    check_lookaheads,
    context_of_step,
    curriculum_stage,
    inertial_loss,
    known_conditions,
    ladder_timesteps,
    ladders_of_windows,
    rolling_target,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_the_target_is_what_the_scheduler_makes_data_of(prediction_type: str):
    scheduler = RollingLadderScheduler(
        prediction_type=prediction_type, beta_schedule="cosine", window_length=6, ladder_step=2
    )
    scheduler.set_timesteps(6)
    clean, noise, times = draw(2, 6, 3), draw(2, 6, 3, seed=1), scheduler.window_timesteps[:1]
    target = rolling_target(scheduler, clean, noise, times)
    sample = scheduler.add_noise(clean, noise, times)
    found = scheduler.step(target, times, sample).pred_original_sample
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


def test_without_inertia_the_loss_is_the_mean_squared_error():
    answer, target = draw(3, 5, 2), draw(3, 5, 2, seed=1)
    assert float(inertial_loss(answer, target)) == pytest.approx(float((answer - target).square().mean()))


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5])
def test_the_inertial_loss_is_that_of_the_paper(weight: float):
    errors = [[1.0, 2.0], [-3.0, 0.5], [4.0, -1.0]]
    squares = sum(number**2 for frame in errors for number in frame)
    products = sum(a * b for one, other in itertools.pairwise(errors) for a, b in zip(one, other, strict=True))
    loss = inertial_loss(torch.tensor([errors]), torch.zeros(1, 3, 2), weight)
    assert float(loss) == pytest.approx((squares - 2 * weight * products) / 6, rel=1e-6)


def test_alternating_errors_count_up_to_one_plus_and_equal_ones_one_minus_twice_the_weight():
    frames = 2_000
    equal, signs = torch.ones(1, frames, 1), torch.tensor([1.0, -1.0]).repeat(frames // 2)[None, :, None]
    for weight in (0.2, 0.5):
        assert float(inertial_loss(equal, 0 * equal, weight)) == pytest.approx(1 - 2 * weight, abs=1e-3)
        assert float(inertial_loss(signs, 0 * signs, weight)) == pytest.approx(1 + 2 * weight, abs=1e-3)


def test_the_inertial_loss_is_positive_and_has_its_least_at_the_mean():
    target = draw(4_000, 4, 1) + torch.tensor([1.0, 2.0, 0.0, -1.0])[None, :, None]
    answer = torch.zeros(1, 4, 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([answer], max_iter=50)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = inertial_loss(answer.expand_as(target), target, 0.5)
        loss.backward()
        return loss

    assert float(optimiser.step(closure).detach()) > 0
    torch.testing.assert_close(answer.detach()[0], target.mean(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("weight", "shape", "message"),
    [
        (0.6, (1, 3, 2), "weight=0.6 is out of range"),
        (-0.1, (1, 3, 2), "weight=-0.1 is out of range"),
        (0.1, (1, 4, 2), r"answer of shape \(1, 3, 2\) does not fit target of shape \(1, 4, 2\)"),
    ],
)
def test_an_inertial_loss_that_has_no_meaning_is_refused(weight: float, shape: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        inertial_loss(torch.zeros(1, 3, 2), torch.zeros(*shape), weight)


def test_the_stages_of_a_curriculum_cover_the_run_in_order():
    stages = [curriculum_stage(step, 10, 3) for step in range(10)]
    assert stages == sorted(stages) and {stages.count(stage) for stage in range(3)} == {3, 4}
    # a run that is made longer, or is shorter than its stages, still has one
    assert curriculum_stage(25, 10, 3) == 2 and [curriculum_stage(step, 2, 3) for step in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("ladders", "message"),
    [([1, 3], "ladder_step=3 does not divide window_length=20"), ([2, 1], "does not ascend"), ([], "does not ascend")],
)
def test_a_curriculum_that_cannot_be_is_refused(ladders: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        check_curriculum(ladders, 20)
    assert check_curriculum([1, 2, 4], 20) == [1, 2, 4]


def test_windows_have_the_ladder_of_the_stage_or_an_earlier_one():
    def ladders(stage: int, replay: float) -> list[int]:
        return ladders_of_windows(8_000, [1, 2, 4], stage, replay, torch.Generator().manual_seed(0))

    assert set(ladders(0, 0.5)) == {1} and set(ladders(2, 0.0)) == {4} and set(ladders(1, 1.0)) == {1}
    shares = [ladders(2, 0.5).count(ladder) / 8_000 for ladder in (1, 2, 4)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_context_is_short_as_often_as_is_asked_and_half_of_that_none():
    lengths = [context_of_step(0, step, 8, 0.4) for step in range(4_000)]
    assert lengths.count(8) / 4_000 == pytest.approx(0.6, abs=0.03)
    # half of the short ones, and one in eight of the others
    assert lengths.count(0) / 4_000 == pytest.approx(0.4 * (0.5 + 0.5 / 8), abs=0.03)
    assert set(lengths) == set(range(9)) and lengths[:50] == [context_of_step(0, step, 8, 0.4) for step in range(50)]
    assert {context_of_step(0, step, 8, 0.0) for step in range(50)} == {8}
    assert {context_of_step(0, step, 0, 0.5) for step in range(50)} == {0}


def test_conditions_are_known_up_to_one_of_the_lookaheads():
    generator = torch.Generator().manual_seed(0)
    known = known_conditions(300, 3, 8, [2, 5], generator)
    assert known.shape == (300, 11) and known[:, :5].all()
    ahead = known[:, 3:].sum(1)
    assert set(ahead.tolist()) == {2, 5} and 100 < (ahead == 2).sum() < 200
    # what is known is without gaps
    assert (known.int().diff(dim=1) <= 0).all()
    assert known_conditions(4, 3, 8, None, generator).all()


@pytest.mark.parametrize("lookahead", [3, 9])
def test_a_lookahead_that_no_stream_can_have_is_refused(lookahead: int):
    check_lookaheads([4, 8], 4, 8)
    check_lookaheads(None, 4, 8)
    with pytest.raises(ValueError, match=f"lookahead={lookahead} is not usable; use numbers from 4, .* to 8"):
        check_lookaheads([4, lookahead], 4, 8)


def test_every_window_has_the_timesteps_of_its_own_ladder():
    schedulers = {
        ladder: RollingLadderScheduler(prediction_type="flow_prediction", window_length=8, ladder_step=ladder)
        for ladder in (1, 2, 4)
    }
    ladders = [4, 1, 2, 4]
    times = ladder_timesteps(schedulers, ladders, "ladder", 0.0, torch.Generator().manual_seed(0))
    assert times.shape == (4, 8)
    for row, ladder in zip(times, ladders, strict=True):
        rungs = row.reshape(-1, ladder)
        assert bool((rungs == rungs[:, :1]).all())
        torch.testing.assert_close(rungs[:, 0].diff(), torch.full((8 // ladder - 1,), 1000.0 * ladder / 8))
    # the draw of a window is that of its place, whatever ladders the others have
    alone = ladder_timesteps(schedulers, [4, 4, 4, 4], "ladder", 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(alone[[0, 3]], times[[0, 3]])


def test_a_line_is_drawn_in_its_colour_from_the_lowest_value_to_the_highest():
    ramp = torch.linspace(-3.0, 5.0, 20)[:, None]
    picture = line_panels(["x"], [("ramp", "#ff0000", ramp)], width=300, height=100)
    # a panel of 100 pixels below the title, and the legend below it
    assert picture.size == (300, 166) and picture.mode == "RGB"
    pixels = torch.from_numpy(np.asarray(picture).astype(np.int64))
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 120)
    panel = red[22:123].nonzero()
    assert panel[:, 0].min() <= 1 and panel[:, 0].max() >= 98 and panel[:, 1].min() <= 14 and panel[:, 1].max() >= 286
    first, last = panel[panel[:, 1] <= 20, 0].double().mean(), panel[panel[:, 1] >= 280, 0].double().mean()
    assert first > 95 > 5 > last
    assert bool((pixels[4:20, :40] < 128).any()) and bool(red[140:160].any())  # title and legend


def test_a_line_that_does_not_move_is_drawn_all_the_same():
    assert line_panels(["x"], [("still", "#000000", torch.zeros(3, 1))]).size == (900, 156)
