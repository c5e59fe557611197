"""The Wiener filter: the best linear guess of a sequence from the frames of its condition around each moment.

With u_t the condition and x_t the target, both of mean 0, D has the rows (u_(t - p), ..., u_(t + q)) and

    x_t = (u_(t - p), ..., u_(t + q)) H,      H = (D'D + n r I)^-1 D'x

Beyond the ends of the recording its first and last condition are repeated. p, q and the ridge r are chosen on rows that H was not fitted to.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WienerFilter:
    """Weights `((past + 1 + ahead) * condition channels, channels)`, and the means that they work about."""

    weights: torch.Tensor
    past: int
    ahead: int
    ridge: float
    condition_mean: torch.Tensor
    target_mean: torch.Tensor

    def __call__(self, condition: torch.Tensor) -> torch.Tensor:
        """The guess `(rows, channels)` from a condition `(rows, condition channels)`, float64."""
        rows = windows(condition.double() - self.condition_mean, self.past, self.ahead)
        return rows @ self.weights + self.target_mean


def windows(condition: torch.Tensor, past: int, ahead: int) -> torch.Tensor:
    """For every row the rows around it, side by side: `(rows, (past + 1 + ahead) * channels)`."""
    first, last = condition[:1].expand(past, -1), condition[-1:].expand(ahead, -1)
    around = torch.cat([first, condition, last]).unfold(0, past + 1 + ahead, 1)
    return around.transpose(1, 2).flatten(1)


def fitted(condition: torch.Tensor, target: torch.Tensor, past: int, ahead: int, ridge: float) -> WienerFilter:
    """The filter that fits a recording.

    Args:
        condition (`torch.Tensor` of shape `(rows, condition channels)`): u; bring its channels to one size first, for the ridge.
        target (`torch.Tensor` of shape `(rows, channels)`): x.
        past (`int`): p, 0 or more.
        ahead (`int`): q, 0 or more.
        ridge (`float`): r, above 0.
    """
    condition, target = condition.double(), target.double()
    means = condition.mean(0), target.mean(0)
    rows = windows(condition - means[0], past, ahead)
    normal = rows.T @ rows + ridge * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    return WienerFilter(torch.linalg.solve(normal, rows.T @ (target - means[1])), past, ahead, ridge, *means)


def chosen(
    condition: torch.Tensor,
    target: torch.Tensor,
    cut: int,
    pasts: Iterable[int],
    aheads: Iterable[int],
    ridges: Iterable[float],
) -> WienerFilter:
    """The filter whose error on the rows from `cut` on is least when fitted to those before it, fitted again to all of them."""

    def error(setting: tuple[int, int, float]) -> float:
        guess = fitted(condition[:cut], target[:cut], *setting)(condition)
        wrong = (guess - target)[cut:].square().mean(0) / target[cut:].double().var(0)
        return float(wrong.mean())

    return fitted(condition, target, *min(itertools.product(pasts, aheads, ridges), key=error))
