"""From a folder or a Hub id to a pipeline, with one sentence for each thing that can be wrong on the way.

What a repository holds is read from its `model_index.json` before any weight is downloaded or loaded, so that a model of
another family costs a second and not gigabytes.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


DEFAULT_MODEL_NAME = "emoji-scenes-64"
DEFAULT_MODEL_ID = f"diffusers-ext/{DEFAULT_MODEL_NAME}"
RESTORATION_MODEL_NAME = "mr-restoration"
FLOW_MODEL_NAME = "emoji-scenes-flow"
MODEL_VARIABLE = "DIFFUSERS_EXT_MODEL"
INDEX_NAME = "model_index.json"

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

# These have the component set of a plain text-to-image model and a network that takes other inputs.
_OTHER_INPUTS = ("Inpaint", "InstructPix2Pix")


class ModelNotFoundError(OSError):
    """A model that is not where it was said to be, or cannot be reached."""


class ModelFamilyError(ValueError):
    """A model of another family than the pipeline can use."""


def resolve_model(
    model: str | os.PathLike[str] | None = None, default: str = DEFAULT_MODEL_NAME, *, index: str = INDEX_NAME
) -> str:
    """Turns what a user typed into a folder or a Hub id.

    Args:
        model (`str` or `os.PathLike`, *optional*):
            A folder in the diffusers layout or a Hub id. Without it a model of this project is taken: from the checkout this
            package lies in if it is there, or by its Hub id.
        default (`str`, *optional*, defaults to `"emoji-scenes-64"`):
            Name of that model, a folder in `pipelines/`. For the demo model the environment variable `DIFFUSERS_EXT_MODEL`
            goes first.
        index (`str`, *optional*, defaults to `"model_index.json"`):
            File that tells such a folder; `"config.json"` for a network alone.

    Returns:
        `str`: The path of an existing folder that holds this file, or a Hub id.

    Raises:
        ModelNotFoundError: If it is meant as a folder and there is none, or it holds no pipeline.
        TypeError: If `model` is neither text nor a path.
    """
    if model is None:
        chosen = os.environ.get(MODEL_VARIABLE) if default == DEFAULT_MODEL_NAME else None
        model = chosen or _checkout_model(default, index) or f"diffusers-ext/{default}"
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model={model!r} is of type {type(model).__name__}; give a folder or a Hub id")
    text = os.fspath(model)
    if not text:
        raise ModelNotFoundError("model='' is empty; give a folder, a Hub id, or leave it out for the demo model")
    path = Path(text).expanduser()
    # Those of `os.path` answer False for a name that no file system takes; those of `Path` raise.
    if os.path.isdir(path):
        if not (path / index).is_file():
            what = "pipeline" if index == INDEX_NAME else "network"
            raise ModelNotFoundError(f"the folder {text} holds no {what}: {index} is missing")
        return str(path)
    if os.path.isfile(path):
        raise ModelNotFoundError(f"model={text!r} is a file; give the folder that holds {index}, or a Hub id")
    shown = text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"
    if isinstance(model, os.PathLike) or _looks_like_path(text):
        raise ModelNotFoundError(f"the model folder {shown} does not exist")
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"model={shown!r} is neither a folder that exists nor a Hub id like owner/name"
        ) from error
    return text


def read_model_index(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Reads the `model_index.json` of a folder or Hub repository.

    Args:
        model (`str` or `os.PathLike`): A folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit sha on the Hub; not used for a folder.
        token (`str` or `bool`, *optional*): As in `from_pretrained`.

    Returns:
        `dict`: The parsed index.

    Raises:
        ModelNotFoundError: If it is missing, cannot be reached, or is not a pipeline index.
    """
    model = resolve_model(model)
    file = Path(model) / INDEX_NAME if Path(model).is_dir() else _download_index(model, revision, token)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{INDEX_NAME} of {model} cannot be read: it is damaged ({error})") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelNotFoundError(f"{INDEX_NAME} of {model} is damaged: it does not say which pipeline it is for")
    return index


