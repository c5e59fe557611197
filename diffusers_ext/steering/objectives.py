"""What samples are steered towards, where it is known in closed form: measurements, masks, and sums of objectives.

An objective has a loss of every sample and a gradient that is scaled so that x <- x - eta grad(x) lowers the loss for every eta
between 0 and 2, whatever the batch, the resolution and the operator:

    measurement   loss = |A x - y|^2 / (2 |A|^2)         grad = A^T (A x - y) / |A|^2
    sum           loss = sum_i w_i loss_i / sum_i w_i    grad likewise

A measurement also has the two other data steps, with s the standard deviation of its noise:

    prox      x + nu A^T (nu A A^T + s^2)^-1 (y - A x),  the most likely picture if x were known up to the variance nu
    project   x + A^+ (y - A x),                         the nearest picture that has the measurement

Schedulers ask `grad`, `prox` and `project` and nothing else, so any object with these is an objective.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .operators import InpaintMask, LinearOperator, check_pictures, check_positive


class Objective:
    """Base of the objectives: a subclass defines `loss` and `grad`, and `prox` and `project` where they exist."""

    prox: Callable[..., torch.Tensor] | None = None
    project: Callable[..., torch.Tensor] | None = None

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        """How far a clean sample is from what is wanted.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): Clean samples.

        Returns:
            `torch.Tensor` of shape `(batch,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(clean)")

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        """The direction that lowers the loss if it is subtracted, scaled so that 0 to 2 times it is stable.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): Clean samples.

        Returns:
            `torch.Tensor` of the same shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define grad(clean)")


def check_objective(name: str, value: Any) -> None:
    """Raises unless `value` is an objective.

    Raises:
        TypeError: If it is not.
    """
    if not callable(getattr(value, "loss", None)) or not callable(getattr(value, "grad", None)):
        raise TypeError(f"{name} has {type(value).__name__}; give an objective such as MeasurementObjective")


class MeasurementObjective(Objective):
    """A sample of which a linear operator should give a measurement.

    Args:
        operator ([`LinearOperator`]): A.
        measurement (`torch.Tensor`):
            y, of the shape that A gives of a sample; one of batch 1 is meant for all samples.
        noise_std (`float`, *optional*, defaults to 0.05):
            Standard deviation of the noise of the measurement, in its units: pictures in [-1, 1] have 0.05 if their noise is 6
            of 255 levels. 0 trusts every value of the measurement, which a blur does not forgive: rather too large than too small.
        weight (`float`, *optional*):
            If given, loss and gradient are those of the authors' code, unscaled: weight * mean |A x - y|^2, the mean over all
            values of the batch. The learning rate then depends on batch and resolution. See `official_settings`.

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If a number is out of range or the measurement is not finite.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import MeasurementObjective, SuperResolution

        small = torch.rand(1, 3, 8, 8) * 2 - 1
        objective = MeasurementObjective(SuperResolution(4), small, noise_std=0.02)
        estimate = torch.zeros(1, 3, 32, 32)
        assert objective.loss(estimate - objective.grad(estimate)) < 1e-6
        ```
    """

    def __init__(
        self,
        operator: LinearOperator,
        measurement: torch.Tensor,
        noise_std: float = 0.05,
        weight: float | None = None,
    ) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"operator={type(operator).__name__} is no LinearOperator; give one such as InpaintMask(mask), or "
                "FromDeepinv(physics)"
            )
        self.operator = operator
        self.measurement = check_pictures("measurement", measurement).detach()
        self.noise_std = check_positive("noise_std", noise_std, zero=True)
        self.weight = None if weight is None else check_positive("weight", weight)
        self._squares: dict[Any, float] = {}

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        residual, scale = self._residual(clean)
        return self._halves(scale) * residual.square().flatten(1).sum(1)

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        residual, scale = self._residual(clean)
        return 2 * self._halves(scale) * self.operator._backward(residual)

    def prox(self, clean: torch.Tensor, variance: float) -> torch.Tensor:
        """The most likely clean sample, between an estimate and the measurement.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): The estimate.
            variance (`float`): nu, the variance of the sample around it, above 0.

        Returns:
            `torch.Tensor` of the same shape. Without noise it is `project`.
        """
        variance = check_positive("variance", variance)
        if not self.noise_std:
            return self.project(clean)
        residual, _ = self._residual(clean)
        solved = self.operator._solve(residual, variance, self.noise_std**2)
        return clean - variance * self.operator._backward(solved)

    def project(self, clean: torch.Tensor) -> torch.Tensor:
        """The nearest sample that has the measurement.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): The estimate.

        Returns:
            `torch.Tensor` of the same shape.
        """
        residual, _ = self._residual(clean)
        return clean - self.operator._pinv(residual)

    def start(self, like: torch.Tensor) -> torch.Tensor:
        """The likeliest of samples of mean 0 and variance 1: where an optimisation begins.

        Args:
            like (`torch.Tensor` of shape `(batch, ...)`): Samples of the size that counts.

        Returns:
            `torch.Tensor` of the same shape.
        """
        return self.prox(torch.zeros_like(like), 1.0)

    def floor(self, clean: torch.Tensor) -> float:
        """The loss that the noise leaves in the true picture, on average.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): Samples of the size that counts.

        Returns:
            `float`: The loss.
        """
        residual, scale = self._residual(clean)
        count = residual[0].numel()
        if isinstance(self.operator, InpaintMask):
            count = int((self.operator.mask.expand(residual.shape)[0] > 0).sum())
        return self._halves(scale) * count * self.noise_std**2

    def _residual(self, clean: torch.Tensor) -> tuple[torch.Tensor, tuple[float, int]]:
        """A x - y, and what it is scaled by: |A|^2 and the number of values."""
        # Checked once; what is made of it here is not checked again.
        found = self.operator._forward(check_pictures("clean", clean))
        if self.measurement.device != found.device or self.measurement.dtype != found.dtype:
            self.measurement = self.measurement.to(found)
        wanted = tuple(self.measurement.shape)
        if wanted[1:] != tuple(found.shape[1:]) or wanted[0] not in (1, len(found)):
            raise ValueError(
                f"measurement of shape {wanted} does not fit: {self.operator} of a sample of shape {tuple(clean.shape)} is "
                f"{tuple(found.shape)}; give that shape"
            )
        key = (tuple(clean.shape), clean.device)
        if key not in self._squares:
            square = self.operator.norm(clean) ** 2
            if not square > 0:
                raise ValueError(
                    f"operator={self.operator} measures nothing of a sample of shape {tuple(clean.shape)}; use another"
                )
            self._squares = {key: square}
        return found - self.measurement, (self._squares[key], found.numel())

    def _halves(self, scale: tuple[float, int]) -> float:
        """The factor of |A x - y|^2."""
        square, count = scale
        return 0.5 / square if self.weight is None else self.weight / count


class LatentMaskObjective(MeasurementObjective):
    """A sample that should be like another where a mask says so, in the space that the scheduler works in.

    Args:
        mask (`torch.Tensor`): 1 where the sample is to be kept, 0 where it is free; see [`InpaintMask`].
        reference (`torch.Tensor` of shape `(batch, channels, height, width)`): What it should be like; for latent models the
            latents, shifted and scaled as the pipeline does. For packed tokens see [`PackedObjective`].
        noise_std (`float`, *optional*, defaults to 0.0): How far it may be from the reference.
        weight (`float`, *optional*): As of [`MeasurementObjective`].

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If the mask does not fit the reference, or a value is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import LatentMaskObjective

        keep = torch.ones(1, 1, 16, 16)
        keep[..., 4:12, 4:12] = 0
        latents = torch.randn(1, 4, 16, 16)
        objective = LatentMaskObjective(keep, latents)
        assert torch.equal(objective.project(torch.zeros_like(latents)), keep * latents)
        ```
    """

    def __init__(
        self, mask: torch.Tensor, reference: torch.Tensor, noise_std: float = 0.0, weight: float | None = None
    ) -> None:
        operator = InpaintMask(mask)
        super().__init__(operator, operator.A(check_pictures("reference", reference)), noise_std, weight)


class SumObjective(Objective):
    """Several objectives at once; a learning rate between 0 and 2 stays stable.

    Args:
        objectives (`Sequence[Objective]`): Them.
        weights (`Sequence[float]`, *optional*): How much each counts, above 0; equally by default. Only their proportions matter.

    Raises:
        TypeError: If one is not an objective.
        ValueError: If there are none, or the weights do not fit.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import LatentMaskObjective, MeasurementObjective, SumObjective, SuperResolution

        keep, latents = torch.ones(16, 16).tril(), torch.randn(1, 4, 16, 16)
        small = SuperResolution(4)
        objective = SumObjective(
            [LatentMaskObjective(keep, latents), MeasurementObjective(small, small.A(latents))], weights=[3, 1]
        )
        assert objective.loss(latents) < 1e-9
        ```
    """

    def __init__(self, objectives: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if not isinstance(objectives, Sequence) or not objectives:
            raise ValueError(f"objectives={objectives!r} has none; give a list of one or more")
        for objective in objectives:
            check_objective("objectives", objective)
        weights = [1.0] * len(objectives) if weights is None else weights
        if not isinstance(weights, Sequence) or len(weights) != len(objectives):
            raise ValueError(
                f"weights={weights!r} does not fit {len(objectives)} objectives; give one number for each"
            )
        numbers = [check_positive("weights", weight) for weight in weights]
        self.objectives, self.weights = tuple(objectives), tuple(number / sum(numbers) for number in numbers)

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        parts = zip(self.objectives, self.weights, strict=True)
        return torch.stack([weight * part.loss(clean) for part, weight in parts]).sum(0)

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        parts = zip(self.objectives, self.weights, strict=True)
        return torch.stack([weight * part.grad(clean) for part, weight in parts]).sum(0)


class StagedObjective(Objective):
    """One objective after another in the course of a run.

    Args:
        objectives (`Sequence[Objective]`): Them, in order.
        stops (`Sequence[float]`): Shares of the run at which each but the last ends, from 0 to 1, ascending.

    Raises:
        TypeError: If one is not an objective.
        ValueError: If the shares do not fit.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import LatentMaskObjective, StagedObjective

        everything, half = torch.ones(16, 16), torch.ones(16, 16).tril()
        latents = torch.randn(1, 4, 16, 16)
        stages = [LatentMaskObjective(mask, latents) for mask in (everything, half)]
        objective = StagedObjective(stages, [0.3])
        assert objective.at(0.2) is stages[0] and objective.at(0.3) is stages[1]
        ```
    """

    def __init__(self, objectives: Sequence[Any], stops: Sequence[float]) -> None:
        if not isinstance(objectives, Sequence) or not objectives:
            raise ValueError(f"objectives={objectives!r} has none; give a list of one or more")
        for objective in objectives:
            check_objective("objectives", objective)
        if not isinstance(stops, Sequence) or len(stops) != len(objectives) - 1:
            raise ValueError(
                f"stops={stops!r} does not fit {len(objectives)} objectives; give one for each but the last"
            )
        numbers = [check_positive("stops", stop, zero=True) for stop in stops]
        if any(a > b for a, b in zip(numbers, [*numbers[1:], 1.0], strict=True)):
            raise ValueError(f"stops={stops!r} is not ascending from 0 to 1; give shares of a run in order")
        self.objectives, self.stops = tuple(objectives), tuple(numbers)
        # What one of them lacks is lacking here too.
        for name in ("prox", "project", "start", "floor"):
            if all(callable(getattr(objective, name, None)) for objective in objectives):
                setattr(self, name, getattr(objectives[-1], name))

    def at(self, share: float) -> Any:
        """The objective of a moment. Schedulers ask for it before each step.

        Args:
            share (`float`): Share of the run that is over, from 0 to 1.

        Returns:
            `Objective`: One of those given.
        """
        return self.objectives[sum(share >= stop for stop in self.stops)]

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        return self.objectives[-1].loss(clean)

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        return self.objectives[-1].grad(clean)


class PackedObjective(Objective):
    """An objective of pictures, on samples whose patches are tokens, as in Flux and Qwen-Image.

    Args:
        objective (`Objective`): An objective of samples of shape `(batch, channels, height, width)`.
        height (`int`), width (`int`): Size of the latents, before packing: for Flux the picture's divided by 8.
        patch_size (`int`, *optional*, defaults to 2): Side of the squares that become tokens; it divides both.

    Raises:
        TypeError: If `objective` is not one.
        ValueError: If a size is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import LatentMaskObjective, PackedObjective

        keep, latents = torch.ones(8, 12).tril(), torch.randn(1, 16, 8, 12)
        objective = PackedObjective(LatentMaskObjective(keep, latents), height=8, width=12)
        assert objective.loss(objective.pack(latents)) == 0
        ```
    """

    def __init__(self, objective: Any, height: int, width: int, patch_size: int = 2) -> None:
        check_objective("objective", objective)
        for name, value in (("patch_size", patch_size), ("height", height), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is out of range; give an int of at least 1")
            if value % patch_size:
                raise ValueError(
                    f"{name}={value} is not a multiple of patch_size={patch_size}; give the size of the latents"
                )
        self.objective, self.height, self.width, self.patch_size = objective, height, width, patch_size
        # What the objective lacks is lacking here too.
        for name in ("prox", "project", "start", "floor"):
            if callable(getattr(objective, name, None)):
                setattr(self, name, getattr(self, f"_{name}"))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as tokens.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Latents.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels * patch_size**2)`.
        """
        size = self.patch_size
        patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as latents.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, channels * patch_size**2)`): Tokens.

        Returns:
            `torch.Tensor` of shape `(batch, channels, height, width)`.

        Raises:
            ValueError: If there are not as many as the size has.
        """
        size, tokens = self.patch_size, check_pictures("clean", tokens)
        rows, columns = self.height // size, self.width // size
        if tokens.ndim != 3 or tokens.shape[1] != rows * columns or tokens.shape[2] % size**2:
            raise ValueError(
                f"clean has shape {tuple(tokens.shape)}; height={self.height}, width={self.width} in patches of {size} are "
                f"(batch, {rows * columns}, channels * {size**2})"
            )
        patches = tokens.unflatten(2, (-1, size, size)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        return self.objective.loss(self.unpack(clean))

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        return self.pack(self.objective.grad(self.unpack(clean)))

    def _prox(self, clean: torch.Tensor, variance: float) -> torch.Tensor:
        return self.pack(self.objective.prox(self.unpack(clean), variance))

    def _project(self, clean: torch.Tensor) -> torch.Tensor:
        return self.pack(self.objective.project(self.unpack(clean)))

    def _start(self, like: torch.Tensor) -> torch.Tensor:
        return self.pack(self.objective.start(self.unpack(like)))

    def _floor(self, clean: torch.Tensor) -> float:
        return self.objective.floor(self.unpack(clean))
