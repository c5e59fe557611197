"""Negative-prompt inversion: the source prompt takes the place of the empty one.

Negative-Prompt Inversion: Fast Image Inversion for Editing with Text-Guided Diffusion Models, 2023, arXiv 2305.16807:
null-text optimisation ends near the embeddings of the source prompt, so begin and end there. Guidance then has nothing to
push against,

    null + w (source - null) = source        where null = source,

and the source prompt is reproduced at any guidance scale as it is at 1. With `interpolation` the embeddings lie on the
great circle between those of the source and of the empty prompt, which gives edits more room.
"""

from dataclasses import replace

import torch

from .ddim import DDIMLadder, ddim_inversion
from .denoiser import Denoiser, InversionCallback, Inverted, checked_float


def negative_prompt_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    interpolation: float = 0.0,
    callback: InversionCallback | None = None,
) -> Inverted:
    """Inverts pictures by DDIM and lets guidance point away from their own prompts: one network evaluation a step.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        interpolation (`float`, *optional*, defaults to 0.0): Part of the way from the source prompt, 0, to the empty one, 1.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step.

    Returns:
        [`Inverted`]: The states, and `null_embeddings` of shape `(1, batch, tokens, width)`.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.
    """
    fraction = checked_float("interpolation", interpolation, 0.0, 1.0)
    inverted = ddim_inversion(denoiser, latents, ladder, callback=callback)
    with torch.no_grad():
        embeddings = denoiser.source_embeddings.detach().clone()
        if fraction:
            embeddings = slerp(fraction, embeddings, denoiser.null_embeddings.detach())
    return replace(inverted, method="negative_prompt", null_embeddings=embeddings[None])


def slerp(fraction: float, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Interpolates along the great circle between two tensors, each item of the batch taken as one vector.

        sin((1 - f) o) / sin(o) start + sin(f o) / sin(o) end,     o the angle between them

    Args:
        fraction (`float`): f, from 0 to 1.
        start (`torch.Tensor` of shape `(batch, ...)`): At f = 0.
        end (`torch.Tensor`): At f = 1, the same shape.

    Returns:
        `torch.Tensor` of that shape. Between vectors of nearly one direction it is the straight line.

    Example:
        ```python
        import torch
        from diffusers_ext.inversion import slerp

        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        assert torch.allclose(slerp(0.5, a, b), torch.full((1, 2), 0.5**0.5))
        ```
    """
    a, b = start.double().flatten(1), end.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
    angle = cosine.clamp(-1.0, 1.0).acos()
    straight = angle.sin() < 1e-6
    span = torch.where(straight, torch.ones_like(angle), angle.sin())
    left = torch.where(straight, torch.full_like(angle, 1.0 - fraction), ((1.0 - fraction) * angle).sin() / span)
    right = torch.where(straight, torch.full_like(angle, fraction), (fraction * angle).sin() / span)
    return (left * a + right * b).reshape(start.shape).to(start.dtype)
