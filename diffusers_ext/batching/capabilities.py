"""What a batch can do: edit, restore, steer or sample. Of each: the pipeline, what a job may say, and one call.

Defaults are those of the commands for one picture, so a batch of one gives what the command gives.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .. import pipelines
from ..attention import controller_for
from ..hub import (
    DEFAULT_MODEL_NAME,
    FLOW_MODEL_NAME,
    RESTORATION_MODEL_NAME,
    load_pipeline,
    native_size,
    read_model_index,
    resolve_model,
)
from ..imaging import fit_square
from ..inversion import INVERSIONS
from ..manifest import verify_manifest
from ..steering_tasks import EDIT_GUIDANCE_SCALE, GUIDANCE_SCALE, task_arguments
from .jobs import Fields


CAPABILITIES = ("edit", "restore", "steer", "sample")
GUIDED = "guide-and-rescale"
DEFAULT_MODELS = {"restore": RESTORATION_MODEL_NAME, "steer": FLOW_MODEL_NAME}
# Arguments of a call that JSON cannot hold, that the batch gives, or that would make several pictures of a job.
_NOT_IN_A_JOB = frozenset(
    "self kwargs image mask_image generator latents output_type return_dict callback_on_step_end "
    "callback_on_step_end_tensor_inputs callback callback_steps guiders inversion controller operator measurement "
    "objective "
    "ip_adapter_image ip_adapter_image_embeds prompt_embeds negative_prompt_embeds pooled_prompt_embeds "
    "negative_pooled_prompt_embeds num_images_per_prompt batch_size return_source samples_per_pass".split()
)
# Of `task_arguments`; the last two are arguments of the pipeline too.
_OF_A_TASK = ("factor", "blur", "noise_std", "source_stop")

Call = Callable[[Any, Mapping[str, Any], Mapping[str, Image.Image], torch.Generator], Any]


@dataclass(frozen=True)
class Capability:
    """One of edit, restore, steer and sample, for one model.

    Attributes:
        name (`str`): Which.
        model (`str`): Folder or Hub id.
        revision (`str`, *optional*): Of a Hub model.
        method (`str`, *optional*): How pictures are edited.
        pipeline (`type`): The class that does it.
        fields ([`Fields`]): What a job may say.
        call (`Callable`): `call(pipe, settings, pictures, generator)` gives the pipeline's output.
    """

    name: str
    model: str
    revision: str | None
    method: str | None
    pipeline: Any
    fields: Fields
    call: Call

    def load(self, device: str | torch.device | None, dtype: torch.dtype) -> Any:
        """The pipeline on a device, without a bar of its own; raises as [`diffusers_ext.hub.load_pipeline`] does."""
        if Path(self.model).is_dir():
            # Pipelines of diffusers, which draw samples, do not look at it themselves.
            verify_manifest(self.model)
        pipe = load_pipeline(self.pipeline, self.model, revision=self.revision, device=device, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(
        self, pipe: Any, settings: Mapping[str, Any], pictures: Mapping[str, Image.Image], seed: int
    ) -> tuple[Image.Image, dict[str, Any]]:
        """One picture, and what the pipeline tells of the call.

        Raises:
            ValueError: If a setting or a picture cannot be used, the result is not finite, or a safety checker held it
                back.
        """
        # A few stock schedulers draw from the global generator in spite of ours; its state depends on the jobs before.
        torch.manual_seed(seed)
        result = self.call(pipe, settings, pictures, torch.Generator().manual_seed(seed))
        flags = getattr(result, "nsfw_content_detected", None)
        if isinstance(flags, (list, tuple)) and any(flags):
            raise ValueError("the model's safety checker held the picture back; use another prompt or seed")
        evaluations = getattr(result, "network_evaluations", None)
        return _picture(result.images), {} if evaluations is None else {"network_evaluations": evaluations}


def find_capability(
    name: str,
    *,
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    method: str = GUIDED,
) -> Capability:
    """What a capability needs and takes, before a weight is loaded.

    Args:
        name (`str`): `"edit"`, `"restore"`, `"steer"` or `"sample"`.
        model (`str` or `os.PathLike`, *optional*): Folder or Hub id; a model of this project by default.
        revision (`str`, *optional*): Branch, tag or commit of a Hub model.
        method (`str`, *optional*, defaults to `"guide-and-rescale"`): For edits; or the name of an inversion such as
            `"null-text"`, under prompt-to-prompt.

    Returns:
        [`Capability`]: Of which `fields` say what a job may say.

    Raises:
        ValueError: If there is no such capability or method, or the model draws no pictures.
        OSError: If there is no such model.

    Example:
        ```python
        from diffusers_ext.batching import find_capability

        restoring = find_capability("restore")
        assert restoring.fields.files == ("file",) and "strength" in restoring.fields.arguments
        ```
    """
    if name not in CAPABILITIES:
        raise ValueError(f"name={name!r} is not a capability; use one of {', '.join(CAPABILITIES)}")
    if name != "edit" and method != GUIDED:
        raise ValueError(f"method={method!r} has no effect on {name}; leave it out")
    found = resolve_model(model, DEFAULT_MODELS.get(name, DEFAULT_MODEL_NAME))
    makers: dict[str, Callable[..., tuple[Any, Fields, Call]]]
    makers = {"edit": _edit, "restore": _restore, "steer": _steer, "sample": _sample}
    pipeline, fields, call = makers[name](method=method, model=found, revision=revision)
    return Capability(name, found, revision, method if name == "edit" else None, pipeline, fields, call)


def inversion_settings(method: str, steps: int) -> dict[str, Any]:
    """Arguments of [`NullTextInversionPipeline`] for an edit with attention from the source.

    Args:
        method (`str`): Name of an inversion, as a word of a command line.
        steps (`int`): Of the inversion.
    """
    inversion = method.replace("-", "_")
    # With attention from the source the authors skip 12 of 100.
    return {"inversion_method": inversion, "skip": round(0.12 * steps) if inversion == "edit_friendly" else 0}


def _edit(method: str, **_: Any) -> tuple[Any, Fields, Call]:
    guided = method == GUIDED
    if not guided and method.replace("-", "_") not in INVERSIONS:
        words = ", ".join([GUIDED, *(word.replace("_", "-") for word in INVERSIONS)])
        raise ValueError(f"method={method!r} is not known; use one of {words}")
    pipeline = pipelines.GuideAndRescalePipeline if guided else pipelines.NullTextInversionPipeline
    # The inversion of the other one is the method, and said with it.
    arguments = _arguments_of(pipeline) - (set() if guided else {"inversion_method"})
    fields = Fields(
        owner=pipeline.__name__,
        arguments=frozenset(arguments),
        files=("file",),
        required=("source_prompt", "prompt"),
        defaults={"num_inference_steps": 50, "guidance_scale": 7.5},
    )

    def call(
        pipe: Any, settings: Mapping[str, Any], pictures: Mapping[str, Image.Image], generator: torch.Generator
    ) -> Any:
        image = fit_square(pictures["file"], native_size(pipe))
        if guided:
            return pipe(image=image, generator=generator, **settings)
        controller = controller_for(pipe.tokenizer, [settings["source_prompt"], settings["prompt"]])
        usual = inversion_settings(method, settings["num_inference_steps"])
        return pipe(image=image, generator=generator, controller=controller, **{**usual, **settings})

    return pipeline, fields, call


def _restore(**_: Any) -> tuple[Any, Fields, Call]:
    pipeline = pipelines.MRRestorationPipeline
    fields = Fields(
        owner=pipeline.__name__,
        arguments=frozenset(_arguments_of(pipeline)),
        files=("file",),
        defaults={"num_inference_steps": 5, "strength": 1.0, "noise_scale": 0.0},
    )

    def call(
        pipe: Any, settings: Mapping[str, Any], pictures: Mapping[str, Image.Image], generator: torch.Generator
    ) -> Any:
        return pipe(pictures["file"], generator=generator, **settings)

    return pipeline, fields, call


def _steer(**_: Any) -> tuple[Any, Fields, Call]:
    pipeline = pipelines.FlowChefPipeline
    fields = Fields(
        owner=pipeline.__name__,
        arguments=frozenset({*_arguments_of(pipeline), "task", *_OF_A_TASK}),
        files=("file", "mask"),
        required=("task", "prompt"),
        defaults={"num_inference_steps": 30},
    )

    def call(
        pipe: Any, settings: Mapping[str, Any], pictures: Mapping[str, Image.Image], generator: torch.Generator
    ) -> Any:
        rest = dict(settings)
        task, source = rest.pop("task"), rest.pop("source_prompt", None)
        of_task = {name: rest.pop(name) for name in _OF_A_TASK if name in rest}
        arguments = task_arguments(
            task, pictures["file"], native_size(pipe), mask=pictures.get("mask"), source=source, **of_task
        )
        scale = EDIT_GUIDANCE_SCALE if task == "edit" else GUIDANCE_SCALE
        return pipe(**{"guidance_scale": scale, **arguments, **rest}, generator=generator)

    return pipeline, fields, call


def _sample(model: str, revision: str | None, **_: Any) -> tuple[Any, Fields, Call]:
    declared = read_model_index(model, revision=revision)["_class_name"]
    kind = str(declared[-1] if isinstance(declared, list) and declared else declared)
    pipeline = getattr(diffusers, kind, None) or getattr(pipelines, kind, None)
    parameters = inspect.signature(pipeline.__call__).parameters if isinstance(pipeline, type) else {}
    # What draws sequences or video gives something else by default; what has no prompt and takes a picture, needs one.
    draws = "generator" in parameters and "output_type" in parameters and parameters["output_type"].default == "pil"
    if not draws or ("image" in parameters and "prompt" not in parameters):
        raise ValueError(f"model={model!r} is a {kind}, which draws no pictures from words; use a text-to-image model")
    arguments = _arguments_of(pipeline)
    fields = Fields(
        owner=kind,
        arguments=frozenset(arguments),
        required=("prompt",) if "prompt" in arguments else (),
    )

    def call(
        pipe: Any, settings: Mapping[str, Any], pictures: Mapping[str, Image.Image], generator: torch.Generator
    ) -> Any:
        # As an array, since a NaN in it would be a black pixel of a picture.
        return pipe(**settings, generator=generator, output_type="np")

    return pipeline, fields, call


def _arguments_of(pipeline: Any) -> set[str]:
    return {name for name in inspect.signature(pipeline.__call__).parameters if name not in _NOT_IN_A_JOB}


def _picture(images: Any) -> Image.Image:
    if len(images) != 1:
        raise ValueError(f"the pipeline made {len(images)} pictures of one job; give it settings that make one")
    if not isinstance(images, np.ndarray):
        return images[0]
    if not np.isfinite(images).all():
        raise ValueError(
            "the picture has values that are not finite; use another dtype or fewer extremes in the settings"
        )
    return VaeImageProcessor.numpy_to_pil(images)[0]
