"""What samples are steered towards, where only a loss is known: functions, classifiers, and what a decoder makes of latents.

Gradients are taken by autograd, through the function and the decoder and never through the model that is steered. Nobody knows the
curvature of such a loss, so that the step is Polyak's (Introduction to Optimization, 1987),

    grad = (loss - floor) / |g|^2 g,   g the gradient of the loss,

for which 0 < eta < 2 lowers the distance to every minimum of a convex loss whose least value is `floor`, whatever the units of loss
and sample. Where the gradient is all but zero its length is bounded.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .objectives import Objective, check_objective
from .operators import check_pictures, check_positive


def polyak_step(
    loss: torch.Tensor, gradient: torch.Tensor, floor: torch.Tensor | float, largest: float
) -> torch.Tensor:
    """The gradient of every sample, scaled to the step that would reach the floor if the loss were linear.

    Args:
        loss (`torch.Tensor` of shape `(batch,)`): Losses.
        gradient (`torch.Tensor` of shape `(batch, ...)`): Their gradients.
        floor (`float`): The least value of the loss; below it there is no step.
        largest (`float`): Largest root mean square of the step.

    Returns:
        `torch.Tensor` of the shape of `gradient`.
    """
    flat = gradient.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    wanted = (loss - floor).clamp(min=0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    length = torch.minimum(wanted, torch.full_like(wanted, largest * math.sqrt(flat.shape[1])))
    factor = torch.where(norm > 0, length / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
    return gradient * factor.reshape(-1, *[1] * (gradient.ndim - 1))


class FunctionObjective(Objective):
    """Any differentiable loss of the clean sample.

    Args:
        function (`Callable`):
            Takes samples of shape `(batch, ...)`, float32, and returns a loss of shape `(batch,)`.
        floor (`float`, *optional*, defaults to 0.0):
            The least value that the loss can take, or at which it is low enough.
        largest_step (`float`, *optional*, defaults to 0.5):
            Largest root mean square of a step of learning rate 1, in units of the sample.

    Raises:
        TypeError: If `function` is not callable.
        ValueError: If a number is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import FunctionObjective

        darker = FunctionObjective(lambda pictures: (pictures.mean((1, 2, 3)) + 0.5).square())
        picture = torch.rand(1, 3, 16, 16)
        assert darker.loss(picture - darker.grad(picture)) < darker.loss(picture)
        ```
    """

    def __init__(
        self, function: Callable[[torch.Tensor], torch.Tensor], floor: float = 0.0, largest_step: float = 0.5
    ) -> None:
        if not callable(function):
            raise TypeError(f"function={function!r} cannot be called; give a function of samples")
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not math.isfinite(floor):
            raise ValueError(f"floor={floor!r} is not a number; give the least value of the loss")
        self.function, self._floor = function, float(floor)
        self.largest_step = check_positive("largest_step", largest_step)

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        return self._loss(check_pictures("clean", clean))

    def floor(self, clean: torch.Tensor) -> float:
        """The loss that is low enough.

        Args:
            clean (`torch.Tensor` of shape `(batch, ...)`): Samples of the size that counts.

        Returns:
            `float`: The loss.
        """
        return self._floor_of(clean)

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        clean = check_pictures("clean", clean)
        # Pipelines run without gradients, and some in inference mode, whose tensors take part in none.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = clean.detach().clone().requires_grad_(True)
            loss = self._loss(leaf)
            if not loss.requires_grad:
                raise ValueError(
                    f"function={self._name()} returned a loss that does not depend on the sample; it must be differentiable"
                )
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return polyak_step(loss.detach(), gradient, self._floor_of(clean), self.largest_step)

    def _loss(self, clean: torch.Tensor) -> torch.Tensor:
        loss = self.function(clean)
        if not isinstance(loss, torch.Tensor) or loss.shape != clean.shape[:1]:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"function={self._name()} returned {found}; it must return one loss for each sample, shape ({len(clean)},)"
            )
        return loss.to(clean.dtype)

    def _floor_of(self, clean: torch.Tensor) -> float:
        return self._floor

    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


class ClassifierObjective(FunctionObjective):
    """A sample that a classifier should give a class.

    Args:
        classifier (`Callable`): Takes samples of shape `(batch, ...)`, float32, and returns logits of shape `(batch, classes)`. For a
            classifier of pictures on a latent model, see [`DecodedObjective`].
        target (`int` or `torch.Tensor` of shape `(batch,)`): The wanted class, or one for each sample.
        confidence (`float`, *optional*, defaults to 0.95): Probability at which the class is certain enough.
        largest_step (`float`, *optional*, defaults to 0.5): As of [`FunctionObjective`].

    Raises:
        TypeError: If `classifier` is not callable or `target` is not whole.
        ValueError: If a number is out of range.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import ClassifierObjective


        def classifier(pictures):  # red or blue
            return torch.stack([pictures[:, 0].mean((1, 2)), pictures[:, 2].mean((1, 2))], 1)


        bluer, picture = ClassifierObjective(classifier, target=1), torch.rand(1, 3, 16, 16)
        assert (picture - bluer.grad(picture))[:, 2].mean() > picture[:, 2].mean()
        ```
    """

    def __init__(
        self,
        classifier: Callable[[torch.Tensor], torch.Tensor],
        target: int | torch.Tensor,
        confidence: float = 0.95,
        largest_step: float = 0.5,
    ) -> None:
        if not callable(classifier):
            raise TypeError(f"classifier={classifier!r} cannot be called; give a function of samples, or a module")
        whole = isinstance(target, int) and not isinstance(target, bool)
        if not whole and not (isinstance(target, torch.Tensor) and target.ndim == 1 and target.dtype == torch.long):
            raise TypeError(f"target={target!r} is no class; give an int, or a tensor of one int64 for each sample")
        if check_positive("confidence", confidence) >= 1:
            raise ValueError(f"confidence={confidence!r} is out of range; give a probability below 1")
        super().__init__(self._cross_entropy, -math.log(confidence), largest_step)
        self.classifier, self.target = classifier, target

    def _cross_entropy(self, clean: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(clean)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(clean):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"classifier returned {found}; it must return logits of shape ({len(clean)}, classes)")
        target = torch.as_tensor(self.target, device=logits.device)
        target = target.expand(len(clean)) if target.ndim == 0 else target
        if target.shape != logits.shape[:1] or not bool(((target >= 0) & (target < logits.shape[1])).all()):
            raise ValueError(
                f"target={self.target!r} does not fit logits of shape {tuple(logits.shape)}; give a class from 0 to "
                f"{logits.shape[1] - 1}"
            )
        return functional.cross_entropy(logits.float(), target, reduction="none")

    def _name(self) -> str:
        return getattr(self.classifier, "__name__", type(self.classifier).__name__)


class DecodedObjective(FunctionObjective):
    """An objective of pictures, for a model that works in latents: the gradient goes through the decoder.

    Args:
        vae (`Any`):
            The pipeline's autoencoder, or a function from latents, as the scheduler has them, to pictures in [-1, 1]. A small one
            such as TAESD costs little.
        objective (`Objective`): An objective of the decoded pictures.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Whether the decoder computes its activations anew in the backward pass instead of keeping them.
        largest_step (`float`, *optional*, defaults to 0.5): As of [`FunctionObjective`].

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If a number is out of range, or the autoencoder has no checkpointing.

    Example:
        ```python
        import torch
        from diffusers import AutoencoderKL
        from diffusers_ext.steering import DecodedObjective, MeasurementObjective, SuperResolution

        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        small = torch.zeros(1, 3, 4, 4)
        objective = DecodedObjective(vae, MeasurementObjective(SuperResolution(4), small))
        latents = torch.randn(1, 4, 16, 16)
        assert objective.grad(latents).shape == latents.shape
        ```
    """

    def __init__(self, vae: Any, objective: Any, checkpointing: bool = False, largest_step: float = 0.5) -> None:
        check_objective("objective", objective)
        if not callable(getattr(vae, "decode", None)) and not callable(vae):
            raise TypeError(f"vae={type(vae).__name__} cannot decode; give an autoencoder or a function of latents")
        if checkpointing and not callable(getattr(vae, "enable_gradient_checkpointing", None)):
            raise ValueError(
                f"checkpointing={checkpointing!r}: {type(vae).__name__} has none; use checkpointing=False"
            )
        super().__init__(self._decoded_loss, 0.0, largest_step)
        self.vae, self.objective, self.checkpointing = vae, objective, checkpointing
        if callable(getattr(objective, "start", None)) and callable(getattr(vae, "encode", None)):
            self.start = self._started
        self._floors: dict[torch.Size, float] = {}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents that are shifted and scaled as in the pipeline.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, ..., height, width)`): Latents.

        Returns:
            `torch.Tensor` of shape `(batch, 3, ..., height, width)`: float32, about -1 to 1.
        """
        if not callable(getattr(self.vae, "decode", None)):
            return self.vae(latents)
        scale, shift = self._statistics(latents)
        latents = latents * scale + shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures, shifted and scaled as in the pipeline: `decode` leads back as far as the autoencoder does.

        Args:
            pictures (`torch.Tensor` of shape `(batch, 3, ..., height, width)`): Pictures in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch, channels, ..., height, width)`: float32, means of what the encoder says.

        Raises:
            TypeError: If `vae` is a function, or cannot encode.
        """
        if not callable(getattr(self.vae, "encode", None)):
            raise TypeError(f"vae={type(self.vae).__name__} cannot encode; give an autoencoder")
        answer = self.vae.encode(pictures.to(self.vae.dtype))
        found = answer.latents if hasattr(answer, "latents") else answer.latent_dist.mode()
        scale, shift = self._statistics(found.float())
        return (found.float() - shift) / scale

    def _statistics(self, like: torch.Tensor) -> tuple[Any, Any]:
        """What latents are multiplied with, and what is added then, before they are decoded."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shape = (1, -1, *[1] * (like.ndim - 2))
            mean, std = (like.new_tensor(config[name]).reshape(shape) for name in ("latents_mean", "latents_std"))
            return std, mean
        return 1.0 / (config.get("scaling_factor") or 1.0), config.get("shift_factor") or 0.0

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        with _ready_to_differentiate(self.vae, self.checkpointing):
            return super().grad(clean)

    def _decoded_loss(self, clean: torch.Tensor) -> torch.Tensor:
        return self.objective.loss(self.decode(clean))

    def _started(self, like: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.encode(self.objective.start(self.decode(like)).clamp(-1, 1))

    def _floor_of(self, clean: torch.Tensor) -> float:
        floor = getattr(self.objective, "floor", None)
        if not callable(floor):
            return 0.0
        if clean.shape not in self._floors:
            with torch.no_grad():
                self._floors = {clean.shape: float(floor(self.decode(clean)))}
        return self._floors[clean.shape]

    def _name(self) -> str:
        return type(self.objective).__name__


@contextmanager
def _ready_to_differentiate(module: Any, checkpointing: bool) -> Iterator[None]:
    """No gradients of the weights, which would keep every activation; checkpoints if wanted; both as before afterwards."""
    weights = (
        [weight for weight in module.parameters() if weight.requires_grad] if isinstance(module, nn.Module) else []
    )
    switch = checkpointing and not getattr(module, "is_gradient_checkpointing", False)
    try:
        for weight in weights:
            weight.requires_grad_(False)
        if switch:
            module.enable_gradient_checkpointing()
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        if switch:
            module.disable_gradient_checkpointing()
