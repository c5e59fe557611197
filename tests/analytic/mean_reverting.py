"""The mean-reverting problem of `tests/golden/mr_sampler/`: a mixture of two Gaussians per pixel whose noise prediction is exact.

x0 ~ 0.5 N(m1, s^2) + 0.5 N(m2, s^2) around a mean mu, x_t = mu + alpha (x0 - mu) + sigma eps. With v = alpha^2 s^2 + sigma^2 and
c_k = alpha m_k + (1 - alpha) mu, a component expects x0 at e_k = m_k + alpha s^2 (x - c_k) / v.
"""

from typing import Any

import torch

from diffusers_ext.schedulers.mean_reverting import Level
from tests.helpers.golden import golden


class MeanRevertingProblem:
    """The problem, in a dtype.

    Args:
        dtype (`torch.dtype`, defaults to `torch.float64`): Of everything in it.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        data = golden("mr_sampler/inputs.npz")
        self.mean, self.start = data.tensor("mu", dtype), data.tensor("x_T", dtype)
        self.m1, self.m2 = data.tensor("m1", dtype), data.tensor("m2", dtype)
        self.noise = data.tensor("noise", dtype)
        self.std, self.sigma_inf = float(data["std"]), float(data["sigma_inf"])

    def expected(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """E[x0] given x."""
        variance = alpha**2 * self.std**2 + sigma**2
        c1, c2 = (alpha * m + (1 - alpha) * self.mean for m in (self.m1, self.m2))
        gain = alpha * self.std**2 / variance
        share = torch.sigmoid(((x - c2) ** 2 - (x - c1) ** 2) / (2 * variance))
        return share * (self.m1 + gain * (x - c1)) + (1 - share) * (self.m2 + gain * (x - c2))

    def answer(self, x: torch.Tensor, level: Level, prediction_type: str = "epsilon") -> torch.Tensor:
        """What a perfect network says of x."""
        alpha, sigma = level.alpha, level.sigma
        clean = self.expected(x, alpha, sigma)
        if prediction_type == "sample":
            return clean
        eps = (x - alpha * clean - (1 - alpha) * self.mean) / sigma
        if prediction_type == "epsilon":
            return eps
        return self.sigma_inf * alpha * eps - sigma / self.sigma_inf * (clean - self.mean)


def run(scheduler: Any, problem: MeanRevertingProblem, start: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The states after each step of a run of an `MRScheduler` whose timesteps are set; noise is the problem's."""
    sample, states = problem.start if start is None else start, []
    for index, timestep in enumerate(scheduler.timesteps):
        # the scheduler's own levels, not those of its rounded timesteps
        level = scheduler._steps[index].level
        output = problem.answer(sample, level, scheduler.config.prediction_type)
        noise = problem.noise[index] if len(sample) == len(problem.noise[0]) else None
        sample = scheduler.step(output, timestep, sample, mean=problem.mean, variance_noise=noise).prev_sample
        states.append(sample)
    return states
