"""Which way a flow's network points.

The velocity of x_t = (1 - t) x0 + t eps has one of two signs:

    "noise_minus_data"   v = eps - x0, as this package trains and SD3 and Flux have it
    "data_minus_noise"   v = x0 - eps, as InstaFlow and the rectified flows it came from (arXiv 2309.06380)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


VELOCITIES = ("noise_minus_data", "data_minus_noise")


class VelocitySignMixin:
    """For pipelines with a UNet and a `velocity` in their config."""

    config: Any
    unet: Any

    @contextmanager
    def _signed(self) -> Iterator[None]:
        """The UNet's answer as eps - x0 for the time of a `with` block."""
        if self.config.velocity == "noise_minus_data":
            yield
            return
        hook = self.unet.register_forward_hook(lambda unet, inputs, answer: (-answer[0], *answer[1:]))
        try:
            yield
        finally:
            hook.remove()


def is_of_flow(scheduler: Any) -> bool:
    """Whether a scheduler steps along a velocity."""
    config = scheduler.config
    if "beta_schedule" not in config:
        return "shift" in config or "flow_shift" in config
    return bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"


def check_flow(scheduler: Any) -> None:
    """Raises a `ValueError` unless a scheduler steps along a velocity."""
    if not is_of_flow(scheduler):
        found = getattr(scheduler.config, "prediction_type", None)
        raise ValueError(
            f"scheduler={type(scheduler).__name__} with prediction_type={found!r} is not one of a flow model; give one with "
            "prediction_type='flow_prediction' and use_flow_sigmas=True, or a FlowChefScheduler"
        )
