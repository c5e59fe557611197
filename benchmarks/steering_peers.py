"""Neighbours of FlowChef and FLAIR on a flow model, from the formulas of their papers.

All of them start from the noise `start` and call `flow.velocity` `steps` times for every draw; `objective` is a `MeasurementObjective` whose
loss is |A x - y|^2 / (2 |A|^2). J is the derivative of the estimate x0 = x_t - t v by x_t, a pass through the network backwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Peer:
    """A method and the settings it is tried with, of which the best by PSNR is reported.

    Attributes:
        run (`Callable`): Takes flow, objective, start, number of steps, a generator and a setting.
        settings (`tuple`): Those tried.
        backward (`int`): Passes through the network backwards in a step.
    """

    run: Callable[..., torch.Tensor]
    settings: tuple[Any, ...]
    backward: int


def levels(steps: int) -> list[float]:
    """Levels of Euler's method in diffusers, and 0."""
    return [*torch.linspace(1, 1e-3, steps).tolist(), 0.0]


def _estimate(flow: Any, state: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t that takes part in autograd, v and x0."""
    leaf = state.detach().requires_grad_(True)
    velocity = flow.velocity(leaf, level)
    return leaf, velocity, leaf - level * velocity


def dps(
    flow: Any, objective: Any, start: torch.Tensor, steps: int, generator: torch.Generator, rate: float
) -> torch.Tensor:
    """Diffusion posterior sampling (2022, arXiv 2209.14687): x <- x + (t' - t) v - eta d loss(x0) / d x_t, the whole gradient."""
    state, nodes = start, levels(steps)
    for level, following in zip(nodes, nodes[1:], strict=False):
        leaf, velocity, clean = _estimate(flow, state, level)
        (gradient,) = torch.autograd.grad(objective.loss(clean).sum(), leaf)
        state = (leaf + (following - level) * velocity).detach() - rate * gradient
    return state


def pigdm(
    flow: Any, objective: Any, start: torch.Tensor, steps: int, generator: torch.Generator, least: float
) -> torch.Tensor:
    """Pseudoinverse guidance on a flow (OT-ODE, 2023, arXiv 2310.04432).

    p(y | x_t) is taken for the Gaussian around A x0 of covariance nu A A^T + s^2, nu = t^2 / (t^2 + (1 - t)^2), and

        v  <-  v - t / (1 - t) J^T A^T (nu A A^T + s^2)^-1 (y - A x0)

    `least` is the smallest 1 - t in the denominator.
    """
    state, nodes = start, levels(steps)
    for level, following in zip(nodes, nodes[1:], strict=False):
        leaf, velocity, clean = _estimate(flow, state, level)
        variance = level**2 / (level**2 + (1 - level) ** 2)
        fixed = clean.detach()
        pull = (objective.prox(fixed, variance) - fixed) / variance
        (gradient,) = torch.autograd.grad(clean, leaf, pull)
        velocity = velocity.detach() - level / max(1 - level, least) * gradient
        state = state + (following - level) * velocity
    return state


def pnp_flow(
    flow: Any, objective: Any, start: torch.Tensor, steps: int, generator: torch.Generator, setting: tuple[int, float]
) -> torch.Tensor:
    """PnP-Flow (2024, arXiv 2410.02423): z <- x - t^alpha grad(x), x <- the mean of x0 from z noised to t, over some draws.

    `setting` is the number of draws, which share the evaluations, and alpha.
    """
    draws, power = setting
    state = objective.start(start)
    for level in levels(steps // draws)[:-1]:
        moved = state - level**power * objective.grad(state)
        found = torch.zeros_like(state)
        for _ in range(draws):
            noised = (1 - level) * moved + level * torch.randn(moved.shape, generator=generator)
            found = found + (noised - level * flow.velocity(noised, level)) / draws
        state = found
    return state


PEERS: Mapping[str, Peer] = {
    "DPS, whole gradient": Peer(dps, (0.25, 0.5, 1.0), 1),
    "PiGDM (OT-ODE)": Peer(pigdm, (0.02,), 1),
    "PnP-Flow": Peer(pnp_flow, ((1, 0.5), (1, 1.0), (5, 0.5), (5, 1.0)), 0),
}
