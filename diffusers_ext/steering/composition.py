"""Operators one after the other."""

from collections.abc import Sequence

import torch

from .operators import LinearOperator
from .resampling import SeparableChain, SeparableOperator


class Compose(LinearOperator):
    """Operators one after the other: `Compose(blur, downsample)` blurs first.

    Where all of them are separable (Gaussian blur, downsampling) norm and inverses are exact; otherwise they are iterated.

    Args:
        operators (`LinearOperator`): One or more, the first to act first.

    Raises:
        TypeError: If one of them is not an operator.
        ValueError: If there are none.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import Compose, GaussianBlur, SuperResolution

        camera = Compose(GaussianBlur(5, 1.0), SuperResolution(2))
        assert camera.A(torch.rand(1, 3, 16, 24)).shape == (1, 3, 8, 12)
        ```
    """

    def __init__(self, *operators: LinearOperator) -> None:
        if not operators:
            raise ValueError("operators is empty; give one or more, the first to act first")
        for operator in operators:
            if not isinstance(operator, LinearOperator):
                raise TypeError(
                    f"operators has {type(operator).__name__}; give operators such as GaussianBlur(5, 1.0)"
                )
        self.operators: Sequence[LinearOperator] = operators
        separable = [operator for operator in operators if isinstance(operator, SeparableOperator)]
        self._chain = SeparableChain(separable) if len(separable) == len(operators) else None

    def _forward(self, pictures: torch.Tensor) -> torch.Tensor:
        for operator in self.operators:
            pictures = operator._forward(pictures)
        return pictures

    def _backward(self, measurement: torch.Tensor) -> torch.Tensor:
        for operator in reversed(self.operators):
            measurement = operator._backward(measurement)
        return measurement

    def _pinv(self, measurement: torch.Tensor) -> torch.Tensor:
        return self._chain._pinv(measurement) if self._chain else super()._pinv(measurement)

    def _solve(self, measurement: torch.Tensor, gain: float, shift: float) -> torch.Tensor:
        return (
            self._chain._solve(measurement, gain, shift) if self._chain else super()._solve(measurement, gain, shift)
        )

    def _norm(self, like: torch.Tensor) -> float:
        return self._chain._norm(like) if self._chain else super()._norm(like)

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.operators))})"
