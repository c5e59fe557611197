r"""Parts of the training of a rolling network: which ladder and which context a step has, and its loss.

Accelerated Rolling Diffusion, arXiv 2503.10488. With the errors e_n of the frames n of a window, the inertial loss is

    L = sum_n |e_n|^2 - 2 w sum_n <e_n, e_(n+1)>

which counts errors that alternate in sign, and so are seen as jitter, by up to 1 + 2 w, and those that are alike by as little as 1 - 2 w. It
is positive for w up to 1/2; the best answer is the same for all of them, the conditional mean.

The ladder of a run grows, 1 -> 2 -> 4 in the paper, each stage from the weights of the one before. Some windows of a later stage have an
earlier ladder, so that one network serves all of them.
"""

from collections.abc import Sequence

import torch

from ..schedulers import RollingLadderScheduler
from .streams import stream


# Most weight of the product of neighbours at which the loss of every window is positive.
LARGEST_INERTIA = 0.5


def rolling_target(
    scheduler: RollingLadderScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network shall answer for every frame: x0, v = a n - s x0, or the flow n - x0.

    Args:
        scheduler ([`RollingLadderScheduler`]): Its `prediction_type` is `"sample"`, `"v_prediction"` or `"flow_prediction"`.
        clean (`torch.Tensor` of shape `(batch, frames, channels)`): Data.
        noise (`torch.Tensor`): The noise in it, of the same shape.
        timesteps (`torch.Tensor` of shape `(batch or 1, frames)`): Those of the model.

    Returns:
        `torch.Tensor` of the shape of `clean`.
    """
    if scheduler.config.prediction_type == "sample":
        return clean
    return scheduler.get_velocity(clean, noise, timesteps)


def inertial_loss(answer: torch.Tensor, target: torch.Tensor, weight: float = 0.0) -> torch.Tensor:
    """The squared error of windows, less twice `weight` times the products of errors of neighbouring frames; mean over all numbers.

    Args:
        answer (`torch.Tensor` of shape `(batch, frames, channels)`): What the network says.
        target (`torch.Tensor`): What is right, of the same shape. With `"sample"` this is the loss of the paper; the error of x0 that
            follows from a flow is -s times that of the flow, of the same sign for neighbours.
        weight (`float`, *optional*, defaults to 0.0): w, from 0 to 0.5.

    Returns:
        `torch.Tensor`: A number, computed in float32.

    Raises:
        ValueError: If `weight` is out of range or the shapes differ.

    Example:
        ```python
        import torch
        from diffusers_ext.training.rolling import inertial_loss

        truth = torch.zeros(1, 2, 1)
        alike, jitter = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[1.0], [-1.0]]])
        assert inertial_loss(alike, truth, 0.25) == 0.75 and inertial_loss(jitter, truth, 0.25) == 1.25
        ```
    """
    if not 0.0 <= weight <= LARGEST_INERTIA:
        raise ValueError(f"weight={weight!r} is out of range; use a number from 0 to {LARGEST_INERTIA}")
    if answer.shape != target.shape or answer.ndim != 3:
        raise ValueError(
            f"answer of shape {tuple(answer.shape)} does not fit target of shape {tuple(target.shape)}; both need "
            "(batch, frames, channels)"
        )
    error = answer.float() - target.float()
    loss = error.square().mean()
    if weight:
        loss = loss - 2.0 * weight * (error[:, 1:] * error[:, :-1]).sum() / error.numel()
    return loss


def check_curriculum(ladders: Sequence[int], window_length: int) -> list[int]:
    """The ladder steps of a run, ascending, each a divisor of the window.

    Raises:
        ValueError: If they are not.
    """
    for ladder in ladders:
        RollingLadderScheduler(window_length=window_length, ladder_step=ladder)
    if not ladders or list(ladders) != sorted(set(ladders)):
        raise ValueError(f"ladder_curriculum={list(ladders)} does not ascend; give for example 1 2 4")
    return list(ladders)


def curriculum_stage(step: int, total: int, stages: int) -> int:
    """The stage that a step belongs to, from 0: all of about the same length, the last with the fall of the learning rate.

    Example:
        >>> [curriculum_stage(step, 6, 3) for step in range(6)]
        [0, 0, 1, 1, 2, 2]
    """
    return min(step * stages // total, stages - 1)


def ladders_of_windows(
    count: int, ladders: Sequence[int], stage: int, replay: float, generator: torch.Generator
) -> list[int]:
    """The ladder step of each window of a batch: that of the stage, or with probability `replay` one of those before it.

    Args:
        count (`int`): Windows.
        ladders (`Sequence[int]`): Ladder steps of all stages.
        stage (`int`): The present one, from 0.
        replay (`float`): From 0 to 1. The paper has 0.
        generator (`torch.Generator`): Source of the draws.
    """
    uniform = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    earlier = (uniform[:, 1] * stage).long().clamp(max=max(stage - 1, 0))
    before = (uniform[:, 0] < replay) & (stage > 0)
    return [ladders[int(place)] for place in torch.where(before, earlier, stage)]


def context_of_step(seed: int, step: int, context_length: int, short_share: float) -> int:
    """Frames of context in a step: all of them, or with probability `short_share` fewer, as where a stream begins.

    Half of the short ones have none at all, since a stream without a prefix is warmed up in this way; the others have any number.
    """
    first, second, third = torch.rand(3, generator=stream(seed, step, "context"), dtype=torch.float64).tolist()
    if first >= short_share:
        return context_length
    return 0 if second < 0.5 else int(third * context_length)


def check_lookaheads(lookaheads: Sequence[int] | None, ladder_step: int, window_length: int) -> None:
    """Refuses lookaheads that streams would.

    Raises:
        ValueError: If one is less than the ladder step or more than the window.
    """
    for lookahead in lookaheads or ():
        if not ladder_step <= lookahead <= window_length:
            raise ValueError(
                f"lookahead={lookahead} is not usable; use numbers from {ladder_step}, the longest ladder step, to "
                f"{window_length}, the window_length"
            )


def known_conditions(
    count: int, context: int, window_length: int, lookaheads: Sequence[int] | None, generator: torch.Generator
) -> torch.Tensor:
    """Which frames of windows have their condition: `(count, context + window_length)`, bool.

    Args:
        count (`int`): Windows.
        context (`int`): Frames of context before them, which have theirs.
        window_length (`int`): Frames of a window.
        lookaheads (`Sequence[int]`, *optional*): Frames from the first of a window that have theirs, one of these drawn for each
            window; by default all of them.
        generator (`torch.Generator`): Source of the draws.

    Example:
        ```python
        import torch
        from diffusers_ext.training.rolling import known_conditions

        known = known_conditions(1, 1, 4, [2], torch.Generator())
        assert known.tolist() == [[True, True, True, False, False]]
        ```
    """
    if not lookaheads:
        return torch.ones(count, context + window_length, dtype=torch.bool)
    drawn = torch.tensor(list(lookaheads))[torch.randint(len(lookaheads), (count, 1), generator=generator)]
    return torch.arange(context + window_length) < context + drawn


def ladder_timesteps(
    schedulers: dict[int, RollingLadderScheduler],
    ladders: Sequence[int],
    mode: str,
    init_share: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Timesteps of windows that each have a ladder of their own: `(len(ladders), window_length)`.

    Args:
        schedulers (`dict[int, RollingLadderScheduler]`): By ladder step.
        ladders (`Sequence[int]`): The ladder step of each window.
        mode (`str`): As in `RollingLadderScheduler.sample_training_timesteps`.
        init_share (`float`): Share of windows in the warm-up from noise, for `"mixed"`.
        generator (`torch.Generator`): Source of the draws.
    """
    # Drawn for every ladder and then chosen, so that one window's draw does not depend on the ladders of the others.
    drawn = {
        ladder: schedulers[ladder].sample_training_timesteps(len(ladders), mode, init_share, generator)
        for ladder in sorted(schedulers)
    }
    return torch.stack([drawn[ladder][row] for row, ladder in enumerate(ladders)])
