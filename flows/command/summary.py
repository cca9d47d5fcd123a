"""Present the summary of a run: as JSON, as tables, and as a Markdown page for Prefect's UI."""

from typing import Any
from urllib.parse import quote

from cropi_core.diagnostics import check_grid
from cropi_core.formatting import percent
from cropi_core.markdown import code, escaped, markdown_table, wide_table
from cropi_core.runs import (
    RunSummary,
    accuracy_grid,
    cost_grid,
    detail_grid,
    seconds_by_step,
    shares,
    spending,
)
from tasks.ui import KEYS, Point, lines, picture

SHOWN_CHECKS = 6
"""Number of score checks shown, the latest ones; the record and the report have all."""


def as_json(summary: RunSummary) -> dict[str, Any]:
    """Convert a summary to JSON values for programs."""
    return {
        "run": summary.run,
        "status": summary.status,
        "accuracy": [vars(row) for row in summary.accuracy],
        "details": [vars(row) for row in summary.details],
        "selected_by_source": {str(stage): counts for stage, counts in summary.selected.items()},
        "pool_by_source": summary.pool,
        "seconds": {
            step: {"made": round(made, 3), "spent": round(spent, 3)}
            for step, (made, spent) in seconds_by_step(summary).items()
        },
        "cost": {
            purpose: {**vars(one.tokens), "seconds": round(one.seconds, 3), "spent": round(one.spent, 3)}
            for purpose, one in spending(summary.slots).items()
        },
        "slots": {s.slot: {"key": s.key, "digest": s.digest, "origin": s.origin} for s in summary.slots},
        "checks": [check.model_dump(mode="json") for check in summary.checks],
        "notes": summary.notes,
    }


def accuracy_points(summary: RunSummary) -> dict[str, list[Point]]:
    """Return the points of the accuracy plot, by set."""
    points: dict[str, list[Point]] = {}
    for row in summary.accuracy:
        points.setdefault(row.set, []).append(Point(row.stage, row.accuracy, row.low, row.high))
    return points


def selection_grid(summary: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Arrange the selection in a grid: the share of each source in the pool and in each stage's subset."""
    stages = sorted(summary.selected)
    columns = [shares(summary.pool), *[shares(summary.selected[stage]) for stage in stages]]
    sources = sorted(summary.pool, key=lambda s: (-columns[-1].get(s, 0.0), s))
    header = ["source", "pool", *[f"stage {stage}" for stage in stages]]
    return header, [[s, *[percent(c.get(s, 0.0), 0) for c in columns]] for s in sources]


def as_markdown(summary: RunSummary, root: str) -> str:
    """Write a run's Markdown page for Prefect's UI; names from data are escaped.

    Links are relative to the UI: `/reports/RUN` is a page of `cropi serve`, `/artifacts/key/KEY` one of Prefect.
    """
    parts = [f"# {escaped(summary.run)}: {summary.status}"]
    if summary.error:
        parts.append(f"**{escaped(summary.error)}**")
    if summary.accuracy:
        title = "Accuracy by stage, 95 % interval"
        parts.append(picture(title, lines(title, accuracy_points(summary), "stage (0: the base policy)")))
    for title, fixed, (header, rows) in (
        ("Accuracy, 95 % interval", 2, accuracy_grid(summary.accuracy)),
        ("Accuracy by part of a set, 95 % interval", 2, detail_grid(summary.details)),
        ("Share by source", 1, selection_grid(summary)),
        ("Are the scores reliable?", 1, check_grid(summary.checks[-SHOWN_CHECKS:])),
        ("Cost by purpose", 1, cost_grid(summary.slots)),
    ):
        if rows:
            cells = [[escaped(cell) for cell in row] for row in rows]
            table = wide_table([escaped(h) for h in header], cells, fixed)
            parts += [f"## {title}", table]
    parts += [f"- {escaped(note)}" for note in summary.notes[:50]]
    rows = [
        [
            escaped(s.slot),
            s.origin,
            f"{s.seconds:.1f}",
            code(s.key),
            escaped(", ".join(s.made_from)) or "–",
        ]
        for s in summary.slots[-50:]
    ]
    parts += ["## Artifacts", markdown_table(["slot", "origin", "seconds", "key", "made from"], rows)]
    report = code(f"{root}/runs/{summary.run}.html")
    parts.append(
        f"Report: {report}, written at the end of the run, or by {code('cropi report ' + summary.run)}. "
        f"[Open it](/reports/{quote(summary.run)}) in the UI of `cropi serve`."
    )
    used = {s.step for s in summary.slots}
    if steps := [(step, key) for step, key in KEYS.items() if step in used]:
        pages = ", ".join(f"[{step}](/artifacts/key/{key})" for step, key in steps)
        parts.append(f"Pages of the steps, with pictures, the newest first: {pages}")
    parts.append(f"Files: {code(root)}")
    return "\n\n".join(parts) + "\n"
