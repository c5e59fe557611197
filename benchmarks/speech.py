"""Mean-reverting diffusion on speech: recordings noised by us, restored as spectrograms by the solvers of MR Sampler.

    apt install pocketsphinx-testdata          # sentences of "Sense and Sensibility", LibriVox, public domain
    python benchmarks/speech.py                # 20 minutes on one core: trains a small network, then measures

The process is that of SGMSE+ (arXiv 2208.05830, theta_schedule="ouve") on compressed spectrograms. A network of 0.4 million weights is
trained on all recordings of a folder but one, which it is then measured on; this shows that the parts fit together, and is no
model to use. Noise is half white and half pink. SI-SDR is the scale-invariant signal-to-distortion ratio in dB.
"""

import argparse
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, summary, write_result
from PIL import Image

from diffusers_ext.data.spectrograms import CompressedSTFT
from diffusers_ext.models import RestorationUNet2DModel
from diffusers_ext.schedulers import MRScheduler
from diffusers_ext.sheets import Tile, contact_sheet
from diffusers_ext.training.restoration import new_restoration_unet


FOLDER = Path("/usr/share/pocketsphinx/test/data/librivox")
RATE = 16_000
FRAMES = 64  # of a training crop, half a second
RATIOS = (0.0, 5.0, 10.0)  # dB of the noisy recordings
DRAWS = 4  # of noise for each ratio
EVALUATIONS = (3, 5, 10, 30)
SAMPLERS: dict[str, dict[str, Any]] = {
    "sde-d-2": {"algorithm_type": "sde-d", "solver_order": 2},
    "sde-d-1": {"algorithm_type": "sde-d", "solver_order": 1},
    "ode-d-2": {"algorithm_type": "ode-d", "solver_order": 2},
    "Euler-Maruyama": {"algorithm_type": "euler-maruyama"},
}


def recording(path: Path) -> torch.Tensor:
    """Samples (1, length), scaled to a peak of 1."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise ValueError(f"{path} is not 16-bit mono at {RATE} Hz; convert it first")
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32)
    return torch.from_numpy(samples / np.abs(samples).max())[None]


def noised(clean: torch.Tensor, decibel: float, generator: torch.Generator) -> torch.Tensor:
    """The recording with white and pink noise of equal power, at this signal-to-noise ratio."""
    white, other = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    frequencies = torch.arange(clean.shape[-1] // 2 + 1).clamp(min=1.0)
    pink = torch.fft.irfft(torch.fft.rfft(other) / frequencies.sqrt(), n=clean.shape[-1])
    noise = white / white.std() + pink / pink.std()
    return clean + noise * (clean.square().mean() / noise.square().mean()).sqrt() * 10 ** (-decibel / 20)


def si_sdr(restored: torch.Tensor, clean: torch.Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB."""
    restored, clean = restored - restored.mean(), clean - clean.mean()
    part = (restored * clean).sum() / clean.square().sum() * clean
    return float(10 * torch.log10(part.square().sum() / (restored - part).square().sum()))


