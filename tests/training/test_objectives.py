import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from diffusers_ext.training.coupling import couple
from diffusers_ext.training.objectives import (
    PREDICTION_TYPES,
    clean_from_prediction,
    logit_normal,
    min_snr_weights,
    noisy,
    stratified_uniform,
    target,
    weighted_mse,
)
from diffusers_ext.training.text_to_image import new_scheduler, noise_levels


def draw(n: int = 6, *shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(n, *(shape or (4, 3, 3)), generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.linspace(0.1, 1.4, n, dtype=torch.float64)
    return clean, noise, angle.cos(), angle.sin()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_clean_sample_is_recovered_from_the_target(prediction_type: str):
    clean, noise, signal, spread = draw()
    if prediction_type == "flow":
        signal = 1.0 - spread
    sample = noisy(clean, noise, signal, spread)
    wanted = target(prediction_type, clean, noise, signal, spread)
    torch.testing.assert_close(clean_from_prediction(prediction_type, wanted, sample, signal, spread), clean)


def test_noise_and_velocity_are_those_of_the_stock_scheduler():
    scheduler = new_scheduler("v_prediction")
    clean, noise = (part.float() for part in draw()[:2])
    timesteps, signal, spread = noise_levels("v_prediction", torch.tensor([0.0, 0.1, 0.35, 0.5, 0.8, 0.9999]))
    assert timesteps.tolist() == [0, 100, 350, 500, 800, 999]
    torch.testing.assert_close(noisy(clean, noise, signal, spread), scheduler.add_noise(clean, noise, timesteps))
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target("v_prediction", clean, noise, signal, spread), velocity)


def test_for_unit_gaussian_data_the_best_velocity_is_zero_and_the_best_noise_is_linear():
    # x_0, eps ~ N(0, 1): E[v | x_t] = a E[eps | x_t] - s E[x_0 | x_t] = a s x_t - s a x_t = 0, E[eps | x_t] = s x_t
    clean, noise, signal, spread = draw(4, 200_000)
    sample = noisy(clean, noise, signal, spread)
    ones = torch.ones_like(signal)
    velocity = target("v_prediction", clean, noise, signal, spread)
    assert (velocity * sample).mean(1).abs().max() < 0.01
    assert float(weighted_mse(torch.zeros_like(sample), velocity, ones)) == pytest.approx(1.0, abs=0.01)
    residual = weighted_mse(spread[:, None] * sample, noise, ones)
    assert float(residual) == pytest.approx(float((signal**2).mean()), abs=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_clean_sample_alike_for_both_predictions(prediction_type: str):
    clean, noise, signal, spread = draw()
    sample = noisy(clean, noise, signal, spread)
    wrong = target(prediction_type, clean, noise, signal, spread) + 0.3 * noise.flip(0)
    weights = min_snr_weights(prediction_type, signal, spread, 5.0)
    error = (wrong - target(prediction_type, clean, noise, signal, spread)).square().flatten(1).mean(1)
    in_clean = clean_from_prediction(prediction_type, wrong, sample, signal, spread) - clean
    capped = ((signal / spread) ** 2).clamp(max=5.0)
    torch.testing.assert_close(weights * error, capped * in_clean.square().flatten(1).mean(1))


def test_signal_to_noise_ratio_is_that_of_diffusers():
    timesteps, signal, spread = noise_levels("epsilon", torch.linspace(0, 0.999, 50))
    snr = compute_snr(new_scheduler("epsilon"), timesteps)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0) / snr
    torch.testing.assert_close(min_snr_weights("epsilon", signal, spread, 5.0), expected, rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_has_weight_zero_in_velocity_and_is_finite():
    weights = min_snr_weights("v_prediction", torch.zeros(1), torch.ones(1), 5.0)
    assert weights.tolist() == [0.0]


def test_without_gamma_all_samples_weigh_alike():
    assert min_snr_weights("flow", torch.rand(3), torch.rand(3), None).tolist() == [1.0, 1.0, 1.0]


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="prediction_type='x0' is unknown; use one of epsilon, v_prediction, flow"):
        target("x0", *draw())
    with pytest.raises(ValueError, match="snr_gamma=5.0 is not defined for prediction_type='flow'"):
        min_snr_weights("flow", torch.ones(1), torch.ones(1), 5.0)
    with pytest.raises(ValueError, match="noise_coupling='best' is unknown"):
        couple("best", torch.zeros(1, 1), torch.zeros(1, 1))


def test_stratified_draws_hit_every_interval_once():
    draws = stratified_uniform(1000, torch.Generator().manual_seed(1))
    assert sorted((draws.double() * 1000).long().tolist()) == list(range(1000))
    assert draws.argsort().tolist() != list(range(1000))


def test_each_stratified_draw_is_uniform_on_its_own():
    first = torch.stack([stratified_uniform(8, torch.Generator().manual_seed(seed))[0] for seed in range(2000)])
    quantiles = first.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.04, rtol=0)


def test_logit_normal_has_the_quantiles_of_a_squashed_normal():
    # Phi(1) = 0.8413447, sigmoid(1) = 0.7310586
    levels = logit_normal(torch.tensor([0.0, 0.1586553, 0.5, 0.8413447, 1.0], dtype=torch.float64))
    torch.testing.assert_close(levels[1:4], torch.tensor([0.2689414, 0.5, 0.7310586]), atol=1e-5, rtol=0)
    assert 0.0 < float(levels[0]) < float(levels[4]) < 1.0


def test_flow_levels_form_a_straight_path():
    timesteps, signal, spread = noise_levels("flow", torch.rand(16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(signal + spread, torch.ones(16))
    torch.testing.assert_close(timesteps, spread * 1000)


def test_flow_scheduler_of_a_published_model_walks_the_straight_path_exactly():
    # all data in one point c: the velocity of the flow is (x - c) / sigma, and Euler steps on it land on c
    scheduler = new_scheduler("flow")
    scheduler.set_timesteps(4)
    centre, sample = torch.full((1, 4, 2, 2), 0.7), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        velocity = (sample - centre) / (float(timestep) / 1000)
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    torch.testing.assert_close(sample, centre, atol=5e-3, rtol=0)


def test_published_schedule_is_that_of_stable_diffusion():
    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(new_scheduler("epsilon").alphas_cumprod, stock.alphas_cumprod)


def test_immiscible_coupling_is_the_cheapest_of_all_pairings():
    samples, noise = (part.float() for part in draw(5)[:2])
    coupled = couple("immiscible", samples, noise)

    def cost(order: torch.Tensor) -> float:
        return float((samples - order).flatten(1).norm(dim=1).sum())

    cheapest = min(cost(noise[list(order)]) for order in itertools.permutations(range(5)))
    assert cost(coupled) == pytest.approx(cheapest)
    assert sorted(coupled.flatten(1).sum(1).tolist()) == sorted(noise.flatten(1).sum(1).tolist())


def test_coupling_none_gives_the_very_same_noise():
    noise = torch.randn(3, 2)
    assert couple("none", torch.zeros(3, 2), noise) is noise
