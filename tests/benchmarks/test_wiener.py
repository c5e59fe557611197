import pytest
import torch
from wiener import chosen, fitted, windows


def recording(rows: int = 4000, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """White conditions of two channels, and the target 0.5 u_(t - 1) + 2 v_t - u_(t + 2) + 3 with noise."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    u, v = condition.unbind(1)
    target = 0.5 * u.roll(1) + 2.0 * v - u.roll(-2) + 3.0
    target = target + noise * torch.randn(rows, generator=generator, dtype=torch.float64)
    return condition, target[:, None], u


def test_windows_hold_the_rows_around_each_and_repeat_the_ends():
    rows = windows(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), past=1, ahead=1)
    assert rows.tolist() == [[1, 10, 1, 10, 2, 20], [1, 10, 2, 20, 3, 30], [2, 20, 3, 30, 3, 30]]


def test_a_linear_filter_is_found_again_with_its_look_ahead():
    condition, target, _ = recording()
    # the first and the last rows were rolled around in the target
    guess = fitted(condition[4:-4], target[4:-4], past=2, ahead=2, ridge=1e-12)
    truth = torch.zeros(10, 1, dtype=torch.float64)
    truth[2], truth[5], truth[8] = 0.5, 2.0, -1.0
    # what the repeated ends cost: a few rows of 4000
    torch.testing.assert_close(guess.weights, truth, atol=5e-3, rtol=0)
    torch.testing.assert_close(guess(condition)[8:-8], target[8:-8], atol=3e-2, rtol=0)


def test_what_the_filter_cannot_see_ahead_stays_unexplained():
    condition, target, _ = recording()
    error = (fitted(condition, target, 2, 0, 1e-9)(condition) - target)[8:-8].square().mean()
    # of the variance .25 + 4 + 1 the part of u_(t + 2) is missing
    assert float(error) == pytest.approx(1.0, rel=0.05)


def test_the_ridge_shrinks_a_white_condition_by_one_over_one_plus_r():
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    condition = (condition - condition.mean()) / condition.std(correction=0)
    for ridge in (0.1, 1.0):
        weights = fitted(condition, 2.0 * condition, 0, 0, ridge).weights
        assert float(weights) == pytest.approx(2.0 / (1.0 + ridge), rel=1e-9)


def test_the_setting_is_chosen_on_rows_that_it_was_not_fitted_to():
    condition, target, _ = recording(600, noise=1.0)
    best = chosen(condition, target, 400, (0, 1, 64), (0, 2, 64), (1e-6, 1e-2))
    # wider windows fit the noise of the first rows better, and the others worse
    assert (best.past, best.ahead) == (1, 2)
    again = fitted(condition, target, best.past, best.ahead, best.ridge)
    assert torch.equal(best.weights, again.weights)
