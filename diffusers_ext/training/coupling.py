"""Which noise goes with which sample of a batch.

Immiscible diffusion (Li et al. 2024, arXiv 2406.12303): before noise is added, the noise vectors of a batch are assigned
to its samples so that the sum of their Euclidean distances is smallest. Each noise is still standard normal and used
once; only the pairing is no longer random, so that each sample diffuses to its own part of the noise.
"""

import torch


COUPLINGS = ("none", "immiscible")


def couple(kind: str, samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Reorders `noise` along its first axis.

    Args:
        kind: "none" leaves it as it is, "immiscible" minimises the summed distance to `samples`.
        samples: Clean samples (n, ...), scaled as they are noised.
        noise: Noise of the same shape.

    Returns:
        The rows of `noise` in a new order.

    Raises:
        ValueError: For an unknown `kind`.
        ImportError: If SciPy, which solves the assignment, is missing.

    Example:
        >>> couple("immiscible", torch.tensor([[1.0], [-1.0]]), torch.tensor([[-2.0], [2.0]])).flatten().tolist()
        [2.0, -2.0]
    """
    if kind == "none":
        return noise
    if kind != "immiscible":
        raise ValueError(f"noise_coupling={kind!r} is unknown; use one of {', '.join(COUPLINGS)}")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("noise_coupling='immiscible' needs SciPy; pip install 'diffusers-ext[training]'") from error
    distance = torch.cdist(samples.flatten(1).float(), noise.flatten(1).float())
    _, order = linear_sum_assignment(distance.cpu().numpy())
    return noise[torch.from_numpy(order).to(noise.device)]
