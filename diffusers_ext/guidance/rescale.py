"""Rescaling of a guidance gradient to the size of classifier-free guidance.

Guide-and-Rescale: Self-Guidance with Noise Rescaling for Image Editing, 2024, arXiv 2409.01322.

    r     = ||g|| / ||c||               g the gradient of the energies, c = w (eps_target - eps_null)
    gamma = clip(r, low, high) / r
    eps   = eps_null + c + gamma g

so that the added term never has less than `low` and never more than `high` times the norm of the classifier-free term.
The norms are taken per sample, where the authors take them over the batch: a picture's edit must not depend on its
neighbours.
"""

import math

import torch


# Below this a gradient counts as zero: dividing by it would overflow float32.
SMALLEST_NORM = 1e-30


def sample_norm(tensor: torch.Tensor) -> torch.Tensor:
    """L2 norm of every sample of a batch, in float32.

    Args:
        tensor (`torch.Tensor` of shape `(batch, ...)`): Any floating dtype.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The norms.

    Example:
        ```python
        import torch
        from diffusers_ext.guidance.rescale import sample_norm

        assert sample_norm(torch.ones(2, 4, 8, 8)).tolist() == [16.0, 16.0]
        ```
    """
    return torch.linalg.vector_norm(tensor.float().flatten(1), dim=1)


def rescale_factor(guidance_norm: torch.Tensor, reference_norm: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The factor gamma that brings a gradient's norm into `[low, high]` times a reference norm.

    Args:
        guidance_norm (`torch.Tensor` of shape `(batch,)`): Norms of the gradient, at least 0.
        reference_norm (`torch.Tensor` of shape `(batch,)`): Norms of the classifier-free term, at least 0.
        low (`float`): Smallest ratio allowed, at least 0.
        high (`float`): Largest ratio allowed, at least `low`; may be infinite.

    Returns:
        `torch.Tensor` of shape `(batch,)`: gamma. Where the gradient is zero there is nothing to scale and gamma is 1;
        where only the reference is zero the ratio counts as 1, as in the authors' code.
    """
    nothing = guidance_norm < SMALLEST_NORM
    ratio = guidance_norm / torch.where(reference_norm == 0, guidance_norm, reference_norm)
    ratio = torch.where(nothing, torch.ones_like(ratio), ratio)
    return torch.where(nothing, torch.ones_like(ratio), ratio.clamp(low, high) / ratio)


class NormRescaler:
    """Keeps the guidance gradient between `low` and `high` times the norm of the classifier-free term.

    Args:
        low (`float`, *optional*, defaults to 0.33):
            Smallest ratio of the norms, at least 0. A weak gradient is amplified to it.
        high (`float`, *optional*, defaults to 3.0):
            Largest ratio, at least `low`. `NormRescaler(0, float("inf"))` leaves every gradient as it is; `low == high`
            makes the ratio constant, so that the energies' scales only set their mix.

    Raises:
        ValueError: If the bounds are negative, not numbers, or in the wrong order.

    Example:
        ```python
        import torch
        from diffusers_ext import NormRescaler

        gradient, classifier_free = torch.full((1, 4, 8, 8), 9.0), torch.ones(1, 4, 8, 8)
        gamma, _, _ = NormRescaler(low=0.33, high=3.0)(gradient, classifier_free)
        assert torch.allclose(gamma * 9, torch.tensor([3.0]))
        ```
    """

    def __init__(self, low: float = 0.33, high: float = 3.0) -> None:
        for name, value in (("low", low), ("high", high)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
                raise ValueError(f"rescale_range: {name}={value!r} is not a number of at least 0")
            if math.isfinite(value) and value > torch.finfo(torch.float32).max:
                raise ValueError(f"rescale_range: {name}={value!r} is beyond float32; use float('inf') for no bound")
        if low > high or math.isinf(low):
            raise ValueError(
                f"rescale_range=({low}, {high}) has its lower bound above its upper; give (low, high) with low <= high"
            )
        self.low = float(low)
        self.high = float(high)

    def __call__(
        self, guidance: torch.Tensor, reference: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes gamma for a batch.

        Args:
            guidance (`torch.Tensor` of shape `(batch, ...)`): The gradient of the energies.
            reference (`torch.Tensor` of shape `(batch, ...)`): The classifier-free term, its scale included.

        Returns:
            `tuple` of three `torch.Tensor` of shape `(batch,)`: gamma, the gradient's norm, the reference's norm.
        """
        guidance_norm, reference_norm = sample_norm(guidance), sample_norm(reference)
        return rescale_factor(guidance_norm, reference_norm, self.low, self.high), guidance_norm, reference_norm

    def __repr__(self) -> str:
        return f"{type(self).__name__}(low={self.low}, high={self.high})"
