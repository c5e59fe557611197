import math

import numpy as np
import pytest
import torch

from diffusers_ext.training.distillation.f_divergence import F_DIVERGENCES, DensityRatioWeights, f_weight

from .golden import FOLDER, golden


TABLE = golden("f_divergence")
FUNCTIONS = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "sf": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "sh": lambda r: 4 * (1 - r.sqrt()),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / (2 * r),
}


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_weights_are_those_of_the_authors(divergence: str):
    torch.testing.assert_close(f_weight(divergence, TABLE["r"]), TABLE[f"w_{divergence}"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(divergence: str):
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(FUNCTIONS[divergence](r).sum(), r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(f_weight(divergence, r.detach()), bend * r.detach() ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_the_weighted_score_difference_is_the_gradient_of_the_divergence(divergence: str):
    # p = N(.4, 1.1^2) and q = N(m, s^2) both blurred by .8; x_t = m + s z + .8 eps, whose derivative in m is 1 and in s is z
    nodes = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    width = nodes[1] - nodes[0]
    mu, tau, m, s, sigma = (float(TABLE[f"gauss_{name}"]) for name in ("mu", "tau", "m", "s", "sigma"))
    big, small = tau**2 + sigma**2, s**2 + sigma**2

    def density(mean: float, variance: float) -> torch.Tensor:
        return torch.exp(-((nodes - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    p, q = density(mu, big), density(m, small)
    difference = -(nodes - mu) / big + (nodes - m) / small
    weighted = -q * f_weight(divergence, p / q) * difference * width
    # E[z | x_t] = s (x_t - m) / (s^2 + sigma^2)
    with np.load(FOLDER / "f_divergence.npz") as file:
        row = file["gauss_table"][file["names"].tolist().index(divergence)]
    assert float(weighted.sum()) == pytest.approx(row[1], abs=1e-7)
    assert float((weighted * s * (nodes - m) / small).sum()) == pytest.approx(row[3], abs=1e-7)


@pytest.mark.parametrize("divergence", [name for name in F_DIVERGENCES if name != "rkl"])
def test_weights_from_logits_are_those_of_the_authors(divergence: str):
    found = DensityRatioWeights(divergence)(TABLE["logits"], TABLE["t"])
    # the authors compute the exponential and the bins in float32
    torch.testing.assert_close(found, TABLE[f"H_{divergence}_norm"], rtol=1e-5, atol=1e-6)


def test_reverse_divergence_weighs_all_alike():
    assert DensityRatioWeights("rkl")(TABLE["logits"], TABLE["t"]).tolist() == [1.0] * 16


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_weights_have_mean_one_whatever_the_logits(divergence: str):
    logits = 30 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weights = DensityRatioWeights(divergence)(logits, torch.linspace(0, 1, 64))
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6) and bool((weights > 0).all())


def test_two_processes_that_add_up_their_sums_give_the_weights_of_one():
    logits, times = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 16)
    one = DensityRatioWeights("kl", bins=3)(logits, times)
    # both halves ask for their sums in the same order; the first pass only records what each contributes
    halves = [slice(0, 16, 2), slice(1, 16, 2)]
    sums: list[torch.Tensor] = []
    for stage in range(2):
        given: list[list[torch.Tensor]] = [[], []]
        for half, rows in enumerate(halves):

            def reduce(
                tensor: torch.Tensor, half: int = half, given: list[list[torch.Tensor]] = given
            ) -> torch.Tensor:
                given[half].append(tensor)
                return sums[len(given[half]) - 1] if len(given[half]) <= len(sums) else tensor

            DensityRatioWeights("kl", bins=3, all_reduce=reduce)(logits[rows], times[rows])
        sums.append(given[0][stage] + given[1][stage])
    for rows in halves:
        order = iter(sums)
        two = DensityRatioWeights("kl", bins=3, all_reduce=lambda _, order=order: next(order))(
            logits[rows], times[rows]
        )
        torch.testing.assert_close(two, one[rows])


def test_remembered_ratios_are_averaged_and_come_back_from_a_checkpoint():
    logits, times = torch.tensor([math.log(2.0), math.log(4.0)]), torch.tensor([0.1, 0.2])
    weights = DensityRatioWeights("kl", bins=2, ema_rate=0.5)
    weights(logits, times)
    assert float(weights.state_dict()["means"][0]) == pytest.approx(3.0)
    assert weights.state_dict()["means"][1].isnan(), "no sample of that noise level yet"
    weights(torch.full((2,), math.log(5.0)), times)
    assert float(weights.state_dict()["means"][0]) == pytest.approx(4.0)
    copy = DensityRatioWeights("kl", bins=2, ema_rate=0.5)
    copy.load_state_dict(weights.state_dict())
    assert torch.equal(copy(logits, times), weights(logits, times))
    with pytest.raises(ValueError, match="have 2 bins, not 3 bins"):
        DensityRatioWeights("kl", bins=3).load_state_dict(weights.state_dict())


def test_wrong_calls_are_answered_in_one_sentence():
    with pytest.raises(ValueError, match="divergence='chi' is unknown; use one of rkl, kl, js"):
        DensityRatioWeights("chi")
    with pytest.raises(ValueError, match=r"ema_rate=1.0 must be a number in \[0, 1\)"):
        DensityRatioWeights(ema_rate=1.0)
    weights = DensityRatioWeights()
    with pytest.raises(ValueError, match="logits are empty or not finite"):
        weights(torch.tensor([math.nan]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"times reach from 0.5 to 2; give them in \[0, 1\]"):
        weights(torch.zeros(2), torch.tensor([0.5, 2.0]))
    assert bool(weights.state_dict()["means"].isnan().all()), "a refused batch leaves no trace"
