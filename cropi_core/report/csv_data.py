"""The data of the report's figures as CSV files inside the page, in `data:` addresses."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cropi_core.report.data import Curve, Trained
from cropi_core.report.plots import BINS

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""A header and rows."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters that a spreadsheet takes for a formula."""


def csv_address(table: Table) -> str:
    """Return a table as the `data:` address of a CSV file; texts cannot be formulas of a spreadsheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header, rows = table
    writer.writerows([[_cell(value) for value in row] for row in (header, *rows)])
    encoded = base64.b64encode(buffer.getvalue().encode()).decode()
    return f"data:text/csv;charset=utf-8;base64,{encoded}"


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return "" if value is None else value


def accuracy_table(curves: Sequence[Curve]) -> Table:
    """Tabulate accuracy with intervals by set and evaluation."""
    rows = [(c.name, p.stage, c.steps[p.stage], p.accuracy, p.low, p.high) for c in curves for p in c.points]
    return ("set", "stage", "steps", "accuracy", "low", "high"), rows


def metric_table(trained: Sequence[Trained], metric: str) -> Table:
    """Tabulate a training metric by optimizer step, every step of the run."""
    parts = [part for part in trained if metric in part.metrics]
    rows = [
        (p.stage, step, value) for p in parts for step, value in zip(p.steps, p.metrics[metric], strict=True)
    ]
    return ("stage", "step", metric), rows


def pass_rate_table(pool: Sequence[float], selected: Sequence[float]) -> Table:
    """Tabulate the shares of the pool and of the selection in bins of the pass rate."""
    rows = [(i / 10, (i + 1) / 10, p, s) for i, (p, s) in enumerate(zip(pool, selected, strict=True))]
    return ("from", "to", "pool", "selected"), rows


def score_table(values: Mapping[int, np.ndarray]) -> Table:
    """Tabulate the distribution of scores by stage, in the bins of the figure."""
    finite = {stage: scores[np.isfinite(scores)] for stage, scores in sorted(values.items())}
    edges = np.histogram_bin_edges(np.concatenate([*finite.values()]), bins=BINS)
    rows = []
    for stage, scores in finite.items():
        counts, _ = np.histogram(scores, bins=edges)
        bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        rows += [(stage, *one) for one in bins]
    return ("stage", "from", "to", "prompts"), rows


def distance_table(labels: Sequence[str], reach: Mapping[int, Sequence[float | None]]) -> Table:
    """Tabulate the distance of selections from the pool by stage and metric; −1 to 1 is within chance."""
    rows = [
        (s, name, d) for s, values in sorted(reach.items()) for name, d in zip(labels, values, strict=True)
    ]
    return ("stage", "metric", "distance"), rows
