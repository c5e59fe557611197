"""Adaptive Adams: a multistep sampler that measures, sample by sample, how far it may extrapolate.

No paper; the method of this package. With X = x / alpha, s = sigma / alpha, e_i the noise prediction (of a flow model too: x +
alpha v), AB(K, p) the Adams-Bashforth rule whose polynomial is one in s^p and AM(K, p) its counterpart that includes the new
node (`adams_bashforth.power_basis_weights`), |.| the root mean square of one sample and <.,.> its inner product:

    r_i   = e_i - (linear extrapolation of e_{i-1}, e_{i-2} to s_i)                       what was not foreseen
    c_i   = <r_i, r_{i-1}> / (|r_i| |r_{i-1}|)        near -1: odd-even oscillation, the step is beyond the stability limit
    rho_i = s_i |r_i| / |X_i|,   m_i = max_{j<=i} rho_j,   q_1 = |e_1 - e_0| / |e_1|

    correct   X_i <- X_i + phi (X_{i-1} + AM(4, -.5) - X_i)      phi = .45 ramp(c_i, -.5, 0) (1 - ramp(rho_i, .6, .9)),
                                                                 at i = 1 with 1 - ramp(q_1, .05, .3) for the first ramp
    predict   D = AB(4, .8) + w (AB(4, .25) - AB(4, .8))         w = 1 - ramp(m_i, .05, .3): trust, which is never regained
              X_{i+1} = X_i + (t - s_i) e_i + om (D - (t - s_i) e_i)              om = 1 - ramp(rho_i, .8, 1.2)

    with the Lipschitz gate   phi times 1 - ramp(z_i, .1, .3)
              z_i = (s_i - t) |e_i - e_{i-1}| / |X_i - X_{i-1}|, X before corrections

with ramp(x, a, b) = clip((x - a) / (b - a), 0, 1). The corrector uses the evaluation that the next step needs anyway, so a
step costs one evaluation. The power p is the damping: extrapolation weights shrink as p grows and the order stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .adams_bashforth import check_order, power_basis_weights
from .multistep import Levels, MultistepScheduler, SchedulerMixin, register_to_config


__all__ = ["AdaptiveAdamsScheduler", "SchedulerMixin"]

HISTORY = 4  # noise predictions that a rule uses
SAFE_POWER, FAST_POWER, CORRECTOR_POWER = 0.8, 0.25, -0.5
LARGEST_CORRECTION = 0.45
# A flow model begins at time 1, where s is infinite: times above this one are taken for one halfway to it.
SAFE_TIME = 0.998
# (a, b) of the ramps: q_1, c_i; rho_i in phi, m_i in w, rho_i in om.
FIRST_CHANGE, ALIGNMENT = (0.05, 0.30), (-0.5, 0.0)
SURPRISE, TRUST, FALLBACK = (0.6, 0.9), (0.05, 0.30), (0.8, 1.2)
# Of z in phi. The second is the stability limit of Adams-Bashforth of order four.
STIFFNESS = (0.1, 0.3)

TINY = 1e-300


def earlier(time: float) -> float:
    """The time that stands for a time of a flow model, 0.999 for 1."""
    return time if time <= SAFE_TIME else 0.5 * (time + SAFE_TIME)


def ramp(value: float, bounds: tuple[float, float]) -> float:
    """0 up to the first bound, 1 from the second, straight in between."""
    return min(max((value - bounds[0]) / (bounds[1] - bounds[0]), 0.0), 1.0)


@lru_cache(maxsize=4096)
def step_rules(nodes: tuple[float, ...], end: float) -> tuple[tuple[float, ...], ...]:
    """Weights of e_i, e_{i-1}, ... in the corrector from s_{i-1} to s_i and, from s_i to `end`, in AB(4, .8) and AB(4, .25).

    Args:
        nodes (`tuple[float, ...]`): s_i, s_{i-1}, ..., two to four of them.
        end (`float`): s_{i+1}.

    Returns:
        `tuple[tuple[float, ...], ...]`: The three rules.
    """
    corrector = power_basis_weights(nodes, nodes[1], nodes[0], CORRECTOR_POWER)
    return corrector, *(power_basis_weights(nodes, nodes[0], end, power) for power in (SAFE_POWER, FAST_POWER))


def moved_by(
    ahead: Sequence[float], corrector: Sequence[float], predicted: Sequence[float], phi: float
) -> list[float]:
    """Weights of e_i, e_{i-1}, ... in X_{i+1} - X_i, where X_i is still without its correction.

    Args:
        ahead (`Sequence[float]`): Weights of e_i, e_{i-1}, ... in D.
        corrector (`Sequence[float]`): The same of the corrector.
        predicted (`Sequence[float]`): Weights of e_{i-1}, e_{i-2}, ... in the D that led to X_i.
        phi (`float`): The share of the correction.

    Returns:
        `list[float]`: One weight more than `predicted` has.
    """
    moved = [0.0, *(-phi * weight for weight in predicted)]
    for j, (own, other) in enumerate(zip(ahead, corrector, strict=True)):
        moved[j] += own + phi * other
    return moved


@dataclass
class Record:
    """What is known of one sample: |r| of the step before, and m, the largest rho so far."""

    length: float | None = None
    worst: float = 0.0

    def gates(self, length: float, relative: float, third: float) -> tuple[float, float, float]:
        """phi, om and w of this step.

        Args:
            length (`float`): |r_i|.
            relative (`float`): rho_i.
            third (`float`): <r_i, r_{i-1}>, or |e_1| in the first step that has a residual.
        """
        if self.length is None:
            smooth = 1.0 - ramp(length / max(third, TINY), FIRST_CHANGE)
        else:
            smooth = ramp(third / max(length * self.length, TINY), ALIGNMENT)
        self.length, self.worst = length, max(self.worst, relative)
        phi = LARGEST_CORRECTION * smooth * (1.0 - ramp(relative, SURPRISE))
        return phi, 1.0 - ramp(relative, FALLBACK), 1.0 - ramp(self.worst, TRUST)


class AdaptiveAdamsScheduler(MultistepScheduler):
    """A deterministic multistep scheduler that adapts to each sample; one network evaluation a step.

    Where the predictions of the network follow each other smoothly it extrapolates far and corrects itself; where they
    oscillate, as under high guidance in few steps, it falls back towards a stable rule, and at worst towards DDIM. Weights are
    per sample, so the rest of a batch changes nothing. `AdaptiveAdamsScheduler.from_config(pipe.scheduler.config)` fits
    diffusion models and flow models. What it is good at, and what not, is measured in docs/samplers.md.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Length of the training process.
        beta_start (`float`, *optional*, defaults to 0.0001): First variance of the training process.
        beta_end (`float`, *optional*, defaults to 0.02): Last variance of the training process.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The variances themselves.
        basis_power (`float`, *optional*): Turns adaptivity off and uses AB(`solver_order`, this power) throughout, from 0 to 4:
            1 is LMS, 0.5 robust, 0.25 accurate, 0 like DEIS.
        lipschitz_gate (`bool`, *optional*, defaults to `False`): Whether the adaptive rule also shuts its corrector where the
            steepness of the slope, estimated along the way, times the step comes near the stability limit. Smaller errors and fewer
            failures on guided mixtures, larger errors on a linear problem that overshoots; figures in docs/samplers.md.
        solver_order (`int`, *optional*, defaults to 4): Order with `basis_power`, from 1 to 8; the adaptive rule has order 4.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"`, `"v_prediction"`, or
            `"flow_prediction"` for models such as SD3 and Flux.
        timestep_spacing (`str`, *optional*, defaults to `"linspace"`): `"linspace"`, `"leading"` or `"trailing"`, where no
            grid is chosen below.
        steps_offset (`int`, *optional*, defaults to 0): Added to the timesteps of `"leading"`.
        use_karras_sigmas (`bool`, *optional*, defaults to `True`): Nodes even in s^(1/7).
        use_exponential_sigmas (`bool`, *optional*, defaults to `False`): Log-uniform nodes.
        use_lu_lambdas (`bool`, *optional*, defaults to `False`): Nodes even in log-SNR: the same, under its other name.
        use_beta_sigmas (`bool`, *optional*, defaults to `False`): Nodes at the quantiles of a beta distribution; needs scipy.
            Flow models have a grid of their own, even in time and shifted, and use none of these four.
        final_sigmas_type (`str`, *optional*, defaults to `"sigma_min"`): Where a diffusion run ends: `"sigma_min"`, the
            lowest level of the training process, or `"zero"`, by one more step of order one.
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
        from diffusers_ext.schedulers import AdaptiveAdamsScheduler
        from diffusers import StableDiffusionPipeline

        pipe = load_pipeline(StableDiffusionPipeline)
        pipe.scheduler = AdaptiveAdamsScheduler.from_config(pipe.scheduler.config)
        image = pipe("a red star on a blue background", num_inference_steps=8).images[0]
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
        basis_power: float | None = None,
        lipschitz_gate: bool = False,
        solver_order: int = 4,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = True,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        final_sigmas_type: str = "sigma_min",
        rescale_betas_zero_snr: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        check_order(solver_order, "solver_order")
        number = isinstance(basis_power, (int, float)) and not isinstance(basis_power, bool)
        if basis_power is not None and not (number and 0.0 <= basis_power <= 4.0):
            raise ValueError(f"basis_power={basis_power!r} is out of range; use None or a number from 0 to 4")
        self._set_up()

    def _forget(self) -> None:
        self._slopes: list[torch.Tensor] = []  # newest first, as `_visited`, the s they belong to
        self._visited: list[float] = []
        self._increments: list[list[float]] = []  # the weights of slopes in D, one row a sample
        self._residuals: list[torch.Tensor] = []  # r of the step before, and memory for the next one
        self._records: list[Record] = []  # one a sample
        self._asked: torch.Tensor | None = None  # X where the slope before was asked for, with `lipschitz_gate`

    def _around(self, index: int) -> Levels:
        if not self._is_flow:
            return super()._around(index)
        # Here too X = x / alpha and s = sigma / alpha, not x and its time: the powers of s and the ramps belong to them.
        start, end = (earlier(time) for time in self._nodes[index : index + 2])
        return Levels(index, start / (1.0 - start), end / (1.0 - end), 1.0 - start, 1.0 - end)

    def _converted(
        self, output: torch.Tensor, sample: torch.Tensor, levels: Levels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_flow:
            return super()._converted(output, sample, levels)
        time = self._nodes[levels.index]
        noise = torch.add(sample, output, alpha=1.0 - time)
        if time > SAFE_TIME:  # along the straight line to the time that stands for this one
            sample = torch.add(sample, output, alpha=1.0 - levels.alpha - time)
        return noise, sample

    def _advance(self, slope: torch.Tensor, sample: torch.Tensor, levels: Levels) -> torch.Tensor:
        if levels.end == 0:
            # The jump to the clean picture takes the prediction of it as it is.
            return torch.add(sample / levels.alpha, slope, alpha=-levels.start)
        power = self.config.basis_power
        nodes = self._take(slope, levels.start, HISTORY if power is None else self.config.solver_order)
        if power is None and len(nodes) > 1:
            return self._adapted(sample, nodes, levels)
        following = sample * (levels.next_alpha / levels.alpha)
        weights = power_basis_weights(nodes, levels.start, levels.end, power or 0.0)
        for value, weight in zip(self._slopes, weights, strict=True):
            following.add_(value, alpha=levels.next_alpha * weight)
        self._increments = [list(weights)] * len(sample)
        if self.config.lipschitz_gate and power is None:
            self._asked = sample.detach() / levels.alpha
        return following

    def _take(self, slope: torch.Tensor, node: float, most: int) -> tuple[float, ...]:
        """Remembers a slope in the memory of one that has fallen out of use: fresh memory costs more than the sums."""
        # The adaptive rule takes back what it predicted, with the slopes of then: one more.
        kept = most if self.config.basis_power is not None else most + 1
        memory = self._slopes.pop() if len(self._slopes) == kept else torch.empty_like(slope)
        self._slopes.insert(0, memory.copy_(slope))
        self._visited = [node, *self._visited[: most - 1]]
        return tuple(self._visited)

    def _adapted(self, sample: torch.Tensor, nodes: tuple[float, ...], levels: Levels) -> torch.Tensor:
        corrector, safe, fast = step_rules(nodes, levels.end)
        gates = list(self._gates(sample, nodes, levels.alpha))
        if self.config.lipschitz_gate:
            stiffness = self._stiffness(sample, levels)
            gates = [
                (phi * (1.0 - ramp(z, STIFFNESS)), share, trust)
                for (phi, share, trust), z in zip(gates, stiffness, strict=True)
            ]
        increments, rows = [], []
        for (phi, share, trust), predicted in zip(gates, self._increments, strict=True):
            weights = [share * (a + trust * (b - a)) for a, b in zip(safe, fast, strict=True)]
            weights[0] += (1.0 - share) * (levels.end - levels.start)
            increments.append(weights)
            # X_{i-1} is X_i less what was predicted, so the correction is a sum of slopes as well.
            rows.append(moved_by(weights, corrector, predicted, phi))
        self._increments = increments

        used = len(nodes) if all(phi == 0.0 for phi, _, _ in gates) else len(self._slopes)
        table = torch.tensor(rows, dtype=sample.dtype, device=sample.device).mul_(levels.next_alpha)
        columns = table.T.reshape(-1, len(sample), *[1] * (sample.ndim - 1))
        following = sample * (levels.next_alpha / levels.alpha)
        for value, column in zip(self._slopes[:used], columns.unbind()):
            following.addcmul_(value, column)
        return following

    def _gates(
        self, sample: torch.Tensor, nodes: tuple[float, ...], alpha: float
    ) -> Iterator[tuple[float, float, float]]:
        """phi, om and w, sample by sample."""
        newest, before, *earlier = (slope.detach() for slope in self._slopes)
        memory = self._residuals.pop() if len(self._residuals) > 1 else torch.empty_like(newest)
        if earlier:
            ahead = (nodes[0] - nodes[2]) / (nodes[1] - nodes[2])
            residual = torch.add(newest, before, alpha=-ahead, out=memory).add_(earlier[0], alpha=ahead - 1.0)
        else:
            residual = torch.sub(newest, before, out=memory)
        self._residuals.insert(0, residual)

        flat, size = residual.flatten(1), torch.linalg.vector_norm(sample.flatten(1), dim=1)
        if len(self._residuals) == 1:
            self._records = [Record() for _ in range(len(sample))]
            third = torch.linalg.vector_norm(newest.flatten(1), dim=1)
        else:
            third = torch.linalg.vecdot(flat, self._residuals[1].flatten(1))
        signals = torch.stack([torch.linalg.vector_norm(flat, dim=1), size, third]).tolist()
        for record, length, size, third in zip(self._records, *signals, strict=True):
            # The residual is one of e, the size that of x = alpha X.
            yield record.gates(length, nodes[0] * alpha * length / max(size, TINY), third)

    def _stiffness(self, sample: torch.Tensor, levels: Levels) -> list[float]:
        """z, sample by sample."""
        asked, before = sample.detach() / levels.alpha, self._asked
        if before is None:
            raise ValueError(
                "there is no earlier step to compare with; call set_timesteps, and step from the first timestep on"
            )
        self._asked = asked
        newest, older = (slope.detach() for slope in self._slopes[:2])
        change, way = (
            torch.linalg.vector_norm((a - b).flatten(1), dim=1) for a, b in ((newest, older), (asked, before))
        )
        return (change / way.clamp(min=torch.finfo(way.dtype).tiny) * (levels.start - levels.end)).tolist()
