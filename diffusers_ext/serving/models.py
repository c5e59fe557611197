"""The models of the Spaces: which one is loaded, and how a distilled network is put together with the other parts of
its teacher."""

import os
from typing import Any

import torch

from ..hub import load_pipeline, resolve_model
from ..students import with_student
from .sharing import SharedPipeline


MODEL_VARIABLE = "MODEL_ID"
REVISION_VARIABLE = "MODEL_REVISION"
STUDENT_VARIABLE = "STUDENT_ID"
STUDENT_REVISION_VARIABLE = "STUDENT_REVISION"


def shared_model(
    pipeline_class: Any,
    default: str,
    *,
    exclusive: bool = True,
    variable: str = MODEL_VARIABLE,
    revision_variable: str = REVISION_VARIABLE,
) -> SharedPipeline:
    """Loads the model of a Space: that of a variable, by default `MODEL_ID` (at `MODEL_REVISION`), or a model of this
    project.

    Args:
        pipeline_class (`type`): The pipeline.
        default (`str`): Name of the model of this project, a folder in `pipelines/`.
        exclusive (`bool`, *optional*, defaults to `True`): As for [`SharedPipeline`].
        variable (`str`, *optional*, defaults to `"MODEL_ID"`): Variable of the environment that names another folder
            or Hub repository.
        revision_variable (`str`, *optional*, defaults to `"MODEL_REVISION"`): The one that names its commit.

    Returns:
        [`SharedPipeline`]: On a GPU if there is one.
    """
    model = resolve_model(os.environ.get(variable) or None, default)
    revision = os.environ.get(revision_variable) or None
    dtype = torch.float16 if torch.cuda.is_available() and os.environ.get(variable) else None
    return SharedPipeline(load_pipeline(pipeline_class, model, revision=revision, dtype=dtype), exclusive=exclusive)


def shared_student(
    teacher: SharedPipeline, *, variable: str = STUDENT_VARIABLE, revision_variable: str = STUDENT_REVISION_VARIABLE
) -> SharedPipeline:
    """Loads a distilled network, by default that of this project, and takes all other parts from its teacher.

    Args:
        teacher ([`SharedPipeline`]): Gives the parts that were not trained; its requests and those of the student wait for each other, so
            that each is measured alone.
        variable (`str`, *optional*, defaults to `"STUDENT_ID"`): Variable of the environment that names another folder or Hub repository.
        revision_variable (`str`, *optional*, defaults to `"STUDENT_REVISION"`): The one that names its commit.

    Returns:
        [`SharedPipeline`]: As [`diffusers_ext.students.with_student`] makes it, and with its errors.
    """
    model, revision = (os.environ.get(name) or None for name in (variable, revision_variable))
    return SharedPipeline(with_student(teacher.pipeline, model, revision=revision), beside=teacher)
