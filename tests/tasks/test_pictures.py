"""Pictures are whole SVG for any name and number, hold nothing that could act, and say what they leave out."""

import base64
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ui.svg import MOST_BARS, MOST_POINTS, Point, bars, histogram, lines, picture

NAMES = st.text(max_size=40)
COUNTS = st.floats(0, 1e9)
ANY = st.floats(allow_nan=True, allow_infinity=True)
SAFE = {"svg", "rect", "line", "text", "polyline", "circle"}


def parts(svg: str) -> list[tuple[str, dict[str, str], str]]:
    """The elements of a picture, which has to be XML; none of them may run or load anything."""
    found = [(e.tag.split("}")[1], e.attrib, e.text or "") for e in ElementTree.fromstring(svg).iter()]
    assert {tag for tag, _, _ in found} <= SAFE
    for _, attributes, _ in found:
        assert not [name for name in attributes if name.startswith("on") or "href" in name]
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
            assert math.isfinite(float(attributes.get(name, 0)))
            assert float(attributes.get(name, 0)) >= 0 or name not in ("width", "height")
    return found


def said(svg: str) -> list[str]:
    return [text for tag, _, text in parts(svg) if tag == "text"]


@given(NAMES, st.lists(st.tuples(NAMES, st.tuples(COUNTS, COUNTS)), max_size=40), NAMES, st.booleans())
def test_bars_are_valid_for_any_name(title, rows, name, stacked):
    found = parts(bars(title, rows, (name, "b"), stacked=stacked))
    drawn = [e for e in found if e[0] == "rect"][1 + 2 :]  # after the ground and the legend
    assert len(drawn) == 2 * min(len(rows), MOST_BARS)


@given(NAMES, st.lists(COUNTS, min_size=1, max_size=30), NAMES)
def test_histograms_are_valid_for_any_name(title, counts, edge):
    parts(histogram(title, [counts, counts], [edge] * (len(counts) + 1), ("a", "b")))


@given(NAMES, st.dictionaries(NAMES, st.lists(st.builds(Point, ANY, ANY, st.none() | ANY, st.none() | ANY))))
def test_lines_are_valid_for_any_number(title, series):
    found = parts(lines(title, series, "x"))
    assert found[0][0] == "svg"


def test_a_bar_is_as_long_as_its_value():
    widths = [float(a["width"]) for t, a, _ in parts(bars("t", [("a", [1.0]), ("b", [4.0])])) if t == "rect"]
    assert widths[2] == pytest.approx(4 * widths[1], rel=0.01)


def test_axes_have_round_numbers_and_points_lie_between_them():
    svg = lines("Mean reward", {"reward": [Point(1, 0.31), Point(40, 0.92)]}, "optimizer steps")
    assert {"0.4", "0.6", "0.8", "10", "20", "30", "40", "optimizer steps"} <= set(said(svg))


def test_omitted_points_are_reported_or_thinned():
    svg = bars("Sources", [(f"s{i}", [1.0]) for i in range(60)])
    assert "Sources (the first 24 of 60)" in said(svg)
    (line,) = (
        a for t, a, _ in parts(lines("t", {"a": [Point(i, i) for i in range(5000)]}, "x")) if t == "polyline"
    )
    assert len(line["points"].split()) <= MOST_POINTS + 1
    assert "t: nothing to draw yet" in said(lines("t", {"a": [Point(0, math.nan)]}, "x"))


@given(NAMES)
def test_a_picture_in_markdown_is_one_image_and_nothing_else(label):
    text = picture(label, bars(label, [(label, [1.0])]))
    found = re.fullmatch(r"!\[(.*)\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found is not None
    parts(base64.b64decode(found[2]).decode())
    assert "<" not in text
