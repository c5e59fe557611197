"""The Space that steers: a mask from the editor arrives as it was painted, results are the library's, and uploads are
looked at first."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.fresh_process import ROOT

from .visitors import EXAMPLES, client, editor, pixels, refused


PAINT, ENLARGE, SHARPEN = "Paint inside the mask", "Enlarge x4", "Sharpen"
PROMPT = "a red heart on a blue background"
STAR = EXAMPLES / "star.png"


@pytest.fixture
def masks(tmp_path: Path) -> dict[str, Path]:
    """Layers of 64 pixels: a brush that is transparent in part, a mask without transparency, all, nothing, another
    shape, no picture."""
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    brush = clear.copy()
    brush.paste((255, 47, 208, 179), (16, 16, 48, 48))
    white = Image.new("L", (64, 64), 0)
    white.paste(255, (16, 16, 48, 48))
    pictures = {
        "brush": brush, "white": white, "all": Image.new("L", (64, 64), 255), "nothing": clear,
        "wide": Image.new("L", (64, 32), 255),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    return {name: tmp_path / f"{name}.png" for name in (*pictures, "text")}


@pytest.fixture(scope="module")
def of_library() -> Callable[..., np.ndarray]:
    """What the library gives for a task, a picture and a seed, in 4 steps."""
    from diffusers_ext import FlowChefPipeline
    from diffusers_ext.hub import load_pipeline
    from diffusers_ext.steering_tasks import task_arguments

    pipe = load_pipeline(FlowChefPipeline, ROOT / "pipelines" / "emoji-scenes-flow", device="cpu")

    def steered(task: str, picture: Image.Image, seed: int, **more: Any) -> np.ndarray:
        arguments = task_arguments(task, picture, 64, **more)
        generator = torch.Generator().manual_seed(seed)
        result = pipe(PROMPT, num_inference_steps=4, guidance_scale=2.5, generator=generator, **arguments)
        return np.asarray(result.images[0])

    return steered


@pytest.mark.parametrize("layer", ["brush", "white"])
def test_what_was_painted_is_new_and_the_rest_is_the_picture(
    space: Callable[[str], Any], masks: dict[str, Path], of_library: Callable[..., np.ndarray], layer: str
) -> None:
    _, url = space("steer")
    square, measured, steered, cost = client(url).predict(
        editor(STAR, masks[layer]), PAINT, PROMPT, False, 4, 2.5, 2.0, 7, api_name="/steer"
    )
    with Image.open(STAR) as picture, Image.open(masks["white"]) as mask:
        expected = of_library("inpaint", picture.convert("RGB"), 7, mask=mask.copy())
    assert np.array_equal(pixels(steered), expected)
    assert np.array_equal(pixels(square), pixels(STAR))
    hole = np.zeros((64, 64), bool)
    hole[16:48, 16:48] = True
    assert (pixels(measured)[hole] == pixels(measured)[16, 16]).all()
    assert np.array_equal(pixels(measured)[~hole], pixels(STAR)[~hole])
    assert "8 network evaluations" in cost and "dB" not in cost


def test_the_margins_of_the_canvas_are_not_part_of_the_picture(
    space: Callable[[str], Any], masks: dict[str, Path], tmp_path: Path
) -> None:
    module, _ = space("steer")
    canvas = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    with Image.open(STAR) as picture:
        canvas.paste(picture.convert("RGB").resize((128, 64)), (0, 32))
    layer = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    layer.paste((255, 47, 208, 179), (48, 48, 80, 80))
    canvas.save(tmp_path / "canvas.png")
    layer.save(tmp_path / "layer.png")
    value = {"background": str(tmp_path / "canvas.png"), "layers": [str(tmp_path / "layer.png")]}
    picture, mask = module.given(value, "inpaint")
    assert picture.size == mask.size == (128, 64) and mask.getbbox() == (48, 16, 80, 48)
    assert module.given(value, "deblur")[0].tobytes() == picture.tobytes()


def test_a_small_picture_is_enlarged_and_a_blurred_one_sharpened(
    space: Callable[[str], Any], of_library: Callable[..., np.ndarray]
) -> None:
    from diffusers_ext.imaging import fit_square

    _, url = space("steer")
    with Image.open(STAR) as image:
        picture = image.convert("RGB")
    for label, task, more in (
        ("Enlarge x2", "upscale", {"factor": 2}),
        (ENLARGE, "upscale", {"factor": 4}),
        (SHARPEN, "deblur", {"blur": 1.5}),
    ):
        _, measured, steered, _ = client(url).predict(
            editor(STAR), label, PROMPT, False, 4, 2.5, 1.5, 0, api_name="/steer"
        )
        assert np.array_equal(pixels(steered), of_library(task, picture, 0, noise_std=0.02, **more)), label
        assert np.array_equal(pixels(measured), np.asarray(fit_square(picture, 64 // more.get("factor", 1))))


def test_a_picture_that_is_spoiled_first_is_measured_by_the_operator_and_compared(space: Callable[[str], Any]) -> None:
    _, url = space("steer")
    square, measured, steered, cost = client(url).predict(
        editor(STAR), ENLARGE, PROMPT, True, 4, 2.5, 2.0, 0, api_name="/steer"
    )
    means = pixels(square).reshape(16, 4, 16, 4, 3).astype(float).mean((1, 3))
    assert np.abs(pixels(measured) - means).max() <= 0.51
    error = ((pixels(square).astype(float) - pixels(steered)) ** 2).mean()
    assert float(cost.split(" dB")[0].split()[-1]) == pytest.approx(10 * np.log10(255**2 / error), abs=0.06)


@pytest.mark.parametrize(
    ("layers", "changes", "said"),
    [
        ([], {}, "Nothing is painted"),
        (["nothing"], {}, "Nothing is painted"),
        (["all"], {}, "All of the picture is painted"),
        (["wide"], {}, "mask has 64 x 32 pixels, the picture 64 x 64"),
        (["text"], {}, "mask is not a picture"),
        (["white"] * 5, {}, "5 layers"),
        (["white"], {"background": "text"}, "upload is not a picture"),
        (["white"], {"background": None}, "There is no picture yet"),
        (["white"], {"task": "Draw"}, "Draw"),
        (["white"], {"prompt": " "}, "prompt is empty"),
        (["white"], {"prompt": "x" * 301}, "301 characters"),
        (["white"], {"steps": 61}, "61"),
        (["white"], {"steps": 4.5}, "not a whole number"),
        (["white"], {"scale": 0.5}, "0.5"),
        (["white"], {"blur": 40}, "40"),
        (["white"], {"seed": -1}, "seed"),
    ],
)
def test_what_is_wrong_is_said(
    space: Callable[[str], Any], masks: dict[str, Path], layers: list[str], changes: dict[str, Any], said: str
) -> None:
    value = editor(STAR, *(masks[layer] for layer in layers))
    if "background" in changes:
        value["background"] = changes["background"] and editor(masks[changes["background"]])["background"]
    fields = {"task": PAINT, "prompt": PROMPT, "spoil": False, "steps": 4, "scale": 2.5, "blur": 2.0, "seed": 0}
    values = [changes.get(name, usual) for name, usual in fields.items()]
    message = refused(space("steer")[1], "/steer", value, *values)
    assert said in message and not any(str(path) in message for path in masks.values()), message


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}gradio_api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=10)


@pytest.mark.parametrize("place", ["background", "layers"])
def test_a_path_of_the_server_is_neither_a_picture_nor_a_mask(space: Callable[[str], Any], place: str) -> None:
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    value = {"background": None, "layers": [], "composite": None, place: [file] if place == "layers" else file}
    url = space("steer")[1]
    data = [value, PAINT, PROMPT, False, 4, 2.5, 2.0, 0]
    event = json.load(post(url, "call/steer", {"data": data}))["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/steer/{event}", timeout=20) as answer:
        said = answer.read().decode()
    assert "event: error" in said and "event: complete" not in said and "root:" not in said, said


def test_the_memory_of_the_server_takes_no_pictures_piece_by_piece(space: Callable[[str], Any]) -> None:
    url = space("steer")[1]
    with urllib.request.urlopen(f"{url}config", timeout=10) as page:
        (component,) = (item for item in json.load(page)["components"] if item["type"] == "imageeditor")
    assert "accept_blobs" not in component["props"].get("server_fns", [])
    body = {"component_id": component["id"], "fn_name": "accept_blobs", "session_hash": "a", "data": {}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, "component_server", body)
    assert caught.value.code == 404


def test_each_example_is_there_with_its_mask_and_needs_no_network(space: Callable[[str], Any]) -> None:
    from diffusers_ext.serving import painted, still_picture

    module, _ = space("steer")
    for name, task, prompt, _ in module.EXAMPLES:
        value = module.example(name)
        assert still_picture(value["background"]).size == (256, 256) and prompt
        assert len(value["layers"]) == (task == PAINT)
        for layer in value["layers"]:
            assert 0.1 < np.asarray(painted(layer)).mean() / 255 < 0.5


def test_a_job_that_is_cancelled_at_once_frees_the_model(space: Callable[[str], Any], masks: dict[str, Path]) -> None:
    module, url = space("steer")
    job = client(url).submit(editor(STAR), SHARPEN, PROMPT, False, 60, 2.5, 2.0, 0, api_name="/steer")
    begin = time.monotonic()
    while not module.model.busy and time.monotonic() - begin < 20:
        time.sleep(0.01)
    assert module.model.busy
    job.cancel()
    begin = time.monotonic()
    while module.model.busy:
        assert time.monotonic() - begin < 10, "the work goes on"
        time.sleep(0.05)
