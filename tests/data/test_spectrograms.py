"""The compressed spectrogram: a round trip, its definition, and speech-like denoising with an OUVE process."""

import math
from typing import Any

import pytest
import torch

from diffusers_ext.data.spectrograms import CompressedSTFT
from diffusers_ext.schedulers import MRScheduler


def voice(length: int = 8000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Something like a voice: harmonics of a gliding pitch, in syllables."""
    time = torch.arange(length, dtype=torch.float64) / 16000
    phase = 2 * math.pi * (140 * time + 30 * time**2)
    wave = sum(torch.sin(k * phase) / k for k in range(1, 12)) * torch.sin(2 * math.pi * 3 * time).clamp(min=0)
    return (0.3 * wave / wave.abs().max()).to(dtype)[None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("length", [300, 8000, 8191, 16384])
def test_a_wave_comes_back(dtype: torch.dtype, tolerance: float, length: int) -> None:
    transform, wave = CompressedSTFT(), voice(length, dtype)
    spectrogram = transform.encode(wave)
    assert spectrogram.shape[1:3] == (2, 256) and spectrogram.shape[3] % 64 == 0
    torch.testing.assert_close(transform.decode(spectrogram, length), wave, rtol=0, atol=tolerance)


def test_a_coefficient_is_compressed_in_size_and_kept_in_phase() -> None:
    wave = voice()
    plain = CompressedSTFT(exponent=1.0, factor=1.0, frames_multiple=1).encode(wave)
    compressed = CompressedSTFT(frames_multiple=1).encode(wave)
    a, b = (torch.view_as_complex(s.permute(0, 2, 3, 1).contiguous()) for s in (plain, compressed))
    torch.testing.assert_close(b.abs(), 0.15 * a.abs().sqrt(), rtol=1e-4, atol=1e-6)
    loud = a.abs() > 1e-2
    torch.testing.assert_close((b / b.abs())[loud], (a / a.abs())[loud], rtol=0, atol=1e-4)


def test_an_ouve_run_with_a_perfect_network_enhances_speech() -> None:
    transform, clean = CompressedSTFT(), voice()
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    target, mean = transform.encode(clean), transform.encode(noisy)
    for kind in ("ode-d", "sde-d"):
        scheduler = MRScheduler(theta_schedule="ouve", algorithm_type=kind, prediction_type="sample")
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        sample = scheduler.prepare_initial(mean, generator)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(target, timestep, sample, mean=mean, generator=generator).prev_sample
        restored = transform.decode(sample, clean.shape[1])
        torch.testing.assert_close(restored, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_fft": 511}, "n_fft=511 is odd"),
        ({"n_fft": 2}, "n_fft=2 is out of range"),
        ({"hop_length": 256}, "hop_length=256 is out of range; use an int from 1 to 255"),
        ({"exponent": 0.0}, "exponent=0.0 is out of range"),
        ({"factor": -1}, "factor=-1 is out of range"),
    ],
)
def test_a_wrong_setting_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressedSTFT(**arguments)


def test_a_wrong_call_is_named() -> None:
    transform = CompressedSTFT()
    for call, error, message in (
        (lambda: transform.encode(torch.zeros(100)), ValueError, "wave of shape"),
        (lambda: transform.encode(torch.zeros(1, 100)), ValueError, r"wave of shape \(1, 100\) is shorter"),
        (lambda: transform.encode(torch.zeros(1, 1000) / 0), ValueError, "wave is not finite in 1000"),
        (lambda: transform.encode("wave"), TypeError, "wave is str"),
        (lambda: transform.decode(torch.zeros(1, 2, 100, 64), 100), ValueError, r"give \(n, 2, 256, frames\)"),
        (
            lambda: transform.decode(torch.zeros(1, 2, 256, 64), 10**6),
            ValueError,
            "length=1000000 is out of range; use an int from 1 to 8191",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
