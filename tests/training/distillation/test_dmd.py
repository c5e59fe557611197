import pytest
import torch

from diffusers_ext.training.distillation.consistency import karras_levels
from diffusers_ext.training.distillation.dmd import (
    dmd_gradient,
    few_step_timesteps,
    gaussian_translator,
    kl_gradient,
    normalizer_of,
    surrogate_loss,
    transport_cost,
)
from diffusers_ext.training.distillation.gan import (
    DiscriminatorHead,
    approximate_r1,
    captured,
    discriminator_loss,
    generator_loss,
)

from .golden import gauss_hermite, golden


DMD = golden("dmd_gradient")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 2e-6, "atol": 1e-7}


def gaussian_denoiser(x: torch.Tensor, spread: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor):
    """E[x_0 | x_0 + spread eps = x] for x_0 ~ N(mean, deviation^2)."""
    return (deviation**2 * x + spread**2 * mean) / (deviation**2 + spread**2)


def loss_and_gradient(normalizer: str, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x = DMD["x"].clone().requires_grad_()
    loss = surrogate_loss(x, dmd_gradient(x, DMD["pred_real"], DMD["pred_fake"], normalizer, weight))
    loss.backward()
    return loss.detach(), x.grad


def test_gradient_and_loss_are_those_of_the_authors():
    gradient = dmd_gradient(DMD["x"], DMD["pred_real"], DMD["pred_fake"])
    torch.testing.assert_close(gradient, DMD["grad_dmd2"], **EXACT)
    loss, slope = loss_and_gradient("dmd2")
    torch.testing.assert_close(loss, DMD["loss_dmd2"], **EXACT)
    torch.testing.assert_close(slope, DMD["dloss_dx"], **EXACT)


@pytest.mark.parametrize("suffix", ["", "_h"])
def test_gradient_with_the_epsilon_and_with_weights_is_that_of_fastgen(suffix: str):
    loss, slope = loss_and_gradient("epsilon", DMD["h"] if suffix else None)
    torch.testing.assert_close(loss.float(), DMD["loss_fastgen" + suffix], **SINGLE)
    torch.testing.assert_close(slope.float(), DMD["dloss_dx_fastgen" + suffix], **SINGLE)


def test_the_recorded_denoisers_are_the_closed_forms():
    spread = DMD["sigma"][:, None, None, None]
    torch.testing.assert_close(
        gaussian_denoiser(DMD["noisy"], spread, DMD["mu"], DMD["tau"]), DMD["pred_real"], **EXACT
    )
    torch.testing.assert_close(gaussian_denoiser(DMD["noisy"], spread, DMD["m"], DMD["s"]), DMD["pred_fake"], **EXACT)
    torch.testing.assert_close(karras_levels(1000), DMD["karras_sigmas"], **SINGLE)  # computed in float32


@pytest.mark.parametrize("alpha", [1.0, 0.8])
@pytest.mark.parametrize("sigma", [0.05, 0.6, 3.0])
def test_averaged_over_the_noise_the_gradient_is_that_of_the_divergence(alpha: float, sigma: float):
    # x = m + s z against N(mu, tau^2), both noised: variances S = alpha^2 s^2 + sigma^2 and T = alpha^2 tau^2 + sigma^2, so
    # dKL/dm = alpha^2 (m - mu) / T and dKL/ds = alpha^2 s (1 / T - 1 / S)
    mean, deviation, mu, tau = (torch.tensor(v, dtype=torch.float64) for v in (-0.3, 1.2, 0.7, 0.5))
    nodes, weights = gauss_hermite(20)
    z, noise = (part.flatten()[:, None] for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).flatten()[:, None]
    x = mean + deviation * z
    # the noisy sample divided by alpha is the one of noise sigma / alpha
    spread = torch.tensor(sigma / alpha, dtype=torch.float64)
    sample = x + spread * noise
    real, fake = (gaussian_denoiser(sample, spread, *law) for law in ((mu, tau), (mean, deviation)))
    one = torch.ones(len(x), dtype=torch.float64)
    gradient = kl_gradient(real, fake, alpha * one, sigma * one)
    big, small = alpha**2 * deviation**2 + sigma**2, alpha**2 * tau**2 + sigma**2
    torch.testing.assert_close((weight * gradient).sum(), alpha**2 * (mean - mu) / small, **EXACT)
    torch.testing.assert_close((weight * gradient * z).sum(), alpha**2 * deviation * (1 / small - 1 / big), **EXACT)


def test_a_generator_that_follows_the_gradient_becomes_the_data():
    mu, tau, spread = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.5, 0.8))
    law = torch.tensor([-1.0, 1.5], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([law], lr=0.03)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        z, noise = torch.randn(2, 1024, 1, generator=generator, dtype=torch.float64)
        x = law[0] + law[1] * z
        sample = (x + spread * noise).detach()
        real, fake = (gaussian_denoiser(sample, spread, *p) for p in ((mu, tau), law.detach()))
        optimizer.zero_grad()
        surrogate_loss(x, dmd_gradient(x, real, fake)).backward()
        optimizer.step()
    torch.testing.assert_close(law.detach(), torch.stack([mu, tau]), atol=0.02, rtol=0)


def test_the_gradient_points_away_from_the_teacher_and_stops_there():
    x, real, fake = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    assert (dmd_gradient(x, real, fake) < 0).all()
    assert not dmd_gradient(x, real, real).any()
    assert not dmd_gradient(x, x, x).any(), "0 / 0 where the teacher agrees to the bit"


def test_nothing_but_the_output_of_the_generator_gets_a_gradient():
    x, real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    surrogate_loss(x, dmd_gradient(x, real, fake)).backward()
    assert x.grad is not None and real.grad is None and fake.grad is None


def test_half_precision_is_normalised_in_single_precision():
    x, real, fake = (part.to(torch.bfloat16) for part in (DMD["x"], DMD["pred_real"], DMD["pred_fake"]))
    gradient = dmd_gradient(x, real, fake)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, dmd_gradient(x.float(), real.float(), fake.float()))


