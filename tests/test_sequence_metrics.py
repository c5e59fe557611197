import math

import pytest
import torch

from diffusers_ext.sequence_metrics import jitter_ratio, power_spectrum, r_squared, seam_ratio, spectrum_error


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_r_squared_is_one_for_the_recording_and_zero_for_its_mean():
    recording = noise(50, 3)
    assert r_squared(recording, recording) == 1.0
    assert r_squared(recording.mean(0).expand(50, 3).clone(), recording) == pytest.approx(0.0, abs=1e-12)


def test_r_squared_is_the_mean_over_samples_and_channels():
    recording = torch.tensor([[0.0, 0.0], [2.0, 20.0]])
    # errors of 0 in the first channel and of the deviation itself in the second; the second sample has both of the latter
    samples = torch.tensor([[[0.0, 10.0], [2.0, 10.0]], [[1.0, 10.0], [1.0, 10.0]]])
    assert r_squared(samples, recording) == pytest.approx((1.0 + 0.0 + 0.0 + 0.0) / 4)


def test_a_draw_of_the_true_distribution_has_twice_the_r_squared_of_the_mean_less_one():
    mean, count = noise(20_000, 1), 4
    recording = mean + noise(20_000, 1, seed=1)
    samples = mean + noise(count, 20_000, 1, seed=2)
    best = r_squared(mean, recording)
    assert r_squared(samples, recording) == pytest.approx(2.0 * best - 1.0, abs=0.03)


def test_the_jitter_of_a_scaled_recording_is_the_scale_squared():
    recording = noise(100, 2)
    assert jitter_ratio(3.0 * recording, recording) == pytest.approx(9.0)
    assert jitter_ratio(torch.linspace(0, 1, 100).double()[:, None].expand(100, 2).clone(), recording) < 1e-12


def test_the_seam_of_steps_of_two_sizes_is_the_ratio_of_their_squares():
    steps = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    frames = torch.cat([torch.zeros(1), steps.cumsum(0)])[:, None]
    assert seam_ratio(frames, 3) == pytest.approx(9.0)
    assert seam_ratio(frames[2:], 3, first=1) == pytest.approx(9.0)
    assert seam_ratio(noise(4, 20_000, 2), 4) == pytest.approx(1.0, abs=0.03)


def test_the_power_of_white_noise_is_its_variance_at_every_frequency():
    power = power_spectrum(2.0 * noise(8, 8_192, 2), 64)
    assert power.shape == (33, 2)
    # the ends and what the mean takes away aside
    assert power[2:-1].mean().item() == pytest.approx(4.0, rel=0.03)


def test_a_tone_has_its_power_at_its_frequency():
    tone = torch.sin(2 * math.pi * 8 / 64 * torch.arange(4_096).double())[:, None]
    assert int(power_spectrum(tone, 64)[:, 0].argmax()) == 8


def test_spectra_are_compared_and_not_the_samples():
    recording, other = noise(8_192, 1), noise(8_192, 1, seed=5)
    assert spectrum_error(recording, recording) == 0.0
    assert spectrum_error(0.0 * recording, recording) == pytest.approx(1.0)
    assert spectrum_error(other, recording, 32) < 0.15 < r_squared(recording, recording) - r_squared(other, recording)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: r_squared(x, x[:-1]), ValueError, "do not fit a recording of shape"),
        (lambda x: r_squared(x, None), TypeError, "recording is NoneType"),
        (lambda x: r_squared(x, x[None]), ValueError, r"do not fit a recording of shape \(1, 40, 2\)"),
        (lambda x: spectrum_error(x, x, "8"), ValueError, "window='8' is not usable"),
        (lambda x: r_squared(x.numpy(), x), TypeError, "samples is float64; give a tensor"),
        (lambda x: r_squared(x * math.nan, x), ValueError, "samples holds values that are infinite"),
        (
            lambda x: r_squared(x, torch.ones_like(x)),
            ValueError,
            "recording of shape .* has the channel 0, which never changes",
        ),
        (lambda x: jitter_ratio(x[:2], x[:2]), ValueError, "give at least 3 frames"),
        (
            lambda x: jitter_ratio(x, torch.ones_like(x)),
            ValueError,
            "recording of shape .* has the channel 0, which never changes",
        ),
        (lambda x: seam_ratio(x, 1), ValueError, "chunk=1 is not usable; use an int from 2 to 39"),
        (lambda x: seam_ratio(x, 40), ValueError, "chunk=40 is not usable"),
        (lambda x: seam_ratio(x, 4, first=0.5), ValueError, "first=0.5 is not usable"),
        (lambda x: power_spectrum(x, 7), ValueError, "window=7 is not usable; use an even int"),
        (lambda x: power_spectrum(x, 64), ValueError, "give at least 64 frames"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(noise(40, 2))
