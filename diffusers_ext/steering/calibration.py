"""How well a flow model knows its data, level by level.

    E(t) = E |v(x_t, t) - (eps - x0)|^2,   x_t = (1 - t) x0 + t eps,   the mean over values, pictures and noise

Solving Inverse Problems with FLAIR, 2025, arXiv 2506.02680, weighs the network by the inverse of it. Of a perfect model it is the
variance of eps - x0 given x_t, which no model is without.
"""

from collections.abc import Callable, Sequence

import torch

from ..schedulers.noise import Generators, drawn_noise
from .operators import check_pictures


def velocity_errors(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    samples: torch.Tensor,
    count: int = 100,
    generator: Generators = None,
) -> list[float]:
    """Measures E(t) at equally spaced levels from 1 to 0.

    Args:
        velocity (`Callable`): Takes states of the shape of `samples` and a level from 1 to 0, and returns eps - x0.
        samples (`torch.Tensor` of shape `(batch, ...)`): Clean samples: latents, shifted and scaled, of a latent model.
        count (`int`, *optional*, defaults to 100): Number of levels, at least 2.
        generator (`torch.Generator` or list of them, *optional*): Source of the noise.

    Returns:
        `list[float]`: What [`FLAIRScheduler`] takes as `velocity_errors`.

    Raises:
        TypeError: If an argument is not what it should be.
        ValueError: If `count` is out of range, or the velocity does not fit or is not finite.

    Example:
        ```python
        import torch
        from diffusers_ext.steering import velocity_errors

        # of white noise the velocity is known: v = x (2 t - 1) / (t^2 + (1 - t)^2)
        errors = velocity_errors(lambda x, t: x * (2 * t - 1) / (t**2 + (1 - t) ** 2), torch.randn(64, 3, 8, 8), count=3)
        assert [round(error) for error in errors] == [1, 2, 1]
        ```
    """
    if not callable(velocity):
        raise TypeError(f"velocity={velocity!r} cannot be called; give a function of states and a level")
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise ValueError(f"count={count!r} is not a number of levels; give an int of at least 2")
    samples = check_pictures("samples", samples)
    levels: Sequence[float] = torch.linspace(1, 0, count, dtype=torch.float64).tolist()
    errors = []
    with torch.no_grad():
        for level in levels:
            noise = drawn_noise(samples, generator)
            found = velocity((1 - level) * samples + level * noise, level)
            if not isinstance(found, torch.Tensor) or found.shape != samples.shape:
                shown = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
                raise ValueError(
                    f"velocity returned {shown}; it must return {tuple(samples.shape)}, the shape of its states"
                )
            error = float((check_pictures("velocity", found) - (noise - samples)).square().mean())
            errors.append(error)
    return errors
