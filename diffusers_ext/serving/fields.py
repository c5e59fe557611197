"""The fields of the Spaces: what they look like and what they hand over stands here once, so that a Space is its page
and its calls.

`pip install "diffusers-ext[spaces]"` brings Gradio.
"""

from typing import Any

import gradio as gr


# Pictures of the demo models are a few dozen pixels wide.
CSS = ".pixels img {image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%}"
_PIXELS = "pixels"


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
        elem_classes=_PIXELS,
    )
    # Not by a class of our own: Gradio writes a stub file beside the source of each component class that it meets.
    field.preprocess = _path  # type: ignore[method-assign]
    return field


def mask_field(label: str, *, height: int = 420) -> gr.ImageEditor:
    """A field for one picture on which a brush paints a mask.

    It hands over the paths of the files as they were sent, as `{"background": path, "layers": [path, ...]}`; the paths
    are for [`diffusers_ext.serving.still_picture`] and [`diffusers_ext.serving.painted`]. As with [`upload_field`]
    nothing is decoded here. What was painted on comes as the square that is seen, with empty margins beside a picture
    that is none: [`diffusers_ext.serving.checks.within_margins`] says where it is.

    Give it no listener of its changes: only then Gradio sends a picture when a button is clicked, as a file that the
    limit of uploads holds for, and not piece by piece into the memory of the server, which is closed here.

    Args:
        label (`str`): What stands above it.
        height (`int`, *optional*, defaults to 420): Of the field, in pixels.

    Returns:
        `gr.ImageEditor`: The field.
    """
    field = gr.ImageEditor(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        format="png",
        height=height,
        transforms=(),
        layers=False,
        # Otherwise a small picture is a small place to paint on, and a photograph an upload beyond the limit.
        canvas_size=(512, 512),
        fixed_canvas=True,
        # One colour that no scene is made of, through which what lies beneath is seen.
        brush=gr.Brush(colors=[("#ff2fd0", 0.7)], color_mode="fixed"),
        buttons=["fullscreen"],
    )
    field.preprocess = _paths  # type: ignore[method-assign]
    # Anyone may call it, as often as he likes and with any number of layers, and what it got was kept for good.
    field.accept_blobs, field.server_fns = None, []
    return field


def seed_field() -> gr.Number:
    """A field for what [`diffusers_ext.serving.checks.seed_number`] checks."""
    return gr.Number(0, precision=0, label="Seed")


def before_after() -> gr.ImageSlider:
    """Two pictures of one size under a slider."""
    return gr.ImageSlider(
        label="Before and after", format="png", max_height=420, interactive=False, elem_classes=_PIXELS
    )


def result_field(label: str, *, height: int = 260) -> gr.Image:
    """A picture that is looked at and kept.

    Args:
        label (`str`): What stands above it.
        height (`int`, *optional*, defaults to 260): Of the field, in pixels.

    Returns:
        `gr.Image`: The field.
    """
    return gr.Image(
        label=label,
        format="png",
        height=height,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=_PIXELS,
    )


def buttons(*words: str) -> tuple[gr.Button, ...]:
    """A row of buttons, the first of them the one that most visitors want, and Stop at the end.

    Args:
        words (`str`): What stands on them.

    Returns:
        `tuple[gr.Button, ...]`: One for each word, and then Stop, to be given what it ends:
        `stop.click(None, cancels=[...])`.
    """
    with gr.Row():
        made = [gr.Button(word, variant="secondary" if i else "primary", min_width=80) for i, word in enumerate(words)]
        return *made, gr.Button("Stop", variant="stop", min_width=80)


def _path(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _paths(payload: Any) -> Any:
    if payload is None:
        return None
    return {"background": _path(payload.background), "layers": [_path(layer) for layer in payload.layers if layer]}
