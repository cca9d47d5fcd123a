"""The commands `cropi chosen` and `cropi compare`: selections compared with the pool and with chance; two runs.

    cropi chosen demo-0123abcd
    cropi chosen demo-0123abcd --root /data/run --json
    cropi compare demo-0123abcd demo-4567cdef

Options and output only: :mod:`cropi_core.analysis` reads and compares.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Root, print_json, print_table, say
from cropi_core.formatting import duration, number, signed

COLUMNS = ("stage", "figure", "prompts", "pool", "selected", "by chance", "so")


def chosen(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run.")],
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Compare what every stage selected with the pool and with chance (JSON lists added and removed prompts)."""
    from cropi_core.analysis import fixed, read_chosen
    from cropi_core.artifacts import Store

    comparison = read_chosen(Store(root), run)
    if as_json:
        print_json(comparison.as_json())
        return
    rows = []
    for one in comparison.stages:
        for name, figure in one.figures.items():
            pool, taken, low, high = map(
                fixed, (figure.pool_mean, figure.selected_mean, figure.low, figure.high)
            )
            prompts = f"{figure.selected_count} of {figure.pool_count}"
            rows.append((one.stage, name, prompts, pool, taken, f"{low} to {high}", figure.side))
    print_table(COLUMNS, rows)
    for one in comparison.stages:
        if (moved := one.moved) is not None:
            jaccard, spearman, chance = (
                "none" if value is None else fixed(value)
                for value in (moved.jaccard, moved.spearman, one.chance_jaccard)
            )
            say(
                f"stage {one.stage}: {moved.both} selected before too, {len(moved.added)} added, "
                f"{len(moved.removed)} removed; "
                f"Jaccard index {jaccard} (chance {chance}), rank correlation of the scores {spearman}"
            )
    for verdict in comparison.verdicts:
        say(verdict.sentence)
    for note in comparison.notes:
        say(f"note: {note}", err=True)
    if not comparison.stages:
        say(f"no stage of {run} has selected yet")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def compare(
    one: Annotated[str, typer.Argument(metavar="RUN_A", help="Id of a run.")],
    other: Annotated[str, typer.Argument(metavar="RUN_B", help="Id of another run.")],
    root: Root = DEFAULT_ROOT,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with learning curves and cost.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs: settings that differ, accuracy with intervals, selections, seconds."""
    from cropi_core.analysis import compare_runs
    from cropi_core.artifacts import Store

    store = Store(root)
    comparison = compare_runs(store, one, other)
    if html is not None:
        from cropi_core.report import write_comparison

        write_comparison(store, one, other, html)
    if as_json:
        print_json(comparison.as_json())
        return
    settings = [(row.setting, _json(row.one), _json(row.other)) for row in comparison.settings]
    if any(comparison.notes):
        settings.insert(0, ("(note)", *comparison.notes))
    print_table(("setting", one, other), settings or [("no setting differs", "", "")])
    accuracy = [
        (
            f"{row.set} ({row.split}), {'base' if row.stage == 0 else f'stage {row.stage}'}",
            row.one.text,
            row.other.text,
            f"{signed(row.points, 1)} points{', may be chance' if row.unclear else ''}",
        )
        for row in comparison.accuracy
    ]
    if accuracy:
        say()
        print_table(("accuracy", one, other, "difference"), accuracy)
    selections = [
        (f"stage {row.stage}", *row.selected, row.both, number(row.spearman)) for row in comparison.selections
    ]
    if selections:
        say()
        print_table(("selected", one, other, "in both", "rank correlation of scores"), selections)
    say()
    print_table(
        ("when computed", one, other),
        [(step, *map(duration, seconds)) for step, seconds in comparison.seconds.items()],
    )
    for problem in comparison.problems:
        say(f"note: {problem}", err=True)
    if html is not None:
        say(f"page {html}")
