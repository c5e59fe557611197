"""FLAIR against the authors' code, over a whole run and step by step."""

import torch

from diffusers_ext.schedulers import FLAIRScheduler
from diffusers_ext.schedulers.scheduling_flair import adjusted_noise, prior_step, prior_weight
from diffusers_ext.steering import InpaintMask, MeasurementObjective
from tests.analytic.steering import PictureFlow, box_mask
from tests.helpers.golden import golden


DATA = golden("steering/flair_inpaint.npz")
LEVELS = DATA["timesteps"].tolist()
ERRORS = DATA["calibration_error"].tolist()


def measurement() -> torch.Tensor:
    """The authors' measurement has the known pixels one after the other; ours is a picture."""
    picture, known = torch.zeros(2, 3, 8, 8), box_mask() > 0
    picture[..., known] = DATA.tensor("y")
    return picture


def objective() -> MeasurementObjective:
    # Theirs is |A x - y|^2, unscaled, and met when it is below 1e-4 a value.
    y = measurement()
    return MeasurementObjective(InpaintMask(box_mask().float()), y, noise_std=0.01, weight=float(y.numel()))


def authors_run() -> torch.Tensor:
    """The iterates of mu of a run, from their start and with their noise."""
    flow, wanted, noise = PictureFlow(), objective(), DATA.tensor("noise")
    scheduler = FLAIRScheduler(data_step="grad", data_learning_rate=float(DATA["lr_data"]), velocity_errors=ERRORS)
    mean = wanted.project(torch.zeros(2, 3, 8, 8))  # theirs is A^+ y
    scheduler.set_objective(wanted, start=mean)
    scheduler.set_timesteps(50)
    state = (1 - LEVELS[0]) * mean + LEVELS[0] * adjusted_noise(noise[0], LEVELS[0], noise[1])
    means = [mean]
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = flow.velocity(state, LEVELS[index])
        scheduler.step(velocity, timestep, state)
        means.append(scheduler.mean)
        if index < 49:
            # what the scheduler returns, with the reference's noise
            level, following = LEVELS[index], LEVELS[index + 1]
            e = adjusted_noise(state + (1 - level) * velocity, following, noise[index + 2])
            state = (1 - following) * means[-1] + following * e
    return torch.stack(means)


def test_a_whole_run_is_that_of_the_authors() -> None:
    assert float((authors_run() - DATA.tensor("mu")).abs().max()) <= 1e-4


def test_the_weights_are_those_of_the_authors() -> None:
    levels = torch.linspace(1, 0, 100, dtype=torch.float64).tolist()
    ours = torch.tensor([prior_weight(ERRORS, level) for level in levels])
    torch.testing.assert_close(ours, DATA.tensor("reg_weight_table"), rtol=1e-5, atol=1e-6)


def test_the_levels_are_those_of_the_authors() -> None:
    scheduler = FLAIRScheduler()
    scheduler.set_objective(objective())
    scheduler.set_timesteps(50)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(LEVELS), rtol=0, atol=1e-6)


def test_the_prior_step_is_the_gradient_of_the_flow_matching_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, noise, velocity = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    level, weight = 0.6, 0.3
    state = (1 - level) * mean + level * noise
    expected = mean - weight * (velocity - (noise - mean))
    torch.testing.assert_close(prior_step(mean, state - level * velocity, level, weight), expected)


def test_adjusted_noise_keeps_unit_variance_and_ends_where_the_network_points() -> None:
    start, noise = torch.randn(2, 100000, generator=torch.Generator().manual_seed(0))
    assert abs(float(adjusted_noise(start, 0.4, noise).var()) - 1) < 0.02
    assert torch.equal(adjusted_noise(start, 0.0, noise), start)
    assert torch.equal(adjusted_noise(start, 1.0, noise), noise)