def test_the_clamped_normaliser_has_a_floor():
    x = torch.zeros(2, 4)
    real = torch.tensor([[0.01] * 4, [0.4] * 4])
    assert normalizer_of(x, real, "clamp").tolist() == pytest.approx([0.1, 0.4])


def test_timesteps_of_few_steps_are_those_of_the_authors():
    assert few_step_timesteps(4) == [999, 749, 499, 249] and few_step_timesteps(1) == [999]


@pytest.mark.parametrize("i", range(9))
def test_the_translator_of_gaussians_is_the_recorded_optimum(i: int):
    table = golden("rdmd")
    found = gaussian_translator(*(float(table[name]) for name in ("a", "s0", "mu", "tau")), float(table["lam"][i]))
    assert found == pytest.approx((float(table["mu_prime"][i]), float(table["b"][i])), rel=1e-10)


@pytest.mark.parametrize("transport_lambda", [0.0, 0.3, 3.0])
def test_training_with_the_transport_term_finds_the_optimum(transport_lambda: float):
    a, s0, mu, tau = (torch.tensor(v, dtype=torch.float64) for v in (-1.0, 0.8, 1.5, 0.5))
    nodes, weights = gauss_hermite(20)
    z, noise = (part.flatten()[:, None] for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).flatten()[:, None]
    spread, one = torch.tensor(1e-3, dtype=torch.float64), torch.ones(len(z), dtype=torch.float64)
    law = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([law], lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        source, output = a + s0 * z, law[0] + law[1] * s0 * z
        sample = (output + spread * noise).detach()
        fake_law = law.detach() * torch.stack([torch.ones_like(s0), s0])
        real, fake = (gaussian_denoiser(sample, spread, *p) for p in ((mu, tau), fake_law))
        gradient = kl_gradient(real, fake, one, spread * one)
        cost = transport_cost(source, output)
        optimizer.zero_grad()
        ((output * gradient * weight).sum() + transport_lambda * (cost[:, None] * weight).sum()).backward()
        optimizer.step()
    wanted = gaussian_translator(-1.0, 0.8, 1.5, 0.5, transport_lambda)
    torch.testing.assert_close(law.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=0.01, atol=0.01)


def test_adversarial_losses_are_those_of_fastgen():
    torch.testing.assert_close(generator_loss(DMD["logits_fake"]), DMD["gan_gen"], **SINGLE)
    torch.testing.assert_close(discriminator_loss(DMD["logits_real"], DMD["logits_fake"]), DMD["gan_disc"], **SINGLE)


def test_approximate_r1_of_a_linear_discriminator_is_its_squared_slope():
    slope, n = torch.tensor([0.3, -0.4]), 0.1 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    penalty = approximate_r1(torch.zeros(20_000), n @ slope)
    assert float(penalty) == pytest.approx(0.1**2 * 0.25, rel=0.03)


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_the_head_gives_one_logit_for_features_of_any_size(side: int):
    logits = DiscriminatorHead(24)(torch.randn(3, 24, side, side + 3))
    assert logits.shape == (3, 1) and bool(torch.isfinite(logits).all())


def test_captured_features_belong_to_the_graph_and_the_hook_is_gone_afterwards():
    layer = torch.nn.Linear(2, 2)
    with captured(layer) as features:
        layer(torch.ones(1, 2))
    features[0].sum().backward()
    assert layer.weight.grad is not None and not layer._forward_hooks


def test_wrong_calls_are_answered_in_one_sentence():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="normalizer='none' is unknown; use one of dmd2, epsilon, clamp"):
        dmd_gradient(x, x, x, "none")
    with pytest.raises(ValueError, match=r"fake has shape \(1, 3\); give that of clean, \(2, 3\)"):
        dmd_gradient(x, x, x[:1])
    with pytest.raises(ValueError, match=r"num_denoising_steps=0 must be a number in \[1, 1000\]"):
        few_step_timesteps(0)
