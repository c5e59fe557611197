"""Measures of a restored or edited picture against a reference, per sample, in float64, on pictures in [-1, 1].

PSNR is -10 log10(mean squared error / 4): the peak-to-peak range of [-1, 1] is 2. SSIM follows Wang et al. 2004 with the
usual 11-pixel Gaussian window of standard deviation 1.5 and constants .01 and .03.
"""

import torch
import torch.nn.functional as F


def psnr(images: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture.

    Args:
        images: (n, c, H, W) in [-1, 1]; values outside are clamped.
        reference: As `images`.
        mask: (n, 1, H, W) weights in [0, 1] of the pixels that count; default all.

    Returns:
        (n,) in decibels, infinite for equal pictures, NaN where a mask is empty.
    """
    _same_shape(images, reference)
    error = (images.double().clamp(-1.0, 1.0) - reference.double().clamp(-1.0, 1.0)).square().mean(1, keepdim=True)
    weight = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
    mean = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10.0 * torch.log10(mean / 4.0)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture: (n,) in [-1, 1], 1 for equal pictures. Sides must be 11 pixels or more."""
    _same_shape(images, reference)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are smaller than the 11-pixel window of SSIM")
    x, y = (picture.double().clamp(-1.0, 1.0) / 2.0 + 0.5 for picture in (images, reference))
    channels = x.shape[1]
    ramp = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64, device=x.device) - 5.0) / 1.5).square())
    window = torch.outer(ramp, ramp) / ramp.sum().square()
    kernel = window.expand(channels, 1, 11, 11)

    def mean_of(value: torch.Tensor) -> torch.Tensor:
        return F.conv2d(value, kernel, groups=channels)

    mx, my = mean_of(x), mean_of(y)
    vx, vy, cov = mean_of(x * x) - mx * mx, mean_of(y * y) - my * my, mean_of(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return ratio.mean((1, 2, 3))


def _same_shape(images: torch.Tensor, reference: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must both have the shape (n, c, H, W)"
        )
