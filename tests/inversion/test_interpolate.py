"""NoiseDiffusion: its weights, its ends, and the noise it makes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.inversion import interpolate, noise_diffusion_weights


def tensors(size: int = 8) -> torch.Tensor:
    return torch.randn(4, 2, 4, size, size, generator=torch.Generator().manual_seed(0))


@given(fraction=st.floats(0, 1), fresh=st.floats(0, 0.99))
def test_weights_of_noise_have_length_one_and_those_of_pictures_a_constant_sum(fraction, fresh):
    a, b, mu, nu = noise_diffusion_weights(fraction, fresh)
    assert a**2 + b**2 + fresh**2 == pytest.approx(1) and mu + nu == pytest.approx(1.2)
    assert mu * b == pytest.approx(nu * a, abs=1e-12)
    assert noise_diffusion_weights(1 - fraction, fresh) == pytest.approx((b, a, nu, mu), abs=1e-9)


@pytest.mark.parametrize("fraction, end", [(0, 0), (1, 1)])
def test_ends_without_clipping_are_the_inverted_latents(fraction, end):
    values = tensors()
    found = interpolate(*values, 0.3, fraction, image_weight=1.0, bound=math.inf)
    torch.testing.assert_close(found, values[end])


def test_the_formula_number_by_number():
    l1, l2, x1, x2, n = (torch.full((1, 1), value) for value in (0.5, -0.25, 1.0, 3.0, 0.7))
    found = interpolate(l1, l2, x1, x2, 0.36, 1 / 3, fresh=0.6, noise=n)
    a, b = 0.8 * math.cos(math.pi / 6), 0.8 * 0.5
    mu, nu = 1.2 * a / (a + b), 1.2 * b / (a + b)
    expected = a * 0.5 - b * 0.25 + 0.6 * ((mu - a) * 1 + (nu - b) * 3) + 0.6 * 0.8 * 0.7
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_outliers_are_cut_before_and_after():
    l1, l2, x1, x2 = tensors()
    l1[0, 0, 0, 0] = 100.0
    found = interpolate(l1, l2, 0 * x1, 0 * x2, 0.1, 0.5)
    assert float(found[0, 0, 0, 0]) == pytest.approx(2 * 0.5**0.5 + 0.5**0.5 * float(l2[0, 0, 0, 0].clamp(-2, 2)))
    assert float(interpolate(l1, l2, 100 * x1, 100 * x2, 0.9).abs().max()) == 2.0


def test_normal_noises_give_nearly_normal_noise_at_every_fraction():
    l1, l2, _, _ = tensors(64)
    nothing = torch.zeros_like(l1)
    for fraction in (0.0, 0.25, 0.5, 0.9):
        assert 0.9 < float(interpolate(l1, l2, nothing, nothing, 0.0, fraction).std()) < 1.0


def test_fresh_noise_repeats_with_a_seed():
    made = [
        interpolate(*tensors(), 0.3, fresh=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    "change, kind, answer",
    [
        ({"fraction": 1.1}, ValueError, "fraction=1.1"),
        ({"fresh": 1}, ValueError, "fresh=1"),
        ({"alpha_bar": -0.1}, ValueError, "alpha_bar=-0.1"),
        ({"bound": 0}, ValueError, "bound=0"),
        ({"image_weight": float("nan")}, ValueError, "image_weight=nan"),
        ({"second": torch.zeros(1, 4, 8, 8)}, ValueError, "second has the shape"),
        ({"second_picture": None}, TypeError, "second_picture is NoneType"),
        ({"first": torch.full((2, 4, 8, 8), float("nan"))}, ValueError, "first holds values that are infinite"),
        ({"fresh": 0.5, "noise": torch.zeros(1)}, ValueError, "noise of shape"),
    ],
)
def test_wrong_arguments_are_named(change, kind, answer):
    names = ("first", "second", "first_picture", "second_picture")
    arguments = {**dict(zip(names, tensors(), strict=True)), "alpha_bar": 0.3, **change}
    with pytest.raises(kind, match=answer):
        interpolate(**arguments)
