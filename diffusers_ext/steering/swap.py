"""Steering of a whole pipeline: its scheduler is exchanged for the time of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from ..schedulers import (
    FLAIRScheduler,
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefLCMScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)


STEERABLE: dict[type, type] = {
    FlowMatchEulerDiscreteScheduler: FlowChefScheduler,
    FlowMatchHeunDiscreteScheduler: FlowChefHeunScheduler,
    FlowMatchLCMScheduler: FlowChefLCMScheduler,
    DPMSolverMultistepScheduler: FlowChefDPMSolverMultistepScheduler,
    UniPCMultistepScheduler: FlowChefUniPCMultistepScheduler,
}


SOLVERS = ("flowchef", "flair")


def steerable(scheduler: Any, solver: str = "flowchef", **settings: Any) -> Any:
    """A scheduler that steps as another does and can be steered.

    Args:
        scheduler (`SchedulerMixin`): A scheduler of flow models: Euler, Heun, LCM, or DPM-Solver++ or UniPC with flow sigmas.
        solver (`str`, *optional*, defaults to `"flowchef"`): `"flowchef"`, which pulls what the scheduler samples, or `"flair"`, which
            optimises one sample whatever the scheduler; see [`FLAIRScheduler`].
        **settings: Settings of [`FlowChefScheduler`] or [`FLAIRScheduler`], such as `data_step`.

    Returns:
        A new scheduler with the configuration of the given one.

    Raises:
        TypeError: If no scheduler of this package steps as the given one does, or a setting is not known.
        ValueError: If a setting is out of range.

    Example:
        ```python
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers_ext.steering import steerable

        scheduler = steerable(FlowMatchEulerDiscreteScheduler(shift=3.0), data_step="grad", learning_rate=0.5)
        assert type(scheduler).__name__ == "FlowChefScheduler" and scheduler.config.shift == 3.0
        ```
    """
    found = next((ours for stock, ours in STEERABLE.items() if isinstance(scheduler, stock)), None)
    if found is None:
        raise TypeError(
            f"scheduler={type(scheduler).__name__} is not one of a flow model; use a pipeline with one of "
            f"{', '.join(stock.__name__ for stock in STEERABLE)}"
        )
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not known; use one of {', '.join(SOLVERS)}")
    if solver == "flair":
        found = FLAIRScheduler
    known: Any = found
    unknown = sorted(set(settings) - set(known._get_init_keys(known)))
    if unknown:
        raise TypeError(
            f"{unknown[0]}={settings[unknown[0]]!r} is no setting of {found.__name__}; see its documentation"
        )
    made = known.from_config(scheduler.config, **settings)
    if hasattr(scheduler, "set_shift") and hasattr(made, "set_shift"):
        made.set_shift(scheduler.shift)  # may have been set since
    return made


@contextmanager
def steer(pipe: Any, objective: Any, generator: Any = None, **settings: Any) -> Iterator[Any]:
    """Steers whatever a flow pipeline samples inside of a `with` block.

    The pipeline itself stays as it is: only its scheduler is exchanged, and put back afterwards, also after an error. It works with
    every pipeline whose scheduler is one of a flow model.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        objective (`Objective`): What samples are steered towards, in the space and layout that the scheduler sees: latents,
            shifted and scaled, packed to tokens in Flux and Qwen-Image (see [`PackedObjective`]), with frames in Wan.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise that steering draws. By default
            the global one.
        **settings: `solver`, and settings of the scheduler that it is, such as `data_step`, `learning_rate` and `steer_stop`; see
            [`steerable`].

    Yields:
        The scheduler that steers.

    Raises:
        TypeError: If the pipeline has no scheduler of a flow model, a setting is not known, or it is not an objective.
        ValueError: If a setting is out of range.

    Example:
        ```python no-run
        import torch
        from diffusers import StableDiffusion3Pipeline
        from diffusers_ext.steering import LatentMaskObjective, steer

        pipe = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
        latents = torch.randn(1, 16, 128, 128)  # of a picture of 1024 pixels, shifted and scaled
        keep = torch.ones(128, 128)
        keep[32:96, 32:96] = 0
        with steer(pipe, LatentMaskObjective(keep, latents)):
            image = pipe("a red star", num_inference_steps=28).images[0]
        ```
    """
    before = getattr(pipe, "scheduler", None)
    if before is None:
        raise TypeError(f"pipe={type(pipe).__name__} has no scheduler; give a pipeline of diffusers")
    scheduler = steerable(before, **settings)
    scheduler.set_objective(objective, generator)
    pipe.scheduler = scheduler
    try:
        yield scheduler
    finally:
        pipe.scheduler = before
