import math
import re
from xml.etree import ElementTree

import pytest
from page import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Panel, line_chart, write_between


def points(chart: str) -> list[list[tuple[float, float]]]:
    """Corners of the drawn lines, in pixels of their panels."""
    found = re.findall(r'<polyline points="([^"]*)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- a -->\nold\n<!-- b -->\nend ü\n", encoding="utf-8")
    write_between(page, "<!-- a -->", "<!-- b -->", "\nnew\n\n")
    assert page.read_text(encoding="utf-8") == "# Title\n<!-- a -->\n\nnew\n\n<!-- b -->\nend ü\n"


@pytest.mark.parametrize("text", ["no marker", "<!-- a --> only the first", "<!-- b --> turned round <!-- a -->"])
def test_a_page_without_its_markers_is_refused_and_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md has no <!-- a --> and <!-- b -->"):
        write_between(page, "<!-- a -->", "<!-- b -->", "new")
    assert page.read_text() == text


def test_columns_stand_at_their_logarithms_and_powers_of_ten_evenly():
    panel = Panel("errors", [4, 8, 16], {"ours": {4: 1.0, 8: 0.1, 16: 0.01}}, logarithmic=True)
    (line,) = points(line_chart([panel], {"ours": "red"}))
    right, low = WIDTH - 10, HEIGHT - BOTTOM
    expected = [(LEFT, TOP), ((LEFT + right) / 2, (TOP + low) / 2), (right, low)]
    assert all(math.dist(found, wanted) < 0.1 for found, wanted in zip(line, expected, strict=True))


def test_values_above_the_most_are_cut_off_and_missing_columns_left_out():
    panel = Panel("errors", [1, 2, 4], {"ours": {1: 1e9, 4: 1.0}}, logarithmic=True, most=10.0)
    (line,) = points(line_chart([panel], {"ours": "red"}))
    assert line == [(LEFT, TOP), (WIDTH - 10, HEIGHT - BOTTOM)]


def test_a_chart_is_well_formed_and_draws_and_names_only_lines_with_a_colour():
    panels = [
        Panel("a < b", [1, 2], {"ours & theirs": {1: 1.0, 2: 1.0}, "other": {1: 5.0}}),
        Panel("nothing", [1, 2], {"other": {1: 1.0}}),
    ]
    chart = line_chart(panels, {"ours & theirs": "red", "absent": "blue"})
    texts = [node.text for node in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in texts and "ours & theirs" in texts
    assert not {"other", "absent", "nothing"} & set(texts)
    assert len(points(chart)) == 1
