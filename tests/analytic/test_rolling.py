"""Closed forms through the real pipeline: exact covariances of AR(1) and AR(2) streams, and golden moments."""

import numpy as np
import pytest
import torch

from tests.helpers.golden import golden

from .rolling import (
    analytic_pipeline,
    ar1_correlations,
    ar2_correlations,
    covariance,
    gaussian_kl_per_frame,
    plain_rollout,
    stream_covariance,
)


AR1 = ar1_correlations(0.9, 64)
TRUE = covariance(AR1, 40)
MOMENTS = golden("rolling/ar1_exact_moments.npz")
# highest KL a frame at one evaluation a frame
LIMITS = {"ddim": 0.011, "2m": 0.0006, "fm": 0.0085, "fm-2m": 0.0001}


@pytest.mark.parametrize("step", [1, 2, 5, 10])
@pytest.mark.parametrize("kind", LIMITS)
def test_one_evaluation_a_frame_is_close_to_the_process(kind: str, step: int) -> None:
    found = stream_covariance(kind, AR1, per_roll=step, step=step)
    assert gaussian_kl_per_frame(found, TRUE) <= LIMITS[kind]
    # frames on both sides of a seam belong together as much as frames inside a block
    spread = np.sqrt(np.diag(found))
    lag1 = np.diag(found, 1) / spread[1:] / spread[:-1]
    seams = np.arange(1, 40) % step == 0
    if step > 1:
        assert abs(lag1[seams].mean() - lag1[~seams].mean()) < 0.005


@pytest.mark.parametrize("kind", ["ddim", "2m", "fm"])
@pytest.mark.parametrize(("step", "per_roll"), [(1, 2), (2, 4), (5, 10)])
def test_the_covariance_is_that_of_the_reference_program(kind: str, step: int, per_roll: int) -> None:
    expected = MOMENTS[f"P_{kind}_eta0_l{step}_m{per_roll}_C1"]
    found = stream_covariance(kind, AR1, per_roll=per_roll, step=step)
    np.testing.assert_allclose(found, expected, atol=1e-3)


# variance and KL a frame of the reference program at l = 4, m = 2
@pytest.mark.parametrize(
    ("kind", "variance", "divergence"),
    [("ddim", 0.7399, 0.0401), ("2m", 0.8643, 0.0147), ("fm", 0.7409, 0.0305), ("fm-2m", 0.9137, 0.0040)],
)
def test_half_an_evaluation_a_frame(kind: str, variance: float, divergence: float) -> None:
    found = stream_covariance(kind, AR1, per_roll=2, step=4)
    assert abs(np.trace(found) / 40 - variance) < 1e-4
    assert abs(gaussian_kl_per_frame(found, TRUE) - divergence) < 1e-4


def test_order_two_is_twenty_times_closer_at_the_same_cost() -> None:
    first, second = (
        gaussian_kl_per_frame(stream_covariance(kind, AR1, per_roll=2, step=2), TRUE) for kind in ("ddim", "2m")
    )
    assert second < first / 20


def test_blocks_without_context_fall_apart_and_with_it_do_not() -> None:
    def seam(context: int) -> float:
        found = stream_covariance("2m", AR1, per_roll=20, step=20, context=context)
        return float(found[19, 20] / np.sqrt(found[19, 19] * found[20, 20]))

    assert abs(seam(0)) < 1e-6
    assert abs(seam(1) - 0.9) < 0.02


def test_jitter_of_a_smooth_process_vanishes_with_enough_context() -> None:
    correlations = ar2_correlations(0.97, 0.2, 64)
    true = covariance(correlations, 40)
    bend = np.zeros((38, 40))
    for i in range(38):
        bend[i, i : i + 3] = 1.0, -2.0, 1.0

    def jitter(context: int) -> float:
        found = stream_covariance("2m", correlations, per_roll=20, step=5, context=context)
        return float(np.trace(bend @ found @ bend.T) / np.trace(bend @ true @ bend.T))

    assert jitter(0) > 5.0
    assert 0.8 < jitter(2) < 1.25


@pytest.mark.parametrize("kind", ["ddim", "2m", "fm", "fm-2m"])
# numbers of levels that divide the 1000 timesteps: others are rounded to whole timesteps
@pytest.mark.parametrize(("step", "per_roll", "context"), [(1, 1, 1), (2, 4, 2), (4, 8, 0), (2, 10, 8)])
def test_a_stream_is_the_plain_rollout(kind: str, step: int, per_roll: int, context: int) -> None:
    noise = np.random.default_rng(0).normal(size=(16, 3))
    position = 0

    def rows(count: int) -> torch.Tensor:
        nonlocal position
        position += count
        return torch.from_numpy(noise[None, position - count : position])

    pipeline = analytic_pipeline(kind, AR1, 3, window=4, step=step, context=context)
    made = pipeline(num_frames=12, num_inference_steps=4 // step * per_roll, noise_source=rows)
    expected, evaluations = plain_rollout(AR1, kind, 4, step, per_roll, context, noise, 12)
    np.testing.assert_allclose(made.frames[0].numpy(), expected, rtol=0, atol=1e-9)
    assert made.network_evaluations == evaluations == (4 // step - 1 + 12 // step) * per_roll
