"""The learning rate of a step, a pure function of its number."""

import math


def learning_rate_factor(
    step: int, total: int, kind: str = "linear", warmup: int = 0, decay_fraction: float = 1.0, end: float = 0.0
) -> float:
    """Factor of the learning rate at optimiser step `step`.

    It rises linearly over the first `warmup` steps, stays at 1, and over the last `decay_fraction` of all steps falls
    to `end`: not at all ("constant"), along a line ("linear") or half a cosine ("cosine").

    Args:
        step: Step counted from 0, below `total`.
        total: Number of steps in all, 1 or more.
        kind: "constant", "linear" or "cosine".
        warmup: Steps of the rise, 0 or more.
        decay_fraction: Share of the steps in which the rate falls, in [0, 1].
        end: Factor that the fall ends at, in [0, 1].

    Returns:
        A factor in [0, 1].

    Example:
        >>> [learning_rate_factor(step, 4, decay_fraction=0.5) for step in range(4)]
        [1.0, 1.0, 1.0, 0.5]
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    length = decay_fraction * total
    done = max(0.0, (step - (total - length)) / length) if length else 0.0
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[kind]
    return rise * (end + (1.0 - end) * left)
