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
from dataclasses import dataclass, field
from typing import Any

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


def sigmoid(value: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in a form that cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * value)


def clipped_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """proj from its two inner products; 0 where the lower vector is 0."""
    return np.minimum(np.maximum(above / np.maximum(below, TINY), -LARGEST_PROJECTION), LARGEST_PROJECTION)


@dataclass
class Products:
    """Inner products, a number a group, of b = m_0 - m_1 and c = m_0.

    All vectors of the method are sums of m_0, m_1 and m_t, so their products follow from a few numbers; differences instead of
    the predictions themselves because these are nearly equal, and float32 would leave little of the difference.
    """

    bb: np.ndarray
    bc: np.ndarray
    cc: np.ndarray

    def moved(self, aa: np.ndarray, ac: np.ndarray) -> "Products":
        """Those of the step after, with a = m_t - m_0: b becomes a, c becomes c + a."""
        return Products(aa, ac + aa, self.cc + 2.0 * ac + aa)


@dataclass
class Prediction:
    """A prediction that waits for its corrector: numbers of the step, R(m_0, m_1), r', and the weights of c and b in X_p - X_e."""

    shrink: float
    h: float
    r: float
    base: float
    w: float
    share: np.ndarray = field(default_factory=lambda: np.zeros(0))
    r_scaled: np.ndarray = field(default_factory=lambda: np.zeros(0))
    of_c: np.ndarray = field(default_factory=lambda: np.zeros(0))
    of_b: np.ndarray = field(default_factory=lambda: np.zeros(0))


