import math

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext.training.coupling import COUPLINGS, couple, draw_noise
from diffusers_ext.training.distillation import ambient, guidance, pfgmpp, pgraft, smooth


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Ambient


def test_the_posterior_of_noisy_data_follows_from_that_of_clean_data():
    # x_0 ~ N(m, tau^2), x_n = x_0 + sigma_n eps, x_t noisier: E[x_n | x_t] is linear regression, as E[x_0 | x_t] is
    m, tau = 0.4, 0.7
    known_level, level = torch.tensor([0.0, 0.3, 1.0]).double(), torch.tensor([0.5, 0.8, 4.0]).double()
    x = torch.tensor([[2.0], [-1.0], [5.0]]).double()
    total = (tau**2 + level**2)[:, None]
    clean = m + tau**2 / total * (x - m)
    expected = m + (tau**2 + known_level**2)[:, None] / total * (x - m)
    torch.testing.assert_close(
        ambient.known_from_clean(clean, x, known_level, level), expected, rtol=1e-14, atol=1e-14
    )


def test_noisy_data_alone_teach_the_posterior_of_the_clean_data():
    m, tau, known_level, level = 0.4, 0.7, 0.5, 1.2
    clean, noise, more = torch.randn(3, 200_000, 1, generator=generator(), dtype=torch.float64)
    levels = torch.full((2, 200_000), known_level, dtype=torch.float64)
    levels[1] = level
    known = m + tau * clean + known_level * noise
    x = ambient.add_more_noise(known, more, *levels)
    assert float(x.var()) == pytest.approx(tau**2 + level**2, rel=0.01)
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=30)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ambient.ambient_loss(line[0] + line[1] * x, x, known, *levels).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    slope = tau**2 / (tau**2 + level**2)
    torch.testing.assert_close(line.detach(), torch.tensor([m * (1 - slope), slope]).double(), atol=0.01, rtol=0)


def test_for_clean_data_the_ambient_loss_is_the_ordinary_one():
    prediction, x, known = torch.randn(3, 4, 5, generator=generator())
    found = ambient.ambient_loss(prediction, x, known, torch.zeros(4), torch.ones(4))
    torch.testing.assert_close(found, (prediction - known).square().mean(1))


# Smooth Diffusion


def test_the_penalty_of_a_linear_map_is_that_of_its_matrix():
    matrix = torch.randn(3, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, generator=generator(1), dtype=torch.float64, requires_grad=True)
    n = torch.randn(2, 3, generator=generator(2), dtype=torch.float64)
    y = smooth.pulled_back(x @ matrix.T, x, n)
    torch.testing.assert_close(y, n @ matrix)
    penalty = smooth.VariationPenalty(decay=0.5)
    lengths = (n @ matrix).norm(dim=1)
    mean = 0.5 * lengths.mean()
    loss = penalty(y)
    torch.testing.assert_close(loss, (lengths - mean).square().mean())
    loss.backward()
    # the running mean is a constant for the gradient
    (expected,) = torch.autograd.grad((lengths - mean.detach()).square().mean(), matrix)
    torch.testing.assert_close(matrix.grad, expected)


def test_the_running_mean_comes_back_from_a_checkpoint():
    first = smooth.VariationPenalty(0.1)
    first(torch.ones(2, 4))
    second = smooth.VariationPenalty(0.1)
    second.load_state_dict(first.state_dict())
    assert float(second.state_dict()["mean"]) == pytest.approx(0.2)
    assert torch.equal(first(torch.ones(2, 9)), second(torch.ones(2, 9)))


def test_a_direction_has_about_the_length_of_the_noise():
    direction = smooth.output_direction(torch.zeros(2, 4, 50, 50), torch.tensor([0.3, 1.0]), generator())
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.tensor([0.3, 1.0]), rtol=0.03, atol=0)


# Guidance distillation


