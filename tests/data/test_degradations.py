"""Degradations: each does what it says, keeps shape and range, and is repeated by its seed."""

import math
from typing import Any

import pytest
import torch

from diffusers_ext.data import degradations
from diffusers_ext.data.degradations import DEGRADATIONS, degrade, line_kernel


def pictures(n: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degradation_keeps_shape_and_range_and_changes_the_picture(name: str) -> None:
    clean = pictures()
    spoilt, how = degrade(clean, [name], seeded())
    assert spoilt.shape == clean.shape and how == [name] * 2
    assert float(spoilt.min()) >= 0.0 and float(spoilt.max()) <= 1.0 + 1e-6
    assert float((spoilt - clean).abs().mean()) > 0.01


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_equal_seeds_give_equal_degradations(name: str) -> None:
    first, second, other = (degrade(pictures(), [name], seeded(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_every_degradation_is_drawn() -> None:
    _, how = degrade(pictures(64, 16), None, seeded())
    assert set(how) == set(DEGRADATIONS)


def test_gaussian_blur_spreads_a_point_by_its_standard_deviation() -> None:
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1.0
    spread = degradations.gaussian_blur(point, 2.0)[0, 0]
    ramp = torch.arange(33) - 16.0
    assert float(spread.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float((spread.sum(0) * ramp**2).sum()) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(("angle", "along"), [(0.0, 1), (90.0, 0)])
def test_motion_blur_spreads_along_its_angle_only(angle: float, along: int) -> None:
    kernel = line_kernel(9.0, angle)
    ramp = torch.arange(len(kernel)) - len(kernel) // 2
    spread = [float((kernel.sum(1 - axis) * ramp**2).sum()) for axis in (0, 1)]
    assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-6)
    assert spread[along] == pytest.approx(81 / 12, rel=0.15) and spread[1 - along] < 0.05


def test_blur_leaves_a_flat_picture_as_it_is() -> None:
    flat = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(degradations.gaussian_blur(flat, 1.5), flat)
    torch.testing.assert_close(degradations.motion_blur(flat, 7.0, 33.0), flat)


def test_noise_has_its_standard_deviation() -> None:
    noisy = degradations.gaussian_noise(torch.full((1, 3, 64, 64), 0.5), 0.1, seeded())
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.03)


def test_rain_brightens_and_never_darkens() -> None:
    clean = pictures()
    assert bool((degradations.rain(clean, 0.01, 9.0, 80.0, seeded()) >= clean - 1e-6).all())
    assert torch.equal(degradations.rain(clean, 0.0, 9.0, 80.0, seeded()), clean)


def test_scratches_blacken_some_pixels_and_leave_the_others() -> None:
    clean = pictures() * 0.9 + 0.1
    spoilt = degradations.scratches(clean, 5, 2.0, seeded())
    black = (spoilt == 0).all(1, keepdim=True).expand_as(clean)
    assert 0.02 < float(black.float().mean()) < 0.6 and torch.equal(spoilt[~black], clean[~black])


def test_low_light_is_the_curve_it_says() -> None:
    clean = pictures()
    torch.testing.assert_close(degradations.low_light(clean, 0.4, 1.5), 0.4 * clean**1.5)


def test_jpeg_of_high_quality_is_close_and_of_low_quality_is_not() -> None:
    smooth = degradations.gaussian_blur(pictures(), 3.0)
    errors = [float((degradations.jpeg(smooth, quality) - smooth).abs().mean()) for quality in (95, 5)]
    assert errors[0] < 0.01 < errors[1]
    assert degradations.jpeg(smooth[:, :1], 50).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gaussian_blur", {"sigma": 0.0}, "sigma=0.0 is out of range"),
        ("motion_blur", {"length": math.nan, "angle": 0.0}, "length=nan is out of range"),
        ("gaussian_noise", {"std": -0.1}, "std=-0.1 is out of range"),
        ("rain", {"density": 2.0, "length": 5.0, "angle": 0.0}, "density=2.0 is out of range"),
        ("scratches", {"count": -1, "width": 2.0}, "count=-1 is out of range"),
        ("low_light", {"gain": "dark"}, "gain='dark' is out of range"),
        ("jpeg", {"quality": 0}, "quality=0 is out of range; use an int from 1 to 100"),
        ("degrade", {"kinds": ["fog"]}, "kinds=.'fog'. names no known degradation; use some of gaussian_blur"),
    ],
)
def test_a_wrong_strength_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(degradations, name)(pictures(), **arguments)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"shape \(3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), math.nan), ValueError, "values from nan"),
        (torch.full((1, 3, 8, 8), 7.0), ValueError, "values from 7 to 7"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        ("picture", TypeError, "images is str"),
    ],
)
def test_pictures_that_are_none_are_refused(images: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        degrade(images)