def trained(waves: list[torch.Tensor], transform: CompressedSTFT, steps: int, batch: int) -> RestorationUNet2DModel:
    """A network that tells the noise in x_t from x_t - mu and mu, trained on crops of the recordings."""
    scheduler = MRScheduler(theta_schedule="ouve")
    torch.manual_seed(0)
    unet = new_restoration_unet((16, 32, 64), (1, 1, 2), picture_channels=2)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    generator, began, losses = torch.Generator().manual_seed(0), time.perf_counter(), []
    length = FRAMES * transform.hop_length
    for step in range(steps):
        rows = []
        for _ in range(batch):
            which, place, ratio = torch.rand(3, generator=generator).tolist()
            whole = waves[int(which * len(waves))]
            start = int(place * (whole.shape[-1] - length))
            piece = whole[:, start : start + length]
            if float(piece.square().mean()) < 1e-4:  # a pause
                continue
            rows.append((piece, noised(piece, -5.0 + 20.0 * ratio, generator)))
        if not rows:
            continue
        clean, mean = (transform.encode(torch.cat(part))[..., :FRAMES] for part in zip(*rows, strict=True))
        low = scheduler.config.ouve_t_eps
        timesteps = low + (1.0 - low) * torch.rand(len(clean), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        sample = scheduler.add_noise(clean, noise, timesteps, mean)
        answer = unet(scheduler.model_input(sample, mean), 1000.0 * timesteps, return_dict=False)[0]
        loss = (answer - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True)
    return unet.eval()


@torch.no_grad()
def restored(
    unet: RestorationUNet2DModel, transform: CompressedSTFT, noisy: torch.Tensor, settings: dict[str, Any], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms and spectrograms after `count` evaluations."""
    scheduler = MRScheduler(theta_schedule="ouve", **settings)
    scheduler.set_timesteps(count)
    generator, mean = torch.Generator().manual_seed(0), transform.encode(noisy)
    sample = scheduler.prepare_initial(mean, generator=generator)
    for t in scheduler.timesteps:
        answer = unet(scheduler.model_input(sample, mean), (1000.0 * t).expand(len(mean)), return_dict=False)[0]
        sample = scheduler.step(answer, t, sample, mean=mean, generator=generator).prev_sample
    return transform.decode(sample, noisy.shape[-1]), sample


def drawn(spectrogram: torch.Tensor) -> Image.Image:
    """The size of a compressed spectrogram (2, bins, frames) as a picture, low frequencies at the bottom."""
    size = (spectrogram.square().sum(0).sqrt() / 0.6).clamp(0.0, 1.0).flip(0)
    return Image.fromarray((255 * size).byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, default=FOLDER, help="folder of 16-bit mono WAV files at 16 kHz")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "speech.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = sorted(options.recordings.glob("*.wav"))
    if len(files) < 2:
        parser.error(f"--recordings {options.recordings} holds {len(files)} WAV files; two are the least")
    *training, held_out = files
    transform = CompressedSTFT(n_fft=510, frames_multiple=8)
    unet = trained([recording(path) for path in training], transform, options.steps, options.batch)

    clean = recording(held_out)
    generator = torch.Generator().manual_seed(1)
    table: dict[str, Any] = {}
    for ratio in RATIOS:
        noisy = torch.cat([noised(clean, ratio, generator) for _ in range(DRAWS)])
        rows: dict[str, Any] = {"noisy": summary([si_sdr(one, clean[0]) for one in noisy])}
        for name, settings in SAMPLERS.items():
            for count in EVALUATIONS:
                waves, _ = restored(unet, transform, noisy, settings, count)
                rows[f"{name}, {count}"] = summary([si_sdr(one, clean[0]) for one in waves])
                print(f"{ratio:4.0f} dB {name:16s} {count:3d}: {rows[f'{name}, {count}']['mean']:.2f} dB", flush=True)
        table[f"{ratio:g} dB"] = rows

    noisy = noised(clean, 5.0, torch.Generator().manual_seed(2))
    tiles = [Tile(drawn(transform.encode(noisy)[0]), f"noisy: {si_sdr(noisy[0], clean[0]):.1f} dB")]
    for count in (5, 30):
        wave_form, spectrogram = restored(unet, transform, noisy, SAMPLERS["sde-d-2"], count)
        tiles.append(Tile(drawn(spectrogram[0]), f"{count} evaluations: {si_sdr(wave_form[0], clean[0]):.1f} dB"))
    tiles.append(Tile(drawn(transform.encode(clean)[0]), "clean"))
    contact_sheet([tiles], tile=256).save(options.picture, optimize=True)
    write_result(
        "speech",
        {
            "training": [path.name for path in training],
            "held_out": held_out.name,
            "seconds_of_training_speech": round(sum(recording(path).shape[-1] for path in training) / RATE, 1),
            "steps": options.steps,
            "si_sdr": table,
        },
    )


if __name__ == "__main__":
    main()
