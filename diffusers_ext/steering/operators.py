"""Linear operators of inverse problems, y = A x + noise, each with its adjoint.

What steering needs of an operator, and what the tests hold every one of them to:

    <A x, y> = <x, A^T y>        norm(A) = max |A x| / |x|        A A^+ A = A        (g A A^T + s) u = y

An operator acts on every picture of a batch alone and draws no noise: noise is a property of a measurement, and an operator that
drew it anew in each step would let a cost compare two noises. Pictures of half precision come out in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch


CG_STEPS = 500
LANCZOS_STEPS = 60


def check_pictures(name: str, value: Any, finite: bool = True) -> torch.Tensor:
    """The pictures in the dtype that operators and objectives work in: float64 if they are, float32 otherwise.

    Args:
        name (`str`): How the error calls them.
        value (`torch.Tensor` of shape `(batch, ..., height, width)`): What a caller gave.
        finite (`bool`, *optional*, defaults to `True`): Whether to look for values that are not finite.

    Raises:
        TypeError: If it is not a tensor of floats.
        ValueError: If it has fewer than two axes or no values, or is not finite.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} is {found}; give a tensor of floats, batch first")
    if value.ndim < 2 or value.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; give pictures of shape (batch, channels, height, width)"
        )
    # A sum may overflow where its terms do not, so it is only grounds for suspicion.
    if finite and not math.isfinite(value.detach().sum(dtype=torch.float32).item()):
        count = int((~torch.isfinite(value)).sum())
        if count:
            raise ValueError(f"{name} is not finite in {count} of {value.numel()} values; give finite ones")
    return value if value.dtype == torch.float64 else value.float()


