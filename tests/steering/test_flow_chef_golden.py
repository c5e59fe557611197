"""FlowChef against the authors' code, step by step and over whole runs."""

import torch

from diffusers_ext.schedulers import FlowChefScheduler
from diffusers_ext.steering import InpaintMask, LatentMaskObjective, MeasurementObjective, official_settings
from tests.analytic.steering import PictureFlow
from tests.helpers.golden import GoldenFile, golden


def replay(scheduler: FlowChefScheduler, data: GoldenFile, sigmas: list[float]) -> torch.Tensor:
    """The states of a run on the analytic field, from the reference's start noise."""
    flow, states = PictureFlow(), [data.tensor("latents")[0]]
    scheduler.set_timesteps(sigmas=sigmas)
    for level, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        states.append(scheduler.step(flow.velocity(states[-1], level), timestep, states[-1]).prev_sample)
    return torch.stack(states)


def by_the_step(
    scheduler: FlowChefScheduler, data: GoldenFile, sigmas: list[float], velocities: torch.Tensor
) -> torch.Tensor:
    """The states after single steps from each state of the reference."""
    scheduler.set_timesteps(sigmas=sigmas)
    states = data.tensor("latents")
    following = [
        scheduler.step(velocity, timestep, state).prev_sample
        for velocity, timestep, state in zip(velocities, scheduler.timesteps, states, strict=False)
    ]
    return torch.stack([states[0], *following])


def error(states: torch.Tensor, data: GoldenFile) -> float:
    return float((states - data.tensor("latents")).abs().max())


def pixel(name: str, rate: float) -> tuple[FlowChefScheduler, GoldenFile, list[float]]:
    data, inpainting = golden(f"steering/{name}.npz"), golden("steering/pixel_inpaint_box4.npz")
    official = official_settings("pixel")
    settings = {**official.scheduler, "learning_rate": rate, "steer_stop": 29 / 30}
    scheduler = FlowChefScheduler(**settings)
    operator = InpaintMask(inpainting.tensor("mask"))
    scheduler.set_objective(MeasurementObjective(operator, inpainting.tensor("y"), **official.objective))
    return scheduler, data, data["timesteps"][:-1].tolist()


def test_inpainting_of_pixels_is_that_of_the_authors() -> None:
    scheduler, data, sigmas = pixel("pixel_inpaint_box4", 96.0)
    assert error(replay(scheduler, data, sigmas), data) <= 1e-6
    assert error(by_the_step(scheduler, data, sigmas, data.tensor("velocity")), data) <= 1e-6


def test_the_loss_is_that_of_the_authors() -> None:
    scheduler, data, sigmas = pixel("pixel_inpaint_box4", 96.0)
    for index in range(29):
        clean = data.tensor("latents")[index] - sigmas[index] * data.tensor("velocity")[index]
        assert abs(float(scheduler.objective.loss(clean).sum()) - data["loss"][index]) <= 1e-6 * data["loss"][index]


def test_the_normalised_objective_takes_the_same_steps_at_half_the_way() -> None:
    # c = 1, lr = 96 and 2 * 3 * 8 * 8 values: eta = 2 * 96 / 384
    _, data, sigmas = pixel("pixel_inpaint_box4", 96.0)
    scheduler = FlowChefScheduler(data_step="grad", learning_rate=0.5, steer_stop=29 / 30)
    scheduler.set_objective(MeasurementObjective(InpaintMask(data.tensor("mask")), data.tensor("y")))
    assert error(replay(scheduler, data, sigmas), data) <= 1e-6


def test_without_a_learning_rate_nothing_is_steered() -> None:
    scheduler, data, sigmas = pixel("pixel_unsteered", 0.0)
    assert error(replay(scheduler, data, sigmas), data) <= 1e-6


def test_inpainting_with_flux_is_that_of_the_authors() -> None:
    data, official = golden("steering/flux_inpaint_sgd.npz"), official_settings("flux_inpaint")
    assert official.scheduler["optimization_steps"] == int(data["optimization_steps"]) == 5
    assert official.scheduler["steer_stop"] == int(data["max_steps"]) / 30
    scheduler = FlowChefScheduler(**{**official.scheduler, "learning_rate": float(data["learning_rate"])})
    objective = LatentMaskObjective(data.tensor("keep_mask"), data.tensor("x_ref"), **official.objective)
    scheduler.set_objective(objective)
    sigmas = data["sigmas"][:-1].tolist()
    assert error(replay(scheduler, data, sigmas), data) <= 1e-6
    assert error(by_the_step(scheduler, data, sigmas, data.tensor("velocity_target")), data) <= 1e-6


def test_the_levels_of_flux_are_those_of_the_authors() -> None:
    data = golden("steering/flux_inpaint_sgd.npz")
    scheduler = FlowChefScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 30, 30).tolist(), mu=0.459375)
    torch.testing.assert_close(scheduler.sigmas, data.tensor("sigmas"), rtol=0, atol=1e-6)


def test_inpainting_with_instaflow_and_adam_is_that_of_the_authors() -> None:
    data, official = golden("steering/instaflow_inpaint_adam.npz"), official_settings("instaflow_inpaint")
    assert official.scheduler["learning_rate"] == float(data["learning_rate"])
    assert official.scheduler["optimization_steps"] == int(data["optimization_steps"])
    scheduler = FlowChefScheduler(**official.scheduler)
    mask = data.tensor("mask").float()
    scheduler.set_objective(LatentMaskObjective(mask, data.tensor("masked_latents"), **official.objective))
    sigmas = (data["timesteps"] / 1000).tolist()
    # Adam divides by the gradient's size plus 1e-8, and these gradients are so small that rounding counts.
    assert error(replay(scheduler, data, sigmas), data) <= 5e-3
    assert error(by_the_step(scheduler, data, sigmas, -data.tensor("velocity")), data) <= 1e-4
