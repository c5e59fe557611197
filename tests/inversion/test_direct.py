"""Direct and negative-prompt inversion: the authors' numbers, and what both promise."""

import math

import pytest
import torch

from diffusers_ext.inversion import (
    bdia_inversion,
    ddim_inversion,
    direct_inversion,
    negative_prompt_inversion,
    regenerate,
    regenerate_states,
    sampling_factors,
    slerp,
)
from tests.inversion.subjects import gaussian, ladder, linear, pictures
from tests.inversion.trained import FILE, picture, rmse, tiny_denoiser, tiny_ladder


def test_offsets_are_those_of_the_authors(golden):
    inverted = direct_inversion(tiny_denoiser(), picture(), tiny_ladder(), guidance_scale=7.5)
    expected = golden(FILE).tensor("direct_offsets_of_the_source")
    torch.testing.assert_close(inverted.offsets.flip(0), expected, atol=2e-4, rtol=0)


def test_a_trained_network_comes_back_exactly_in_float64():
    denoiser, pixels = tiny_denoiser(torch.float64), picture().double()
    inverted = direct_inversion(denoiser, pixels, tiny_ladder(), guidance_scale=7.5)
    torch.testing.assert_close(regenerate(denoiser, inverted, tiny_ladder()), pixels, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_source_branch_is_exact_in_float64(kind):
    inverted = direct_inversion(gaussian(kind=kind), pictures(), ladder(50, kind), guidance_scale=7.5)
    states = torch.stack(list(regenerate_states(gaussian(kind=kind), inverted, ladder(50, kind)))).flip(0)
    assert float((states - inverted.latents).abs().max()) <= 1e-9


def test_the_offset_of_a_linear_network_is_known():
    denoiser, steps, w = linear(slope=0.4, shift=1.0, batch=1), ladder(1), 3.0
    inverted = direct_inversion(denoiser, pictures(1), steps, guidance_scale=w)
    start, noisy = inverted.latents
    kept, predicted = sampling_factors(*steps.sampling_levels(0))
    # The guided output is 0.4 z + w, that of the source prompt alone, which inverted the picture, 0.4 z0 + 1.
    torch.testing.assert_close(noisy, (start - predicted * (0.4 * start + 1)) / kept)
    torch.testing.assert_close(inverted.offsets[0], predicted * (0.4 * (start - noisy) + 1 - w))


def test_without_offsets_the_source_is_put_on_its_trajectory_at_any_scale():
    inverted = direct_inversion(gaussian(), pictures(), ladder(5), guidance_scale=None)
    assert inverted.offsets is None
    for scale in (1.0, 7.5):
        assert torch.equal(regenerate(gaussian(), inverted, ladder(5), scale), pictures())


def test_ways_back_without_help_are_as_far_off_as_those_of_the_authors(golden):
    file, denoiser, steps = golden(FILE), tiny_denoiser(), tiny_ladder()
    inverted = ddim_inversion(denoiser, picture(), steps)
    for name, scale in (("rec_ddim_cfg1", 1.0), ("rec_ddim_cfg75", 7.5)):
        torch.testing.assert_close(regenerate(denoiser, inverted, steps, scale), file.tensor(name), atol=2e-3, rtol=0)


def test_negative_prompt_inversion_at_any_guidance_is_ddim_at_one(golden):
    file, denoiser, steps = golden(FILE), tiny_denoiser(), tiny_ladder()
    inverted = negative_prompt_inversion(denoiser, picture(), steps)
    without = regenerate(denoiser, inverted, steps, guidance_scale=1.0)
    guided = regenerate(denoiser, inverted, steps, guidance_scale=7.5)
    torch.testing.assert_close(guided, without, atol=1e-4, rtol=0)
    torch.testing.assert_close(guided, file.tensor("rec_npi"), atol=2e-3, rtol=0)
    assert rmse(guided, picture()) == pytest.approx(0.148, abs=1e-3)


def test_interpolated_embeddings_are_those_of_the_authors(golden):
    inverted = negative_prompt_inversion(tiny_denoiser(), picture(), tiny_ladder(1), interpolation=0.3)
    expected = golden(FILE).tensor("npi_uncond_interp03")
    torch.testing.assert_close(inverted.null_embeddings[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_slerp_of_unit_vectors_is_the_angle(fraction):
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(2.0), math.sin(2.0)]])
    expected = torch.tensor([[math.cos(2.0 * fraction), math.sin(2.0 * fraction)]])
    torch.testing.assert_close(slerp(fraction, a, b), expected)
    torch.testing.assert_close(slerp(fraction, a, 3 * a), (1 + 2 * fraction) * a)
    assert torch.equal(slerp(0.5, torch.zeros(1, 2), torch.zeros(1, 2)), torch.zeros(1, 2))


def test_bdia_leads_back_on_a_trained_network():
    inverted = bdia_inversion(tiny_denoiser(), picture(), tiny_ladder())
    back = regenerate(tiny_denoiser(), inverted, tiny_ladder())
    assert rmse(back, picture()) <= 1e-5