def check_positive(name: str, value: Any, zero: bool = False) -> float:
    """A finite number above zero, or also zero.

    Raises:
        ValueError: If it is not one.
    """
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or value < 0 or (value == 0 and not zero):
        raise ValueError(
            f"{name}={value!r} is out of range; give a finite number {'of at least' if zero else 'above'} 0"
        )
    return float(value)


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    adjoint: Callable[[torch.Tensor], torch.Tensor] | None = None,
    steps: int = CG_STEPS,
) -> torch.Tensor:
    """Solves M u = b, every sample alone, starting from zero: for a positive definite M, or by least squares for any.

    Least squares are those of A^T A u = A^T b, without forming the product, which would square the rounding (CGLS; Paige and
    Saunders, 1982). From zero, u stays in the range of A^T, where the smallest solution is.

    Args:
        apply (`Callable`): M u.
        target (`torch.Tensor` of shape `(batch, ...)`): b.
        adjoint (`Callable`, *optional*): M^T u, for least squares.
        steps (`int`, *optional*, defaults to 500): Most iterations. Fewer are made once the residual is at rounding.

    Returns:
        `torch.Tensor`: u.
    """

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).flatten(1).sum(1)

    def times(factor: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return factor.reshape(-1, *[1] * (vector.ndim - 1)) * vector

    residual = target.clone()
    direction = seen = residual if adjoint is None else adjoint(residual)
    solution, size = torch.zeros_like(direction), dot(seen, seen)
    tiny = (4 * torch.finfo(target.dtype).eps) ** 2 * size
    for _ in range(steps):
        active = size > tiny
        if not bool(active.any()):
            break
        image = apply(direction)
        curvature = dot(image, image if adjoint is not None else direction)
        # A sample that is done stays as it is.
        active = active & (curvature > 0)
        length = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        solution, residual = solution + times(length, direction), residual - times(length, image)
        seen = residual if adjoint is None else adjoint(residual)
        before, size = size, torch.where(active, dot(seen, seen), 0.0)
        direction = seen + times(torch.where(active, size / torch.where(active, before, 1.0), 0.0), direction)
    return solution


def largest_singular_value(
    forward: Callable[[torch.Tensor], torch.Tensor],
    backward: Callable[[torch.Tensor], torch.Tensor],
    like: torch.Tensor,
    steps: int = LANCZOS_STEPS,
) -> float:
    """|A| by Lanczos' method on A^T A: converges where power iteration crawls, because singular values are close.

    Args:
        forward (`Callable`): A x.
        backward (`Callable`): A^T y.
        like (`torch.Tensor`): A tensor of the shape of x.
        steps (`int`, *optional*, defaults to 60): Most iterations.

    Returns:
        `float`: The largest singular value, from below.
    """
    vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)
    vector, last = vector / torch.linalg.vector_norm(vector), torch.zeros_like(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    with torch.no_grad():
        for _ in range(min(steps, like.numel())):
            image = backward(forward(vector)) - (beside[-1] if beside else 0.0) * last
            diagonal.append(float((image * vector).sum()))
            image = image - diagonal[-1] * vector
            beside.append(float(torch.linalg.vector_norm(image)))
            if beside[-1] <= 1e-6 * max(diagonal):
                break
            vector, last = image / beside[-1], vector
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return math.sqrt(max(float(torch.linalg.eigvalsh(matrix)[-1]), 0.0))


class LinearOperator:
    """Base of the operators, and the shortest way to one's own.

    A subclass defines `_forward` and `_backward`, which get and return float32 (float64 where the caller's pictures are). Norm,
    pseudo-inverse and regularised inverse then follow by iteration; a subclass that knows them in closed form says so.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import LinearOperator


        class Flip(LinearOperator):
            def _forward(self, pictures):
                return pictures.flip(-1)

            def _backward(self, measurement):
                return measurement.flip(-1)


        flip, picture = Flip(), torch.rand(1, 3, 8, 8)
        assert torch.equal(flip.adjoint(flip.A(picture)), picture)
        assert abs(flip.norm(picture) - 1) < 1e-6
        ```
    """

    def A(self, pictures: torch.Tensor) -> torch.Tensor:
        """What is measured of pictures, without noise.

        Args:
            pictures (`torch.Tensor` of shape `(batch, ..., height, width)`): Any floating dtype.

        Returns:
            `torch.Tensor`: The measurement, float32 (float64 for pictures of float64), differentiable.

        Raises:
            TypeError: If `pictures` is not a tensor of floats.
            ValueError: If it is not finite or of a size that the operator does not take.
        """
        return self._forward(check_pictures("pictures", pictures))

    __call__ = A

    def adjoint(self, measurement: torch.Tensor) -> torch.Tensor:
        """A^T y, by which the gradient of |A x - y|^2 / 2 is A^T (A x - y).

        Args:
            measurement (`torch.Tensor`): y, of the shape that `A` returns.

        Returns:
            `torch.Tensor` of the shape of pictures.

        Raises:
            TypeError: If `measurement` is not a tensor of floats.
            ValueError: If it is not finite or of another shape.
        """
        return self._backward(check_pictures("measurement", measurement))

    def pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        """A^+ y: of all pictures with the least |A x - y|, the smallest.

        Args:
            measurement (`torch.Tensor`): y, of the shape that `A` returns.

        Returns:
            `torch.Tensor` of the shape of pictures. Where A is badly conditioned (blur), noise of y is amplified without bound;
            `solve` does not.

        Raises:
            TypeError: If `measurement` is not a tensor of floats.
            ValueError: If it is not finite or of another shape.
        """
        return self._pinv(check_pictures("measurement", measurement))

    def solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        """(gain A A^T + shift)^-1 y, the heart of a proximal step.

        Args:
            measurement (`torch.Tensor`): y, of the shape that `A` returns.
            gain (`float`): Above 0: variance of the pictures around their estimate.
            shift (`float`): Above 0: variance of the noise of y.

        Returns:
            `torch.Tensor` of the shape of `measurement`.

        Raises:
            TypeError: If `measurement` is not a tensor of floats.
            ValueError: If it is not finite or of another shape, or a number is not above 0.
        """
        gain, shift = check_positive("gain", gain), check_positive("shift", shift)
        return self._solve(check_pictures("measurement", measurement), gain, shift)

    def norm(self, like: torch.Tensor) -> float:
        """The largest singular value, |A|.

        Args:
            like (`torch.Tensor`): Pictures of the size that counts; their values do not.

        Returns:
            `float`: |A| for pictures of this size.

        Raises:
            TypeError: If `like` is not a tensor of floats.
            ValueError: If the operator does not take its size.
        """
        return self._norm(check_pictures("like", like, finite=False))

    # -- what a subclass defines, or knows better ------------------------------------------------------------------

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward(pictures)")

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _backward(measurement)")

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        return conjugate_gradients(self._forward, measurement, self._backward)

    def _solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        return conjugate_gradients(lambda u: gain * self._forward(self._backward(u)) + shift * u, measurement)

    def _norm(self, like: torch.Tensor) -> float:
        return largest_singular_value(self._forward, self._backward, like)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class InpaintMask(LinearOperator):
    """Keeps what a mask says is known: A x = m x.

    Args:
        mask (`torch.Tensor`):
            1 where the picture is known, 0 where it is to be painted; between them, how much is known. Booleans, integers or
            floats, of any shape that broadcasts to the pictures: `(height, width)`, `(batch, 1, height, width)`, or tokens
            `(1, tokens, 1)`.

    Raises:
        TypeError: If `mask` is not a tensor.
        ValueError: If its values are not between 0 and 1, or all 0.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import InpaintMask

        known = torch.ones(8, 8)
        known[2:6, 2:6] = 0
        pictures = torch.rand(2, 3, 8, 8)
        assert InpaintMask(known).A(pictures)[..., 2:6, 2:6].abs().max() == 0
        ```
    """

    def __init__(self, mask: torch.Tensor) -> None:
        if not isinstance(mask, torch.Tensor) or mask.is_complex():
            found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise TypeError(f"mask is {found}; give a tensor with 1 where the picture is known and 0 elsewhere")
        mask = mask if mask.dtype == torch.float64 else mask.float()
        if mask.numel() == 0 or not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} has values outside of 0 to 1; give 1 for known, 0 for not"
            )
        if not bool((mask > 0).any()):
            raise ValueError(f"mask of shape {tuple(mask.shape)} is 0 everywhere; give 1 where the picture is known")
        self.mask = mask

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures * self._fitted(pictures)

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        return measurement * self._fitted(measurement)

    def _fitted(self, pictures: torch.Tensor) -> torch.Tensor:
        shape, wanted = tuple(self.mask.shape), tuple(pictures.shape)
        reach = len(shape) <= len(wanted) and all(
            own in (1, size) for own, size in zip(shape[::-1], wanted[::-1], strict=False)
        )
        if not reach:
            raise ValueError(
                f"mask of shape {shape} does not fit pictures of shape {wanted}; give one that broadcasts to them"
            )
        if self.mask.device != pictures.device or self.mask.dtype != pictures.dtype:
            return self.mask.to(pictures)
        return self.mask

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        mask = self._fitted(measurement)
        return torch.where(mask > 0, measurement / mask.clamp(min=torch.finfo(mask.dtype).tiny), 0.0)

    def _solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        return measurement / (gain * self._fitted(measurement).square() + shift)

    def _norm(self, like: torch.Tensor) -> float:
        return float(self._fitted(like).max())

    def __repr__(self) -> str:
        return f"InpaintMask(shape={tuple(self.mask.shape)}, known={float(self.mask.mean()):.0%})"


