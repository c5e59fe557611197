r"""Rectified flow by ReFlow (Liu et al. 2022, arXiv 2209.03003) with the choices of Simple ReFlow (Kim et al. 2024, arXiv 2410.07815).

A flow model is trained anew on pairs (eps, x_0) that its teacher's own ODE connects: x_sigma = (1 - sigma) x_0 + sigma eps, target
eps - x_0. Where the paths of the pairs do not cross the new flow is straight, and one Euler step suffices:
    S = int_0^1 E ||(eps - x_0) - v(x_sigma, sigma)||^2 d sigma,     0 for straight paths.
Simple ReFlow: a density of times proportional to 10^sigma, each sample's loss divided by its own value, a loss that counts high
frequencies more, pairs of real pictures inverted to noise among the simulated ones, and a sigmoid grid of times at inference.
"""

import math

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape


def exponential_times(uniform: torch.Tensor, base: float = 10.0) -> torch.Tensor:
    """Times with a density proportional to base^sigma, more of them at the noise.

    Args:
        uniform: Draws from [0, 1), of any shape.
        base: Ratio of the densities at noise and sample, above 1.

    Returns:
        log(1 + (base - 1) u) / log base, in [0, 1).

    Example:
        >>> exponential_times(torch.tensor([0.0, 1.0])).tolist()
        [0.0, 1.0]
    """
    check_range("base", base, 1.0, above=True)
    return torch.log1p((base - 1.0) * uniform) / math.log(base)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of straight paths and their velocity.

    Args:
        clean: Ends x_0 (n, ...).
        noise: Starts eps, same shape; of the pair, not fresh.
        sigma: (n,) in [0, 1].

    Returns:
        x_sigma and eps - x_0, each (n, ...).
    """
    check_same_shape(clean=clean, noise=noise)
    check_levels(clean, sigma=sigma)
    level = per_sample(sigma, clean)
    return (1.0 - level) * clean + level * noise, noise - clean


def high_pass(residual: torch.Tensor, strength: float) -> torch.Tensor:
    """residual + strength (residual - its 3x3 mean): counts fine structure more in a squared loss.

    Args:
        residual: (n, c, h, w).
        strength: 0 or more; 0 returns the residual itself.
    """
    check_range("strength", strength, 0.0)
    if residual.ndim != 4:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; the high-pass filter needs (n, c, h, w)")
    if strength == 0.0:
        return residual
    blurred = torch.nn.functional.avg_pool2d(residual, 3, 1, 1, count_include_pad=False)
    return residual + strength * (residual - blurred)


def reflow_loss(
    prediction: torch.Tensor, velocity: torch.Tensor, normalize: bool = False, high_pass_strength: float = 0.0
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        prediction: v(x_sigma, sigma), (n, ...).
        velocity: eps - x_0 of the pairs, same shape.
        normalize: Divide each sample's loss by its own value without gradient, which evens out noise levels.
        high_pass_strength: See `high_pass`.

    Returns:
        A scalar; with `normalize` it is 1 whatever the error, only its gradient tells.
    """
    check_same_shape(prediction=prediction, velocity=velocity)
    residual = prediction.float() - velocity.float()
    if high_pass_strength:
        residual = high_pass(residual, high_pass_strength)
    losses = residual.square().flatten(1).mean(1)
    if normalize:
        # a sample fitted to the bit has no direction either way
        losses = losses / losses.detach().clamp(min=torch.finfo(losses.dtype).tiny)
    return losses.mean()


def mixed_pairs(
    simulated: tuple[torch.Tensor, torch.Tensor], inverted: tuple[torch.Tensor, torch.Tensor], take: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (clean, noise) of a batch, some of them real pictures with the noise they were inverted to.

    Args:
        simulated: Clean and noise (n, ...) of the teacher run from noise.
        inverted: Clean and noise (n, ...) of the teacher run from real pictures, same shape.
        take: Boolean (n,): where the inverted pair is used.
    """
    check_same_shape(clean=simulated[0], noise=simulated[1], real=inverted[0], its_noise=inverted[1])
    check_levels(simulated[0], take=take)
    chosen = take.reshape(-1, *[1] * (simulated[0].ndim - 1))
    clean, noise = (torch.where(chosen, real, made) for made, real in zip(simulated, inverted))
    return clean, noise


def sigmoid_grid(steps: int, kappa: float = 20.0) -> torch.Tensor:
    """Falling levels 1 ... 0 that are dense at both ends.

    Args:
        steps: Steps of the solver, 1 or more.
        kappa: Density at the ends, above 0; towards 0 the grid becomes even.

    Returns:
        (steps + 1,), float64.
    """
    check_range("steps", steps, 1)
    check_range("kappa", kappa, 0.0, above=True)
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    raised = torch.sigmoid(kappa * (even - 0.5))
    return (raised - raised[-1]) / (raised[0] - raised[-1])


def straightness(velocities: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """S of simulated paths, 0 where they are straight.

    Args:
        velocities: v along each path at equally long steps, (steps, n, ...).
        clean: Ends of the paths (n, ...).
        noise: Their starts, same shape.

    Returns:
        Mean over steps, paths and elements, a scalar.
    """
    check_same_shape(clean=clean, noise=noise)
    if velocities.shape[1:] != clean.shape or not len(velocities):
        raise ValueError(
            f"velocities have shape {tuple(velocities.shape)}; give (steps, {', '.join(map(str, clean.shape))})"
        )
    return ((noise - clean) - velocities).square().mean()
