"""The page of two runs: settings that differ, learning curves, accuracy with intervals, selections, cost."""

from typing import Any

from markupsafe import Markup

from cropi_core.analysis import compare_runs
from cropi_core.artifacts import Store
from cropi_core.report import plots
from cropi_core.report.data import Curve, accuracy_curves
from cropi_core.report.page import environment
from cropi_core.runs import Artifacts, cost_grid, load_run

MOST_SETS = 8


def render_comparison(store: Store, one: str, other: str) -> str:
    """Return the page of two runs of a store as HTML.

    Raises:
        ArtifactError: A run does not exist, or its record cannot be read.
    """
    comparison = compare_runs(store, one, other)
    runs = [Artifacts(store, load_run(store, name)) for name in (one, other)]
    context: dict[str, Any] = {
        "comparison": comparison,
        "records": [artifacts.record for artifacts in runs],
        "figures": _figures([accuracy_curves(artifacts) for artifacts in runs], (one, other)),
        "costs": [cost_grid(artifacts.slots()) for artifacts in runs],
    }
    return environment().get_template("compare.html.jinja").render(context)


def _figures(curves: list[list[Curve]], names: tuple[str, str]) -> list[tuple[str, Markup]]:
    """Plot the accuracy of both runs on every set that both evaluated, test sets first; equal axes."""
    first, second = ({curve.name: curve for curve in of if curve.points} for of in curves)
    pairs = [(first[name], second[name]) for name in first if name in second]
    pairs = sorted(pairs, key=lambda pair: pair[0].role != "test")[:MOST_SETS]
    if not pairs:
        return []
    limits = plots.limits_of([curve for pair in pairs for curve in pair])
    numbers = {names[0]: 0, names[1]: 1}
    figures = []
    for number, pair in enumerate(pairs):
        lines = [
            Curve(name, curve.role, curve.points, curve.steps)
            for name, curve in zip(names, pair, strict=True)
        ]
        svg = plots.learning(lines, limits, f"compared-{number}", numbers)
        figures.append((f"{pair[0].name} ({pair[0].role})", Markup(svg)))  # noqa: S704 - matplotlib escapes its text
    return figures
