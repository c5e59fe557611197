"""Each Space: fit to be published, answers as the library does, and refuses with a sentence."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.publishable import MIN_GRADIO, check_publishable
from tests.helpers.fresh_process import ROOT

from .visitors import EXAMPLES, PROMPT, SOURCE, client, pixels, refused, upload


NAMES = sorted(path.parent.name for path in (ROOT / "spaces").glob("*/app.py"))
GUIDED = "Guide-and-Rescale"


@pytest.mark.parametrize("name", NAMES)
def test_a_space_can_be_published_and_asks_for_a_gradio_that_is_safe(name: str) -> None:
    checked = check_publishable(ROOT / "spaces" / name, space=True)
    assert not checked.remarks
    card = (ROOT / "spaces" / name / "README.md").read_text()
    import gradio

    wanted = re.search(r"^sdk_version: (\S+)$", card, re.MULTILINE)
    assert wanted and tuple(map(int, wanted[1].split(".")[:2])) >= MIN_GRADIO
    assert wanted[1] == gradio.__version__, "the Space would run with another Gradio than it is tested with"


@pytest.mark.parametrize("name", NAMES)
def test_a_space_is_thin_and_imports_only_what_its_requirements_bring(name: str) -> None:
    tree = ast.parse((ROOT / "spaces" / name / "app.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {module.split(".")[0] for module in modules}
    assert packages - set(sys.stdlib_module_names) <= {"diffusers_ext", "diffusers", "gradio", "torch", "PIL", "numpy"}


def test_an_edit_is_that_of_the_library_and_the_second_one_keeps_the_inversion(space: Callable[[str], Any]) -> None:
    from diffusers_ext import GuideAndRescalePipeline
    from diffusers_ext.hub import load_pipeline

    _, url = space("edit")
    arguments = upload(EXAMPLES / "star.png"), SOURCE, PROMPT, GUIDED, 4, 7.5
    (before, after), difference, cost = client(url).predict(*arguments, api_name="/edit")
    pipe = load_pipeline(GuideAndRescalePipeline, ROOT / "pipelines" / "emoji-scenes-64", device="cpu")
    with Image.open(EXAMPLES / "star.png") as image:
        expected = pipe(image.convert("RGB"), SOURCE, PROMPT, num_inference_steps=4).images[0]
    assert np.array_equal(pixels(before), pixels(EXAMPLES / "star.png"))
    assert np.array_equal(pixels(after), np.asarray(expected))
    gap = np.abs(pixels(before).astype(int) - pixels(after))
    assert np.array_equal(pixels(difference), gap)
    assert "inverted in" in cost
    (_, again), _, cost = client(url).predict(*arguments, api_name="/edit")
    assert np.array_equal(pixels(again), pixels(after)) and "inversion kept" in cost


def test_every_method_is_compared_on_one_picture(space: Callable[[str], Any]) -> None:
    module, url = space("edit")
    gallery, costs = client(url).predict(upload(EXAMPLES / "star.png"), SOURCE, PROMPT, 4, 7.5, api_name="/compare")
    assert [item["caption"] for item in gallery] == ["before", "Guide-and-Rescale", "direct", "null-text"]
    assert all(f"* **{method}**: " in costs for method in module.METHODS)
    assert len({pixels(item["image"]).tobytes() for item in gallery}) == len(gallery)


def test_a_restoration_is_that_of_the_library_and_its_gain_is_measured(space: Callable[[str], Any]) -> None:
    from diffusers_ext import MRRestorationPipeline
    from diffusers_ext.hub import load_pipeline

    folder = ROOT / "spaces" / "restore" / "examples"
    _, url = space("restore")
    noisy, clean = upload(folder / "noise.png"), upload(folder / "noise-clean.png")
    (_, after), cost = client(url).predict(noisy, clean, 3, 1.0, 7, api_name="/restore")
    pipe = load_pipeline(MRRestorationPipeline, ROOT / "pipelines" / "mr-restoration", device="cpu")
    with Image.open(folder / "noise.png") as image:
        generator = torch.Generator().manual_seed(7)
        expected = pipe(image.convert("RGB"), num_inference_steps=3, noise_scale=1.0, generator=generator).images[0]
    assert np.array_equal(pixels(after), np.asarray(expected))
    found = re.search(r"\*\*([\d.]+) dB before, ([\d.]+) dB after", cost)
    assert found and cost.startswith("3 network evaluations")
    truth = pixels(folder / "noise-clean.png").astype(float)
    for value, picture in zip(found.groups(), (pixels(folder / "noise.png"), pixels(after)), strict=True):
        error = ((picture - truth) ** 2).mean()
        assert float(value) == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


def test_a_stream_changes_while_it_runs_and_ends_when_it_should(space: Callable[[str], Any]) -> None:
    _, url = space("stream")
    visitor = client(url)
    job = visitor.submit(0.9, 1.0, 1, 0, api_name="/stream")
    states = []
    for drawing, state in job:
        assert drawing.startswith("<svg") and drawing.count("<polyline") == 6
        if not states:
            visitor.predict(0.4, 2.0, api_name="/set_gait")
        states.append(state)
    assert states[0].endswith("cadence 0.9, vigour 1.") and states[-1].endswith("cadence 0.4, vigour 2.")
    assert states[-1].startswith("64 frames, 1.0 s of motion")


def test_two_streams_with_one_seed_are_equal_and_another_seed_is_not(space: Callable[[str], Any]) -> None:
    _, url = space("stream")
    jobs = [client(url).submit(0.9, 1.0, 1, seed, api_name="/stream") for seed in (0, 0, 1)]
    first, second, other = ([drawing for drawing, _ in job][-1] for job in jobs)
    assert first == second != other


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("edit", (None, SOURCE, PROMPT, GUIDED, 4, 7.5), "There is no picture yet"),
        ("edit", ("star.png", "", PROMPT, GUIDED, 4, 7.5), "description of the picture is empty"),
        ("edit", ("star.png", SOURCE, "x" * 301, GUIDED, 4, 7.5), "has 301 characters"),
        ("edit", ("star.png", SOURCE, PROMPT, "Other", 4, 7.5), "Other"),
        ("edit", ("star.png", SOURCE, PROMPT, GUIDED, 4.5, 7.5), "not a whole number"),
        ("edit", ("star.png", SOURCE, PROMPT, GUIDED, 500, 7.5), "500"),
        ("edit", ("bad.png", SOURCE, PROMPT, GUIDED, 4, 7.5), "not a picture"),
        ("restore", (None, None, 5, 0.0, 0), "There is no picture yet"),
        ("restore", ("bad.png", None, 5, 0.0, 0), "not a picture"),
        ("restore", ("star.png", "bad.png", 5, 0.0, 0), "clean picture is not a picture"),
        ("restore", ("star.png", None, True, 0.0, 0), "not a number"),
        ("restore", ("star.png", None, 5, 0.0, -1), "seed"),
        ("stream", (0.9, 9.0, 1, 0), "9"),
        ("stream", (0.9, 1.0, 1.5, 0), "not a whole number"),
    ],
)
def test_what_is_wrong_is_said_to_the_visitor(
    space: Callable[[str], Any], tmp_path: Path, name: str, arguments: tuple[Any, ...], said: str
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    files = {"bad.png": tmp_path / "bad.png", "star.png": EXAMPLES / "star.png"}
    values = [upload(files[value]) if value in files else value for value in arguments]
    message = refused(space(name)[1], f"/{name}", *values)
    assert said in message and str(tmp_path) not in message, message
