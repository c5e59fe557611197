"""Null-text inversion: embeddings of the empty prompt, optimised so that guided sampling keeps to the inverted trajectory.

Null-text Inversion for Editing Real Images using Guided Diffusion Models, 2022, arXiv 2211.09794. With z*_k the states of DDIM
inversion and S(z, u) a sampling step whose guidance points away from embeddings u,

    for k = T ... 1:    u_k = argmin_u mean((S(z, u) - z*_{k-1})^2)   from the former step's u, by Adam
                        z   = S(z, u_k)

The authors take ten rounds of Adam at rate 1e-2 (1 - i/100) in step i, stop a step's rounds where the loss is below
1e-5 + 2e-5 i, and evaluate the network twice more with what was found: up to 1 + 10 * 2 + 2 forward and backward passes a
step. `schedule="official"` gives their embeddings. The default spends at most 8:

* The source prompt's pass is made once a step, for the state does not change while u does.
* The best of the evaluated embeddings is kept, with the state it led to, so nothing is evaluated after the last round.
* The second and the last round are reached by a jump, which needs no gradient. S is nearly linear in u, so changes of u, each
  with the change of the network's output that it brings, tell which combination of them lowers the loss most. One such
  change is free: that from u to the embeddings of the source prompt, whose pass has been made. The others are those of the rounds
  before. The first jump thus goes as far towards negative-prompt inversion as the loss falls; the last one puts right
  what Adam's rounds between them, at a higher rate than the authors', have left.

States, embeddings and Adam are in float32, whatever the network is in.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch

from .ddim import DDIMLadder, ddim_inversion, ddim_step, sampling_factors
from .denoiser import (
    Denoiser,
    InversionCallback,
    InversionProgress,
    InversionStoppedError,
    Inverted,
    checked_count,
    checked_float,
    checked_start,
    with_guidance,
)
from .fixed_point import least_residual_weights


RIDGE = 2e-2  # of the mean square of the changes: over their lengths S is only nearly linear


@dataclass(frozen=True)
class NullTextSchedule:
    """How a step's embeddings are looked for.

    Attributes:
        inner_steps (`int`): Rounds at most.
        learning_rate (`float`): Adam's, in the first step.
        jumps (`bool`): Whether the second and the last round are reached by a jump, and the best evaluated embeddings are
            taken; else every round is one of Adam's, and those after the last are taken, which costs one more evaluation.
        decay_over (`int`, *optional*): The rate falls linearly and would be 0 after so many steps; None stands for twice the
            steps of the run.
    """

    inner_steps: int
    learning_rate: float
    jumps: bool
    decay_over: int | None = None

    @property
    def evaluations(self) -> int:
        """Forward passes of a step at most, without that of the source prompt."""
        return self.inner_steps + (0 if self.jumps else 1)

    @property
    def gradients(self) -> int:
        """Backward passes of a step at most."""
        return sum(self.descends(number) for number in range(self.inner_steps))

    def descends(self, number: int) -> bool:
        """Whether a round, counted from 0, ends with a step of Adam."""
        return not self.jumps or 0 < number < self.inner_steps - 2

    def rate(self, step: int, steps: int) -> float:
        """Learning rate in a step, counted from 0 at the noisy end; never below 1 % of the first."""
        return self.learning_rate * max(1.0 - step / (self.decay_over or 2 * steps), 0.01)


SCHEDULES = {
    "fast": NullTextSchedule(inner_steps=5, learning_rate=5e-2, jumps=True),
    "official": NullTextSchedule(inner_steps=10, learning_rate=1e-2, jumps=False, decay_over=100),
}


def null_text_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    guidance_scale: float = 7.5,
    schedule: str = "fast",
    inner_steps: int | None = None,
    learning_rate: float | None = None,
    early_stop: float = 1e-5,
    callback: InversionCallback | None = None,
) -> Inverted:
    """Inverts pictures by DDIM and finds null embeddings with which guided sampling leads back to them.

    A picture is optimised by itself: its embeddings do not depend on its batch, and memory does not grow with it. Gradients
    go through the network, so switch gradient checkpointing on where memory is short; the result is the same.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        guidance_scale (`float`, *optional*, defaults to 7.5): That of the sampling, not 1.
        schedule (`str`, *optional*, defaults to `"fast"`): `"fast"`, or `"official"` for the authors' rounds and rate.
        inner_steps (`int`, *optional*): Rounds in each step instead of the schedule's 5 or 10.
        learning_rate (`float`, *optional*): Adam's rate in the first step instead of the schedule's 5e-2 or 1e-2.
        early_stop (`float`, *optional*, defaults to 1e-5): A step's rounds end below this loss + 2e-5 times its number.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every step of the inversion and every round,
            with the loss.

    Returns:
        [`Inverted`]: The states of DDIM inversion, and `null_embeddings` of shape `(steps, batch, tokens, width)` in float32.

    Raises:
        InversionStoppedError: If the loss becomes infinite or NaN; the message names picture, step and round, and `best` holds
            what was found until then.
        ValueError: If an argument is out of range.
        TypeError: If an argument is of a wrong type.

    Example:
        ```python
        import torch
        from diffusers import DDIMScheduler
        from diffusers_ext.inversion import DDIMLadder, Denoiser, null_text_inversion, regenerate


        def network(latents, timestep, embeddings):
            return 0.3 * latents + embeddings.mean(dim=1)[:, :, None, None]


        denoiser = Denoiser(network, torch.ones(1, 4, 4), torch.zeros(1, 4, 4))
        ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 10)
        inverted = null_text_inversion(denoiser, torch.randn(1, 4, 8, 8), ladder, guidance_scale=7.5)
        assert inverted.null_embeddings.shape == (10, 1, 4, 4)
        back = regenerate(denoiser, inverted, ladder, guidance_scale=7.5)
        ```
    """
    guidance_scale = checked_float("guidance_scale", guidance_scale, 0.0)
    if guidance_scale == 1:
        raise ValueError(
            "guidance_scale=1.0 uses no null embeddings; give that of the sampling, or use ddim_inversion"
        )
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    plan = SCHEDULES[schedule]
    if inner_steps is not None:
        plan = replace(plan, inner_steps=checked_count("inner_steps", inner_steps))
    if learning_rate is not None:
        plan = replace(plan, learning_rate=checked_float("learning_rate", learning_rate, 1e-8, 10.0))
    checked_float("early_stop", early_stop, 0.0)
    # Autograd can use nothing that was made in inference mode, so everything is made outside it.
    with torch.inference_mode(False), torch.no_grad():
        start = checked_start(denoiser, latents, ladder)
        inverted = ddim_inversion(denoiser, start, ladder, callback=callback)
        forward, backward, steps = inverted.forward_passes, 0, len(ladder)
        null = denoiser.null_embeddings.detach().clone().to(start.dtype)
        found = null[None].repeat(steps, *[1] * null.ndim)

        def result() -> Inverted:
            return replace(
                inverted, method="null_text", null_embeddings=found, forward_passes=forward, backward_passes=backward,
                settings={**inverted.settings, "guidance_scale": guidance_scale},
            )  # fmt: skip

        for picture in range(len(start)):
            part, rows = denoiser.part(picture), slice(picture, picture + 1)
            state, embeddings = inverted.latents[-1, rows], null[rows]
            for step in range(steps):
                target = inverted.latents[steps - 1 - step, rows]
                search = _Step(part, ladder, step, picture, state, target, guidance_scale)
                try:
                    embeddings, state = search.run(embeddings, plan, early_stop, callback)
                except InversionStoppedError as error:
                    found[: steps - step, rows] = search.best.embeddings
                    error.best = result()
                    raise
                finally:
                    forward, backward = forward + search.forward, backward + search.backward
                found[steps - 1 - step, rows] = embeddings
        return result()


class _Point(NamedTuple):
    """Evaluated embeddings, what the network says with them, and the state that follows."""

    embeddings: torch.Tensor
    output: torch.Tensor
    following: torch.Tensor


class _Step:
    """The search for the embeddings of one step of one picture."""

    def __init__(
        self,
        denoiser: Denoiser,
        ladder: DDIMLadder,
        step: int,
        picture: int,
        state: torch.Tensor,
        target: torch.Tensor,
        guidance_scale: float,
    ) -> None:
        self.denoiser, self.ladder, self.step, self.picture = denoiser, ladder, step, picture
        self.state, self.target, self.guidance_scale = state, target, guidance_scale
        self.timestep = ladder.timesteps[step]
        # Copies, because autograd refuses what was made in inference mode.
        before, after = ladder.sampling_levels(step)
        self.levels = before.clone(), after.clone()
        self.source = denoiser.source(state, self.timestep)
        self.forward, self.backward = 1, 0
        self.points: list[_Point] = []
        self.best = _Point(denoiser.null_embeddings.to(state.dtype), self.source, state)

    def run(
        self,
        embeddings: torch.Tensor,
        plan: NullTextSchedule,
        early_stop: float,
        callback: InversionCallback | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings found, and the state to which they lead."""
        self.best = self.best._replace(embeddings=embeddings)
        variable = embeddings.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([variable], lr=plan.rate(self.step, len(self.ladder)))
        enough, lowest = early_stop + 2e-5 * self.step, float("inf")
        for number in range(plan.inner_steps):
            with torch.set_grad_enabled(plan.descends(number)):
                point = self._evaluated(variable)
                total = (point.following - self.target).square().sum()
            loss = float(total.detach()) / self.target.numel()
            self._check(loss, number)
            if loss < lowest:
                lowest, self.best = loss, self.points[-1]
            if callback is not None:
                callback(
                    InversionProgress(
                        "optimisation", self.step, len(self.ladder), int(self.timestep), self.picture, number, loss
                    )
                )
            if plan.jumps and (loss < enough or number + 1 == plan.inner_steps):
                return self.best.embeddings, self.best.following
            if not plan.descends(number):
                variable.copy_(self._jump())
                continue
            # Of the sum, divided afterwards: in a half-precision network the gradient of the mean would underflow.
            (gradient,) = torch.autograd.grad(total, [variable])
            self.backward += 1
            variable.grad = gradient / self.target.numel()
            optimizer.step()
            if loss < enough:
                break
        final = self._evaluated(variable.detach())
        self._check(float((final.following - self.target).square().mean()), plan.inner_steps)
        return final.embeddings, final.following

    def _evaluated(self, embeddings: torch.Tensor) -> _Point:
        self.forward += 1
        output = self.denoiser.null(self.state, self.timestep, embeddings)
        guided = with_guidance(output, self.source, self.guidance_scale)
        following = ddim_step(guided, self.state, *self.levels, self.ladder.prediction_type)
        self.points.append(_Point(embeddings.detach().clone(), output.detach(), following.detach()))
        return _Point(embeddings, output, following)

    def _jump(self) -> torch.Tensor:
        """Embeddings that would lower the loss most if S were linear in them, among those that the known changes reach."""
        here, (_, predicted) = self.best, sampling_factors(*self.levels, self.ladder.prediction_type)
        source = _Point(self.denoiser.source_embeddings.to(here.embeddings), self.source, here.following)
        changes = [(here, source), *pairwise(self.points)]
        moves = torch.stack([after.embeddings - before.embeddings for before, after in changes])
        shifts = torch.stack([(after.output - before.output).flatten() for before, after in changes])
        shifts = shifts * predicted * (1 - self.guidance_scale)
        weights = least_residual_weights((here.following - self.target).flatten(), shifts, ridge=RIDGE)
        return here.embeddings - torch.einsum("n,n...->...", weights.to(moves), moves)

    def _check(self, loss: float, number: int) -> None:
        if not loss < float("inf"):
            raise InversionStoppedError(
                f"the null-text optimisation of picture {self.picture} stopped in step {self.step + 1} of "
                f"{len(self.ladder)} (timestep {int(self.timestep)}), round {number + 1}: its loss is {loss}, infinite or "
                "not a number; the best so far is in this error's `best`; use a network in float32 or a lower learning_rate"
            )
