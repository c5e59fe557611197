"""What a visitor of a Space does from Python: asks, sends files and looks at pictures."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.fresh_process import ROOT


EXAMPLES = ROOT / "spaces" / "edit" / "examples"
SOURCE, PROMPT = "a yellow star on a blue background", "a red star on a blue background"


def client(url: str) -> Any:
    from gradio_client import Client

    # Its own patience of five seconds is too short for twenty visitors on a busy machine.
    return Client(url, verbose=False, httpx_kwargs={"timeout": 120})


def upload(path: Path) -> Any:
    from gradio_client import handle_file

    return handle_file(str(path))


def editor(picture: Path, *layers: Path) -> dict[str, Any]:
    """What the editor of a mask sends."""
    return {"background": upload(picture), "layers": [upload(layer) for layer in layers], "composite": None}


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def refused(url: str, api_name: str, *values: Any) -> str:
    """What is said to a visitor whose request is wrong: neither a trace nor a place on the server."""
    try:
        client(url).predict(*values, api_name=api_name)
    except Exception as error:  # the client's own kinds, which differ between its releases
        message = str(error)
    else:
        raise AssertionError(f"{values} were accepted")
    assert "Traceback" not in message and "/gradio/" not in message, message
    return message


def api_names(url: str) -> set[str]:
    with urllib.request.urlopen(f"{url.rstrip('/')}/config", timeout=5) as page:
        return {item["api_name"] for item in json.load(page)["dependencies"]}
