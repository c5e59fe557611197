"""Steering on a flow whose posteriors are known: how near samples come, and that nothing diverges."""

from typing import Any

import pytest
import torch

from diffusers_ext.schedulers import (
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefLCMScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)
from diffusers_ext.steering import (
    Compose,
    GaussianBlur,
    InpaintMask,
    LinearOperator,
    MotionBlur,
    SuperResolution,
)
from tests.analytic.steering import (
    NOISE_STD,
    OFFICIAL,
    SHAPE,
    Quality,
    box_mask,
    picture_flow,
    quality,
    run,
    start_noise,
    steered,
    tasks,
)
from tests.helpers.golden import golden


TASKS = ("inpainting", "super-resolution", "deblurring")
every_task = pytest.mark.parametrize("name", TASKS)


def official(name: str) -> Quality:
    return quality(name, FlowChefScheduler, settings=tuple(OFFICIAL.items()))


# -- the field itself --------------------------------------------------------------------------------------------------


def test_the_field_is_that_of_the_reference_vectors() -> None:
    data, flow = golden("steering/pixel_unsteered.npz"), picture_flow()
    for index in (0, 10, 29):
        velocity = flow.velocity(data.tensor("latents")[index], float(data["timesteps"][index]))
        torch.testing.assert_close(velocity, data.tensor("velocity")[index], rtol=1e-4, atol=1e-5)


def test_posterior_means_have_their_limits_and_that_of_a_gaussian() -> None:
    flow, generator = picture_flow(), torch.Generator().manual_seed(0)
    truth = flow.sample(3, generator)
    everything = InpaintMask(torch.ones(8, 8, dtype=torch.float64))
    torch.testing.assert_close(flow.posterior_mean(everything, truth, 1e-4), truth, rtol=0, atol=1e-3)
    prior = torch.einsum("k,kchw->chw", flow.log_weights.softmax(0), flow.means)
    torch.testing.assert_close(flow.posterior_mean(everything, truth, 1e4), prior.expand(3, *SHAPE), rtol=0, atol=1e-3)
    # A measurement y = x + s n is the state x_t = (1 - t) y at the level t with s = t / (1 - t).
    expected = flow.clean(0.8 * truth, 0.2)
    torch.testing.assert_close(flow.posterior_mean(everything, truth, 0.25), expected)


# -- quality -----------------------------------------------------------------------------------------------------------


@every_task
def test_the_default_is_ahead_of_the_authors_settings_and_keeps_to_the_noise(name: str) -> None:
    ours, theirs = quality(name), official(name)
    assert ours.psnr >= theirs.psnr + 0.4
    assert ours.mean_error <= 0.03 and ours.mean_error < theirs.mean_error
    assert 0.5 <= ours.residual <= 1.2


@every_task
def test_the_multistep_solver_steers_as_well(name: str) -> None:
    ours = quality(name, FlowChefDPMSolverMultistepScheduler)
    assert ours.psnr >= official(name).psnr + 0.4 and ours.mean_error <= 0.03 and 0.5 <= ours.residual <= 1.2


@every_task
@pytest.mark.parametrize(("cls", "steps"), [(FlowChefHeunScheduler, 15), (FlowChefUniPCMultistepScheduler, 30)],
                         ids=["Heun", "UniPC"])  # fmt: skip
def test_the_others_keep_to_the_noise_too(cls: type, steps: int, name: str) -> None:
    ours = quality(name, cls, steps)
    assert ours.psnr > 21.5 and ours.mean_error <= 0.08 and 0.5 <= ours.residual <= 1.2


def test_lcm_is_euler_with_all_noise_new() -> None:
    ours, theirs = quality("inpainting", FlowChefLCMScheduler), quality("inpainting")
    assert abs(ours.psnr - theirs.psnr) < 0.05 and abs(ours.mean_error - theirs.mean_error) < 0.005


def test_releasing_the_measurement_before_the_end_costs_quality() -> None:
    released = quality("inpainting", settings=(("steer_stop", 2 / 3),))
    assert released.psnr < quality("inpainting").psnr - 5 and released.residual > 3


# -- stability ---------------------------------------------------------------------------------------------------------


def inner_mask() -> torch.Tensor:
    """0 along a border of one pixel."""
    mask = torch.zeros(8, 8, dtype=torch.float64)
    mask[1:-1, 1:-1] = 1
    return mask


OPERATORS: dict[str, LinearOperator] = {
    "few pixels": InpaintMask((torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.8).double()),
    "bicubic": SuperResolution(4, "bicubic"),
    "wide blur": GaussianBlur(7, 2.0),
    "circular blur": GaussianBlur(11, 3.0, "circular"),
    "motion": MotionBlur(5, 20.0),
    "motion with edges": Compose(MotionBlur(3), InpaintMask(inner_mask())),
    "camera": Compose(GaussianBlur(5, 1.0), SuperResolution(2, "bicubic")),
    "amplifier": InpaintMask(0.2 + 0.8 * box_mask()),
}


@pytest.mark.parametrize("steps", [5, 30])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_default_diverges_on_no_operator(name: str, steps: int) -> None:
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(0)
    truth = picture_flow().sample(8, generator)
    clean = operator.A(truth)
    measurement = clean + NOISE_STD * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    if isinstance(operator, InpaintMask):
        measurement = measurement * (operator.mask > 0)
    start = torch.randn(8, *SHAPE, generator=generator)
    samples = steered(FlowChefScheduler(), operator, measurement.float(), start, steps).double()
    free = run(FlowChefScheduler(), steps, start).double()
    spread = (operator.A(samples) - measurement)[operator.A(torch.ones_like(truth)) != 0]
    assert float(spread.square().mean().sqrt()) < 1.3 * NOISE_STD
    assert float((samples - truth).square().mean()) < 0.8 * float((free - truth).square().mean())


@pytest.mark.parametrize("settings", [{}, {"renoise": 0.0}, {"data_step": "grad"}, {"data_step": "project"}], ids=str)
def test_a_picture_is_steered_alike_alone_and_in_a_batch(settings: dict[str, Any]) -> None:
    task, start = tasks()["super-resolution"], start_noise()[:3]
    together = steered(FlowChefScheduler(**{**settings, "renoise": 0.0}), task.operator, task.repeated[:3], start, 10)
    alone = steered(FlowChefScheduler(**{**settings, "renoise": 0.0}), task.operator, task.repeated[:1], start[:1], 10)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
