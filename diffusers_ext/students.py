"""Distilled networks in the place of their teacher's: a student shares all other parts with the model it was distilled from."""

import os
from pathlib import Path
from typing import Any, TypeVar

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from .hub import ModelFamilyError, ModelNotFoundError, resolve_model


STUDENT_MODEL_NAME = "emoji-scenes-reflow"
CONFIG_NAME = "config.json"

# What the other parts of a pipeline hand to the network and take from it.
_SHAPES = ("in_channels", "out_channels", "sample_size", "cross_attention_dim")

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)


def with_student(
    pipeline: PipelineT,
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PipelineT:
    """A pipeline like its teacher's, sampled by a distilled network.

    Args:
        pipeline (`DiffusionPipeline`):
            The teacher's, with a `unet`. It stays as it is; all its other parts are shared.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of the network with its `config.json`, and in `scheduler/` what samples it; without such a folder the
            teacher's scheduler does. Without `model` the student of the demo flow is taken.
        revision (`str`, *optional*):
            Branch, tag or commit sha on the Hub.
        token (`str` or `bool`, *optional*):
            Access token for a private or gated repository.

    Returns:
        A pipeline of the same class on the same device, to be called with `guidance_scale=1` and few steps.

    Raises:
        ModelNotFoundError: If there is no such network, or it cannot be read.
        ModelFamilyError: If it does not fit the other parts, or diffusers has no such scheduler.

    Example:
        ```python
        from diffusers import StableDiffusionPipeline
        from diffusers_ext.students import with_student

        teacher = StableDiffusionPipeline.from_pretrained("pipelines/emoji-scenes-flow")
        student = with_student(teacher)
        image = student("a blue mushroom on a yellow background", num_inference_steps=1, guidance_scale=1).images[0]
        ```
    """
    source = resolve_model(model, STUDENT_MODEL_NAME, index=CONFIG_NAME)
    teacher = pipeline.unet
    remote = {} if Path(source).is_dir() else {"revision": revision, "token": token}
    try:
        unet = type(teacher).from_pretrained(source, use_safetensors=True, torch_dtype=teacher.dtype, **remote)
    except OSError as error:
        raise ModelNotFoundError(f"{source} holds no distilled network that can be read: {error}") from error
    for name in _SHAPES:
        if unet.config[name] != teacher.config[name]:
            raise ModelFamilyError(
                f"the network of {source} has {name}={unet.config[name]} and that of the pipeline {teacher.config[name]}; give one "
                f"that was distilled from this model"
            )
    scheduler = _scheduler(pipeline.scheduler, source, remote)
    parts = {**pipeline.components, "unet": unet.to(pipeline.device), "scheduler": scheduler}
    return type(pipeline)(**parts, requires_safety_checker=pipeline.config.requires_safety_checker)


def _scheduler(own: Any, source: str, remote: dict[str, Any]) -> Any:
    """What the student is sampled with, of the class that its config names; the teacher's `own` if there is no config."""
    try:
        config = type(own).load_config(source, subfolder="scheduler", **remote)
    except OSError:
        # The network has been read from there, so it is the config that is not there.
        return own
    family: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(family, type) and issubclass(family, SchedulerMixin)
    if not known:
        raise ModelFamilyError(
            f"the scheduler of {source} is a {config.get('_class_name')}, which diffusers {diffusers.__version__} does not have; give a "
            f"student with a scheduler of diffusers"
        )
    return family.from_config(config)
