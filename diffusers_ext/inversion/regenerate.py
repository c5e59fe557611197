"""The way back: from what an inversion found to the pictures, or with other prompts to edits of them."""

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch

from .bdia import BDIAPair, bdia_states
from .ddim import DDIMLadder, ddim_step
from .denoiser import Denoiser, Inverted, checked_count, checked_float, finite
from .edit_friendly import stochastic_step


def regenerate(
    denoiser: Denoiser,
    inverted: Inverted,
    ladder: DDIMLadder,
    guidance_scale: float | None = None,
    source: bool = True,
    skip: int = 0,
) -> torch.Tensor:
    """Samples with all that an inversion has stored.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts, or with those of an edit.
        inverted ([`Inverted`]): What a method returned.
        ladder ([`DDIMLadder`]): The same timesteps and levels as in the inversion.
        guidance_scale (`float`, *optional*): Defaults to that of the inversion, or 1 if it had none.
        source (`bool`, *optional*, defaults to `True`): Whether this is the way back to the pictures. Offsets belong to it
            alone, so give False for an edit.
        skip (`int`, *optional*, defaults to 0): Steps to leave out at the noisy end: sampling starts from a later state, which
            keeps more of the picture. Not with BDIA, whose start is a pair.

    Returns:
        `torch.Tensor` of shape `(batch, channels, height, width)`: The latents of the pictures.

    Raises:
        ValueError: If arguments do not fit or values become infinite or NaN.
        TypeError: If an argument is of a wrong type.
    """
    return deque(regenerate_states(denoiser, inverted, ladder, guidance_scale, source, skip), maxlen=1).pop()


def regenerate_states(
    denoiser: Denoiser,
    inverted: Inverted,
    ladder: DDIMLadder,
    guidance_scale: float | None = None,
    source: bool = True,
    skip: int = 0,
) -> Iterator[torch.Tensor]:
    """The states of [`regenerate`] one by one: first the noisy one where it starts, last the pictures. Same arguments."""
    for name, value, kind, what in (
        ("denoiser", denoiser, Denoiser, "Denoiser(network, source, null) makes"),
        ("inverted", inverted, Inverted, "an inversion method returned"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; give what {what}")
    own = inverted.settings.get("guidance_scale")
    scale = float(own or 1.0) if guidance_scale is None else checked_float("guidance_scale", guidance_scale, 0.0)
    checked_count("skip", skip, 0, len(ladder) - 1)
    if inverted.timesteps.tolist() != ladder.timesteps.flip(0).tolist():
        raise ValueError(
            f"the inversion has the timesteps {inverted.timesteps.tolist()}, the ladder "
            f"{ladder.timesteps.flip(0).tolist()} (ascending); use the same model, scheduler and steps"
        )
    if len(denoiser) != inverted.latents.shape[1]:
        raise ValueError(
            f"the inversion has {inverted.latents.shape[1]} pictures, the denoiser prompts of {len(denoiser)}"
        )
    if source and own is not None and scale != own:
        raise ValueError(
            f"guidance_scale={scale}, but the inversion was made for {own}; use the same value, or source=False for an edit"
        )
    if inverted.method == "bdia":
        if skip:
            raise ValueError(f"skip={skip} is not possible after bdia, which starts from a pair; use 0")
        settings = {**ladder.config, "gamma": inverted.settings["gamma"]}
        pair = BDIAPair(inverted.latents[-1], inverted.latents[-2], settings, len(ladder))
        return _checked(bdia_states(partial(denoiser.guided, guidance_scale=scale), pair), len(ladder))
    return _checked(_sampled(denoiser, inverted, ladder, scale, source, skip), len(ladder) - skip)


def _checked(states: Iterator[torch.Tensor], steps: int) -> Iterator[torch.Tensor]:
    # The network runs inside `next`, so gradients are off for that long and not while the caller has the state.
    number = 0
    while True:
        with torch.no_grad():
            state = next(states, None)
        if state is None:
            return
        yield finite(state, f"the latents after {number} of {steps} steps")
        number += 1


def _sampled(
    denoiser: Denoiser, inverted: Inverted, ladder: DDIMLadder, scale: float, source: bool, skip: int
) -> Iterator[torch.Tensor]:
    steps, states = len(ladder), inverted.latents
    state = states[steps - skip]
    yield state
    for step in range(skip, steps):
        k, timestep = steps - 1 - step, ladder.timesteps[step]
        if source and inverted.method == "direct" and inverted.offsets is None:
            # Without offsets the source is put on its trajectory, wherever a step would lead.
            state = states[k]
        else:
            output = denoiser.guided(state, timestep, scale, inverted.null_embeddings_at(step))
            levels = ladder.sampling_levels(step)
            if inverted.noise_maps is None:
                state = ddim_step(output, state, *levels, ladder.prediction_type)
            else:
                eta = float(inverted.settings["eta"])
                mean, spread = stochastic_step(output, state, *levels, eta, ladder.prediction_type)
                state = mean + spread * inverted.noise_maps[k]
            if source and inverted.offsets is not None:
                state = state + inverted.offsets[k]
        yield state
