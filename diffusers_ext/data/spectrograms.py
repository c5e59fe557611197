"""Speech as the compressed spectrograms that score-based enhancement works on, and back.

SGMSE+, Richter et al., 2023, arXiv 2208.05830: a short-time Fourier transform c becomes b |c|^a exp(i arg c) with a = 0.5 and b = 0.15,
which evens out the loudness of its coefficients, and its real and imaginary parts are the two channels of a picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class CompressedSTFT:
    """Waveforms to compressed spectrograms and back, exactly but for rounding.

    Args:
        n_fft (`int`, *optional*, defaults to 510): Length of a frame in samples, even; n_fft / 2 + 1 frequencies.
        hop_length (`int`, *optional*, defaults to 128): Samples from frame to frame, at most n_fft / 2.
        exponent (`float`, *optional*, defaults to 0.5): a above, in (0, 1]; 1 does not compress.
        factor (`float`, *optional*, defaults to 0.15): b above, more than 0.
        frames_multiple (`int`, *optional*, defaults to 64): Spectrograms are padded with silence to a multiple of this, as
            networks need that halve them.

    Raises:
        ValueError: If a number is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.data.spectrograms import CompressedSTFT

        transform, wave = CompressedSTFT(), torch.randn(1, 16000)
        spectrogram = transform.encode(wave)  # (1, 2, 256, 128)
        again = transform.decode(spectrogram, length=16000)
        assert torch.allclose(wave, again, atol=1e-4)
        ```
    """

    n_fft: int = 510
    hop_length: int = 128
    exponent: float = 0.5
    factor: float = 0.15
    frames_multiple: int = 64

    def __post_init__(self) -> None:
        _whole("n_fft", self.n_fft, 4, 2**16)
        if self.n_fft % 2:
            raise ValueError(f"n_fft={self.n_fft} is odd; use an even number")
        _whole("hop_length", self.hop_length, 1, self.n_fft // 2)
        _whole("frames_multiple", self.frames_multiple, 1, 2**16)
        for name, top in (("exponent", 1.0), ("factor", 1e6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= top:
                raise ValueError(f"{name}={value!r} is out of range; use a number above 0 and up to {top:g}")

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """The compressed spectrogram of waveforms.

        Args:
            wave (`torch.Tensor` of shape `(n, length)`): Samples, of at least n_fft / 2 + 1 a wave.

        Returns:
            `torch.Tensor` of shape `(n, 2, n_fft / 2 + 1, frames)`: Real and imaginary part, of the dtype of `wave`.

        Raises:
            TypeError: If it is not a tensor of floats.
            ValueError: If it has another shape, is too short, or is not finite.
        """
        _check("wave", wave, 2)
        if wave.shape[1] <= self.n_fft // 2:
            raise ValueError(
                f"wave of shape {tuple(wave.shape)} is shorter than a frame; give at least {self.n_fft // 2 + 1} samples"
            )
        coefficients = torch.stft(
            wave, self.n_fft, self.hop_length, window=self._window(wave), center=True, return_complex=True
        )
        magnitude = coefficients.abs()
        compressed = torch.polar(self.factor * magnitude**self.exponent, coefficients.angle())
        channels = torch.view_as_real(compressed).permute(0, 3, 1, 2)
        return F.pad(channels, (0, -channels.shape[-1] % self.frames_multiple))

    def decode(self, spectrogram: torch.Tensor, length: int) -> torch.Tensor:
        """The waveforms of compressed spectrograms.

        Args:
            spectrogram (`torch.Tensor` of shape `(n, 2, n_fft / 2 + 1, frames)`): What `encode` gave, changed or not.
            length (`int`): Samples of a wave.

        Returns:
            `torch.Tensor` of shape `(n, length)`.

        Raises:
            TypeError: If it is not a tensor of floats.
            ValueError: If it has another shape, is not finite, or has too few frames for `length`.
        """
        _check("spectrogram", spectrogram, 4)
        bins = self.n_fft // 2 + 1
        if spectrogram.shape[1] != 2 or spectrogram.shape[2] != bins:
            raise ValueError(
                f"spectrogram of shape {tuple(spectrogram.shape)} does not fit; give (n, 2, {bins}, frames)"
            )
        frames = spectrogram.shape[3]
        _whole("length", length, 1, frames * self.hop_length - 1)
        compressed = torch.view_as_complex(spectrogram.permute(0, 2, 3, 1).contiguous())
        magnitude = (compressed.abs() / self.factor) ** (1.0 / self.exponent)
        coefficients = torch.polar(magnitude, compressed.angle())
        # a padded spectrogram holds frames beyond the wave, of silence, and they would be averaged into its end
        used = min(frames, length // self.hop_length + 1)
        return torch.istft(
            coefficients[..., :used],
            self.n_fft,
            self.hop_length,
            window=self._window(spectrogram),
            center=True,
            length=length,
        )

    def _window(self, like: torch.Tensor) -> torch.Tensor:
        return torch.hann_window(self.n_fft, periodic=True, dtype=like.dtype, device=like.device)


def _whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is out of range; use an int from {low} to {high}")


def _check(name: str, value: torch.Tensor, ndim: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} is {found}; give a tensor of float32 or float64")
    if value.ndim != ndim or value.numel() == 0:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not fit; it must have {ndim} axes and none may be empty"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} is not finite in {int((~torch.isfinite(value)).sum())} values; give finite ones")
