"""BDIA against the authors' code, against DDIM, and back to where it came from."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext.schedulers import BDIADDIMInverseScheduler, BDIADDIMScheduler
from tests.analytic.sampler_problems import MixtureProblem
from tests.helpers.golden import golden


LDM = golden("samplers/bdia_ldm.npz")
ROUND_TRIP = golden("samplers/bdia_roundtrip.npz")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
Predict = Callable[[torch.Tensor, float], torch.Tensor]


def sample_with(scheduler: BDIADDIMScheduler, predict: Predict, start: torch.Tensor) -> torch.Tensor:
    state = start
    for timestep in scheduler.timesteps:
        state = scheduler.step(predict(state, float(timestep)), timestep, state).prev_sample
    return state


def round_trip(predict: Predict, clean: torch.Tensor, steps: int, gamma: float, **config: Any) -> torch.Tensor:
    inverse, forward = (
        cls(**{**SCHEDULE, "gamma": gamma, **config}) for cls in (BDIADDIMInverseScheduler, BDIADDIMScheduler)
    )
    inverse.set_timesteps(steps)
    state = clean
    for timestep in inverse.timesteps:
        state = inverse.step(predict(state, float(timestep)), timestep, state).prev_sample
    forward.set_timesteps(steps)
    forward.set_initial_pair(*inverse.pair)
    state = inverse.pair[1]
    for timestep in forward.timesteps[1:]:
        state = forward.step(predict(state, float(timestep)), timestep, state).prev_sample
    return state


@pytest.mark.parametrize("model", ["mix", "cfg"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_sampled_latents_are_those_of_the_authors(model: str, gamma: float) -> None:
    problem = MixtureProblem(model)
    scheduler = BDIADDIMScheduler(**SCHEDULE, gamma=gamma, steps_offset=1)
    scheduler.alphas_cumprod = problem.alphas_cumprod
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == LDM["timesteps"].tolist()
    final = sample_with(scheduler, lambda x, t: problem.noise(x, float(problem.alphas_cumprod[int(t)])), problem.start)
    expected = LDM.tensor(f"{model}_g{gamma}_final")
    assert float((final - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("model", ["mix", "cfg"])
@pytest.mark.parametrize("gamma", ["0.92", "1.0"])
def test_inversion_and_its_way_back_are_those_of_the_authors(model: str, gamma: str) -> None:
    problem, key = MixtureProblem(model), f"{model}_g{gamma}"
    asked: list[float] = []
    bars = problem.alphas_cumprod

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        asked.append(timestep)
        return problem.noise(x, float(bars[int(timestep)]))

    inverse = BDIADDIMInverseScheduler(**SCHEDULE, gamma=float(gamma))
    inverse.alphas_cumprod = bars
    inverse.set_timesteps(10)
    state = ROUND_TRIP.tensor("x0")
    for timestep in inverse.timesteps:
        state = inverse.step(predict(state, float(timestep)), timestep, state).prev_sample
    # They ask for the picture at timestep -100, which their schedule takes for the level of timestep 0.
    assert asked == [max(t, 0.0) for t in ROUND_TRIP[f"{key}_inv_model_t"].tolist()]
    for name, found in zip(("zN", "zNm1"), inverse.pair, strict=True):
        expected = ROUND_TRIP.tensor(f"{key}_{name}")
        assert float((found - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))

    forward = BDIADDIMScheduler(**SCHEDULE, gamma=float(gamma))
    forward.alphas_cumprod = bars
    forward.set_timesteps(10)
    forward.set_initial_pair(*inverse.pair)
    asked.clear()
    state = inverse.pair[1]
    for timestep in forward.timesteps[1:]:
        state = forward.step(predict(state, float(timestep)), timestep, state).prev_sample
    assert asked == ROUND_TRIP[f"{key}_fwd_model_t"].tolist()
    assert float((state - ROUND_TRIP.tensor("x0")).abs().max()) < 1e-9


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_gamma_zero_is_ddim_bit_for_bit(prediction_type: str, spacing: str, to_one: bool) -> None:
    config = {**SCHEDULE, "prediction_type": prediction_type, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    ours, theirs = BDIADDIMScheduler(**config, gamma=0.0), DDIMScheduler(**config, clip_sample=False)
    states = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        state = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        run = []
        for timestep in scheduler.timesteps:
            output = scheduler.step(torch.sin(state + 0.01 * timestep), timestep, state)
            state = output.prev_sample
            run += [state, output.pred_original_sample]
        states.append(torch.stack(run))
    assert torch.equal(*states)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Smooth and nonlinear, of a size that keeps states near 1; which function it is does not matter otherwise."""
    return 0.35 * torch.sin(1.3 * x + 0.002 * timestep) + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("gamma", [0.92, 0.96, 1.0])
