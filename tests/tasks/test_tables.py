import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.markdown import code, escaped, markdown_table
from data_schemas.records import Manifest
from tasks.ui.rows import LONGEST, WIDEST, flat, plain, step_rows


def manifest(kind: str, step: str, summary: dict) -> Manifest:
    return Manifest(
        kind=kind,
        key=f"{kind}-v1-0123456789abcdef",
        digest="d",
        step=step,
        inputs={},
        settings={},
        files=[],
        summary=summary,
        versions={},
        git_revision=None,
        host="h",
        device="cpu",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.25,
        peak_memory_bytes=1,
    )


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.int64(3), np.bool_(True), math.nan, math.inf, -math.inf, 1.79765e308, "x"]
)
def test_every_cell_is_json_without_nan(value):
    json.dumps(plain(value), allow_nan=False)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_summary_becomes_short_json_cells(value):
    cells = flat({f"name{i}": value for i in range(40)})
    assert len(cells) == WIDEST
    for cell in cells.values():
        json.dumps(cell, allow_nan=False)
        assert not isinstance(cell, str) or len(cell) <= LONGEST


@given(st.text())
def test_untrusted_text_cannot_become_markup_or_another_cell(text):
    line = markdown_table(["a", "b"], [[escaped(text), code(text)]]).splitlines()[-1]
    bare = line.replace("\\|", "").replace("\\`", "")
    assert bare.count("|") == 3
    assert "<" not in escaped(text)
    assert "\n" not in escaped(text)


def test_a_long_table_is_cut_and_says_so():
    lines = markdown_table(["n"], [[str(i)] for i in range(80)]).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 52
    assert "30 more" in lines[-1]


def test_an_evaluation_has_a_row_a_set():
    sets = {"goal": {"accuracy": 0.5, "low": 0.4, "high": 0.6}, "other": {"accuracy": math.nan}}
    rows = step_rows(
        "evaluation", "evaluation@1", "cached", manifest("evaluation", "evaluation", {"accuracy": sets})
    )
    assert [row["set"] for row in rows] == ["goal", "other"]
    assert rows[1]["accuracy"] == "nan"
    assert all(row["origin"] == "cached" and row["slot"] == "evaluation@1" for row in rows)


def test_a_line_of_a_megabyte_is_cut_and_its_control_characters_are_visible():
    """What a verifier, an error or a note says may be of any length; a page shows its beginning."""
    text = "<script>\x1b[2J\u202e" * 100_000
    for shown in (escaped(text), code(text)):
        assert len(shown) < 10_000
        assert shown.isprintable()
        assert f"({len(text):,} characters)".replace("(", "").replace(")", "") in shown
    assert "<" not in escaped(text)
