"""What spoils pictures: blur, noise, rain, scratches, darkness and JPEG, for batches and with seeded chance.

Every function takes pictures (n, c, H, W) of floats in [0, 1] and returns spoilt ones of the same shape, in [0, 1]. Strengths
are in pixels and shares, so they suit pictures of about 64 pixels; scale them with the size. Random ones draw from a
`torch.Generator` on the CPU and from nothing else.
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blurs with a Gaussian.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        sigma (`float`): Standard deviation in pixels, above 0 and below 64.
    """
    _check(images)
    sigma = _number("sigma", sigma, 0.0, 64.0)
    reach = max(1, math.ceil(3.0 * sigma))
    ramp = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square())
    ramp = (ramp / ramp.sum()).to(images)
    return _filtered(_filtered(images, ramp[None, :]), ramp[:, None])


def motion_blur(images: torch.Tensor, length: float, angle: float) -> torch.Tensor:
    """Blurs along a straight line.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        length (`float`): Length of the line in pixels, from 1 to 128.
        angle (`float`): Its angle to the horizontal in degrees.
    """
    _check(images)
    return _filtered(images, line_kernel(length, angle).to(images))


def line_kernel(length: float, angle: float) -> torch.Tensor:
    """A filter that spreads a pixel along a line: square of odd side, sum 1. See `motion_blur` for the arguments."""
    length = _number("length", length, 0.999, 128.001)
    angle = math.radians(_number("angle", angle, -1e6, 1e6))
    reach = max(1, math.ceil(length / 2.0))
    ramp = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    along = x * math.cos(angle) - y * math.sin(angle)
    across = x * math.sin(angle) + y * math.cos(angle)
    # a line one pixel wide, with soft ends and sides
    kernel = (1.0 - across.abs()).clamp(0.0, 1.0) * ((length + 1.0) / 2.0 - along.abs()).clamp(0.0, 1.0)
    return kernel / kernel.sum()


