"""Null-text inversion: embeddings of the empty prompt, optimised so that guided sampling keeps to the inverted trajectory.

Null-text Inversion for Editing Real Images using Guided Diffusion Models, 2022, arXiv 2211.09794. With z*_k the states of DDIM
inversion and S(z, u) a sampling step whose guidance points away from embeddings u,

    for k = T ... 1:    u_k = argmin_u mean((S(z, u) - z*_{k-1})^2)   from the former step's u, by Adam
                        z   = S(z, u_k)

The authors take ten rounds of Adam at rate 1e-2 (1 - i/100) in step i, stop a step's rounds where the loss is below
1e-5 + 2e-5 i, and evaluate the network twice more with what was found: up to 1 + 10 * 2 + 2 forward and backward passes a
step. `schedule="official"` gives their embeddings. The default spends at most 11:

* the source prompt's pass is made once a step, for the state does not change while u does;
* the best of the evaluated embeddings is kept, with the state it led to, so nothing is evaluated after the last round;
* fewer rounds at a higher rate, and a jump to the last one, which needs no gradient: S is nearly linear in u, so the changes of
  u made so far, each with the change of the network's output that it brought, tell which combination of them lowers the
  loss most. Changes of former steps serve as well, for the network answers alike at neighbouring levels.

States, embeddings and Adam are in float32, whatever the network is in.
"""

from collections import deque
from dataclasses import dataclass, replace

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


RIDGE = 1e-1  # of the mean square of the changes: those of other steps are only nearly right


@dataclass(frozen=True)
class NullTextSchedule:
    """How a step's embeddings are looked for.

    Attributes:
        inner_steps (`int`): Rounds at most.
        learning_rate (`float`): Adam's, in the first step.
        keeps_best (`bool`): Whether the best evaluated embeddings are taken, with a jump to the last round; else those after
            the last round, which costs one more evaluation.
        decay_over (`int`, *optional*): The rate falls linearly and would be 0 after so many steps; None stands for twice the
            steps of the run.
    """

    inner_steps: int
    learning_rate: float
    keeps_best: bool
    decay_over: int | None = None

    @property
    def jumps(self) -> bool:
        """Whether the last round is reached by a jump, for which there must have been two others."""
        return self.keeps_best and self.inner_steps >= 3

    @property
    def memory(self) -> int:
        """Changes of embeddings that a jump may combine."""
        return 4 * self.inner_steps

    def rate(self, step: int, steps: int) -> float:
        """Learning rate in a step, counted from 0 at the noisy end; never below 1 % of the first."""
        return self.learning_rate * max(1.0 - step / (self.decay_over or 2 * steps), 0.01)


SCHEDULES = {
    "fast": NullTextSchedule(inner_steps=6, learning_rate=1e-1, keeps_best=True),
    "official": NullTextSchedule(inner_steps=10, learning_rate=1e-2, keeps_best=False, decay_over=100),
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
        inner_steps (`int`, *optional*): Rounds in each step instead of the schedule's 6 or 10.
        learning_rate (`float`, *optional*): Adam's rate in the first step instead of the schedule's 1e-1 or 1e-2.
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
            changes: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=plan.memory)
            for step in range(steps):
                target = inverted.latents[steps - 1 - step, rows]
                search = _Step(part, ladder, step, picture, state, target, guidance_scale, changes)
                try:
                    embeddings, state = search.run(embeddings, plan, early_stop, callback)
                except InversionStoppedError as error:
                    found[: steps - step, rows] = search.best[0]
                    error.best = result()
                    raise
                finally:
                    forward, backward = forward + search.forward, backward + search.backward
                found[steps - 1 - step, rows] = embeddings
        return result()


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
        changes: deque[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.denoiser, self.ladder, self.step, self.picture = denoiser, ladder, step, picture
        self.state, self.target, self.guidance_scale = state, target, guidance_scale
        self.changes = changes
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.timestep = ladder.timesteps[step]
        # Copies, because autograd refuses what was made in inference mode.
        before, after = ladder.sampling_levels(step)
        self.levels = before.clone(), after.clone()
        self.source = denoiser.source(state, self.timestep)
        self.forward, self.backward = 1, 0
        self.best = (denoiser.null_embeddings.to(state.dtype), state)

    def run(
        self,
        embeddings: torch.Tensor,
        plan: NullTextSchedule,
        early_stop: float,
        callback: InversionCallback | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings found, and the state to which they lead."""
        self.best = (embeddings, self.state)
        variable = embeddings.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([variable], lr=plan.rate(self.step, len(self.ladder)))
        enough, lowest = early_stop + 2e-5 * self.step, float("inf")
        for number in range(plan.inner_steps):
            with torch.enable_grad():
                following = self._following(variable)
                total = (following - self.target).square().sum()
            loss = float(total.detach()) / self.target.numel()
            self._check(loss, number)
            if loss < lowest:
                lowest, self.best = loss, (variable.detach().clone(), following.detach())
            if callback is not None:
                callback(
                    InversionProgress(
                        "optimisation", self.step, len(self.ladder), int(self.timestep), self.picture, number, loss
                    )
                )
            if plan.keeps_best and (loss < enough or number + 1 == plan.inner_steps):
                return self.best
            if plan.jumps and number + 2 == plan.inner_steps:
                variable.copy_(self._jump(variable.detach(), following.detach()))
                continue
            # Of the sum, divided afterwards: in a half-precision network the gradient of the mean would underflow.
            (gradient,) = torch.autograd.grad(total, [variable])
            self.backward += 1
            variable.grad = gradient / self.target.numel()
            optimizer.step()
            if loss < enough:
                break
        final = variable.detach()
        following = self._following(final)
        self._check(float((following - self.target).square().mean()), plan.inner_steps)
        return final, following

    def _following(self, embeddings: torch.Tensor) -> torch.Tensor:
        self.forward += 1
        null = self.denoiser.null(self.state, self.timestep, embeddings)
        here = embeddings.detach().clone(), null.detach()
        if self.last is not None:
            self.changes.append((here[0] - self.last[0], here[1] - self.last[1]))
        self.last = here
        output = with_guidance(null, self.source, self.guidance_scale)
        return ddim_step(output, self.state, *self.levels, self.ladder.prediction_type)

    def _jump(self, embeddings: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Embeddings that would lower the loss most if S were linear in them, within the changes made so far."""
        _, predicted = sampling_factors(*self.levels, self.ladder.prediction_type)
        moves = torch.stack([move for move, _ in self.changes])
        shifts = torch.stack([shift.flatten() for _, shift in self.changes]) * predicted * (1 - self.guidance_scale)
        weights = least_residual_weights((following - self.target).flatten(), shifts, ridge=RIDGE)
        return embeddings - torch.einsum("n,n...->...", weights.to(moves), moves)

    def _check(self, loss: float, number: int) -> None:
        if not loss < float("inf"):
            raise InversionStoppedError(
                f"the null-text optimisation of picture {self.picture} stopped in step {self.step + 1} of "
                f"{len(self.ladder)} (timestep {int(self.timestep)}), round {number + 1}: its loss is {loss}, infinite or "
                "not a number; the best so far is in this error's `best`; use a network in float32 or a lower learning_rate"
            )
