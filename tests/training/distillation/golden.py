"""The recorded vectors of tests/golden/distillation."""

from pathlib import Path

import numpy as np
import torch


FOLDER = Path(__file__).resolve().parents[2] / "golden" / "distillation"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The numeric arrays of `name`.npz as tensors; strings are left out."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file if file[key].dtype.kind in "fiu"}


def gauss_hermite(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
