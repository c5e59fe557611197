"""Runs train_dmd.py in float64, for which it has no option; started by tests, in one process or two."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training.conftest import load_script  # noqa: E402


script = load_script("train_dmd")


class DoubleTeacher(script.Teacher):  # type: ignore[name-defined, misc]
    """A teacher in float64 that takes what is drawn in float32."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        for part in (self.pipeline.vae, self.pipeline.unet, self.pipeline.text_encoder):
            part.double()
        self.unet.register_forward_pre_hook(in_double, with_kwargs=True)
        self.empty = self.empty.double()


class DoubleNetworks(script.MatchingNetworks):  # type: ignore[name-defined, misc]
    """Student, fake score and discriminator in float64."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.double()


def in_double(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, inputs)), {name: cast(value) for name, value in named.items()}


if __name__ == "__main__":
    script.Teacher, script.MatchingNetworks = DoubleTeacher, DoubleNetworks
    # where the losses ask for full precision in place of half, it shall be double here
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    script.main(script.parse_args())
