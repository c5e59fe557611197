"""Operators that act on rows and columns by a matrix each: averaging, bicubic downsampling and Gaussian blur.

    A x = R x C^T,   R = U_R S_R V_R^T,   C = U_C S_C V_C^T

so that the singular values of A are the products of those of R and C. Norm, pseudo-inverse and regularised inverse are exact, at
the price of two decompositions of the size of a side, made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .operators import LinearOperator, check_positive


MODES = ("average", "bicubic")
PADDINGS = ("reflect", "replicate", "circular", "zeros")
CACHED_AXES = 8  # matrices of a side of 1024 have 8 MB each


def average_matrix(size: int, factor: int) -> torch.Tensor:
    """Means of `factor` neighbours.

    Args:
        size (`int`): Length before, a multiple of `factor`.
        factor (`int`): Neighbours to a mean.

    Returns:
        `torch.Tensor` of shape `(size // factor, size)`: float64.
    """
    eye = torch.eye(size // factor, dtype=torch.float64)
    return eye.repeat_interleave(factor, dim=1) / factor


def bicubic_matrix(size: int, factor: int) -> torch.Tensor:
    """Bicubic downsampling (a = -1/2) with the kernel widened by the factor, as PIL does it.

    Args:
        size (`int`): Length before, a multiple of `factor`.
        factor (`int`): How many times shorter.

    Returns:
        `torch.Tensor` of shape `(size // factor, size)`: float64; rows sum to 1.
    """
    centres = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor
    distance = ((torch.arange(size, dtype=torch.float64) + 0.5)[None] - centres[:, None]).abs() / factor
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def convolution_matrix(size: int, kernel: torch.Tensor, padding: str) -> torch.Tensor:
    """Convolution of a line with an odd, symmetric kernel.

    Args:
        size (`int`): Length of the line.
        kernel (`torch.Tensor` of odd length): Its weights.
        padding (`str`): What lies beyond the ends: `"reflect"` (without repeating the last value), `"replicate"`,
            `"circular"` or `"zeros"`.

    Returns:
        `torch.Tensor` of shape `(size, size)`: float64.
    """
    half = len(kernel) // 2
    places = torch.arange(size)[:, None] + torch.arange(-half, half + 1)[None]
    weights = kernel.double().expand(size, -1)
    if padding == "zeros":
        weights = weights * ((places >= 0) & (places < size))
    elif padding == "circular":
        places = places % size
    elif padding == "reflect":
        period = max(2 * (size - 1), 1)
        places = places % period
        places = torch.minimum(places, period - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places.clamp(0, size - 1), weights)


@dataclass(frozen=True)
class Axis:
    """The matrix of an axis and its decomposition: `matrix = left @ diag(values) @ right`."""

    matrix: torch.Tensor
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def to(self, like: torch.Tensor) -> "Axis":
        return Axis(*(part.to(like) for part in (self.matrix, self.left, self.values, self.right)))


class SeparableOperator(LinearOperator):
    """Base: a subclass says which matrix an axis is multiplied with, and how long an axis was before.

    The matrix must not be longer than it is wide.
    """

    def _matrix(self, size: int) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _matrix(size)")

    def _size_before(self, size: int) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define _size_before(size)")

    def _axis(self, size: int, like: torch.Tensor) -> Axis:
        axes: dict[Any, Axis] = self.__dict__.setdefault("_axes", {})
        key = (size, like.device, like.dtype)
        if key not in axes:
            matrix = self._matrix(size)
            if len(axes) >= CACHED_AXES:
                axes.clear()
            axes[key] = Axis(matrix, *torch.linalg.svd(matrix, full_matrices=False)).to(like)
        return axes[key]

    def _before(self, pictures: torch.Tensor) -> tuple[Axis, Axis]:
        height, width = pictures.shape[-2:]
        return self._axis(height, pictures), self._axis(width, pictures)

    def _after(self, measurement: torch.Tensor) -> tuple[Axis, Axis]:
        height, width = (self._size_before(size) for size in measurement.shape[-2:])
        return self._axis(height, measurement), self._axis(width, measurement)

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        rows, columns = self._before(pictures)
        return rows.matrix @ pictures @ columns.matrix.mT

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        rows, columns = self._after(measurement)
        return rows.matrix.mT @ measurement @ columns.matrix

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        rows, columns = self._after(measurement)
        values = rows.values[:, None] * columns.values
        # the usual limit below which a singular value is rounding
        least = torch.finfo(values.dtype).eps * max(rows.matrix.shape[1], columns.matrix.shape[1]) * values.max()
        inverse = torch.where(values > least, 1 / values.clamp(min=least), 0.0)
        return rows.right.mT @ (inverse * (rows.left.mT @ measurement @ columns.left)) @ columns.right

    def _solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        rows, columns = self._after(measurement)
        weights = 1 / (gain * (rows.values[:, None] * columns.values).square() + shift)
        return rows.left @ (weights * (rows.left.mT @ measurement @ columns.left)) @ columns.left.mT

    def _norm(self, like: torch.Tensor) -> float:
        rows, columns = self._before(like)
        return float(rows.values[0]) * float(columns.values[0])


class SuperResolution(SeparableOperator):
    """Pictures made smaller: their sides are divided by a factor.

    Args:
        factor (`int`): How many times shorter the sides become, at least 2. It must divide them.
        mode (`str`, *optional*, defaults to `"average"`): `"average"` of squares of pixels, or `"bicubic"` with antialiasing, as
            picture editors do it.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import SuperResolution

        small = SuperResolution(4).A(torch.rand(1, 3, 32, 64))
        assert small.shape == (1, 3, 8, 16)
        ```
    """

    def __init__(self, factor: int, mode: str = "average") -> None:
        if not isinstance(factor, int) or isinstance(factor, bool) or not 2 <= factor <= 1024:
            raise ValueError(f"factor={factor!r} is out of range; give an int from 2 to 1024")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; use one of {', '.join(MODES)}")
        self.factor, self.mode = factor, mode

    def _matrix(self, size: int) -> torch.Tensor:
        if size % self.factor:
            raise ValueError(
                f"factor={self.factor} does not divide a side of {size} pixels; crop or pad the pictures to a multiple, or use "
                "another factor"
            )
        return (average_matrix if self.mode == "average" else bicubic_matrix)(size, self.factor)

    def _size_before(self, size: int) -> int:
        return size * self.factor

    def __repr__(self) -> str:
        return f"SuperResolution(factor={self.factor}, mode={self.mode!r})"


class GaussianBlur(SeparableOperator):
    """Blur by a Gaussian.

    Args:
        kernel_size (`int`): Width of the kernel in pixels, odd.
        sigma (`float`): Standard deviation in pixels, above 0.
        padding (`str`, *optional*, defaults to `"reflect"`): What lies beyond the edges: `"reflect"`, `"replicate"`, `"circular"`
            or `"zeros"`.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import GaussianBlur

        blur, picture = GaussianBlur(11, 2.0), torch.rand(1, 3, 32, 48)
        assert blur.A(picture).std() < picture.std()
        ```
    """

    def __init__(self, kernel_size: int, sigma: float, padding: str = "reflect") -> None:
        check_odd("kernel_size", kernel_size)
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} is not known; use one of {', '.join(PADDINGS)}")
        self.kernel_size, self.sigma, self.padding = kernel_size, check_positive("sigma", sigma), padding
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        weights = torch.exp(-0.5 * (offsets / self.sigma).square())
        self.kernel = weights / weights.sum()

    def _matrix(self, size: int) -> torch.Tensor:
        if self.padding == "reflect" and self.kernel_size // 2 >= size:
            raise ValueError(
                f"kernel_size={self.kernel_size} is too wide to reflect a side of {size} pixels; use at most {2 * size - 1}, or "
                "padding='replicate'"
            )
        return convolution_matrix(size, self.kernel, self.padding)

    def _size_before(self, size: int) -> int:
        return size

    def __repr__(self) -> str:
        return f"GaussianBlur({self.kernel_size}, {self.sigma:g}, padding={self.padding!r})"


class SeparableChain(SeparableOperator):
    """Separable operators one after the other: separable again.

    Args:
        operators (`Sequence[SeparableOperator]`): The first to act first.
    """

    def __init__(self, operators: Sequence[SeparableOperator]) -> None:
        self.operators = operators

    def _matrix(self, size: int) -> torch.Tensor:
        matrix = torch.eye(size, dtype=torch.float64)
        for operator in self.operators:
            matrix = operator._matrix(len(matrix)) @ matrix
        return matrix

    def _size_before(self, size: int) -> int:
        for operator in reversed(self.operators):
            size = operator._size_before(size)
        return size


def check_odd(name: str, value: Any) -> None:
    """Raises unless `value` is an odd number of pixels.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4095 or value % 2 == 0:
        near = (
            f" such as {value + 1}"
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 4095
            else ""
        )
        raise ValueError(f"{name}={value!r} has no middle pixel; use an odd int from 1 to 4095{near}")
