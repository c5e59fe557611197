"""The Spaces in a browser: a picture is uploaded, a button clicked, and the result looked at.

Headless Chromium, driven by Playwright without a browser of its own: `pip install -e ".[browser]"` and Debian's package chromium, or
another Chromium named by the variable CHROMIUM. With SPACES_SCREENSHOTS=docs/images the pictures of the documentation are made anew.
"""

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fresh_process import ROOT


pytestmark = pytest.mark.nightly

EXAMPLES = ROOT / "spaces" / "edit" / "examples"
DAMAGED = ROOT / "spaces" / "restore" / "examples"
PATIENCE = 90_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='Playwright is not installed: pip install -e ".[browser]"'
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here: apt install chromium, or name one by the variable CHROMIUM")
    with playwright.sync_playwright() as driver:
        # Without its sandbox it also runs in a container; it opens nothing but our own pages.
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any, space: Callable[[str], Any]) -> Iterator[Callable[[str], Any]]:
    """`visit("edit")` opens a Space; at the end no error may stand in the browser's console."""
    pages, errors = [], []

    def open_page(name: str) -> Any:
        page = browser.new_page(viewport={"width": 1180, "height": 880}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        # Fonts and analytics of others: a Space works, and these tests run, without a network.
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        page.goto(space(name)[1])
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not errors, errors


def result_pictures(page: Any) -> list[np.ndarray]:
    """Both pictures of the slider, as they lie on the server."""
    sources = [page.locator("img.preview").nth(i).get_attribute("src") for i in range(2)]
    pictures = [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]
    return [np.asarray(picture).astype(int) for picture in pictures]


def screenshot(page: Any, name: str, tmp_path: Path) -> None:
    """Kept for the documentation if that was asked for; in any case of a size that a page can show."""
    folder = Path(os.environ.get("SPACES_SCREENSHOTS") or tmp_path)
    page.mouse.move(0, 0)
    path = folder / f"space_{name}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    assert 10_000 < path.stat().st_size < 300_000


def test_a_picture_is_edited_and_every_method_compared(visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit("edit")
    page.locator("input[type=file]").first.set_input_files(EXAMPLES / "star.png")
    page.get_by_label("It shows").fill("a yellow star on a blue background")
    page.get_by_label("It shall show").fill("a red star on a blue background")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("network evaluations.").first.wait_for()
    before, after = result_pictures(page)
    with Image.open(EXAMPLES / "star.png") as image:
        assert np.array_equal(before, np.asarray(image.convert("RGB")))
    # What was yellow, red and green alike, lost its green; the blue ground stayed.
    star = (before[..., 0] > 180) & (before[..., 1] > 150) & (before[..., 2] < 120)
    assert star.mean() > 0.05
    assert after[star][:, 1].mean() < before[star][:, 1].mean() - 60
    ground = (before[..., 2] > 150) & (before[..., 0] < 100)
    assert np.abs(after[ground] - before[ground]).mean() < 25
    page.get_by_role("button", name="Compare all").click()
    page.locator("li", has_text="Prompt-to-prompt, null-text: ").first.wait_for()
    screenshot(page, "edit", tmp_path)


def test_an_example_fills_the_fields(visit: Callable[[str], Any]) -> None:
    page = visit("edit")
    page.get_by_text("a tulip on an orange dotted background").first.click()
    field = page.get_by_label("It shall show")
    begin = time.monotonic()
    while field.input_value() != "a tulip on an orange dotted background":
        assert time.monotonic() - begin < 20, field.input_value()
        page.wait_for_timeout(100)


def test_a_picture_is_restored_and_the_decibels_follow_the_slider(visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit("restore")
    fields = page.locator("input[type=file]")
    for name in ("noise-clean.png", "noise.png"):
        # The second field first: a field that has its picture loses its input.
        fields.nth(1 if name == "noise-clean.png" else 0).set_input_files(DAMAGED / name)
        page.locator(f'img[src$="{name}"]').first.wait_for()
    page.get_by_role("button", name="Restore", exact=True).click()
    text = page.get_by_text("dB after")
    text.wait_for()
    low, high = map(float, re.findall(r"([\d.]+) dB", text.inner_text()))
    assert high > low + 5
    before, after = result_pictures(page)
    assert before.shape == after.shape == (96, 96, 3)
    page.locator("input[type=range]").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator("input[type=range]").first.dispatch_event("pointerup")
    page.get_by_text("6 network evaluations").wait_for()
    screenshot(page, "restore", tmp_path)


def test_a_file_that_is_no_picture_is_answered_in_words(visit: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page = visit("restore")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Restore", exact=True).click()
    message = page.get_by_text("is not a picture in a known format")
    message.first.wait_for()
    shown = page.locator("body").inner_text()
    assert "Traceback" not in shown and "/tmp" not in shown and str(tmp_path) not in shown


def test_a_stream_runs_changes_and_stops(visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit("stream")
    page.get_by_role("button", name="Start").click()
    page.locator("#motion polyline").first.wait_for()
    page.wait_for_timeout(3000)
    page.locator("input[type=range]").nth(1).focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.get_by_text("vigour 1.8").wait_for()
    page.wait_for_timeout(2500)
    screenshot(page, "stream", tmp_path)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1500)
    state = page.get_by_text("frames a second, ").inner_text()
    page.wait_for_timeout(1000)
    assert page.get_by_text("frames a second, ").inner_text() == state


def test_a_mask_is_painted_and_only_what_it_covers_is_new(visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit("steer")
    source = ROOT / "spaces" / "steer" / "examples" / "fish.png"
    canvas = page.locator(".image-container canvas, canvas").first
    canvas.wait_for()
    # The editor loses a file that comes before it is set up, and does not say when it is.
    page.wait_for_timeout(3_000)
    page.locator("input[type=file]").first.set_input_files(source)
    page.wait_for_timeout(3_000)
    page.get_by_label("Brush", exact=False).first.click()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    reach = min(box["width"], box["height"]) / 8
    page.mouse.move(middle[0] - reach, middle[1] - reach)
    page.mouse.down()
    for i in range(9):
        across = (-1) ** i * reach
        page.mouse.move(middle[0] + across, middle[1] + (i - 4) / 4 * reach, steps=8)
    page.mouse.up()
    page.get_by_label("It shall show").fill("a yellow star on a teal striped background")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("60 network evaluations").wait_for()
    square, measured, steered = (
        np.asarray(Image.open(io.BytesIO(page.request.get(picture.get_attribute("src")).body())).convert("RGB"))
        for picture in page.locator(".pixels img").all()[:3]
    )
    with Image.open(source) as given:
        sent = np.asarray(given.convert("RGB").resize(square.shape[1::-1])).astype(int)
    assert np.abs(square - sent).mean() < 8, "it is not the picture that was uploaded"
    hole = (square != measured).any(2)
    assert 0.01 < hole.mean() < 0.6, "the brush left no mask, or all of it"
    change = np.abs(square.astype(int) - steered).mean(2)
    assert change[hole].mean() > 2 * change[~hole].mean()
    screenshot(page, "steer", tmp_path)


def test_an_example_with_its_mask_is_steered_by_two_clicks(visit: Callable[[str], Any]) -> None:
    page = visit("steer")
    page.get_by_text("a mushroom on a yellow dotted background").first.click()
    field = page.get_by_label("It shall show")
    begin = time.monotonic()
    while field.input_value() != "a mushroom on a yellow dotted background":
        assert time.monotonic() - begin < 20, field.input_value()
        page.wait_for_timeout(100)
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("60 network evaluations").wait_for()


def test_teacher_and_students_are_shown_with_their_seconds(visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit("distilled")
    page.get_by_label("It shall show").fill("a red star on a teal background")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("li", has_text="teacher: ").wait_for()
    rows = page.locator("li", has_text=re.compile(r"\d\.\d\d s, \d+ network evaluation")).all_inner_texts()
    assert [row.split(":")[0] for row in rows] == ["teacher", "4 steps", "1 step"]
    pictures = page.locator(".pixels img")
    assert pictures.count() == 3
    screenshot(page, "distilled", tmp_path)
