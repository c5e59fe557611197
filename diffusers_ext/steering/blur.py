"""Blur by any kernel, and by motion.

A x = k * x, a convolution: the picture of a point of light is the kernel. The picture repeats at its edges, so that with the Fourier
transform F and K = F k

    A x = F^-1(K F x),   A^T y = F^-1(conj(K) F y),   |A| = max |K|,   (g A A^T + s)^-1 y = F^-1(F y / (g |K|^2 + s))

A camera does not see round the edges. `Compose(MotionBlur(...), InpaintMask(inner))`, with a mask that is 0 along a border as wide as
half the kernel, leaves out the pixels that depend on it.
"""

import math
from typing import Any

import torch

from .operators import LinearOperator
from .resampling import check_odd


def motion_kernel(length: int, angle: float) -> torch.Tensor:
    """A line of light, one point a pixel of its length, each shared by the four pixels around it.

    Args:
        length (`int`): Number of points.
        angle (`float`): Direction in degrees, counted from the right upwards.

    Returns:
        `torch.Tensor` of odd, square shape: float64, sums to 1.
    """
    along = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    half = math.ceil((length - 1) / 2)
    turn = math.radians(angle)
    kernel = torch.zeros(2 * half + 1, 2 * half + 1, dtype=torch.float64)
    # whole pixels up to rounding, so that a line along an axis stays in its row
    across, down = ((half + along * factor).mul(1e9).round() / 1e9 for factor in (math.cos(turn), -math.sin(turn)))
    for drop in (0, 1):
        for aside in (0, 1):
            row, column = down.floor() + drop, across.floor() + aside
            weight = (1 - (down - row).abs()) * (1 - (across - column).abs())
            inside = weight > 0
            kernel.index_put_((row[inside].long(), column[inside].long()), weight[inside], accumulate=True)
    return kernel / kernel.sum()


class Blur(LinearOperator):
    """Blur by a kernel.

    Args:
        kernel (`torch.Tensor` of shape `(height, width)`):
            The picture of a point of light; both sides odd. It is used as it is, not scaled to a sum of 1.

    Raises:
        TypeError: If `kernel` is not a tensor of floats.
        ValueError: If it has another shape, an even side, or values that are not finite or all zero.

    Example:
        ```python
        import torch
        from diffusers_ext.steering.blur import Blur

        box = Blur(torch.full((3, 3), 1 / 9))
        assert abs(box.norm(torch.rand(1, 3, 16, 24)) - 1) < 1e-6
        ```
    """

    def __init__(self, kernel: torch.Tensor) -> None:
        if not isinstance(kernel, torch.Tensor) or not kernel.is_floating_point():
            found = kernel.dtype if isinstance(kernel, torch.Tensor) else type(kernel).__name__
            raise TypeError(f"kernel is {found}; give a tensor of floats of shape (height, width)")
        if kernel.ndim != 2:
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}; give one of shape (height, width), both odd")
        for side, size in zip(("height", "width"), kernel.shape, strict=True):
            check_odd(f"kernel of shape {tuple(kernel.shape)}: its {side}", size)
        if not bool(torch.isfinite(kernel).all()) or not bool(kernel.any()):
            raise ValueError(f"kernel of shape {tuple(kernel.shape)} is zero or not finite; give a finite one")
        self.kernel = kernel.detach().double()
        self._transfers: dict[Any, torch.Tensor] = {}

    def _transfer(self, like: torch.Tensor) -> torch.Tensor:
        """K for pictures of this size, device and dtype."""
        size = tuple(like.shape[-2:])
        key = (size, like.device, like.dtype)
        if key not in self._transfers:
            grid = torch.zeros(size, dtype=torch.float64)
            rows, columns = (
                (torch.arange(length) - length // 2) % side
                for length, side in zip(self.kernel.shape, size, strict=True)
            )
            # a kernel wider than the picture comes round again
            grid.index_put_((rows[:, None], columns[None]), self.kernel.cpu(), accumulate=True)
            wanted = torch.complex128 if like.dtype == torch.float64 else torch.complex64
            self._transfers = {key: torch.fft.rfft2(grid).to(like.device, wanted)}
        return self._transfers[key]

    def _filtered(self, pictures: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(pictures) * response, s=pictures.shape[-2:])

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self._filtered(pictures, self._transfer(pictures))

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        return self._filtered(measurement, self._transfer(measurement).conj())

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        transfer = self._transfer(measurement)
        power = transfer.abs()
        least = torch.finfo(power.dtype).eps * max(measurement.shape[-2:]) * power.max()
        inverse = torch.where(power > least, transfer.conj() / power.clamp(min=least).square(), 0.0)
        return self._filtered(measurement, inverse)

    def _solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        return self._filtered(measurement, 1 / (gain * self._transfer(measurement).abs().square() + shift))

    def _norm(self, like: torch.Tensor) -> float:
        return float(self._transfer(like).abs().max())

    def __repr__(self) -> str:
        return f"Blur({self.kernel.shape[0]}x{self.kernel.shape[1]})"


class MotionBlur(Blur):
    """Blur by a camera that moved along a straight line.

    Args:
        length (`int`): Length of the line in pixels, from 1 to 4095.
        angle (`float`, *optional*, defaults to 0.0): Direction in degrees, counted from the right upwards.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import MotionBlur

        point = torch.zeros(1, 1, 9, 9)
        point[..., 4, 4] = 1
        line = MotionBlur(5).A(point)[0, 0]
        assert torch.allclose(line[4, 2:7], torch.full((5,), 0.2), atol=1e-6)
        ```
    """

    def __init__(self, length: int, angle: float = 0.0) -> None:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 4095:
            raise ValueError(f"length={length!r} is out of range; give an int from 1 to 4095")
        if isinstance(angle, bool) or not isinstance(angle, (int, float)) or not math.isfinite(angle):
            raise ValueError(f"angle={angle!r} is not a number of degrees; give a finite one")
        super().__init__(motion_kernel(length, math.fmod(angle, 360.0)))
        self.length, self.angle = length, angle

    def __repr__(self) -> str:
        return f"MotionBlur(length={self.length}, angle={self.angle:g})"
