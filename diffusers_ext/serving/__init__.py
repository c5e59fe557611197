"""What the Gradio Spaces share: checks of what visitors send, work that can be watched and stopped, and safe settings.

Only `serving.app` and `serving.fields` need Gradio (`pip install "diffusers-ext[spaces]"`); nothing else of this
package imports it.
"""

from .checks import VisitorError, painted, shrunk, still_picture, whole_number, words
from .sharing import Kept, SharedPipeline
from .work import Done, Step, StoppedError, in_steps


__all__ = [
    "Done",
    "Kept",
    "SharedPipeline",
    "Step",
    "StoppedError",
    "VisitorError",
    "in_steps",
    "painted",
    "shrunk",
    "still_picture",
    "whole_number",
    "words",
]