def test_a_round_trip_of_fifty_steps_is_exact_in_float32(prediction_type: str, gamma: float) -> None:
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    bars = BDIADDIMScheduler(**SCHEDULE).alphas_cumprod

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        output = network(x, timestep)
        if prediction_type == "sample":  # the picture that goes with a noise of moderate size
            return (x - (1 - bars[int(timestep)]).sqrt() * output) / bars[int(timestep)].sqrt()
        return output

    back = round_trip(predict, clean, 50, gamma, prediction_type=prediction_type)
    assert float((back - clean).abs().max()) <= 1e-5


def test_a_round_trip_through_the_mixture_is_exact_in_float32() -> None:
    problem = MixtureProblem("mix")

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return problem.noise(x.double(), float(problem.alphas_cumprod[int(timestep)])).float()

    clean = ROUND_TRIP.tensor("x0").float()
    for gamma in (0.92, 0.96, 1.0):
        assert float((round_trip(predict, clean, 50, gamma) - clean).abs().max()) <= 1e-5, gamma


def stays_bounded(gamma: float, z: float) -> bool:
    """Whether the recursion of sampling, on dX/ds = lambda X with constant steps, does not grow."""
    # z_{i-1} = gamma (z_{i+1} - (1 + z) z_i) + (1 - z) z_i, with D_{i->i+-1} = (1 +- z) z_i.
    before, now = 1.0, 1.0 - z
    for _ in range(100_000):
        before, now = now, gamma * (before - (1 + z) * now) + (1 - z) * now
        if abs(now) > 1e6:
            return False
    return True


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.8, 0.92])
def test_the_measured_stability_limit_is_the_closed_form(gamma: float) -> None:
    limit = 2 * (1 - gamma) / (1 + gamma)
    assert stays_bounded(gamma, 0.98 * limit)
    assert not stays_bounded(gamma, 1.02 * limit)


def test_a_gamma_that_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma=0.5 is out of range; use a number from 0.9 to 1"):
        BDIADDIMInverseScheduler(gamma=0.5)
    for cls in (BDIADDIMScheduler, BDIADDIMInverseScheduler):
        for gamma in (-0.1, 1.1, math.nan, "1", True):
            with pytest.raises(ValueError, match="gamma="):
                cls(gamma=gamma)


@pytest.mark.parametrize("cls", [BDIADDIMScheduler, BDIADDIMInverseScheduler])
def test_noise_on_the_way_is_refused(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"eta=0.3: noise"):
        scheduler.step(torch.zeros(1, 2, 2), scheduler.timesteps[0], torch.zeros(1, 2, 2), eta=0.3)


def test_a_pair_is_asked_for_and_given_at_the_right_time() -> None:
    inverse = BDIADDIMInverseScheduler()
    inverse.set_timesteps(2)
    with pytest.raises(ValueError, match="the pair is there after the last step"):
        _ = inverse.pair
    forward = BDIADDIMScheduler()
    state = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="no second step"):
        forward.set_initial_pair(state, state)
    forward.set_timesteps(4)
    with pytest.raises(ValueError, match="noisiest of shape"):
        forward.set_initial_pair(state, state[..., :1])
    with pytest.raises(TypeError, match="next_noisiest is str"):
        forward.set_initial_pair(state, "z")
    forward.set_initial_pair(state, state)
    assert forward.begin_index == 1


def test_combinations_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True with prediction_type='epsilon'"):
        BDIADDIMScheduler(rescale_betas_zero_snr=True).set_timesteps(5)
    with pytest.raises(ValueError, match="set_alpha_to_one=True with prediction_type='sample'"):
        BDIADDIMInverseScheduler(prediction_type="sample").set_timesteps(5)
    with pytest.raises(ValueError, match="must be whole numbers"):
        BDIADDIMScheduler().set_timesteps(timesteps=[900.5, 3])
