import itertools

import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.training.distillation.parameterization import (
    PREDICTIONS,
    NoiseSchedule,
    clean_from,
    convert,
    noise_from,
    score_from_clean,
)
from diffusers_ext.training.objectives import noisy
from diffusers_ext.training.text_to_image import new_scheduler


def pair(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64)
    return clean, noise


def levels(flow: bool, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    spread = torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    return (1.0 - spread if flow else (1.0 - spread**2).sqrt()), spread


def meaning(kind: str, clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor):
    """The definition of each prediction, written out."""
    signal, spread = signal[:, None, None], spread[:, None, None]
    return {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - spread * clean, "flow": noise - clean}[
        kind
    ]


@pytest.mark.parametrize(("given", "wanted"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_becomes_every_other_on_a_schedule_that_both_have(given: str, wanted: str):
    (clean, noise), (signal, spread) = pair(), levels(flow=True)
    if "v_prediction" in (given, wanted):
        # a^2 + s^2 = 1 and a + s = 1 have only the ends in common
        signal, spread = (torch.ones(5), torch.zeros(5)) if "flow" in (given, wanted) else levels(flow=False)
    sample = noisy(clean, noise, signal, spread)
    prediction = meaning(given, clean, noise, signal, spread)
    torch.testing.assert_close(
        convert(prediction, given, wanted, sample, signal, spread), meaning(wanted, clean, noise, signal, spread)
    )


def test_a_prediction_that_is_what_is_wanted_is_not_touched():
    (clean, noise), (signal, spread) = pair(), levels(flow=True)
    assert convert(clean, "flow", "flow", noise, signal, spread) is clean


def test_the_score_of_gaussian_data_is_that_of_the_noisy_gaussian():
    # x_0 ~ N(m, tau^2): x_t ~ N(a m, a^2 tau^2 + s^2), E[x_0 | x_t] = m + a tau^2 (x_t - a m) / (a^2 tau^2 + s^2)
    (sample, _), (signal, spread), m, tau = pair(), levels(flow=False), 0.3, 0.7
    a, s = signal[:, None, None], spread[:, None, None]
    variance = a**2 * tau**2 + s**2
    posterior = m + a * tau**2 * (sample - a * m) / variance
    torch.testing.assert_close(score_from_clean(posterior, sample, signal, spread), -(sample - a * m) / variance)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_schedule_is_that_of_its_scheduler(prediction_type: str):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert not schedule.is_flow and schedule.prediction_type == prediction_type
    (clean, noise), timesteps = (part.float() for part in pair()), torch.tensor([0, 10, 500, 998, 999])
    sample = schedule.noisy(clean, noise, timesteps)
    torch.testing.assert_close(sample, scheduler.add_noise(clean, noise, timesteps))
    prediction = schedule.target(clean, noise, timesteps)
    torch.testing.assert_close(schedule.noise(prediction, sample, timesteps), noise, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(schedule.clean(prediction, sample, timesteps), clean, rtol=1e-3, atol=2e-3)
    expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
    torch.testing.assert_close(prediction, expected[prediction_type])


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), new_scheduler("flow")])
def test_a_flow_schedule_is_a_straight_line(scheduler):
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.is_flow
    signal, spread = schedule.levels(torch.tensor([0.0, 250.0, 1000.0]))
    assert signal.tolist() == [1.0, 0.75, 0.0] and spread.tolist() == [0.0, 0.25, 1.0]


def test_wrong_calls_are_answered_in_one_sentence():
    (clean, noise), (signal, spread) = pair(), levels(flow=False)
    with pytest.raises(ValueError, match="prediction_type='x0' is unknown; use one of epsilon"):
        clean_from("x0", clean, noise, signal, spread)
    with pytest.raises(ValueError, match=r"prediction has shape \(4, 3, 4\); give that of sample, \(5, 3, 4\)"):
        noise_from("epsilon", clean[:4], noise, signal, spread)
    with pytest.raises(ValueError, match=r"signal has shape \(2,\); give \(5,\), one entry a sample"):
        clean_from("epsilon", clean, noise, signal[:2], spread)
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
    with pytest.raises(ValueError, match="timesteps reach from 0 to 1000; this schedule has those from 0 to 999"):
        schedule.levels(torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match="has no alphas_cumprod and is no flow"):
        NoiseSchedule.from_scheduler(EDMDPMSolverMultistepScheduler())
