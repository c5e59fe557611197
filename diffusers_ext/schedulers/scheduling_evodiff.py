"""EVODiff: a second-order multistep sampler whose weights follow the predictions themselves.

EVODiff: Entropy-aware Variance Optimized Diffusion Inference, NeurIPS 2025, arXiv 2509.26096. In X = x / alpha and s = sigma /
alpha, with levels s_1 > s_0 > t, data predictions m_1, m_0, m_t there, h = 1/t - 1/s_0, r = log(s_1/s_0) / log(s_0/t) and
proj(a, b) = clip(<a, b> / <b, b>, -2, 2), one value a channel:

    X_e = (t / s_0) X + (1 - t / s_0) m_0                                                              DDIM
    w   = mu (1 - ((t + t_min) / (t_max + t_min))^2),   base = sqrt((t / s_0) / (s_0 / s_1))
    R(a, b) = (1 - w) base + w proj(a, b)
    D_1 = m_0 - R(m_0, m_1) m_1,   r' = clip(sigmoid(c |R(m_0, m_1)|) r, r/4, 3r/2)
    X_p = X_e + t h D_1 / (2 r')                                    predictor; the network is asked here: m_t
    D_2 = m_t - R(m_t, m_0) m_0,   P = D_1 / (r h),   Q = r D_2 / h
    B   = -eta D_1 / r + (1 - eta) r D_2,   eta = sigmoid(|proj(Q + P, Q - P)| / 2) / 2
    z   = |proj(X_p - X_e - t h B / (2 r'), D_1)| / (h t) - 1/2
    X   = X_e + t h B / (2 zeta),   zeta = sigmoid(z), or sigmoid(-z g) in runs of more than 20 steps   corrector

with mu = 1/2, c = 1/4 and g = sigmoid(proj(m_0, (m_0 - m_1) / h) (2 - (t / s_0)^2)). The corrector of a step uses the
evaluation that the next step needs, so a step costs one evaluation.

`base` is 1 only where t / s_0 = s_0 / s_1: on log-uniform nodes. Elsewhere D does not vanish for a constant prediction and the
method does not converge to the trajectory as steps shrink; that is the paper's method, not an oversight here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .multistep import (
    PREDICTION_TYPES,
    Levels,
    MultistepScheduler,
    SchedulerMixin,
    as_numbers,
    register_to_config,
)


__all__ = ["EVODiffScheduler", "SchedulerMixin"]

LARGEST_PROJECTION = 2.0
# Runs longer than this use the other form of zeta.
SHORT_RUN = 20
# alpha of a flow model is 0 at its first time; X = x / alpha is kept finite.
LOWEST_ALPHA = 1e-3
# The least that zeta is in a short run. In a long one it has no bound, and float32 would turn noise into an explosion.
LOWEST_ZETA = 1.0 / (1.0 + math.exp(0.5))


TINY = 1e-300
# Up to so many groups are computed number by number: calls of numpy cost more than they save on short arrays.
FEW_GROUPS = 32

# tanh, min and max of floats, and of arrays.
Functions = tuple[Callable[[Any], Any], Callable[[Any, Any], Any], Callable[[Any, Any], Any]]
OF_FLOATS: Functions = (math.tanh, min, max)
OF_ARRAYS: Functions = (np.tanh, np.minimum, np.maximum)


class StepNumbers(NamedTuple):
    """What the weights of a step know of its levels: 1 - t / s_0, h, r, (1 - w) base, and w."""

    width: float
    h: float
    r: float
    base: float
    w: float


def step_numbers(before: float, start: float, end: float, high: float, low: float, shift_mu: float) -> StepNumbers:
    """Those of the step from s_0 = `start` to t = `end`, after one from s_1 = `before`, in a run from `high` to `low`."""
    shrink, w = end / start, shift_mu * (1.0 - ((end + low) / (high + low)) ** 2)
    base = (1.0 - w) * math.sqrt(shrink / (start / before))
    return StepNumbers(1.0 - shrink, 1.0 / end - 1.0 / start, -math.log(before / start) / math.log(shrink), base, w)


@dataclass(frozen=True)
class Turn:
    """What a step does to every group alike. Its terms are m_t, m_0 - m_t = -a and m_1 - m_0 = -b."""

    waiting: StepNumbers | None  # of the step before, whose prediction this evaluation corrects
    ahead: StepNumbers | None  # of the step to come, if it has a predictor
    order: tuple[int, int, int]  # rows that the terms stand in
    units: Sequence[float]  # of the terms: what a row has to be multiplied by
    kept: float  # weight of X_i, and so of what corrects it
    plain: tuple[float, float]  # weights of the first two terms without predictor and corrector
    scale: float  # of the result
    temperature: float
    long_run: bool


# Of a group: with b = m_0 - m_1 and c = m_0 the inner products <b, b>, <b, c>, <c, c> and <m_1, m_1>; then, of a prediction that
# waits for its corrector, R(m_0, m_1), (1 - t / s_0) / 2 r', and the weights of c and b in X_p - X_e.
#
# All vectors of the method are sums of m_0, m_1 and m_t, so their products follow from a few numbers; differences instead of the
# predictions themselves because these are nearly equal, and float32 would leave little of the difference.
State = tuple[Any, Any, Any, Any, Any, Any, Any, Any]


def turning(turn: Turn, functions: Functions) -> Callable[[State, Any], tuple[State, tuple[Any, Any, Any]]]:
    """A step of one group in floats, or of all groups in arrays: the state after it, and the weights of the three rows.

    It takes the state before, and the inner products of the second term with every row. X_i was made as X_e + (X_p - X_e); the
    corrector has other weights instead of the second ones, and X_e in common.
    """
    tanh, least, most = functions
    low, high = -LARGEST_PROJECTION, LARGEST_PROJECTION
    unit, before, earlier = turn.units
    row_new, row_second, row_old = turn.order
    of_rows = [turn.order.index(row) for row in range(3)]
    kept, (plain_new, plain_second), long_run = turn.kept, turn.plain, turn.long_run
    scale_new, scale_second, scale_old = (turn.scale * one for one in turn.units)
    width, h, r, base, w = turn.waiting or (1.0, 1.0, 1.0, 0.0, 0.0)
    square, bend = r * r, 1.0 - 0.5 * (1.0 - width) ** 2
    pull, next_base, next_w = (
        (0.0, 0.0, 0.0) if turn.ahead is None else (turn.ahead[0] / turn.ahead[2], *turn.ahead[3:])
    )
    half_temperature = 0.5 * turn.temperature

    def turned(state: State, inner: Any) -> tuple[State, tuple[Any, Any, Any]]:
        bb, bc, cc, old, share, factor, was_c, was_b = state
        aa, at = before * before * inner[row_second], -before * unit * inner[row_new]
        ac = at - aa
        ct = cc + ac
        aligned = least(most(ct / most(cc, TINY), low), high)  # proj(m_t, m_0)
        of_new, of_second, of_old = plain_new, plain_second, 0.0

        if turn.waiting is not None:
            ab = before * earlier * inner[row_old]
            # D_1 = b + k m_1 and D_2 = a + l c; everything else is made of their three products.
            k, l = 1.0 - share, 1.0 - base - w * aligned
            first = bb + k * (2.0 * (bc - bb) + k * old)
            second = aa + l * (2.0 * ac + l * cc)
            mixed = share * ab + k * ac + l * (share * bc + k * cc)
            # P and Q of the paper, both times h r: their scale is lost in the projection.
            qq = square * square * second
            length = least(abs(qq - first) / most(qq - 2.0 * square * mixed + first, TINY), high)
            eta = 0.25 + 0.25 * tanh(0.25 * length)
            of_first, of_last = eta / -r, r - r * eta  # the weights of D_1 and D_2 in B
            gap = factor * ((1.0 - of_first) * first - of_last * mixed)
            half_z = 0.5 / width * least(abs(gap) / most(first, TINY), high) - 0.25
            if long_run:
                change = least(most(bc * h / most(bb, TINY), low), high)
                half_z = -0.5 * half_z * (1.0 + tanh(bend * change))
            weight = kept * width / most(1.0 + tanh(half_z), 2.0 * LOWEST_ZETA)
            of_first, of_last = weight * of_first, weight * of_last
            of_c = of_first * k + of_last * l - kept * was_c
            of_new, of_second = of_new + of_c, of_second + of_c - of_last
            of_old = kept * was_b - of_first * share

        if turn.ahead is not None:
            share = next_base + next_w * aligned
            # sigmoid(x) = (1 + tanh(x / 2)) / 2. That of what is not negative is from 1/2 to 1: the clip of r' is never felt.
            factor = pull / (1.0 + tanh(half_temperature * abs(share)))
            was_b = factor * share
            was_c = factor - was_b
            of_new, of_second = of_new + was_c, of_second - was_b
        after = (aa, at, ct + at, cc, share, factor, was_c, was_b)
        weights = scale_new * of_new, scale_second * of_second, scale_old * of_old
        return after, (weights[of_rows[0]], weights[of_rows[1]], weights[of_rows[2]])

    return turned


def first_states(squares: torch.Tensor) -> Any:
    """The states after the first evaluation, from <m_0, m_0>: a list over few groups, or one state of arrays over many."""
    if len(squares) <= FEW_GROUPS:
        return [(0.0, 0.0, square, *5 * [0.0]) for square in squares.tolist()]
    numbers = as_numbers(squares)
    none = np.zeros_like(numbers)
    return none, none, numbers, *5 * [none]


def turned_groups(states: Any, inner: torch.Tensor, turn: Turn) -> tuple[Any, torch.Tensor]:
    """The states of all groups after a step, and the weights of the rows, `(groups, rows)` as their inner products."""
    if isinstance(states, list):
        turned = turning(turn, OF_FLOATS)
        after = [turned(state, row) for state, row in zip(states, inner.tolist(), strict=True)]
        weights = torch.tensor([row for _, row in after], dtype=inner.dtype, device=inner.device)
        return [state for state, _ in after], weights
    states, columns = turning(turn, OF_ARRAYS)(states, as_numbers(inner.T))
    table = np.empty(inner.shape)
    for row, column in enumerate(columns):
        table[:, row] = column
    return states, torch.from_numpy(table).to(inner)


class EVODiffScheduler(MultistepScheduler):
    """A deterministic multistep scheduler with a corrector, without statistics of the model; one network evaluation a step.

    It aims at the statistics of the pictures, not at the trajectory: against the exact one it is less accurate than
    DPM-Solver++ on the same nodes (docs/samplers.md). Use log-uniform nodes, its default; see the head of the module for why.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        shift_mu (`float`, *optional*, defaults to 0.5): The mu above, from 0 to 1: weight of the projections in R.
        temperature (`float`, *optional*, defaults to 0.25): The c above, at least 0.
        per_channel_stats (`bool`, *optional*, defaults to `True`): Whether projections are taken a channel, as the authors
            do, or over a whole sample, which does not depend on the number of channels.
        official_final (`bool`, *optional*, defaults to `False`): Whether the last step is that of the authors' code, which
            multiplies the state by 1 - sqrt(t s_0): harmless at sigma 0.002, a shrink by 4 % at the 0.03 where latent
            models end. Otherwise it is DDIM.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"`, `"v_prediction"`, or
            `"flow_prediction"` for models such as SD3 and Flux.
        timestep_spacing (`str`, *optional*, defaults to `"linspace"`): `"linspace"`, `"leading"` or `"trailing"`, where no
            grid is chosen below.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        use_karras_sigmas (`bool`, *optional*, defaults to `False`): Nodes even in s^(1/7).
        use_exponential_sigmas (`bool`, *optional*, defaults to `True`): Log-uniform nodes, as the authors.
        use_lu_lambdas (`bool`, *optional*, defaults to `False`): Nodes even in log-SNR: the same, under its other name.
        use_beta_sigmas (`bool`, *optional*, defaults to `False`): Nodes at the quantiles of a beta distribution; needs scipy.
            Flow models have a grid of their own, even in time and shifted, and use none of these four.
        final_sigmas_type (`str`, *optional*, defaults to `"sigma_min"`): Where a diffusion run ends: `"sigma_min"`, the
            lowest level of the training process, or `"zero"`, by one more step that takes the predicted picture.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Whether the training process ends in pure noise.
        flow_shift (`float`, *optional*, defaults to 1.0): Shift of the times of a flow model towards noise.
        use_dynamic_shifting (`bool`, *optional*, defaults to `False`): Whether the pipeline gives the shift as `mu`.
        time_shift_type (`str`, *optional*, defaults to `"exponential"`): How `mu` shifts, or `"linear"`.
        shift_terminal (`float`, *optional*): Last time of a flow run before 0; others are stretched towards it.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        ```python
        from diffusers_ext.hub import load_pipeline
        from diffusers_ext.schedulers import EVODiffScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config)
        image = pipe("a red star on a blue background", num_inference_steps=10).images[0]
        ```
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        shift_mu: float = 0.5,
        temperature: float = 0.25,
        per_channel_stats: bool = True,
        official_final: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = True,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        final_sigmas_type: str = "sigma_min",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        for name, value, highest in (("shift_mu", shift_mu, 1.0), ("temperature", temperature, math.inf)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0.0 <= value <= highest:
                raise ValueError(f"{name}={value!r} is out of range; use a number from 0 to {highest:g}")
        self._set_up()

    def _forget(self) -> None:
        # Three rows of shape (groups, numbers), each in a unit of its own, in turn: m_0, then -a = m_0 - m_t, then -b, then free.
        self._rows: torch.Tensor | None = None
        self._units = [1.0, 1.0, 1.0]
        self._states: Any = None  # of the groups
        self._waiting: StepNumbers | None = None
        self._taken = 0
        flow = self._is_flow
        self._alphas = [max(1.0 - node, LOWEST_ALPHA) if flow else self._alpha(node) for node in self._nodes]
        pairs = zip(self._nodes, self._alphas, strict=True)
        self._ratios = [node / alpha if flow else node for node, alpha in pairs]

    def _around(self, index: int) -> Levels:
        return Levels(index, *self._nodes[index : index + 2], *self._alphas[index : index + 2])

    def _converted(
        self, output: torch.Tensor, sample: torch.Tensor, levels: Levels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return output, sample

    def _data_prediction(self, levels: Levels) -> tuple[float, float, float]:
        """Which parts of sample and output make a data prediction, and in which unit: one pass over memory, not two."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return 1.0, -levels.alpha * levels.start, 1.0 / levels.alpha
        if kind == "v_prediction":
            return 1.0, -levels.start, levels.alpha
        if kind == "flow_prediction":
            return 1.0, -levels.start, 1.0
        if kind == "sample":
            return 0.0, 1.0, 1.0
        raise ValueError(f"prediction_type={kind!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")

    def _advance(self, slope: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        index, (start, end) = levels.index, self._ratios[levels.index : levels.index + 2]
        groups = math.prod(sample.shape[: 2 if self.config.per_channel_stats and sample.ndim > 2 else 1])
        flat = sample.reshape(groups, -1)
        of_sample, of_output, unit = self._data_prediction(levels)
        place, self._taken = self._taken % 3, self._taken + 1
        order = place, (place + 2) % 3, (place + 1) % 3  # of m_t, -a and -b in the rows
        rows = self._remembered(flat, slope.reshape(groups, -1), of_sample, of_output, unit, order)
        units = [self._units[row] for row in order]

        kept = shrink = end / start
        plain, ahead = (1.0 - shrink, 0.0), None  # by itself DDIM
        last = len(self._times) - (self._nodes[-1] == 0) - 1  # without a jump to the clean picture
        if self._taken > 1 and index < last:
            low = self._ratios[-1] or self._ratios[-2]
            ahead = step_numbers(self._ratios[index - 1], start, end, self._ratios[0], low, self.config.shift_mu)
        elif self._taken > 1 and index == last and self.config.official_final:
            less, half = 1.0 - math.sqrt(start * end), 0.5 * (1.0 - shrink)
            share = 1.0 - 0.5 * math.sqrt(shrink if shrink < 0.5 else shrink - 0.5)
            kept = less * shrink
            plain = less * (1.0 - shrink) + half * (1.0 - share), -half * share

        of_state, seen = levels.next_alpha * kept / levels.alpha, rows.detach()
        if self._taken == 1:
            self._states = first_states(unit * unit * torch.linalg.vecdot(seen[place], seen[place]))
            following = rows[place] * (levels.next_alpha * unit * plain[0])
            return following.add_(flat, alpha=of_state).reshape(sample.shape)
        inner = torch.bmm(seen[order[1]].unsqueeze(1), seen.permute(1, 2, 0)).squeeze(1)
        turn = Turn(
            self._waiting, ahead, order, units, kept, plain, levels.next_alpha, self.config.temperature,
            len(self._times) > SHORT_RUN,
        )  # fmt: skip
        self._states, weights = turned_groups(self._states, inner, turn)
        following = torch.bmm(weights.unsqueeze(1), rows.transpose(0, 1)).squeeze(1).add_(flat, alpha=of_state)
        self._waiting = ahead
        return following.reshape(sample.shape)

    def _remembered(
        self, sample: torch.Tensor, output: torch.Tensor, of_sample: float, of_output: float, unit: float,
        order: tuple[int, int, int],
    ) -> torch.Tensor:  # fmt: skip
        """The rows with a new prediction among them, and the one before made a difference to it."""
        if self._rows is None:
            self._rows = sample.new_zeros(3, *sample.shape)
        newest, second, _ = order
        before, self._units[newest] = self._units[second], unit
        if torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad or self._rows.requires_grad):
            # Not in place: gradients flow through rows of earlier steps.
            rows = list(self._rows)
            rows[newest] = of_sample * sample + of_output * output
            if self._taken > 1:
                rows[second] = rows[second] - unit / before * rows[newest]
            self._rows = torch.stack(rows)
            return self._rows
        if of_sample:
            torch.add(sample, output, alpha=of_output, out=self._rows[newest])
        else:
            self._rows[newest].copy_(output)
        if self._taken > 1:
            self._rows[second].sub_(self._rows[newest], alpha=unit / before)
        return self._rows
