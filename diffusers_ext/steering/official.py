"""The settings of the authors of FlowChef, by task, for comparisons.

Their cost is a mean over all values of the batch, c mean |A x - y|^2, and their learning rate belongs to it: in units of the
normalised objective it is eta = 2 c lr |A|^2 / n for n values, which is 0.08 for pictures of 64 pixels and 0.005 for Flux at 1024.
It depends on batch and resolution. The variants with Adam step by its learning rate whatever the cost, unless the gradient is
below Adam's epsilon, where c matters again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class OfficialSettings:
    """Settings that belong together.

    Attributes:
        objective (`dict[str, Any]`): Arguments of [`MeasurementObjective`] or [`LatentMaskObjective`].
        scheduler (`dict[str, Any]`): Arguments of [`FlowChefScheduler`], or of [`steer`].
        num_inference_steps (`int`): Steps of a run.
    """

    objective: dict[str, Any]
    scheduler: dict[str, Any]
    num_inference_steps: int


# task -> c, optimizer, learning rate, moves in a step, steps of a run, how many of them are steered
_CONSTANTS: Mapping[str, tuple[float, str, float, int, int, int]] = MappingProxyType(
    {
        "pixel": (1.0, "sgd", 500.0, 1, 100, 99),
        "instaflow_inpaint": (1e-3, "adam", 0.5, 1, 200, 200),
        "instaflow_restore": (1e3, "adam", 0.02, 1, 100, 100),
        "instaflow_edit": (1e-5, "adam", 0.5, 5, 50, 50),
        "flux_inpaint": (1e3, "sgd", 1.0, 5, 30, 20),
        "flux_edit": (1e3, "sgd", 0.6, 5, 30, 20),
    }
)

OFFICIAL_TASKS = tuple(_CONSTANTS)


def official_settings(task: str) -> OfficialSettings:
    """What the authors' scripts and demos use for a task.

    Args:
        task (`str`): `"pixel"` (inverse problems at 64 pixels), `"instaflow_inpaint"`, `"instaflow_restore"`, `"instaflow_edit"`,
            `"flux_inpaint"` or `"flux_edit"`.

    Returns:
        [`OfficialSettings`]: A new one, which may be changed.

    Raises:
        ValueError: If the task is none of these.

    Example:
        ```python
        import torch
        from diffusers_ext import FlowChefScheduler
        from diffusers_ext.steering import LatentMaskObjective, official_settings

        official = official_settings("flux_inpaint")
        objective = LatentMaskObjective(torch.ones(16, 16).tril(), torch.randn(1, 16, 16, 16), **official.objective)
        scheduler = FlowChefScheduler(**official.scheduler)
        scheduler.set_objective(objective)
        ```
    """
    if task not in OFFICIAL_TASKS:
        raise ValueError(f"task={task!r} is not known; use one of {', '.join(OFFICIAL_TASKS)}")
    weight, optimizer, rate, moves, steps, steered = _CONSTANTS[task]
    scheduler = {
        "data_step": "grad", "renoise": 0.0, "optimizer": optimizer, "learning_rate": rate, "optimization_steps": moves,
        "steer_stop": steered / steps,
    }  # fmt: skip
    return OfficialSettings({"weight": weight}, scheduler, steps)
