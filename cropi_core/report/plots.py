"""Figures of a report as inline SVG: deterministic bytes, text kept as text, colors from the page.

Every figure has a bounded number of marks, independent of the size of the pool and the length of the run. Names come
from users' tables: they are drawn literally (no mathematical markup) and truncated to fit.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from cropi_core.report.data import Curve, Trained
from cropi_core.report.text import cut, visible

# Okabe and Ito's hues at a lightness that is readable on white and on black: safe for color blindness, no theme
# needed.
COLOURS = ("#2f7fc1", "#d5701f", "#1f9d78", "#b0629c", "#b08a00", "#5a9fb8", "#8a6d5a", "#7a7a86")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
GREY = "#8c8c94"
MOST_CURVES = 8
MOST_POINTS = 500
BINS = 40
"""Bins of a histogram of scores."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name can contain a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # included in matplotlib: the same layout on every machine
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",  # matplotlib writes black without a color attribute, so the page sets the color
    "ytick.labelcolor": "black",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "path.simplify": False,
}


@contextmanager
def axes(size: tuple[float, float] = (5.2, 3.0)) -> Iterator[Axes]:
    """Create axes in the report's style."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The reader's own font renders glyphs that DejaVu lacks, because text is kept as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        yield Figure(figsize=size, layout="constrained").subplots()


def to_svg(ax: Axes, name: str, label: str) -> str:
    """Render a figure as an ``<svg>`` element without date or metadata, and with ids that are unique in the page.

    Args:
        ax: The axes.
        name: Name of the figure, unique in the page.
        label: Description of the figure.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"cropi-{name}"}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        cast(Figure, ax.get_figure(root=True)).savefig(
            buffer, format="svg", transparent=True, metadata=metadata
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # In an HTML page the namespaces are implied, and the page sets the sizes.
    svg = re.sub(
        r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg
    )
    return svg.replace("xlink:href", "href")


def short(name: str, most: int = 18) -> str:
    """Truncate a name to fit next to a curve."""
    return cut(visible(name, lines=False), most)


def learning(
    curves: Sequence[Curve], limits: tuple[float, float], name: str, numbers: Mapping[str, int]
) -> str:
    """Plot accuracy over training steps with 95 % intervals, one labeled curve per set.

    Args:
        curves: The curves.
        limits: Limits of the accuracy axis.
        name: Name of the figure.
        numbers: Number of each set in the run, which gives a set the same colour in every figure.
    """
    shown = curves[:MOST_CURVES]
    last = max((n for c in shown for n in c.steps.values()), default=0) or 1
    with axes() as ax:
        ends = []
        for i, curve in enumerate(shown):
            # Offset the curves so that intervals at the same step do not cover one another.
            offset = (i - (len(shown) - 1) / 2) * 0.012 * last
            x = [curve.steps[p.stage] + offset for p in curve.points]
            y = np.array([p.accuracy for p in curve.points])
            margins = np.array([[p.accuracy - p.low, p.high - p.accuracy] for p in curve.points]).T
            number = numbers[curve.name] % len(COLOURS)
            ax.errorbar(
                x,
                y,
                yerr=np.maximum(margins, 0),
                color=COLOURS[number],
                marker=MARKERS[number],
                markersize=4.5,
                linewidth=1.6,
                elinewidth=1,
                capsize=2.5,
                linestyle="-" if curve.role == "validation" else "--",
            )
            ends.append((float(y[-1]), short(curve.name), COLOURS[number]))
        ax.set_xlim(-0.05 * last, 1.05 * last)
        ax.set_ylim(*limits)
        gap = 0.075 * (limits[1] - limits[0])
        for y, (_, text, colour) in zip(spread([e[0] for e in ends], gap), ends, strict=True):
            ax.annotate(f"— {text}", (1.06 * last, y), color=colour, va="center", annotation_clip=False)
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel("accuracy")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(ax, name, f"Accuracy over optimizer steps, {name} sets")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels vertically until adjacent ones are ``gap`` apart, keeping their order and center."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    shift = (sum(placed) - sum(heights)) / max(1, len(heights))
    result = [0.0] * len(heights)
    for k, i in enumerate(order):
        result[i] = placed[k] - shift
    return result


def limits_of(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the accuracy limits shared by all panels: all intervals with a margin, within 0 to 1."""
    low = min(p.low for c in curves for p in c.points)
    high = max(p.high for c in curves for p in c.points)
    air = max(0.04, 0.06 * (high - low))
    return max(-0.02, low - air), min(1.02, high + air)


def training(trained: Sequence[Trained], metric: str, label: str) -> str | None:
    """Plot a training metric over optimizer steps, averaged over bins in long runs; None without values."""
    parts = [t for t in trained if metric in t.metrics]
    steps = np.array([s for t in parts for s in t.steps], dtype=float)
    values = np.array([np.nan if v is None else v for t in parts for v in t.metrics[metric]], dtype=float)
    steps, values = steps[~np.isnan(values)], values[~np.isnan(values)]
    if not len(steps):
        return None
    if len(steps) > MOST_POINTS:
        pieces = np.array_split(np.arange(len(steps)), MOST_POINTS)
        steps, values = (np.array([x[piece].mean() for piece in pieces]) for x in (steps, values))
    with axes() as ax:
        ax.plot(steps, values, color=COLOURS[0], linewidth=1.6, marker="o", markersize=2.5)
        for t in parts[:20]:
            ax.axvline(t.steps[0] - 0.5, color=GREY, linewidth=0.7, linestyle=":")
            if len(parts) <= 6:
                where = (t.steps[0] - 0.4, 1.0)
                ax.annotate(f"stage {t.stage}", where, xycoords=("data", "axes fraction"), va="bottom")
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(ax, metric, f"{label.capitalize()} by optimizer step")


def pass_rates(pool: Sequence[float], selected: Sequence[float], stage: int) -> str:
    """Plot ten bins of pass rate for the pool and for the selection."""
    x = np.arange(10) / 10
    with axes((5.2, 2.4)) as ax:
        ax.bar(x + 0.028, pool, width=0.04, color=GREY, alpha=0.75, label="pool")
        ax.bar(x + 0.072, selected, width=0.04, color=COLOURS[0], label="selected")
        ax.set_xticks(np.arange(0, 11, 2) / 10)
        ax.set_xlim(-0.01, 1.01)
        ax.set_xlabel("pass rate of the stored trajectories")
        ax.set_ylabel("share of prompts")
        ax.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.16))
        return to_svg(ax, f"pass-rate-{stage}", f"Pass rates of pool and selection, stage {stage}")


def score_histogram(values: dict[int, np.ndarray], name: str, number: int, metric: str) -> str:
    """Plot the distribution of the pool's similarity to a validation set, one line per stage, limited by the colors."""
    stages = sorted(values)
    if len(stages) > len(COLOURS):
        stages = [stages[i] for i in np.linspace(0, len(stages) - 1, len(COLOURS)).astype(int)]
    finite = {s: values[s][np.isfinite(values[s])] for s in stages}
    together = np.concatenate([*finite.values()])
    edges = np.histogram_bin_edges(together, bins=BINS)
    with axes((5.2, 2.6)) as ax:
        for i, (stage, scores) in enumerate(finite.items()):
            counts, _ = np.histogram(scores, bins=edges)
            share = counts / max(1, len(scores))
            ax.stairs(share, edges, color=COLOURS[i], linewidth=1.5, label=f"stage {stage}")
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_xlabel(f"{metric} with {short(name, 30)}")
        ax.set_ylabel("share of prompts")
        ax.legend(loc="upper right")
        return to_svg(ax, f"scores-{number}", "Scores of the pool by stage")


def chance_comparison(labels: Sequence[str], reach: dict[int, list[float | None]]) -> str | None:
    """Plot how far selections are from their pool, a row per metric and a mark per stage; None without values.

    Args:
        labels: Names of the metrics, the first at the top.
        reach: By stage and metric, in half-widths of the interval of random subsets: −1 to 1 is within chance.
    """
    stages = sorted(reach)
    if len(stages) > len(COLOURS):
        stages = [stages[i] for i in np.linspace(0, len(stages) - 1, len(COLOURS)).astype(int)]
    if not any(value is not None for stage in stages for value in reach[stage]):
        return None
    with axes((5.2, 0.9 + 0.3 * len(labels))) as ax:
        ax.axvspan(-1, 1, color=GREY, alpha=0.2, linewidth=0)
        ax.axvline(0, color=GREY, linewidth=0.8)
        for i, stage in enumerate(stages):
            offset = (i - (len(stages) - 1) / 2) * 0.5 / len(stages)
            marks = [(value, row + offset) for row, value in enumerate(reach[stage]) if value is not None]
            ax.plot(
                [x for x, _ in marks],
                [y for _, y in marks],
                linestyle="none",
                marker=MARKERS[i],
                markersize=5,
                color=COLOURS[i],
                label=f"stage {stage}",
            )
        ax.set_xscale("symlog", linthresh=2)
        most = max(2.0, *(abs(v) for stage in stages for v in reach[stage] if v is not None))
        ax.set_xlim(-1.3 * most, 1.3 * most)
        ticks = [t for t in (1, 3, 10, 30, 100, 1000) if t <= 1.3 * most]
        ax.set_xticks([*(-t for t in reversed(ticks)), 0, *ticks], minor=False)
        ax.set_xticklabels([*(f"−{t}" for t in reversed(ticks)), "0", *map(str, ticks)])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(range(len(labels)), [short(label, 44) for label in labels])
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlabel("selected − pool, in half-widths of chance")
        ax.legend(loc="lower center", ncols=4, bbox_to_anchor=(0.35, 1.0))
        return to_svg(
            ax, "beside-chance", "How far the selected prompts lie from their pool, compared with chance"
        )