def gaussian_noise(images: torch.Tensor, std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Adds white noise.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        std (`float`): Standard deviation, from 0 to 1.
        generator (`torch.Generator`, *optional*): Source of the noise.
    """
    _check(images)
    std = _number("std", std, -1e-12, 1.0 + 1e-12)
    return (images + std * _normal(images.shape, generator).to(images)).clamp(0.0, 1.0)


def rain(
    images: torch.Tensor,
    density: float,
    length: float,
    angle: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Lays bright streaks over pictures.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        density (`float`): Share of the pixels where a streak begins, from 0 to 1; 0.01 is a shower.
        length (`float`): Length of a streak in pixels, from 1 to 128.
        angle (`float`): Angle to the horizontal in degrees; 90 falls straight down.
        generator (`torch.Generator`, *optional*): Source of where they are.
    """
    _check(images)
    density = _number("density", density, -1e-12, 1.0 + 1e-12)
    shape = (images.shape[0], 1, *images.shape[2:])
    drops = (_uniform(shape, generator) < density).float() * (0.5 + 0.5 * _uniform(shape, generator))
    streaks = _filtered(drops.to(images), line_kernel(length, angle).to(images)) * length * 0.6
    # as if seen through: what is bright already changes little
    return images + (1.0 - images) * streaks.clamp(0.0, 0.85)


def scratches(
    images: torch.Tensor, count: int, width: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Blackens straight scratches, to be painted in again.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        count (`int`): Scratches a picture, from 0 to 256.
        width (`float`): Their width in pixels, above 0 and below 64.
        generator (`torch.Generator`, *optional*): Source of where they are.
    """
    _check(images)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 256:
        raise ValueError(f"count={count!r} is out of range; use an int from 0 to 256")
    width = _number("width", width, 0.0, 64.0)
    n, _, height, side = images.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    ends = _uniform((n, count, 4), generator) * torch.tensor([side, height, side, height])
    kept = torch.ones(n, 1, height, side)
    for row, own in enumerate(ends.tolist()):
        for x0, y0, x1, y1 in own:
            dx, dy = x1 - x0, y1 - y0
            position = ((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-6)
            position = position.clamp(0.0, 1.0)
            distance = torch.hypot(x - x0 - position * dx, y - y0 - position * dy)
            kept[row, 0] *= (distance > width / 2.0).float()
    return images * kept.to(images)


def low_light(
    images: torch.Tensor,
    gain: float,
    gamma: float = 1.0,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Darkens pictures as a short exposure does: `gain` x^`gamma`, and noise.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        gain (`float`): Factor, from 0 to 1.
        gamma (`float`, *optional*, defaults to 1): Exponent, above 0 and below 10.
        noise (`float`, *optional*, defaults to 0): Standard deviation of the noise, from 0 to 1.
        generator (`torch.Generator`, *optional*): Source of the noise.
    """
    _check(images)
    gain = _number("gain", gain, -1e-12, 1.0 + 1e-12)
    gamma = _number("gamma", gamma, 0.0, 10.0)
    return gaussian_noise(gain * images.clamp(0.0, 1.0) ** gamma, noise, generator)


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Compresses pictures as JPEG files and decodes them again.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1], of 1 or 3 channels.
        quality (`int`): From 1 to 100.
    """
    _check(images)
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality={quality!r} is out of range; use an int from 1 to 100")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; a JPEG file has 1 or 3")
    pixels = (images.detach().float().clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
            buffer, "JPEG", quality=quality
        )
        array = np.asarray(Image.open(buffer), dtype=np.float32).reshape(picture.shape)
        decoded.append(torch.from_numpy(array).permute(2, 0, 1))
    return torch.stack(decoded).to(images) / 255.0


Draw = Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]


def _between(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(_uniform((1,), generator))


# name -> one picture or batch and a generator to it spoilt with a strength drawn at random
DEGRADATIONS: dict[str, Draw] = {
    "gaussian_blur": lambda x, g: gaussian_blur(x, _between(0.6, 2.0, g)),
    "motion_blur": lambda x, g: motion_blur(x, _between(3.0, 9.0, g), _between(0.0, 180.0, g)),
    "noise": lambda x, g: gaussian_noise(x, _between(0.05, 0.2, g), g),
    "rain": lambda x, g: rain(x, _between(0.004, 0.016, g), _between(6.0, 16.0, g), _between(60.0, 120.0, g), g),
    "scratches": lambda x, g: scratches(x, int(_between(4.0, 12.0, g)), _between(1.5, 3.5, g), g),
    "low_light": lambda x, g: low_light(x, _between(0.2, 0.5, g), _between(1.0, 1.3, g), _between(0.0, 0.02, g), g),
    "jpeg": lambda x, g: jpeg(x, int(_between(8.0, 30.0, g))),
}


def degrade(
    images: torch.Tensor, kinds: Sequence[str] | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Spoils each picture of a batch in one way, of a strength drawn at random.

    Args:
        images (`torch.Tensor` of shape `(n, c, H, W)`): Pictures in [0, 1].
        kinds (`Sequence[str]`, *optional*): Names from `DEGRADATIONS`, one of which is drawn for each picture; all by default.
        generator (`torch.Generator`, *optional*): Source of every draw.

    Returns:
        `tuple[torch.Tensor, list[str]]`: The spoilt pictures, and how each was spoilt.

    Raises:
        ValueError: If a name is not known, or the pictures do not fit.
        TypeError: If `images` is not a tensor of floats.

    Example:
        >>> clean = torch.full((4, 3, 16, 16), 0.5)
        >>> spoilt, how = degrade(clean, ["noise", "jpeg"], torch.Generator().manual_seed(0))
        >>> spoilt.shape, set(how) <= {"noise", "jpeg"}
        (torch.Size([4, 3, 16, 16]), True)
    """
    _check(images)
    given = DEGRADATIONS if kinds is None else [kinds] if isinstance(kinds, str) else kinds
    names = list(given) if isinstance(given, (list, tuple, dict)) else []
    if not names or not all(isinstance(name, str) and name in DEGRADATIONS for name in names):
        raise ValueError(f"kinds={kinds!r} names no known degradation; use some of {', '.join(DEGRADATIONS)}")
    drawn = torch.randint(len(names), (len(images),), generator=generator).tolist()
    chosen = [names[i] for i in drawn]
    spoilt = [DEGRADATIONS[name](images[i : i + 1], generator) for i, name in enumerate(chosen)]
    return torch.cat(spoilt) if spoilt else images.clone(), chosen


def _filtered(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    channels, (rows, columns) = images.shape[1], kernel.shape
    padded = F.pad(images, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, rows, columns), groups=channels)


def _uniform(shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator)


def _normal(shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator)


def _number(name: str, value: float, low: float, high: float) -> float:
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not low < value < high:
        raise ValueError(
            f"{name}={value!r} is out of range; use a number between {round(low, 3):g} and {round(high, 3):g}"
        )
    return float(value)


def _check(images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images is {found}; give a tensor of floats in [0, 1]")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)} is no batch; give (n, c, H, W)")
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < -1e-3 or high > 1.0 + 1e-3:
        raise ValueError(f"images has values from {low:.3g} to {high:.3g}; give finite floats in [0, 1]")
