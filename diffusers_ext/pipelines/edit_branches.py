"""The branches of an edit on an inverted picture: what the network says of them, and how a step moves them.

The source branch carries the picture's own prompt. Where a method has stored the states that it passes through exactly
(`FOLLOWS`), it is put on them after every step, as Direct Inversion does (2023, arXiv 2310.01506), and needs no pass
without words; with the other methods it is sampled with guidance, as the edits are. It takes part in a pass only where something
looks at it: a prompt-to-prompt controller, or a caller who wants to see it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..attention import AttentionController, ControllerGroup
from ..guidance import Condition, join_conditions
from ..inversion import DDIMLadder, Inverted, ddim_step, stochastic_step, with_guidance
from ..inversion.bdia import laid_scheduler
from ..schedulers import BDIADDIMScheduler
from .inputs import checked_number


# Methods whose states are those of the source branch at the guidance scale that they were made for.
FOLLOWS = ("direct", "edit_friendly", "bdia")


class BranchNetwork:
    """Outputs of a network for the edits, and for the source beside them.

    Args:
        unet (`torch.nn.Module`): The network.
        controller ([`AttentionController`] or [`ControllerGroup`], *optional*):
            Attached to it; then the sources are the first rows.
        follows (`bool`): Whether the source is put on stored states, so that it needs no guidance.
        kwargs (`dict`): Keyword arguments of every pass.
    """

    def __init__(
        self,
        unet: Any,
        controller: AttentionController | ControllerGroup | None,
        follows: bool,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.unet, self.controller, self.follows, self.kwargs = unet, controller, follows, kwargs
        self.passes = 0

    def __call__(
        self,
        latents: torch.Tensor,
        source_latents: torch.Tensor | None,
        timestep: torch.Tensor,
        guidance_scale: float,
        edit: tuple[Condition, Condition],
        source: tuple[Condition, Condition],
    ) -> torch.Tensor:
        """Output of every row, those of the source first.

        Args:
            latents (`torch.Tensor` of shape `(results, channels, height, width)`): The edits.
            source_latents (`torch.Tensor` of shape `(pictures, channels, height, width)`, *optional*): The source branch.
            timestep (`torch.Tensor`): Scalar.
            guidance_scale (`float`): w. As everywhere in diffusers there is no guidance at 1 and below.
            edit (`tuple` of two `dict`): Conditions of the edits, without their words and with them.
            source (`tuple` of two `dict`): The same of the source.

        Returns:
            `torch.Tensor` of shape `(pictures + results, ...)`, or `(results, ...)` without the source.
        """
        without, words = edit
        rows = latents
        if source_latents is not None:
            rows, words = torch.cat([source_latents, latents]), join_conditions([source[1], words])
        if guidance_scale <= 1:
            return self._run(rows, timestep, words)
        if source_latents is None or not self.follows:
            without = without if source_latents is None else join_conditions([source[0], without])
            # In one batch, as in diffusers, whose rounding is then ours.
            both = self._run(torch.cat([rows] * 2), timestep, join_conditions([without, words]))
            away, towards = both.chunk(2)
            return with_guidance(away, towards, guidance_scale)
        towards = self._run(rows, timestep, words)
        if self.controller is None:
            away = self._run(latents, timestep, without)
        else:
            with self.controller.paused():
                away = self._run(latents, timestep, without)
        pictures = len(source_latents)
        return torch.cat([towards[:pictures], with_guidance(away, towards[pictures:], guidance_scale)])

    def _run(self, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.passes += len(latents)
        output = self.unet(latents.to(self.unet.dtype), timestep, return_dict=False, **condition, **self.kwargs)[0]
        return output.to(latents.dtype)


class EditSteps:
    """The sampler that belongs to an inversion: DDIM, with the stored noise, or BDIA from the stored pair.

    Args:
        inverted ([`Inverted`]): What the method found, on the device, in float32.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        repeats (`int`): Edits of each picture.
        skip (`int`): Steps that are left out at the noisy end.

    Attributes:
        first (`int`): The first step that is taken.

    Raises:
        ValueError: If the inversion does not say what its sampler needs.
    """

    def __init__(self, inverted: Inverted, ladder: DDIMLadder, repeats: int, skip: int) -> None:
        self.inverted, self.ladder, self.repeats = inverted, ladder, repeats
        self.first = skip
        self.bdia: Any = None
        self.eta = 0.0
        if inverted.method == "edit_friendly":
            self.eta = checked_number(inverted.settings.get("eta"), "eta of the inversion", 0.0, 1.0)
        if inverted.method == "bdia":
            # The pair is what remains of the first step.
            self.first = 1
            gamma = checked_number(inverted.settings.get("gamma"), "gamma of the inversion", 0.5, 1.0)
            pair = (self.repeated(inverted.latents[-1]), self.repeated(inverted.latents[-2]))
            self.bdia = laid_scheduler(BDIADDIMScheduler, ladder.config, len(ladder), pair[0], gamma=gamma)
            self.bdia.set_initial_pair(*pair)

    def repeated(self, pictures: torch.Tensor) -> torch.Tensor:
        """Something of each picture for each of its edits."""
        return pictures.repeat(self.repeats, *[1] * (pictures.ndim - 1))

    def state(self, step: int) -> torch.Tensor:
        """The states of the pictures before a step, `(pictures, ...)`; after the last one their clean latents."""
        return self.inverted.latents[len(self.ladder) - step]

    def __call__(self, output: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Moves the edits one step on."""
        if self.bdia is not None:
            moved: torch.Tensor = self.bdia.step(output, self.ladder.timesteps[step], latents).prev_sample
            return moved
        levels = self.ladder.sampling_levels(step)
        if self.inverted.noise_maps is None:
            return ddim_step(output, latents, *levels, self.ladder.prediction_type)
        mean, spread = stochastic_step(output, latents, *levels, self.eta, self.ladder.prediction_type)
        return mean + spread * self.repeated(self.inverted.noise_maps[len(self.ladder) - 1 - step])

    def source(self, output: torch.Tensor, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Moves a source branch that is sampled, which methods with a sampler of their own never need."""
        return ddim_step(output, latents, *self.ladder.sampling_levels(step), self.ladder.prediction_type)