def test_guidance_is_that_of_the_pipelines():
    conditional, unconditional = torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    assert guidance.guided(conditional, unconditional, torch.tensor([1.0, 7.5])).tolist() == [[2.0], [8.5]]


def test_a_trajectory_holds_what_the_network_meets_and_ends_where_the_sampler_does():
    scheduler = DDIMScheduler(clip_sample=False)
    noise, scale = torch.randn(2, 3, generator=generator()), torch.tensor([1.0, 4.0])

    def denoise(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.9 * x, 0.8 * x

    points = list(guidance.guided_trajectory(scheduler, denoise, noise, scale, 5))
    assert [int(point.timestep) for point in points] == scheduler.timesteps.tolist()
    assert torch.equal(points[0].sample, noise)
    sample = noise
    for point in points:
        torch.testing.assert_close(point.sample, sample)
        torch.testing.assert_close(point.guided, (0.8 + 0.1 * scale[:, None]) * sample)
        sample = scheduler.step(point.guided, point.timestep, sample).prev_sample


def test_an_adapter_changes_nothing_before_training_and_tells_scales_apart_afterwards():
    adapter = guidance.GuidanceAdapter(6, width=16)
    features, scale = torch.randn(4, 5, 6, generator=generator()), torch.tensor([1.0, 4.0, 7.5, 12.0])
    assert not adapter(features, scale).any()
    shared, shift = features[:1].expand(4, 5, 6), torch.linspace(-1, 1, 6)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(300):
        error = guidance.relative_error(adapter(shared, scale), (scale[:, None, None] * shift).expand(4, 5, 6))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert float(error.detach()) < 0.01


def test_an_adapter_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first, second = guidance.GuidanceAdapter(6), guidance.GuidanceAdapter(6)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.query.weight, second.query.weight)


# P-GRAFT


def test_the_best_of_each_prompt_are_kept_and_numbers_that_are_none_never():
    rewards = torch.tensor([[0.1, math.nan, 0.9, 0.9], [math.nan, math.nan, math.nan, -1.0]])
    assert pgraft.best_of(rewards, 2).tolist() == [[False, False, True, True], [False, False, False, True]]


def test_accepted_samples_follow_the_tilted_distribution():
    # base N(0, 1), reward x, temperature 1 / 2: p(x) exp(2 x) is N(2, 1); rewards are capped so that a maximum exists
    x = torch.randn(400_000, generator=generator(), dtype=torch.float64).clamp(max=3.5)
    kept = x[pgraft.accepted(x, torch.rand(len(x), generator=generator(1), dtype=torch.float64), 0.5)]
    assert float(kept.mean()) == pytest.approx(1.93, abs=0.05) and len(kept) > 100
    assert float(kept.max()) == float(x.max())


def test_the_tuned_network_rules_above_the_switch_only():
    switch = pgraft.switch_timestep(0.25)
    timesteps = pgraft.tuned_timesteps(torch.rand(5000, generator=generator()), switch)
    assert int(timesteps.min()) == 750 and int(timesteps.max()) == 999
    denoise = pgraft.switched(lambda x, t: x + 1, lambda x, t: x - 1, switch)
    assert [float(denoise(torch.zeros(()), torch.tensor(t))) for t in (999, 750, 749, 0)] == [1.0, 1.0, -1.0, -1.0]
    assert pgraft.switch_timestep(1.0) == 0


# PFGM++


@pytest.mark.parametrize(("size", "extra"), [(3072, 2048.0), (16, 8.0), (64, 1e6)])
def test_the_radius_has_the_quantiles_of_its_beta_prime_distribution(size: int, extra: float):
    from scipy.stats import betaprime

    drawn = pfgmpp.perturbation(
        (20_000, size) if size < 100 else (2000, size),
        torch.tensor(2.0).expand(20_000 if size < 100 else 2000),
        extra,
        generator(),
    )
    lengths = drawn.double().norm(dim=1) / 2.0
    share = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = torch.from_numpy((extra * betaprime(size / 2, extra / 2).ppf(share.numpy())) ** 0.5)
    torch.testing.assert_close(lengths.quantile(share), expected, rtol=0.02, atol=0)


