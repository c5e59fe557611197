"""Noise levels of rolling diffusion: which frame is how noisy at which network evaluation.

Rolling Diffusion Models, Ruhe et al., ICML 2024, arXiv 2402.09470, denoise a window of W frames of which every frame is noisier than
the one before it, and move the window on as its first frame becomes clean. The ladder of arXiv 2503.10488 (and of PA-VDM, arXiv
2410.08151) lets l frames share a level: the window has R = W / l rungs, takes m evaluations from rung to rung, and a frame takes
K = R m of them from noise to data. With f the number of a frame in the whole sequence and e that of the evaluation, both from 0,

    L(f, e) = clip(K + m floor(f / l) - e, 0, K),        level 0 is data, level K is noise,

covers the warm-up from pure noise, the steady roll and the end. An emitted frame costs K / W = m / l evaluations whatever l is:
the ladder by itself saves nothing, but only with l > m is that less than one.
"""

from typing import Any

import numpy as np
import torch


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [step for step in range(1, number + 1) if number % step == 0]


def checked_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        ValueError: If it is not.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value < 2**31:
        raise ValueError(f"{name}={value!r} is not usable; use an int of at least {least}")
    return int(value)


def checked_rungs(window_length: Any, ladder_step: Any) -> int:
    """The number of rungs R of a window.

    Args:
        window_length (`int`): Frames of the window, W.
        ladder_step (`int`): Frames that share a level, l; a divisor of W.

    Returns:
        `int`: W / l.

    Raises:
        ValueError: If one is not a positive int, or l does not divide W; the message lists the l that do.
    """
    window, step = checked_count(window_length, "window_length"), checked_count(ladder_step, "ladder_step")
    if window % step:
        fitting = ", ".join(map(str, divisors(window)))
        raise ValueError(f"ladder_step={step} does not divide window_length={window}; use one of {fitting}")
    return window // step


def checked_evaluations(num_inference_steps: int, rungs: int, most: int) -> int:
    """The number of evaluations from one roll of the window to the next, m.

    Args:
        num_inference_steps (`int`): Evaluations of a frame from noise to data, K; a multiple of R.
        rungs (`int`): R.
        most (`int`): The largest K that the model allows.

    Returns:
        `int`: K / R.

    Raises:
        ValueError: If R does not divide K; the message has the nearest numbers that work.
    """
    if num_inference_steps % rungs:
        lower = num_inference_steps // rungs * rungs
        fitting = [str(steps) for steps in (lower, lower + rungs) if 0 < steps <= most]
        cure = f"use {' or '.join(fitting)}" if fitting else "use a larger ladder_step or a shorter window_length"
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not a multiple of the {rungs} rungs of the window "
            f"(window_length / ladder_step); {cure}"
        )
    return num_inference_steps // rungs


def ladder_level(frame: Any, evaluation: Any, num_levels: int, per_roll: int, ladder_step: int) -> Any:
    """The level of a frame before an evaluation, L(f, e).

    Args:
        frame (`int` or array): Number of the frame in the sequence, from 0.
        evaluation (`int` or array): Number of the evaluation, from 0; broadcast with `frame`.
        num_levels (`int`): K.
        per_roll (`int`): m.
        ladder_step (`int`): l.

    Returns:
        `np.int64` or array: From 0, data, to K, noise.

    Example:
        ```python
        from diffusers_ext.schedulers.ladder import ladder_level

        # three rungs of two frames, two evaluations a roll: before the fourth evaluation the first rung has moved most
        assert ladder_level([0, 1, 2, 3, 4, 5], 3, 6, 2, 2).tolist() == [3, 3, 5, 5, 6, 6]
        ```
    """
    start = num_levels + per_roll * (np.asarray(frame) // ladder_step)
    return np.clip(start - np.asarray(evaluation), 0, num_levels)


def window_levels(window_length: int, ladder_step: int, per_roll: int) -> np.ndarray:
    """Levels of the window in its steady state, a row an evaluation: (m, W)."""
    rungs = window_length // ladder_step
    return _table(window_length, ladder_step, per_roll, first=(rungs - 1) * per_roll, count=per_roll)


def warmup_levels(window_length: int, ladder_step: int, per_roll: int) -> np.ndarray:
    """Levels of the window on its way from pure noise to the steady state, a row an evaluation: ((R - 1) m, W)."""
    rungs = window_length // ladder_step
    return _table(window_length, ladder_step, per_roll, first=0, count=(rungs - 1) * per_roll)


def _table(window_length: int, ladder_step: int, per_roll: int, first: int, count: int) -> np.ndarray:
    levels = window_length // ladder_step * per_roll
    evaluations = np.arange(first, first + count)[:, None]
    return np.asarray(ladder_level(np.arange(window_length), evaluations, levels, per_roll, ladder_step))


def evaluations_for(num_frames: int, window_length: int, ladder_step: int, per_roll: int) -> int:
    """Network evaluations of a stream of `num_frames` frames that is warmed up from noise: (R - 1) m + ceil(F / l) m."""
    if num_frames == 0:
        return 0
    return (window_length // ladder_step - 1 + -(-num_frames // ladder_step)) * per_roll


def drawn_shares(count: int, window_length: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Levels to train on, as shares of K in (0, 1], every frame by itself: (count, W), float64."""
    # Not [0, 1): a frame that is data already teaches nothing.
    return 1.0 - torch.rand(count, window_length, generator=generator, dtype=torch.float64)


def drawn_ladders(
    count: int, window_length: int, ladder_step: int, init_probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Levels of whole windows to train on, as shares of K in (0, 1]: min(1, u + floor(f / l) / R), one u a window.

    Args:
        count (`int`): Number of windows.
        window_length (`int`): W.
        ladder_step (`int`): l.
        init_probability (`float`): Share of windows in the warm-up, where u is uniform in (1 / R, 1]; in the steady state it is
            uniform in (0, 1 / R], which covers any number of evaluations a roll.
        generator (`torch.Generator`, *optional*): Source of the draws.

    Returns:
        `torch.Tensor` of shape `(count, W)`, float64.
    """
    rungs = window_length // ladder_step
    moment = drawn_shares(count, 1, generator)
    in_warmup = torch.rand(count, 1, generator=generator, dtype=torch.float64) < init_probability
    first = torch.where(in_warmup, 1.0 / rungs + moment * (1.0 - 1.0 / rungs), moment / rungs)
    return (first + torch.arange(window_length) // ladder_step / rungs).clamp(max=1.0)
