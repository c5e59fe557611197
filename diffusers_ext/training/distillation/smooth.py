r"""Smooth Diffusion (Guo et al. 2023, arXiv 2312.04410): equal steps in the noise make equal steps in the picture.

For the map x_0(eps) of a network at timestep t, with the random direction n ~ N(0, I) (1 - alpha_bar_t)^(1/2) / sqrt(d) in the output:
    y = J^T n,     penalty = (||y|| - a)^2,     a <- a + 0.01 (mean ||y|| - a),
the path-length regularisation of StyleGAN2 for one diffusion step. It needs second derivatives: attention must be the plain one.
"""

from collections.abc import Mapping

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape


def pulled_back(output: torch.Tensor, given: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """J^T n, the gradient of <output, n> with respect to the input, with a graph of its own.

    Args:
        output: What the network made of `given`, (n, ...).
        given: Its input, with `requires_grad`.
        direction: n, in the shape of `output`.

    Returns:
        In the shape of `given`.

    Raises:
        ValueError: If `given` does not require gradients.
    """
    check_same_shape(output=output, direction=direction)
    if not given.requires_grad:
        raise ValueError("given does not require gradients; call given.requires_grad_() before the network")
    (gradient,) = torch.autograd.grad((output * direction).sum(), given, create_graph=True)
    return gradient


def output_direction(output: torch.Tensor, spread: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """n: normal noise in the shape of `output` (n, ...), of norm about the noise level `spread` (n,)."""
    check_levels(output, spread=spread)
    noise = torch.randn(output.shape, generator=generator).to(output)
    return noise * per_sample(spread, output) / output[0].numel() ** 0.5


class VariationPenalty:
    """(||J^T n|| - a)^2 with the running mean a, which is saved with the networks.

    Args:
        decay: Share of the new mean in an update, in (0, 1].

    Example:
        >>> penalty = VariationPenalty(decay=1.0)
        >>> float(penalty(torch.tensor([[3.0, 4.0]])))
        0.0
    """

    def __init__(self, decay: float = 0.01):
        check_range("decay", decay, 0.0, 1.0, above=True)
        self.decay = decay
        self._mean = torch.zeros((), dtype=torch.float64)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """Mean penalty of gradients (n, ...) from `pulled_back`; takes their mean norm into a first."""
        check_same_shape(gradient=gradient)
        lengths = gradient.flatten(1).square().sum(1).sqrt()
        self._mean = torch.lerp(self._mean, lengths.detach().mean().double().cpu(), self.decay)
        return (lengths - self._mean.to(lengths)).square().mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running mean."""
        return {"mean": self._mean.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        if "mean" not in state:
            raise ValueError("the saved state holds no running mean; give one of VariationPenalty.state_dict")
        self._mean = state["mean"].double().clone()
