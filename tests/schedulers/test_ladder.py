"""The level formula against the matrices of other people's code, and the answers to ladders that do not fit."""

import re

import numpy as np
import pytest
import torch

from diffusers_ext.schedulers.ladder import (
    checked_evaluations,
    checked_rungs,
    drawn_ladders,
    evaluations_for,
    ladder_level,
    warmup_levels,
    window_levels,
)
from tests.helpers.golden import golden


PYRAMIDS = ("S10_H6_u1", "S10_H6_u2", "S10_H8_u3", "S10_H4_u10")
LADDERS = golden("rolling/official_ladders.npz")


@pytest.mark.parametrize("name", PYRAMIDS)
def test_levels_are_the_pyramids_of_diffusion_forcing(name: str) -> None:
    official = golden("rolling/diffusion_forcing_official.npz")[f"pyramid_{name}"]
    levels, _, lag = map(int, re.findall(r"\d+", name))
    evaluations, frames = (np.arange(size) for size in official.shape)
    assert np.array_equal(ladder_level(frames, evaluations[:, None], levels, lag, 1), official)


def test_a_lag_of_one_half_is_a_ladder_of_two() -> None:
    official = golden("rolling/diffusion_forcing_official.npz")["pyramid_S20_H10_u0.5"]
    evaluations, frames = (np.arange(size) for size in official.shape)
    assert np.array_equal(ladder_level(frames, evaluations[:, None], 20, 1, 2), official)


@pytest.mark.parametrize("name", [name for name in LADDERS if name.startswith("pavdm")])
def test_the_window_has_the_stages_of_pa_vdm(name: str) -> None:
    window, step = map(int, re.findall(r"\d+", name))
    ours = window_levels(window, step, per_roll=step) * (1000 / window)
    np.testing.assert_allclose(ours, LADDERS[name], atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LADDERS if name.endswith("_timesteps")])
def test_levels_and_updates_are_those_of_skyreels(name: str) -> None:
    official, updated = LADDERS[name], LADDERS[name.replace("timesteps", "updated")]
    _, levels, _, lag, step = map(int, re.findall(r"\d+", name)[:5])
    frames, evaluations = np.arange(official.shape[1]), np.arange(official.shape[0])[:, None]
    ours = ladder_level(frames, evaluations, levels, lag, step)
    assert np.array_equal(ours, np.where(official == 999, levels, official // 10))
    assert np.array_equal(ladder_level(frames, evaluations + 1, levels, lag, step) != ours, updated)


@pytest.mark.parametrize(("window", "step", "per_roll"), [(20, 1, 1), (20, 5, 3), (6, 6, 4), (12, 4, 2), (1, 1, 7)])
def test_warm_up_and_roll_join(window: int, step: int, per_roll: int) -> None:
    levels = window // step * per_roll
    warm, steady = warmup_levels(window, step, per_roll), window_levels(window, step, per_roll)
    assert warm.shape == (levels - per_roll, window) and steady.shape == (per_roll, window)
    path = np.concatenate([warm, steady])
    assert (path[0] == levels).all()
    assert set(np.diff(path, axis=0).ravel()) <= {0, -1}
    # one more evaluation, and the window moved on is the window of the roll before
    assert (path[-1] - 1)[:step].max() == 0
    moved = np.append((path[-1] - 1)[step:], [levels] * step)
    assert np.array_equal(moved, steady[0])
    # the number of evaluations follows from the same table
    assert evaluations_for(3 * step, window, step, per_roll) == len(warm) + 3 * per_roll
    assert evaluations_for(0, window, step, per_roll) == 0


def test_a_ladder_step_that_does_not_divide_lists_those_that_do() -> None:
    with pytest.raises(
        ValueError, match="ladder_step=3 does not divide window_length=20; use one of 1, 2, 4, 5, 10, 20"
    ):
        checked_rungs(20, 3)
    with pytest.raises(ValueError, match="use one of 1, 7$"):
        checked_rungs(7, 14)
    for wrong in (0, -1, 2.0, True, None, "2"):
        with pytest.raises(ValueError, match="ladder_step="):
            checked_rungs(20, wrong)
        with pytest.raises(ValueError, match="window_length="):
            checked_rungs(wrong, 1)


def test_a_number_of_steps_that_does_not_fit_names_the_nearest() -> None:
    assert checked_evaluations(40, 20, 1000) == 2
    with pytest.raises(ValueError, match="num_inference_steps=50 is not a multiple of the 20 rungs.*use 40 or 60"):
        checked_evaluations(50, 20, 1000)
    with pytest.raises(ValueError, match="use 20$"):
        checked_evaluations(7, 20, 1000)
    with pytest.raises(ValueError, match="use a larger ladder_step or a shorter window_length"):
        checked_evaluations(7, 20, 10)


def test_drawn_windows_lie_on_the_ladder() -> None:
    generator = torch.Generator().manual_seed(0)
    steady = drawn_ladders(500, 12, 3, 0.0, generator)
    assert 0 < steady.min() and steady[:, 0].max() <= 0.25 and steady[:, -1].min() > 0.75
    torch.testing.assert_close(steady[:, 3:] - steady[:, :-3], torch.full((500, 9), 0.25, dtype=torch.float64))
    assert torch.equal(steady[:, 0::3], steady[:, 2::3])
    warm = drawn_ladders(500, 12, 3, 1.0, generator)
    assert warm[:, 0].min() > 0.25 and warm.max() == 1.0 and (warm.diff(dim=1) >= 0).all()
    mixed = drawn_ladders(2000, 12, 3, 0.3, generator)
    assert abs(float((mixed[:, 0] > 0.25).double().mean()) - 0.3) < 0.04
    # a window of one rung has no warm-up but its beginning
    assert drawn_ladders(5, 4, 4, 1.0, generator).eq(1.0).all()