def test_with_many_extra_dimensions_the_perturbation_is_gaussian():
    drawn = pfgmpp.perturbation((20_000, 8), torch.full((20_000,), 0.5), 1e7, generator())
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.005)
    torch.testing.assert_close(drawn.T.cov(), 0.25 * torch.eye(8), atol=0.01, rtol=0)
    assert float((drawn / 0.5).pow(4).mean()) == pytest.approx(3.0, abs=0.1)


def test_the_radius_of_a_draw_is_the_formula():
    found = pfgmpp.radius(torch.tensor([0.5, 0.8]), torch.tensor([1.0, 2.0]), 4.0)
    torch.testing.assert_close(found, torch.tensor([2.0, 8.0]))


# Noise coupling


def pairs(n: int, kind: str, dimensions: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    samples = torch.randn(n, dimensions, generator=generator(3))
    return samples, couple(kind, samples, draw_noise(kind, (n, dimensions), generator(4)))


def test_the_nearest_candidate_of_each_sample_is_taken():
    samples = torch.randn(7, 2, 3, generator=generator())
    noise = draw_noise("immiscible_knn", (7, 2, 3), generator(1))
    assert noise.shape == (7, 4, 2, 3)
    found = couple("immiscible_knn", samples, noise)
    for i in range(7):
        distances = [float((noise[i, k] - samples[i]).norm()) for k in range(4)]
        assert torch.equal(found[i], noise[i, distances.index(min(distances))])


def test_in_many_dimensions_the_chosen_noise_stays_close_to_normal():
    samples, noise = pairs(400, "immiscible_knn", 1024)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    # the nearest of four is a little shorter and leans to its sample: by about one standard error of a distance
    assert 0.97 < float(noise.square().mean()) < 1.0
    assert 0.0 < float((samples * noise).mean()) < 0.06


@pytest.mark.parametrize("kind", [kind for kind in COUPLINGS if kind != "none"])
def test_every_coupling_brings_noise_nearer_to_its_sample(kind: str):
    def cost(found: str) -> float:
        samples, noise = pairs(64, found)
        return float((samples - noise).norm(dim=1).mean())

    assert cost(kind) < 0.85 * cost("none")


def test_optimal_transport_on_a_line_keeps_the_order():
    samples = torch.randn(50, 1, generator=generator())
    noise = couple("optimal_transport", samples, torch.randn(50, 1, generator=generator(1)))
    assert torch.equal(samples.flatten().argsort(), noise.flatten().argsort())


def test_wrong_calls_are_answered_in_one_sentence():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="level must be above known_level for each sample"):
        ambient.ambient_loss(x, x, x, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="given does not require gradients"):
        smooth.pulled_back(x, x, x)
    with pytest.raises(ValueError, match="holds no running mean"):
        smooth.VariationPenalty().load_state_dict({})
    with pytest.raises(ValueError, match=r"keep=3 must be a number in \[1, 2\]"):
        pgraft.best_of(torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\); give \(prompts, samples\)"):
        pgraft.best_of(torch.zeros(2), 1)
    with pytest.raises(ValueError, match=r"extra_dimensions=0.0 must be a number in \(0, inf\)"):
        pfgmpp.perturbation((1, 1), torch.ones(1), 0.0, generator())
    with pytest.raises(ValueError, match=r"candidates have shape \(2, 3\); give \(2, k, 3\)"):
        couple("immiscible_knn", x, x)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3\); give that of samples, \(2, 3\)"):
        couple("optimal_transport", x, x[:1])
    with pytest.raises(ValueError, match=r"width=2 must be a number in \[4, inf\)"):
        guidance.GuidanceAdapter(4, width=2)