def check_family(pipeline_class: type[DiffusionPipeline], index: dict[str, Any], model: str = "the model") -> None:
    """Checks that a repository has the components a pipeline is made of.

    Args:
        pipeline_class (`type`): The pipeline that shall be loaded.
        index (`dict`): The repository's `model_index.json`.
        model (`str`, *optional*): The repository's name for the message.

    Raises:
        ModelFamilyError: If components are missing, of another family, or the network takes other inputs.
    """
    declared = index["_class_name"]
    kind = str(declared[-1] if isinstance(declared, list) and declared else declared)
    found = {
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and any(item is not None for item in value)
    }
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    known = {parameter.name for parameter in parameters}
    optional = set(pipeline_class._optional_components)
    required = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in {"self", *optional}
    }
    needs = f"{pipeline_class.__name__} needs a model made of {', '.join(sorted(required))}"
    if missing := sorted(required - found):
        raise ModelFamilyError(f"{model} is a {kind}, without {', '.join(missing)}: {needs}")
    if extra := sorted(found - known):
        raise ModelFamilyError(f"{model} is a {kind}, with {', '.join(extra)} besides: {needs}")
    own = pipeline_class.__name__
    if any(word in kind and word not in own for word in _OTHER_INPUTS):
        raise ModelFamilyError(f"{model} is a {kind}, whose network takes more than noisy latents: {needs}")


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Picks a device, or checks the one that was asked for.

    Args:
        device (`str` or `torch.device`, *optional*): Such as `"cpu"` or `"cuda:1"`. Without it a CUDA device, then
            Apple's, then the CPU.

    Returns:
        `torch.device`: A device that is present.

    Raises:
        ValueError: If it is not the name of a device, or not present.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device={str(device)!r} is not present here; leave it out or use 'cpu'") from error
    return wanted


def load_pipeline(
    pipeline_class: type[PipelineT],
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **components: Any,
) -> PipelineT:
    """Loads a pipeline from a folder, the Hub, or the demo model of this project.

    Args:
        pipeline_class (`type`):
            The pipeline, for example `GuideAndRescalePipeline`.
        model (`str` or `os.PathLike`, *optional*):
            A folder or a Hub id; see [`resolve_model`] for what is taken without it.
        revision (`str`, *optional*):
            Branch, tag or commit sha on the Hub. A sha makes a run repeatable whatever is pushed later.
        token (`str` or `bool`, *optional*):
            Access token for a private or gated repository.
        device (`str` or `torch.device`, *optional*):
            Where to put it; see [`resolve_device`].
        dtype (`torch.dtype`, *optional*):
            Precision of the weights; without it float32, which is right on a CPU.
        components:
            Components that replace those of the repository, such as `scheduler=`.

    Returns:
        The pipeline, on the device.

    Raises:
        ModelNotFoundError: If there is no such model, or the Hub cannot be reached.
        ModelFamilyError: If the model is of another family, found before any weight is loaded.
        ValueError: If the device is not present.

    Example:
        ```python
        from diffusers import StableDiffusionPipeline
        from diffusers_ext.hub import load_pipeline

        pipe = load_pipeline(StableDiffusionPipeline, device="cpu")
        ```
    """
    place = resolve_device(device)
    resolved = resolve_model(model)
    check_family(pipeline_class, read_model_index(resolved, revision=revision, token=token), resolved)
    arguments: dict[str, Any] = {"use_safetensors": True, **components}
    if dtype is not None:
        arguments["dtype"] = dtype
    if not Path(resolved).is_dir():
        arguments |= {"revision": revision, "token": token}
    return pipeline_class.from_pretrained(resolved, **arguments).to(place)


def native_size(pipeline: Any) -> int:
    """The side in pixels of the square pictures that a latent diffusion pipeline was trained on.

    Args:
        pipeline (`DiffusionPipeline`): A pipeline with a UNet and a VAE.

    Returns:
        `int`: Pixels, such as 512 for Stable Diffusion 1.5.
    """
    sample_size = pipeline.unet.config.sample_size
    side = min(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
    return int(side) * int(pipeline.vae_scale_factor)


def _checkout_model(name: str, index: str) -> str | None:
    folder = Path(__file__).resolve().parent.parent / "pipelines" / name
    return str(folder) if (folder / index).is_file() else None


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text or text.endswith("/")


def _download_index(model: str, revision: str | None, token: str | bool | None) -> Path:
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(hf_hub_download(model, INDEX_NAME, revision=revision, token=token))
    except HFValidationError as error:
        raise ModelNotFoundError(f"model={model!r} is neither a folder nor a Hub id like 'owner/name'") from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the Hub repository {model} is gated: accept its terms on its page and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the Hub repository {model} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{model}{at} is neither a folder nor in the local Hub cache, and the Hub cannot be reached: name a folder, "
            "or try again with a connection"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no folder and no Hub repository {model} (a private one needs `hf auth login`)"
        ) from error
    except EntryNotFoundError as error:
        raise ModelNotFoundError(f"the Hub repository {model}{at} holds no pipeline: no {INDEX_NAME}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(f"{model}{at} cannot be fetched from the Hub: {reason}") from error