class FromDeepinv(LinearOperator):
    """A linear physics of deepinv, or anything with its methods.

    Args:
        physics (`Any`):
            An object with `A(x)` and `A_adjoint(y)`, both without noise, and optionally `A_dagger(y)`.

    Raises:
        TypeError: If a method is missing.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import FromDeepinv


        class Physics:  # deepinv.physics.Inpainting(...) has the same methods
            def A(self, x):
                return x[..., ::2]

            def A_adjoint(self, y):
                return torch.stack([y, 0 * y], -1).flatten(-2)


        assert FromDeepinv(Physics()).A(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 4)
        ```
    """

    def __init__(self, physics: Any) -> None:
        missing = [name for name in ("A", "A_adjoint") if not callable(getattr(physics, name, None))]
        if missing:
            raise TypeError(
                f"physics={type(physics).__name__} has no method {missing[0]}; give a linear physics of deepinv"
            )
        self.physics = physics

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        # `physics(x)` would add its noise; `physics.A(x)` does not.
        return self._result("A", pictures)

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        return self._result("A_adjoint", measurement)

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        if not callable(getattr(self.physics, "A_dagger", None)):
            return super()._pinv(measurement)
        return self._result("A_dagger", measurement)

    def _result(self, method: str, argument: torch.Tensor) -> torch.Tensor:
        result = getattr(self.physics, method)(argument)
        if not isinstance(result, torch.Tensor):
            raise TypeError(
                f"physics={type(self.physics).__name__}: {method} returned {type(result).__name__}; give a physics whose "
                "measurement is one tensor"
            )
        return result.to(argument.dtype)

    def __repr__(self) -> str:
        return f"FromDeepinv({type(self.physics).__name__})"
