"""Gradio as the Spaces use it: handlers that can be stopped and end when their visitor leaves, and safe settings.

`pip install "diffusers-ext[spaces]"` brings Gradio. On ZeroGPU the package `spaces` lends a GPU for the time of a call; anywhere else
[`on_gpu`] does nothing.
"""

import functools
import logging
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from .checks import VisitorError
from .fields import CSS
from .work import Done, Report, StoppedError, in_steps


MAX_UPLOAD = "8mb"
MAX_WAITING = 32
# One group for everything that uses the model: two calls at once would only share the same processor.
MODEL_GROUP = "model"
# Answers that wait for a visitor whose session is closed, some two seconds of them; one who listens, however slowly,
# leaves none waiting.
_UNREAD = 8

_log = logging.getLogger(__name__)


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
    for step in in_steps(work, gone=departure()):
        if isinstance(step, Done):
            return step.result
        progress(step.fraction, desc=step.words)
        yield gr.skip() if outputs == 1 else [gr.skip()] * outputs
    raise AssertionError("work ends with its result or an error")


def departure() -> Callable[[], bool]:
    """Whether the visitor of the call that runs now has left, as a question that its work asks at each step.

    Gradio closes a handler where it hands something over, and of a call that is cancelled before its handler did so
    for the first time it forgets the handler and lets it run. What it knows at any time is whether the call is still
    in its queue, whether the stream of its answers was broken off, and, of a visitor who left before he opened that
    stream, that his session is closed while answers pile up.

    A slow visitor keeps his connection and has not left. Where the queue does not know the call (it runs in a process
    of its own, or past the queue) the answer is always no.

    Returns:
        `Callable[[], bool]`: To be asked from any thread.
    """
    # Not part of Gradio's public interface, so that a release without them has the patience of `in_steps` instead.
    queue: Any = getattr(LocalContext.blocks.get(None), "_queue", None)
    events: Any = getattr(queue, "event_ids_to_events", {})
    event_id = LocalContext.event_id.get(None)
    event = events.get(event_id)
    if event is None:
        return lambda: False

    def gone() -> bool:
        if events.get(event_id) is not event or not event.alive:
            return True
        session = queue.server_app.state_holder.session_data.get(event.session_hash)
        answers = queue.pending_messages_per_session.get(event.session_hash)
        return bool(session and session.is_closed and answers and answers.qsize() > _UNREAD)

    return gone


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
        css=CSS,
        **settings,
    )
