"""Inversion that solves each sampling step for its input instead of guessing it.

A sampling step is z_{k-1} = A z_k + B f(z_k), where f is what the network says at the noisier state (`sampling_factors`). DDIM
inversion puts f(z_{k-1}) there, and that is its whole error. Solved for z_k instead:

    z_k = G(z_k),     G(z) = (z_{k-1} - B f(z)) / A

Effective Real Image Editing with Accelerated Iterative Diffusion Inversion (AIDI), 2023, arXiv 2309.04907, iterates G and
speeds that up after Anderson: of the last m + 1 pairs (z, G(z)) it takes the affine combination whose residual G(z) - z is
smallest. Source Prompt Disentangled Inversion (SPDInv), 2024, arXiv 2403.11105, lowers mean((z - G(z))^2) by AdamW, with
gradients through the network. For a network that predicts noise both begin at DDIM inversion, which is G(z_{k-1}).
"""

import torch

from .ddim import DDIMLadder, sampling_factors
from .denoiser import (
    Denoiser,
    InversionCallback,
    InversionProgress,
    InversionStoppedError,
    Inverted,
    check_callback,
    checked_count,
    checked_float,
    checked_start,
    finite,
)


SOLVERS = ("iterate", "anderson", "gradient")
HISTORY = 3  # pairs before the newest that Anderson's method looks at
LEARNING_RATE = 1e-3  # of SPDInv, as are its 25 rounds


def fixed_point_inversion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    iterations: int = 25,
    solver: str = "iterate",
    tolerance: float = 0.0,
    learning_rate: float = LEARNING_RATE,
    callback: InversionCallback | None = None,
) -> Inverted:
    """Inverts pictures so that sampling with the source prompt, without guidance, leads back to them.

    A picture is inverted by itself, so the result does not depend on its batch.

    Args:
        denoiser ([`Denoiser`]): The network with the source prompts.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The encoded pictures.
        ladder ([`DDIMLadder`]): Timesteps and levels.
        iterations (`int`, *optional*, defaults to 25): Rounds in each step after the first guess; 0 leaves the guess, which is
            DDIM inversion.
        solver (`str`, *optional*, defaults to `"iterate"`): `"iterate"` applies G, `"anderson"` is the same accelerated;
            `"gradient"` is SPDInv, whose rounds cost a forward and a backward pass each.
        tolerance (`float`, *optional*, defaults to 0.0): Mean squared residual at which a step's rounds end; SPDInv has 5e-6.
        learning_rate (`float`, *optional*, defaults to 1e-3): Of AdamW, for `"gradient"`.
        callback (`Callable`, *optional*): Gets an [`InversionProgress`] after every round, with that residual as its loss.

    Returns:
        [`Inverted`]: The states.

    Raises:
        InversionStoppedError: If values become infinite or NaN; the message names the step.
        ValueError: If an argument is out of range.
        TypeError: If an argument is of a wrong type.

    Example:
        ```python
        import torch
        from diffusers import DDIMScheduler
        from diffusers_ext.inversion import DDIMLadder, Denoiser, fixed_point_inversion, regenerate


        def network(latents, timestep, embeddings):
            return 0.3 * torch.sin(latents)


        denoiser = Denoiser(network, torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
        ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 10)
        picture = torch.randn(1, 4, 8, 8)
        inverted = fixed_point_inversion(denoiser, picture, ladder)
        assert torch.allclose(regenerate(denoiser, inverted, ladder), picture, atol=1e-4)
        ```
    """
    check_callback(callback)
    checked_count("iterations", iterations, 0)
    checked_float("tolerance", tolerance, 0.0)
    checked_float("learning_rate", learning_rate, 1e-8, 10.0)
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    with torch.inference_mode(False), torch.no_grad():
        start = checked_start(denoiser, latents, ladder)
        rows = []
        passes = [0, 0]
        for picture in range(len(start)):
            part = denoiser.part(picture)
            states = [start[picture : picture + 1]]
            for step in range(len(ladder)):
                solve = _Solve(part, states[-1], ladder, step, picture, tolerance, callback)
                states.append(
                    solve.descend(iterations, learning_rate) if solver == "gradient" else solve.run(iterations, solver)
                )
                passes = [total + more for total, more in zip(passes, solve.passes, strict=True)]
            rows.append(torch.stack(states))
    return Inverted(
        "fixed_point",
        torch.cat(rows, dim=1),
        ladder.timesteps.flip(0),
        {"alignment": "matched"},
        forward_passes=passes[0],
        backward_passes=passes[1],
    )