def predict(products: Products, step: Prediction, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of c and b in X_p - X_e; fills in R(m_0, m_1) and r'."""
    aligned = clipped_ratio(products.cc - products.bc, products.cc - 2.0 * products.bc + products.bb)
    step.share = (1.0 - step.w) * step.base + step.w * aligned
    # The sigmoid of what is not negative is at least 1/2 and at most 1: the clip of r' to r/4 and 3r/2 is never felt.
    step.r_scaled = sigmoid(temperature * np.abs(step.share)) * step.r
    factor = 0.5 * (1.0 - step.shrink) / step.r_scaled
    step.of_b = factor * step.share
    step.of_c = factor - step.of_b
    return step.of_c, step.of_b


def correct(
    products: Products, step: Prediction, aa: np.ndarray, ab: np.ndarray, ac: np.ndarray, long_run: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of a, b and c in X - X_e, with a = m_t - m_0."""
    bb, bc, cc, r = products.bb, products.bc, products.cc, step.r
    # D_1 = b + k (c - b) and D_2 = a + l c; everything else is made of their three products.
    k, l = 1.0 - step.share, 1.0 - (1.0 - step.w) * step.base - step.w * clipped_ratio(cc + ac, cc)
    first = bb + k * (2.0 * (bc - bb) + k * (cc - 2.0 * bc + bb))
    second = aa + l * (2.0 * ac + l * cc)
    mixed = ab + k * (ac - ab) + l * (bc + k * (cc - bc))

    # P and Q of the paper, both times h: their scale is lost in the projection.
    pp, qq, pq = first / r**2, second * r**2, mixed
    eta = 0.5 * sigmoid(np.abs(0.5 * clipped_ratio(qq - pp, qq - 2.0 * pq + pp)))
    of_first, of_second = -eta / r, (1.0 - eta) * r  # B
    half, width = 0.5 * (1.0 - step.shrink), 1.0 - step.shrink
    gap = half / step.r_scaled * ((1.0 - of_first) * first - of_second * mixed)
    z = np.abs(clipped_ratio(gap, first)) / width - 0.5
    if long_run:
        z = -z * sigmoid(clipped_ratio(bc * step.h, bb) * (2.0 - step.shrink**2))
    factor = half / np.maximum(sigmoid(z), LOWEST_ZETA)
    of_first, of_second = factor * of_first, factor * of_second
    return of_second, of_first * (1.0 - k), of_first * k + of_second * l


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
        # Of shape (groups, numbers): c = m_0, and -b = m_1 - m_0.
        self._newest: torch.Tensor | None = None
        self._difference: torch.Tensor | None = None
        self._products = Products(*np.zeros((3, 0)))
        self._pending: Prediction | None = None
        self._before = 0.0  # s of m_1

    def _alpha(self, node: float) -> float:
        return max(1.0 - node, LOWEST_ALPHA) if self._is_flow else super()._alpha(node)

    def _ratio(self, node: float) -> float:
        return node / self._alpha(node) if self._is_flow else node

    def _slope(self, output: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        # The data prediction instead: what this method is made of. A new tensor, for it is kept.
        kind, s, alpha = self.config.prediction_type, levels.start, levels.alpha
        if kind == "sample":
            return output.clone()
        if kind == "epsilon":
            return torch.mul(output, -s).add_(sample, alpha=1.0 / alpha)
        if kind == "v_prediction":
            return torch.mul(output, -alpha * s).add_(sample, alpha=alpha)
        if kind == "flow_prediction":
            return torch.add(sample, output, alpha=-s)
        raise ValueError(f"prediction_type={kind!r} is not known; use one of {', '.join(PREDICTION_TYPES)}")

    def _advance(self, slope: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        start, end = self._ratio(levels.start), self._ratio(levels.end)
        groups = math.prod(sample.shape[: 2 if self.config.per_channel_stats and sample.ndim > 2 else 1])
        newest = slope.reshape(groups, -1)
        terms, correction = self._take_in(newest)

        # X, corrected, is X_i and `correction` times `terms`; from there the step adds its own weights of m_t and m_0 - m_t.
        shrink = end / start
        weights: list[Any] = [1.0 - shrink]  # by itself DDIM
        kept, last = shrink, len(self._times) - (self._nodes[-1] == 0) - 1  # without a jump to the clean picture
        if self._difference is not None and levels.index < last:
            self._pending = self._laid_out(start, end)
            of_c, of_b = predict(self._products, self._pending, self.config.temperature)
            weights = [1.0 - shrink + of_c, -of_b]
        elif self._difference is not None and levels.index == last and self.config.official_final:
            less, half = 1.0 - math.sqrt(start * end), 0.5 * (1.0 - shrink)
            share = 1.0 - 0.5 * math.sqrt(shrink if shrink < 0.5 else shrink - 0.5)
            kept *= less
            weights = [less * (1.0 - shrink) + half * (1.0 - share), -half * share]
        table = np.zeros((max(len(terms), len(weights)), groups))
        for row, weight in enumerate(correction):
            table[row] = kept * weight
        for row, weight in enumerate(weights):
            table[row] += weight
        columns = torch.from_numpy(table * levels.next_alpha).to(newest).unsqueeze(-1).unbind()
        following = sample.reshape(groups, -1) * (levels.next_alpha * kept / levels.alpha)
        for term, column in zip(terms, columns, strict=True):
            following.addcmul_(term, column)
        self._before = start
        return following.reshape(sample.shape)

    def _take_in(self, newest: torch.Tensor) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        """Makes a prediction the newest one. Returns m_t, -a = m_0 - m_t and -b, and their weights in what corrects X_i.

        X_i was made as X_e + (X_p - X_e); the corrector has other weights instead of the second ones, and X_e in common.
        """
        difference, older, step = self._newest, self._difference, self._pending
        self._newest, self._pending = newest, None
        if difference is None:
            square = as_numbers(torch.linalg.vecdot(newest, newest))
            self._products = Products(np.zeros_like(square), np.zeros_like(square), square)
            return [newest], []
        difference.sub_(newest)  # in the memory of m_0: c is m_t - a
        self._difference = difference
        flat = difference.detach()
        others = [flat, newest.detach(), *([] if older is None else [older.detach()])]
        aa, less, *ab = as_numbers(torch.stack([torch.linalg.vecdot(flat, other) for other in others]))
        ac = -less - aa
        correction = []
        if step is not None and older is not None:
            of_a, of_b, of_c = correct(self._products, step, aa, ab[0], ac, len(self._times) > SHORT_RUN)
            of_c = of_c - step.of_c
            correction = [of_c, of_c - of_a, step.of_b - of_b]
        self._products = self._products.moved(aa, ac)
        return [newest, difference, *([older] if correction and older is not None else [])], correction

    def _laid_out(self, start: float, end: float) -> Prediction:
        high, low = self._ratio(self._nodes[0]), self._ratio(self._nodes[-1] or self._nodes[-2])
        w = self.config.shift_mu * (1.0 - ((end + low) / (high + low)) ** 2)
        r = math.log(self._before / start) / math.log(start / end)
        base = math.sqrt((end / start) / (start / self._before))
        return Prediction(end / start, 1.0 / end - 1.0 / start, r, base, w)
