"""The report's section about selected prompts: a table, a figure, and the paper's findings in this run."""

from dataclasses import dataclass

from markupsafe import Markup

from cropi_core.analysis import Contrast, RunChosen, StageChosen, chosen_of, fixed
from cropi_core.report import plots
from cropi_core.report.csv_data import csv_address, distance_table
from cropi_core.report.data import shown_stages
from cropi_core.report.text import number, percent
from cropi_core.runs import Artifacts

LABELS = {
    "entropy": "entropy of a token, nats",
    "pass_rate": "pass rate",
    "level": "human level",
    "difficulty": "1 − pass rate of the base",
    "length": "tokens of a completion",
    "similarity": "similarity to the validation sets",
    "alike": "cosine of two selected",
    "alike_nearest": "cosine with the nearest selected",
}
"""Rows of the table in order; rows of single validation sets follow ``similarity``."""

MEANINGS = {
    "entropy": "Under the policy that chose, on the stored trajectories; prompts with a gradient alone.",
    "pass_rate": "Of the trajectories that the stage chose by.",
    "level": "The data's own, where its levels hold a number.",
    "difficulty": "Share of failures in the first stage's trajectories, the base policy's: difficulty without a human.",
    "length": "Mean over a prompt's trajectories.",
    "similarity": "Mean cosine of a prompt's sentence embedding with those of a validation set; averaged over sets.",
    "alike": "Mean cosine of the gradient features of two different prompts: how redundant the selection is.",
    "alike_nearest": "Mean over selected prompts of the cosine with the most similar other one.",
}
MOST_SETS = 4


@dataclass(frozen=True)
class Cell:
    """One metric of one stage: selection, pool, interval of random subsets, and whether the selection is within it."""

    chosen: str
    pool: str
    chance: str
    by_chance: bool


@dataclass(frozen=True)
class Row:
    """One metric by stage; a cell is None if the metric was not measured."""

    label: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Section:
    """The data of the section."""

    stages: list[int]
    rows: list[Row]
    moves: list[tuple[str, list[str]]]
    meanings: list[tuple[str, str]]
    figure: Markup | None
    csv: str
    verdicts: list[str]
    notes: list[str]


def section(artifacts: Artifacts) -> Section | None:
    """Lay out the selections of the stages shown in full; None before any stage has selected."""
    chosen_run = chosen_of(artifacts, shown_stages(artifacts.stages("selection")))
    if not chosen_run.stages:
        return None
    names = _names(chosen_run)
    labels = [label_of(name) for name in names]
    reach = {one.stage: [_reach(one.figures.get(name)) for name in names] for one in chosen_run.stages}
    svg = plots.chance_comparison(labels, reach)
    return Section(
        stages=[one.stage for one in chosen_run.stages],
        rows=[
            Row(label_of(name), [_cell(name, one.figures.get(name)) for one in chosen_run.stages])
            for name in names
        ],
        moves=_moves(chosen_run.stages),
        meanings=[(LABELS[name], MEANINGS[name]) for name in names if name in MEANINGS],
        figure=None if svg is None else Markup(svg),  # noqa: S704 - matplotlib escapes its text
        csv=csv_address(distance_table(labels, reach)),
        verdicts=[verdict.sentence for verdict in chosen_run.verdicts],
        notes=chosen_run.notes,
    )


def label_of(name: str) -> str:
    """Return the display name of a metric."""
    kind, colon, set_name = name.partition(":")
    if not colon:
        return LABELS[name]
    return (
        f"mean cosine with {set_name}" if kind == "similarity" else f"cosine with the nearest of {set_name}"
    )


def _names(chosen_run: RunChosen) -> list[str]:
    """List the metrics of at least one stage. With many validation sets, those of single sets are only in the JSON."""
    figures = list(dict.fromkeys(name for one in chosen_run.stages for name in one.figures))
    sets = [name for name in figures if ":" in name]
    if len(sets) > 2 * MOST_SETS:
        sets = []
    if len(sets) == 2:  # with one set the mean is already the first row
        sets = sets[1:]
    return [
        one for name in LABELS if name in figures for one in (name, *(sets if name == "similarity" else []))
    ]


def _cell(name: str, contrast: Contrast | None) -> Cell | None:
    if contrast is None:
        return None
    digits = 3 if name.startswith("alike") else 2  # cosines of gradients are close to 0
    values = (contrast.selected_mean, contrast.pool_mean, contrast.low, contrast.high)
    chosen, pool, low, high = (fixed(value, digits) for value in values)
    return Cell(chosen, pool, f"{low} to {high}", contrast.side == "like chance")


def _reach(contrast: Contrast | None) -> float | None:
    return None if contrast is None else contrast.reach


def _moves(stages: list[StageChosen]) -> list[tuple[str, list[str]]]:
    """Lay out the changes between stages, a cell per stage; empty with one stage."""
    if len(stages) < 2:
        return []
    rows: dict[str, list[str]] = {"Jaccard index with the stage before": [], "came, went": []}
    rows["rank correlation of the scores"] = []
    for one in stages:
        cells = ["–"] * 3
        if (moved := one.moved) is not None:
            by_chance = "" if one.chance_jaccard is None else f" (chance {percent(one.chance_jaccard, 0)})"
            cells = [
                "–" if moved.jaccard is None else f"{percent(moved.jaccard, 0)}{by_chance}",
                f"{len(moved.added)}, {len(moved.removed)}",
                number(moved.spearman),
            ]
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    return list(rows.items())
