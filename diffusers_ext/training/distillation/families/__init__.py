"""The families of pipelines that distillation takes as teachers.

A family holds nothing: it says of one pipeline class how prompts become a condition, how the denoiser is called with it, and
how a student is put together and saved. Teacher, students, methods and scripts are the same for all families.
"""

from .flows import Flux, StableDiffusion3
from .unets import StableDiffusion, StableDiffusionXL


# a UNet that predicts epsilon or v, which `LCMScheduler` samples, and that can have an input for the guidance
UNETS: tuple[StableDiffusion, ...] = (StableDiffusion(), StableDiffusionXL())
FAMILIES: tuple[StableDiffusion, ...] = (*UNETS, StableDiffusion3(), Flux())


def family_named(class_name: object) -> StableDiffusion | None:
    """The family whose pipelines have this class name, as in `model_index.json`; `None` if there is none."""
    return next((family for family in FAMILIES if family.pipeline_class.__name__ == class_name), None)


def listed(families: tuple[StableDiffusion, ...]) -> str:
    """The pipeline classes of families, for a message: "a X, Y or Z"."""
    *first, last = (family.pipeline_class.__name__ for family in families)
    return f"a {' or '.join([', '.join(first), last] if first else [last])}"
