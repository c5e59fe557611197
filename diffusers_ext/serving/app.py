"""Gradio as the Spaces use it: uploads that are checked before they are decoded, handlers that can be stopped, safe settings.

`pip install "diffusers-ext[spaces]"` brings Gradio. On ZeroGPU the package `spaces` lends a GPU for the time of a call; anywhere else
[`on_gpu`] does nothing.
"""

import functools
import logging
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import Any

import gradio as gr
import torch

from ..hub import load_pipeline, resolve_model
from .checks import VisitorError
from .sharing import SharedPipeline
from .work import Done, Report, StoppedError, in_steps


MODEL_VARIABLE = "MODEL_ID"
REVISION_VARIABLE = "MODEL_REVISION"
MAX_UPLOAD = "8mb"
MAX_WAITING = 32
# One group for everything that uses the model: two calls at once would only share the same processor.
MODEL_GROUP = "model"

# Pictures of the demo models are a few dozen pixels wide.
_CSS = ".pixels img {image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%}"
_log = logging.getLogger(__name__)


def upload_field(label: str, *, height: int = 240) -> gr.Image:
    """A field for one picture, from a file or the clipboard, that hands over the path of the file as it was sent.

    Gradio's own decodes and converts what it gets, whatever its size. Here nothing is decoded before
    [`diffusers_ext.serving.still_picture`] has looked at the header.

    Args:
        label (`str`): What stands above it.
        height (`int`, *optional*, defaults to 240): Of the field, in pixels.

    Returns:
        `gr.Image`: The field.
    """
    field = gr.Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        format="png",
        height=height,
        elem_classes="pixels",
    )
    # Not by a class of our own: Gradio writes a stub file beside the source of each component class that it meets.
    field.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return field


def shared_model(pipeline_class: Any, default: str, *, exclusive: bool = True) -> SharedPipeline:
    """Loads the model of a Space: that of the variable `MODEL_ID` (at `MODEL_REVISION`), or a model of this project.

    Args:
        pipeline_class (`type`): The pipeline.
        default (`str`): Name of the model of this project, a folder in `pipelines/`.
        exclusive (`bool`, *optional*, defaults to `True`): As for [`SharedPipeline`].

    Returns:
        [`SharedPipeline`]: On a GPU if there is one.
    """
    model = resolve_model(os.environ.get(MODEL_VARIABLE) or None, default)
    revision = os.environ.get(REVISION_VARIABLE) or None
    dtype = torch.float16 if torch.cuda.is_available() and os.environ.get(MODEL_VARIABLE) else None
    return SharedPipeline(load_pipeline(pipeline_class, model, revision=revision, dtype=dtype), exclusive=exclusive)


def on_gpu(seconds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that asks ZeroGPU for a GPU for at most so many seconds, and does nothing elsewhere."""
    try:
        import spaces
    except ImportError:
        return lambda function: function
    # A folder of that name on the path is importable too.
    gpu = getattr(spaces, "GPU", None)
    return (lambda function: function) if gpu is None else gpu(duration=seconds)


def answering(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Makes of what goes wrong in a handler what a visitor may read.

    A [`VisitorError`] is shown as it is; of anything else only a number by which it is found in the log.
    """

    @functools.wraps(handler)
    def answer(*values: Any, **named: Any) -> Iterator[Any]:
        try:
            yield from handler(*values, **named)
        except StoppedError:
            return
        except VisitorError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        except gr.Error:
            raise
        except Exception:
            mark = secrets.token_hex(4)
            _log.exception("error %s", mark)
            raise gr.Error(
                f"Something went wrong here, not with what you sent. It was noted as {mark}.", print_exception=False
            ) from None

    return answer


def shown(work: Callable[[Report], Any], progress: gr.Progress, outputs: int) -> Generator[Any, None, Any]:
    """Runs work for a handler: `result = yield from shown(work, progress, outputs=3)`.

    Args:
        work (`Callable`): As for [`in_steps`].
        progress (`gr.Progress`): The handler's.
        outputs (`int`): Number of its outputs, which stay as they are meanwhile.

    Returns:
        What the work returned.
    """
    for step in in_steps(work):
        if isinstance(step, Done):
            return step.result
        progress(step.fraction, desc=step.words)
        yield gr.skip() if outputs == 1 else [gr.skip()] * outputs
    raise AssertionError("work ends with its result or an error")


def page(title: str) -> gr.Blocks:
    """An empty page, to be filled in a `with` block; uploads and results are deleted an hour after their last use."""
    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600))


def launch(blocks: gr.Blocks, **settings: Any) -> Any:
    """Starts a Space with what all of them have in common: a queue with an end, small uploads, no traces, no monitoring page.

    Args:
        blocks (`gr.Blocks`): The page.
        settings: Further arguments of `gr.Blocks.launch`, such as `server_port`.

    Returns:
        What `launch` returns.
    """
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return blocks.launch(
        max_file_size=MAX_UPLOAD,
        show_error=False,
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        mcp_server=False,
        footer_links=["api"],
        css=_CSS,
        **settings,
    )
