"""Fixed-point inversion against the closed form of a linear network, and on a trained one."""

import pytest
import torch

from diffusers_ext.inversion import (
    Denoiser,
    InversionStoppedError,
    anderson_mix,
    ddim_inversion,
    fixed_point_inversion,
    regenerate,
    sampling_factors,
)
from tests.inversion.subjects import counted, gaussian, ladder, linear, pictures
from tests.inversion.trained import picture, rmse, tiny_denoiser, tiny_ladder


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_each_round_shrinks_the_error_of_a_linear_network_by_the_known_factor(iterations, kind):
    denoiser, start, steps = linear(slope=0.7, shift=0.0), pictures(), ladder(1, kind)
    level, noisier = steps.inversion_levels(0)
    kept, predicted = sampling_factors(noisier, level, kind)
    fixed = start / (kept + 0.7 * predicted)
    factor = -0.7 * predicted / kept
    found = fixed_point_inversion(denoiser, start, steps, iterations).latents[1]
    torch.testing.assert_close(found - fixed, factor ** (iterations + 1) * (start - fixed), atol=1e-12, rtol=1e-9)


def test_no_rounds_are_ddim_inversion():
    plain = ddim_inversion(gaussian(), pictures(), ladder(6))
    found = fixed_point_inversion(gaussian(), pictures(), ladder(6), iterations=0)
    torch.testing.assert_close(found.latents, plain.latents, atol=1e-12, rtol=0)
    assert found.forward_passes == plain.forward_passes


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_more_rounds_lead_back_better(kind):
    errors = []
    for iterations in (0, 1, 3, 10, 60):
        inverted = fixed_point_inversion(gaussian(kind=kind), pictures(), ladder(10, kind), iterations)
        errors.append(float((regenerate(gaussian(kind=kind), inverted, ladder(10, kind)) - pictures()).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0]


def test_pure_noise_can_be_reached_by_a_network_that_predicts_v():
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    steps = ladder(10, "v_prediction", **changes)
    assert steps.alpha_bars[-1] == 0
    denoiser = linear(slope=0.1, shift=0.1)
    inverted = fixed_point_inversion(denoiser, pictures(), steps)
    torch.testing.assert_close(regenerate(denoiser, inverted, steps), pictures(), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="timestep 999 is pure noise"):
        ladder(10, "epsilon", **changes)


def test_anderson_solves_in_as_many_rounds_as_there_are_slopes():
    slopes = torch.tensor([0.9, -0.5, 0.3], dtype=torch.float64)
    words = torch.zeros(1, 1, 3, dtype=torch.float64)
    denoiser = Denoiser(lambda latents, timestep, embeddings: slopes * latents + 0.2, words, words)
    start, steps = pictures(1), ladder(2)
    found, plain = (
        fixed_point_inversion(denoiser, start, steps, iterations=5, solver=solver)
        for solver in ("anderson", "iterate")
    )
    torch.testing.assert_close(regenerate(denoiser, found, steps), start, atol=1e-8, rtol=0)
    assert float((regenerate(denoiser, plain, steps) - start).abs().max()) > 1e-3


def test_anderson_of_equal_pairs_is_the_answer():
    z, answer = torch.zeros(1, 3), torch.ones(1, 3)
    assert torch.equal(anderson_mix([z], [answer]), answer)
    assert torch.equal(anderson_mix([z, z], [answer, answer]), answer)


def test_the_gradient_form_lowers_the_residual():
    losses: dict[int, list[float]] = {}

    def note(progress):
        losses.setdefault(progress.step, []).append(progress.loss)

    inverted = fixed_point_inversion(
        gaussian(1), pictures(1), ladder(3), iterations=40, solver="gradient", learning_rate=0.03, callback=note
    )
    # Where the first guess is within a step of the optimiser already, there is nothing to gain.
    worst = max(losses.values(), key=lambda values: values[0])
    assert min(worst) < 0.8 * worst[0]
    plain = fixed_point_inversion(gaussian(1), pictures(1), ladder(3), iterations=0)
    error, before = ((regenerate(gaussian(1), result, ladder(3)) - pictures(1)).norm() for result in (inverted, plain))
    assert error < before


@pytest.mark.parametrize("solver", ["iterate", "anderson", "gradient"])
def test_rounds_end_at_the_tolerance(solver):
    denoiser, counter = counted(gaussian())
    fixed_point_inversion(denoiser, pictures(), ladder(4), solver=solver, tolerance=1e6)
    assert (counter.forward, counter.backward) == (2 * 4 * 2, 0)


def test_divergence_is_named():
    with pytest.raises(
        InversionStoppedError, match=r"stopped in step 1 of 2 \(timestep 1\), round \d+: the residual is"
    ):
        fixed_point_inversion(linear(slope=1e200), pictures(), ladder(2))


def test_a_trained_network_is_inverted_to_the_promised_error():
    denoiser, steps = tiny_denoiser(), tiny_ladder()
    errors = [
        rmse(regenerate(denoiser, fixed_point_inversion(denoiser, picture(), steps, n), steps), picture())
        for n in (1, 25)
    ]
    assert errors[0] == pytest.approx(0.040, abs=2e-3) and errors[1] <= 0.002
