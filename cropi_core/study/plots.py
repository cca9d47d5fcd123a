"""The picture of a study: accuracy on the targets by optimizer step, an arm a line, a world a panel, as SVG and PNG."""

import io
from collections.abc import Sequence
from typing import cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cropi_core.report.plots import COLOURS, GREY, STYLE, short, to_svg
from cropi_core.study.compare import ALL, ArmResult
from data_schemas.study import Study

PANEL = (5.6, 3.4)


def arms_svg(study: Study, rows: Sequence[ArmResult], world: str) -> str:
    """Draw one world as an ``<svg>`` element."""
    with mpl.rc_context(STYLE):
        ax = Figure(figsize=PANEL, layout="constrained").subplots()
        draw(ax, study, rows, world)
        label = f"Accuracy on the targets by optimizer step, {short(world, 40)}"
        return to_svg(ax, f"arms-{world}", label.replace('"', ""))


def arms_png(study: Study, results: Sequence[ArmResult]) -> bytes:
    """Draw all worlds side by side."""
    worlds = [world for world in study.worlds if any(row.world == world for row in results)]
    across = min(2, len(worlds))
    down = -(-len(worlds) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained", dpi=110)
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for ax, world in zip(panels, worlds, strict=False):
            draw(ax, study, results, world)
        for ax in panels[len(worlds) :]:
            ax.remove()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw(ax: Axes, study: Study, results: Sequence[ArmResult], world: str) -> None:
    """Draw the arms of a world: means over seeds with 95 % intervals, and the level to be reached."""
    rows = [row for row in results if row.world == world and row.targets and row.world != ALL]
    for row in rows:
        place = list(study.arms).index(row.arm)
        steps = sorted(row.targets)
        found = [row.targets[step] for step in steps]
        y = np.array([e.value for e in found])
        main = row.arm in (study.subject, study.reference)
        ax.plot(
            steps,
            y,
            color=COLOURS[place % len(COLOURS)],
            linewidth=2.2 if main else 1.3,
            linestyle="-" if place < len(COLOURS) else "--",
            marker="o",
            markersize=3.5 if main else 2.5,
            label=short(row.arm),
            zorder=3 if main else 2,
        )
        if main:
            ax.fill_between(
                steps,
                [e.value if e.low is None else e.low for e in found],
                [e.value if e.high is None else e.high for e in found],
                color=COLOURS[place % len(COLOURS)],
                alpha=0.18,
                linewidth=0,
            )
    reference = [row for row in rows if row.arm == study.reference]
    if reference:
        last = reference[0].targets[max(reference[0].targets)].value
        ax.axhline(last, color=GREY, linewidth=0.8, linestyle=":")
    seeds = max((len(row.seeds) for row in rows), default=0)
    ax.set_title(f"{short(world, 40)}, {seeds} seed{'s' if seeds != 1 else ''}", fontsize=9)
    ax.set_xlabel("optimizer steps")
    ax.set_ylabel("accuracy on the targets")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    cast(Axes, ax).legend(fontsize=7, ncols=2, loc="best")
