"""The rule as the benchmark writes it is the rule of the scheduler, with and without the gate that came of it."""

import math

import pytest
import torch
from adaptive_leads import EVALUATIONS, LEADS, Mixture, Options, karras, run, score, shifted_log

from diffusers_ext.schedulers import AdaptiveAdamsScheduler


def test_the_noise_of_one_gaussian_is_that_of_the_formula() -> None:
    problem = Mixture(seed=0, count=1, size=3, scale=1.0)
    state, s = problem.start[:2], 0.7
    covariance = problem.turns[0] @ torch.diag(problem.spread[0]) @ problem.turns[0].T
    expected = s * torch.linalg.solve(covariance + s * s * torch.eye(3).double(), (state - problem.means[0]).T).T
    torch.testing.assert_close(problem.noise(state, s), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("steps", [6, 10])
def test_the_scheduler_does_what_was_measured(gated: bool, steps: int) -> None:
    problem, nodes = Mixture(12, 12, 24, 6.0), karras(steps).tolist()
    expected = run(problem, nodes, Options(gates=(("corrector", 0.1, 0.3),) if gated else ()))
    scheduler = AdaptiveAdamsScheduler(lipschitz_gate=gated)
    scheduler.set_timesteps(sigmas=nodes)
    sample = problem.start / math.sqrt(1 + nodes[0] ** 2)
    for timestep, node in zip(scheduler.timesteps, nodes, strict=False):
        noise = problem.noise(sample * math.sqrt(1 + node**2), node)
        sample = scheduler.step(noise, timestep, sample).prev_sample
    torch.testing.assert_close(sample * math.sqrt(1 + nodes[-1] ** 2), expected, rtol=1e-9, atol=1e-9)


def test_nodes_span_the_range_and_a_score_of_itself_is_one() -> None:
    for nodes in (karras(7), shifted_log(7, 0.1)):
        assert len(nodes) == 8 and (nodes[1:] < nodes[:-1]).all()
        assert nodes[[0, -1]] == pytest.approx(karras(1), rel=1e-12)
    table = {f"a, {count}": (0.1, 0.0) for count in EVALUATIONS}
    assert score(table, table)["geometric_mean"] == 1.0
    # The page says how many configurations there were.
    assert sum(map(len, LEADS.values())) == 47
