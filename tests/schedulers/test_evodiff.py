"""EVODiff against the authors' own code, and where it may be used."""

import math

import numpy as np
import pytest
import torch

from diffusers_ext.schedulers import EVODiffScheduler
from diffusers_ext.schedulers.scheduling_evodiff import FEW_GROUPS
from tests.analytic.sampler_problems import MixtureProblem, exact_nodes, log_uniform_nodes, run
from tests.helpers.golden import golden


DATA = golden("samplers/evodiff.npz")
FINALS = [name for name in DATA if name.endswith("final")]


def nodes_of(name: str) -> list[float]:
    """The levels of a reference run: the recorded ones, and the end that they do not tell."""
    sigmas, grid, zero, _, _ = name.split("_")
    levels = DATA[f"{sigmas}_{grid}_{zero}_mix_model_sigmas"].tolist()
    lowest = MixtureProblem("mix").s_min if sigmas == "sd" else 0.002
    return [*levels, 0.0 if zero == "dz1" else lowest]


@pytest.mark.parametrize("name", FINALS)
def test_final_states_are_those_of_the_authors(name: str) -> None:
    problem = MixtureProblem("cfg" if "_cfg_" in name else "mix")
    scheduler = EVODiffScheduler(official_final=True)
    nodes = nodes_of(name)
    scheduler.set_timesteps(sigmas=nodes)
    final = run(scheduler, problem, problem.start * math.sqrt(1 + nodes[0] ** 2) * (1 + nodes[0] ** 2) ** -0.5)
    expected = DATA.tensor(name)
    assert float((final - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sd_logSNR_dz0_mix_model_inputs", "edm_edm_dz0_mix_model_inputs"])
def test_the_model_is_asked_where_the_authors_ask_it(name: str) -> None:
    problem = MixtureProblem("mix")
    scheduler = EVODiffScheduler(official_final=True)
    scheduler.set_timesteps(sigmas=nodes_of(name.replace("model_inputs", "mix_final").replace("mix_mix", "mix")))
    sample, nodes = problem.start, exact_nodes(scheduler)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = DATA.tensor(name)[index]
        state = sample * math.sqrt(1 + nodes[index] ** 2)
        assert float((state - expected).abs().max()) < 1e-9 * float(expected.abs().max())
        sample = scheduler.step(problem.noise(sample, 1 / (1 + nodes[index] ** 2)), timestep, sample).prev_sample


def deviation_from_a_line(nodes: list[float]) -> float:
    """How far a run strays from the straight line that a constant data prediction, 1, means; at its worst."""
    scheduler = EVODiffScheduler(prediction_type="sample")
    scheduler.set_timesteps(sigmas=nodes)
    clean = torch.ones(1, 2, 4, 4, dtype=torch.float64)
    sample = torch.zeros_like(clean)
    worst = 0.0
    for timestep, node in zip(scheduler.timesteps, nodes[1:], strict=True):
        sample = scheduler.step(clean, timestep, sample).prev_sample
        state = sample * math.sqrt(1 + node**2)
        worst = max(worst, float((state - (1 - node / nodes[0])).abs().max()))
    return worst


def test_a_constant_prediction_is_followed_on_log_uniform_nodes_only() -> None:
    problem = MixtureProblem("mix")
    uneven = np.linspace(problem.s_max**0.25, problem.s_min**0.25, 21) ** 4
    assert deviation_from_a_line(log_uniform_nodes(problem, 20)) < 1e-12
    assert deviation_from_a_line(uneven.tolist()) > 0.005


def test_statistics_over_a_sample_do_not_depend_on_how_channels_are_cut() -> None:
    problem = MixtureProblem("mix")

    def final(shape: tuple[int, ...], **config: object) -> torch.Tensor:
        scheduler = EVODiffScheduler(**config)
        scheduler.set_timesteps(sigmas=log_uniform_nodes(problem, 8))
        sample, nodes = problem.start.reshape(shape), exact_nodes(scheduler)
        for index, timestep in enumerate(scheduler.timesteps):
            noise = problem.noise(sample.reshape(2, 4, 8, 8), 1 / (1 + nodes[index] ** 2)).reshape(shape)
            sample = scheduler.step(noise, timestep, sample).prev_sample
        return sample.reshape(2, 256)

    whole, cut = (final(shape, per_channel_stats=False) for shape in ((2, 4, 8, 8), (2, 16, 4, 4)))
    torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(final((2, 4, 8, 8)), final((2, 16, 4, 4)))


@pytest.mark.parametrize("steps", [8, 24])
def test_many_groups_are_computed_as_few_are(steps: int) -> None:
    # arrays over all groups, against floats of each
    problem = MixtureProblem("mix")
    starts = torch.cat([problem.start * scale for scale in (0.6, 0.8, 1.0, 1.2, 1.4)])

    def final(sample: torch.Tensor) -> torch.Tensor:
        scheduler = EVODiffScheduler(official_final=True)
        scheduler.set_timesteps(sigmas=log_uniform_nodes(problem, steps))
        return run(scheduler, problem, sample)

    assert starts.shape[0] * starts.shape[1] > FEW_GROUPS >= starts.shape[1]
    alone = torch.cat([final(sample) for sample in starts.split(1)])
    torch.testing.assert_close(final(starts), alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_run_that_keeps_gradients_gives_the_same_sample(prediction_type: str) -> None:
    def final(factor: torch.Tensor) -> torch.Tensor:
        scheduler = EVODiffScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(5)
        sample = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(factor * torch.tanh(sample), timestep, sample).prev_sample
        return sample

    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kept = final(factor)
    torch.testing.assert_close(kept.detach(), final(factor.detach()), rtol=1e-12, atol=1e-12)
    kept.sum().backward()
    assert factor.grad is not None and math.isfinite(float(factor.grad)) and float(factor.grad) != 0.0


@pytest.mark.parametrize("steps", [8, 10, 20])
def test_the_plain_last_step_is_nearer_to_the_trajectory_than_the_authors(steps: int) -> None:
    problem = MixtureProblem("mix")
    reference = problem.reference(problem.start, problem.s_max, problem.s_min)
    errors = {}
    for official in (False, True):
        scheduler = EVODiffScheduler(official_final=official)
        scheduler.set_timesteps(sigmas=log_uniform_nodes(problem, steps))
        errors[official] = float((run(scheduler, problem, problem.start) - reference).square().mean().sqrt())
    # The second number is published in the notes of the method: .033, .025, .014 at 8, 10 and 20 steps.
    assert errors[False] < errors[True] == pytest.approx({8: 0.033, 10: 0.025, 20: 0.014}[steps], abs=6e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("shift_mu", 1.5), ("shift_mu", True), ("temperature", -1), ("temperature", "a")]
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        EVODiffScheduler(**{name: value})
