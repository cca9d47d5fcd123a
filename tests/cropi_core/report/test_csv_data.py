"""The data of a figure, as a file inside the page."""

import base64
import csv
import io

import numpy as np

from cropi_core.report.csv_data import (
    accuracy_table,
    csv_address,
    distance_table,
    metric_table,
    pass_rate_table,
    score_table,
)
from cropi_core.report.data import Curve, Trained
from cropi_core.runs import Accuracy


def read(address: str) -> list[list[str]]:
    kind, _, encoded = address.partition(",")
    assert kind == "data:text/csv;charset=utf-8;base64"
    return list(csv.reader(io.StringIO(base64.b64decode(encoded).decode())))


def test_a_file_has_every_value_and_an_empty_cell_where_there_is_none():
    trained = [
        Trained(1, {}, 0, [1, 2], {"kl": [0.1, None]}),
        Trained(2, {}, 0, [3], {"kl": [0.30000000000000004]}),
    ]
    assert read(csv_address(metric_table(trained, "kl"))) == [
        ["stage", "step", "kl"],
        ["1", "1", "0.1"],
        ["1", "2", ""],
        ["2", "3", "0.30000000000000004"],
    ]
    assert metric_table(trained, "loss")[1] == []


def test_a_name_is_text_and_no_formula():
    name = '=HYPERLINK("http://evil.example","x"),\n"'
    curve = Curve(name, "test", [Accuracy(name, "test", 0, 0.5, 0.4, 0.6)], {0: 0})
    assert read(csv_address(accuracy_table([curve])))[1] == [f"'{name}", "0", "0", "0.5", "0.4", "0.6"]


def test_histograms_count_every_finite_value():
    scores = {2: np.array([0.0, 1.0, np.nan]), 1: np.array([0.25])}
    header, rows = score_table(scores)
    assert header == ("stage", "from", "to", "prompts")
    assert {stage: sum(row[3] for row in rows if row[0] == stage) for stage in (1, 2)} == {1: 1, 2: 2}
    assert pass_rate_table([0.5] * 10, [1.0] * 10)[1][9] == (0.9, 1.0, 0.5, 1.0)


def test_distances_are_listed_by_stage_and_metric():
    header, rows = distance_table(["entropy", "level"], {2: [None, 1.5], 1: [0.5, -2.0]})
    assert header == ("stage", "metric", "distance")
    assert rows == [(1, "entropy", 0.5), (1, "level", -2.0), (2, "entropy", None), (2, "level", 1.5)]
