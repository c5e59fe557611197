"""Diffusion models whose every quantity is known: Gaussian data and Gaussian mixtures, under any schedule.

A noisy state is x = alpha x0 + sigma eps with eps ~ N(0, I). For data sum_k w_k N(m_k, C_k) the states are distributed as

    p(x) = sum_k w_k N(x; alpha m_k, S_k),   S_k = alpha^2 C_k + sigma^2 I

and with the responsibilities r_k(x) of that mixture

    score(x)    = sum_k r_k S_k^-1 (alpha m_k - x)
    E[eps | x]  = -sigma score(x)
    E[x0 | x]   = sum_k r_k (m_k + alpha C_k S_k^-1 (x - alpha m_k))
    v(x)        = alpha E[eps | x] - sigma E[x0 | x]            (v-prediction)
    u(x)        = E[eps | x] - E[x0 | x]                        (flow matching, x = (1 - t) x0 + t eps)

Every schedule is the same ODE in another parameter: scaled to x / sqrt(alpha^2 + sigma^2) it runs along the angle
theta = atan2(sigma, alpha), and its velocity dx/dtheta is v. So one reference solution serves all of them, also where
alpha or sigma is zero. All numbers are float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm


PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha x0 + sigma eps."""

    alpha: float
    sigma: float

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> "Level":
        """The level of a variance-preserving schedule, alpha^2 = `alpha_bar` and sigma^2 = 1 - `alpha_bar`."""
        return cls(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @classmethod
    def of_flow_time(cls, time: float) -> "Level":
        """The level of a straight path: alpha = 1 - `time`, sigma = `time`."""
        return cls(1 - time, time)

    @classmethod
    def of_sigma(cls, sigma: float) -> "Level":
        """The level of a variance-exploding schedule: alpha = 1."""
        return cls(1.0, sigma)

    @property
    def scale(self) -> float:
        """Length of (alpha, sigma)."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def angle(self) -> float:
        """Angle of (alpha, sigma), from 0 (data) to pi/2 (noise)."""
        return math.atan2(self.sigma, self.alpha)


class GaussianMixtureDiffusion:
    """Data distributed as a Gaussian mixture, and everything a perfect model of it would say.

    Args:
        weights (`torch.Tensor` of shape (K,)):
            Weights, summing to 1.
        means (`torch.Tensor` of shape (K, D)):
            Means.
        covariances (`torch.Tensor` of shape (K, D, D)):
            Covariances; zero is allowed, which makes a point.
    """

    def __init__(self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> None:
        self.weights, self.means, self.covariances = weights.double(), means.double(), covariances.double()
        count, size = self.means.shape
        if self.weights.shape != (count,) or self.covariances.shape != (count, size, size):
            raise ValueError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and covariances "
                f"{tuple(covariances.shape)} do not fit; use (K,), (K, D) and (K, D, D)"
            )

    @property
    def size(self) -> int:
        """Number of dimensions D."""
        return self.means.shape[1]

    def sample(self, count: int, seed: int = 0) -> torch.Tensor:
        """`count` data points, shape (count, D)."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        values, vectors = torch.linalg.eigh(self.covariances)
        root = vectors * values.clamp(min=0).sqrt()[:, None, :]
        noise = torch.randn(count, self.size, dtype=torch.float64, generator=generator)
        return self.means[which] + torch.einsum("nij,nj->ni", root[which], noise)

    def _marginal(self, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        identity = torch.eye(self.size, dtype=torch.float64)
        return level.alpha * self.means, level.alpha**2 * self.covariances + level.sigma**2 * identity

    def _terms(self, x: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """S_k^-1 (x - alpha m_k) and log(w_k N(x; alpha m_k, S_k)), shapes (N, K, D) and (N, K)."""
        centres, spreads = self._marginal(level)
        offset = x[:, None, :] - centres
        solved = torch.linalg.solve(spreads, offset[..., None])[..., 0]
        logs = -0.5 * ((offset * solved).sum(-1) + torch.logdet(2 * math.pi * spreads)) + self.weights.log()
        return solved, logs

    def log_density(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """log p(x) at `level`, shape (N,) for `x` of shape (N, D)."""
        return self._terms(x, level)[1].logsumexp(-1)

    def score(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Gradient of `log_density`, shape (N, D)."""
        solved, logs = self._terms(x, level)
        return -(logs.softmax(-1)[..., None] * solved).sum(1)

    def clean(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """E[x0 | x], shape (N, D)."""
        solved, logs = self._terms(x, level)
        means = self.means + level.alpha * torch.einsum("kij,nkj->nki", self.covariances, solved)
        return (logs.softmax(-1)[..., None] * means).sum(1)

    def clean_covariance(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Cov[x0 | x], shape (N, D, D)."""
        solved, logs = self._terms(x, level)
        share = logs.softmax(-1)
        gain = level.alpha * torch.linalg.solve(self._marginal(level)[1], self.covariances).mT
        within = self.covariances - level.alpha * gain @ self.covariances
        means = self.means + level.alpha * torch.einsum("kij,nkj->nki", self.covariances, solved)
        offset = means - (share[..., None] * means).sum(1, keepdim=True)
        return torch.einsum("nk,kij->nij", share, within) + torch.einsum("nk,nki,nkj->nij", share, offset, offset)

    def noise(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """E[eps | x], shape (N, D)."""
        return -level.sigma * self.score(x, level)

    def predict(self, x: torch.Tensor, level: Level, prediction_type: str) -> torch.Tensor:
        """What a perfect model trained on `prediction_type` says, shape (N, D)."""
        if prediction_type == "epsilon":
            return self.noise(x, level)
        if prediction_type == "sample":
            return self.clean(x, level)
        if prediction_type == "v_prediction":
            return level.alpha * self.noise(x, level) - level.sigma * self.clean(x, level)
        if prediction_type == "flow_prediction":
            return self.noise(x, level) - self.clean(x, level)
        raise ValueError(f"prediction_type={prediction_type!r} is not known; use one of {', '.join(PREDICTIONS)}")

    def model(
        self, levels: Callable[[float], Level], prediction_type: str
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """The perfect model as a function of state and timestep, keeping shape and dtype of the state.

        Args:
            levels (`Callable[[float], Level]`):
                Noise level of a timestep.
            prediction_type (`str`):
                One of `PREDICTIONS`.
        """

        def call(x: torch.Tensor, timestep: float) -> torch.Tensor:
            flat = x.double().reshape(-1, self.size)
            return self.predict(flat, levels(float(timestep)), prediction_type).reshape(x.shape).to(x.dtype)

        return call

    def transport(self, x: torch.Tensor, start: Level, end: Level, tolerance: float = 1e-12) -> torch.Tensor:
        """Follows the probability-flow ODE from `start` to `end`: an eighth-order solver at `tolerance`, float64.

        Args:
            x (`torch.Tensor` of shape (N, D)):
                States at `start`.
            start (`Level`), end (`Level`):
                Noise levels, in either order.
            tolerance (`float`, *optional*, defaults to 1e-12):
                Relative and absolute tolerance of a step.

        Returns:
            `torch.Tensor` of shape (N, D): the states at `end`.
        """
        shape = x.shape

        def velocity(angle: float, state: object) -> object:
            level = Level(math.cos(angle), math.sin(angle))
            here = torch.as_tensor(state, dtype=torch.float64).reshape(shape)
            return self.predict(here, level, "v_prediction").flatten().numpy()

        solution = solve_ivp(
            velocity, (start.angle, end.angle), (x.double() / start.scale).flatten().numpy(), method="DOP853",
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip
        if not solution.success:
            raise RuntimeError(f"the reference solver stopped: {solution.message}")
        return torch.from_numpy(solution.y[:, -1].copy()).reshape(shape) * end.scale

    def distribution_function(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """P(X <= x) at `level` for one-dimensional data, shape (N,). The flow carries it along unchanged."""
        if self.size != 1:
            raise ValueError(f"the data has {self.size} dimensions; a distribution function needs 1")
        centres, spreads = self._marginal(level)
        parts = norm.cdf(x.double().numpy(), centres[:, 0].numpy(), spreads[:, 0, 0].sqrt().numpy())
        return torch.from_numpy(parts) @ self.weights


class GaussianDiffusion(GaussianMixtureDiffusion):
    """Data distributed as one Gaussian, where the probability-flow ODE has a solution in closed form.

    Args:
        mean (`torch.Tensor` of shape (D,)):
            Mean.
        covariance (`torch.Tensor` of shape (D, D)):
            Covariance; zero is allowed, which makes a point.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        super().__init__(torch.ones(1), mean[None], covariance[None])

    def transport(self, x: torch.Tensor, start: Level, end: Level, tolerance: float = 0.0) -> torch.Tensor:
        """Follows the probability-flow ODE exactly: along each principal axis the distance to the mean keeps its quantile.

            x' - alpha' m = sqrt(S' S^-1) (x - alpha m)

        `tolerance` is taken for the sake of the parent's signature; there is no error to bound.
        """
        values, vectors = torch.linalg.eigh(self.covariances[0])
        values = values.clamp(min=0)
        before = start.alpha**2 * values + start.sigma**2
        after = end.alpha**2 * values + end.sigma**2
        offset = (x.double() - start.alpha * self.means[0]) @ vectors
        return end.alpha * self.means[0] + (offset * (after / before).sqrt()) @ vectors.mT


def alpha_bar_levels(alphas_cumprod: torch.Tensor) -> Callable[[float], Level]:
    """Noise level of an integer timestep of a discrete schedule, from the table of a scheduler."""
    return lambda timestep: Level.of_alpha_bar(float(alphas_cumprod[int(timestep)]))


def anisotropic_gaussian(size: int = 3, seed: int = 0) -> GaussianDiffusion:
    """A Gaussian off the origin with standard deviations between 0.2 and 2 along turned axes."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    variances = torch.logspace(math.log10(0.2), math.log10(2.0), size, dtype=torch.float64) ** 2
    mean = torch.randn(size, dtype=torch.float64, generator=generator)
    return GaussianDiffusion(mean, axes @ torch.diag(variances) @ axes.mT)


def separated_mixture(size: int = 2, components: int = 3, seed: int = 0) -> GaussianMixtureDiffusion:
    """A mixture of unequal weights whose components stand apart, so that the posterior has several modes."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    means = 2.0 * torch.randn(components, size, dtype=torch.float64, generator=generator)
    factors = 0.3 * torch.randn(components, size, size, dtype=torch.float64, generator=generator)
    covariances = factors @ factors.mT + 0.02 * torch.eye(size, dtype=torch.float64)
    return GaussianMixtureDiffusion(weights / weights.sum(), means, covariances)