class _Solve:
    """One step of one picture: G, its rounds, and what they cost."""

    def __init__(
        self,
        denoiser: Denoiser,
        state: torch.Tensor,
        ladder: DDIMLadder,
        step: int,
        picture: int,
        tolerance: float,
        callback: InversionCallback | None,
    ) -> None:
        self.denoiser, self.state, self.tolerance, self.callback = denoiser, state, tolerance, callback
        self.timestep, self.step, self.steps, self.picture = ladder.timesteps[-1 - step], step, len(ladder), picture
        level, noisier = (bar.to(state).clone() for bar in ladder.inversion_levels(step))
        self.factors = sampling_factors(noisier, level, ladder.prediction_type)
        self.passes = [0, 0]

    def better(self, guess: torch.Tensor) -> torch.Tensor:
        """G(guess)."""
        self.passes[0] += 1
        kept, predicted = self.factors
        return (self.state - predicted * self.denoiser.source(guess, self.timestep)) / kept

    def run(self, iterations: int, solver: str) -> torch.Tensor:
        """Iterates G, by itself or after Anderson."""
        guesses: list[torch.Tensor] = []
        answers: list[torch.Tensor] = []
        # The state itself is no guess at the noisier one, only at what the network says there: it stays out of the history.
        guess = self.better(self.state)
        for number in range(iterations):
            answer = self.better(guess)
            if self._is_done(number, float((answer - guess).square().mean())):
                return answer
            if solver == "iterate":
                guess = answer
                continue
            guesses, answers = [*guesses, guess][-HISTORY - 1 :], [*answers, answer][-HISTORY - 1 :]
            guess = anderson_mix(guesses, answers) if number + 1 < iterations else answer
        return self._checked(guess)

    def descend(self, iterations: int, learning_rate: float) -> torch.Tensor:
        """Lowers mean((z - G(z))^2) by AdamW."""
        guess = self._checked(self.better(self.state)).requires_grad_(True)
        optimizer = torch.optim.AdamW([guess], lr=learning_rate)
        best, lowest = guess.detach().clone(), float("inf")
        for number in range(iterations):
            with torch.enable_grad():
                loss = (guess - self.better(guess)).square().mean()
            value = float(loss.detach())
            done = self._is_done(number, value)
            if value < lowest:
                best, lowest = guess.detach().clone(), value
            if done or number + 1 == iterations:
                break
            with torch.enable_grad():
                (guess.grad,) = torch.autograd.grad(loss, [guess])
            self.passes[1] += 1
            optimizer.step()
        return best

    def _is_done(self, number: int, loss: float) -> bool:
        if not loss < float("inf"):
            raise InversionStoppedError(
                f"the inversion of picture {self.picture} stopped in step {self.step + 1} of {self.steps} (timestep "
                f"{int(self.timestep)}), round {number + 1}: the residual is {loss}, which is infinite or "
                "not a number; use fewer iterations or a network in float32"
            )
        if self.callback is not None:
            self.callback(
                InversionProgress(
                    "optimisation", self.step, self.steps, int(self.timestep), self.picture, number, loss
                )
            )
        return loss <= self.tolerance

    def _checked(self, state: torch.Tensor) -> torch.Tensor:
        return finite(state, f"the latents after {self.step + 1} of {self.steps} steps of the inversion")


def anderson_mix(guesses: list[torch.Tensor], answers: list[torch.Tensor]) -> torch.Tensor:
    """Anderson's next guess: the affine combination of answers whose residual is the smallest.

    Args:
        guesses (list of `torch.Tensor`): z, oldest first, all of one shape.
        answers (list of `torch.Tensor`): G(z) of each.

    Returns:
        `torch.Tensor`: The next guess; with one pair its answer.
    """
    residuals = torch.stack([(answer - guess).flatten() for guess, answer in zip(guesses, answers, strict=True)])
    if len(answers) == 1:
        return answers[-1]
    weights = least_residual_weights(residuals[-1], residuals[-1] - residuals[:-1], ridge=1e-10)
    steps = torch.stack([(answers[-1] - answer).flatten() for answer in answers[:-1]])
    return answers[-1] - (weights.to(steps) @ steps).reshape(answers[-1].shape)


def least_residual_weights(residual: torch.Tensor, changes: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights w that make `|residual - sum_j w_j changes_j|` smallest, in float64.

    Args:
        residual (`torch.Tensor` of shape `(size,)`): What is to be taken away.
        changes (`torch.Tensor` of shape `(count, size)`): What it is taken away with.
        ridge (`float`): Penalty of weights, relative to the mean square length of the changes. Without one, changes that say
            nearly the same would get huge weights of opposite signs.

    Returns:
        `torch.Tensor` of shape `(count,)`: w, on the CPU.
    """
    gram = (changes @ changes.mT).cpu().double()
    penalty = ridge * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), dtype=gram.dtype), (changes @ residual).cpu().double()
    )
