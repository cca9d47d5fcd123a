"""The report page: collects the data and figures of the other report modules and renders the template."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cropi_core.analysis import Levels, read_levels
from cropi_core.artifacts import Store
from cropi_core.prompts import data_card
from cropi_core.report import plots, text
from cropi_core.report.baselines import baselines, compared_role
from cropi_core.report.changed import changed_sets
from cropi_core.report.chosen import section
from cropi_core.report.csv_data import (
    Table,
    accuracy_table,
    csv_address,
    metric_table,
    pass_rate_table,
    score_table,
)
from cropi_core.report.data import (
    METRICS,
    Curve,
    Trained,
    accuracy_curves,
    headline,
    shown_stages,
    stage_seconds,
    steps_after,
    trained_stages,
)
from cropi_core.report.lineage import provenance, run_slots, tree
from cropi_core.report.prompts import Example, examples
from cropi_core.report.stages import (
    Share,
    StageChoice,
    overlap,
    pass_rate_shares,
    rank_correlation,
    read_choice,
    shares,
    status_counts,
)
from cropi_core.report.trust import panel
from cropi_core.runs import (
    Artifacts,
    Detail,
    Pool,
    cost_grid,
    detail_grid,
    details,
    read_note,
    read_pool,
    selection_in_steps,
)
from data_schemas import Config, RunRecord

TEMPLATES = Path(__file__).parent / "templates"
MOST_SETS = 8


@dataclass(frozen=True)
class Drawn:
    """A figure, its caption, and its data as a `data:` address of a CSV file; ``name`` is the name of that file."""

    caption: str
    svg: Markup
    name: str
    csv: str


@dataclass(frozen=True)
class StageView:
    """The data that the page shows of one stage; ``choice`` is None before the stage has measured anything."""

    stage: int
    choice: StageChoice | None = None
    sources: list[Share] = field(default_factory=list)
    levels: list[Share] = field(default_factory=list)
    pass_rates: Drawn | None = None
    statuses: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    fallback: dict[str, Any] | None = None


def _levels(artifacts: Artifacts, stages: list[int]) -> list[Levels]:
    """Read the levels of the stages that have selected; empty if the pool has no levels."""
    found = [read_levels(artifacts, stage) for stage in stages]
    return [one for one in found if one is not None and one.pool is not None]


def render(store: Store, record: RunRecord) -> str:
    """Return the page of a run as HTML."""
    artifacts = Artifacts(store, record)
    curves = accuracy_curves(artifacts)
    trained = trained_stages(artifacts)
    pool = read_pool(artifacts)
    views = [_view(artifacts, pool, stage) for stage in shown_stages(artifacts.stages())]
    choices = [v.choice for v in views if v.choice is not None]
    context: dict[str, Any] = {
        "record": record,
        "note": read_note(store, record.run),
        "config": artifacts.config,
        "elapsed": _elapsed(record),
        "progress": _progress(artifacts),
        "headline": headline(artifacts, curves),
        "pool_size": None if pool is None else len(pool.ids),
        "curves": curves,
        "figures": _learning(curves, trained),
        "rows": _rows(artifacts, curves),
        "details": detail_grid(_details(artifacts)),
        "changed": changed_sets(artifacts),
        "baselines": baselines(artifacts),
        "compared": compared_role(artifacts.config),
        "trained": trained,
        "left_out": len(artifacts.stages()) - len(views),
        "views": views,
        "overlaps": _matrix(choices, overlap) if any(c.selected is not None for c in choices) else [],
        "correlations": _matrix(choices, rank_correlation),
        "score_figures": _score_figures(choices, artifacts.config.scores.metric),
        "chosen": section(artifacts),
        "levels": _levels(artifacts, [v.stage for v in views]),
        "panel": panel(artifacts),
        "absent": _absent(artifacts.config),
        "cost": _cost(artifacts),
        "slots": run_slots(artifacts),
        "tree": tree(artifacts),
        "provenance": provenance(artifacts),
        "cards": _cards(artifacts),
    }
    # Evaluated last, because every reader above can add problems.
    return environment().get_template("report.html.jinja").render(context, problems=artifacts.problems)


def _cost(artifacts: Artifacts) -> dict[str, Any]:
    """Sum tokens and seconds by purpose, and express the selection's cost in training steps."""
    slots = artifacts.slots()
    header, rows = cost_grid(slots)
    return {"header": header, "rows": rows, "steps": selection_in_steps(slots)}


def _cards(artifacts: Artifacts) -> dict[str, str]:
    """Render the cards of pool, validation and test sets, by slot."""
    slots = [slot for slot in artifacts.record.slots if slot.startswith("prompts/") and "@" not in slot]
    manifests = {slot: artifacts.manifest(slot) for slot in slots}
    return {slot: data_card(manifest) for slot, manifest in manifests.items() if manifest is not None}


def _details(artifacts: Artifacts) -> list[Detail]:
    """Read accuracy by source and level, and pass@k, of the evaluations that are shown."""
    stages = [0, *shown_stages(artifacts.stages("evaluation"))]
    summaries = [(stage, artifacts.summary(f"evaluation@{stage}")) for stage in stages]
    return [
        row for stage, summary in summaries for row in details(summary, stage, artifacts.config.data.test)
    ]


def environment() -> Environment:
    """Return the template environment: output is escaped, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": text.name,
        "line": text.line,
        "block": text.block,
        "num": text.number,
        "percent": text.percent,
        "signed": text.signed,
        "duration": text.duration,
        "moment": text.moment,
        "memory": text.memory,
        "anchor": lambda slot: "slot-" + "".join(c if c.isalnum() else "-" for c in slot),
    }
    return environment


def _view(artifacts: Artifacts, pool: Pool | None, stage: int) -> StageView:
    choice = None if pool is None else read_choice(artifacts, pool, stage)
    if pool is None or choice is None:
        return StageView(stage)
    sources, levels, figure = [], [], None
    if choice.selected is not None:
        sources = shares(pool.sources, choice.selected)
        levels = shares(pool.levels, choice.selected, in_order=True) if pool.has_levels else []
        if (bins := pass_rate_shares(choice)) is not None:
            svg = plots.pass_rates(*bins, stage)
            figure = _drawn("Pass rates", svg, f"pass-rates-{stage}", pass_rate_table(*bins))
    best, worst = examples(artifacts, pool, choice) if choice.has_scores else ([], [])
    fallback = artifacts.summary(f"selection@{stage}").get("fallback")
    return StageView(
        stage, choice, sources, levels, figure, status_counts(choice, pool), best, worst, fallback
    )


def _learning(curves: list[Curve], trained: list[Trained]) -> list[Drawn]:
    """Plot the learning curves and the training metrics, each with its caption and its data."""
    drawn = []
    numbers = {curve.name: number for number, curve in enumerate(curves)}
    for role, purpose in (("validation", "their gradient is the target"), ("test", "only ever evaluated")):
        if group := [c for c in curves if c.role == role]:
            left_out = len(group) - len(group[: plots.MOST_CURVES])
            caption = f"{role.capitalize()} sets ({purpose}), 95 % intervals"
            caption += f"; {left_out} more in the table" if left_out else ""
            svg = plots.learning(group, plots.limits_of(curves), role, numbers)
            drawn.append(_drawn(caption, svg, f"accuracy-{role}", accuracy_table(group)))
    for metric in METRICS:
        if (svg := plots.training(trained, metric.name, metric.label)) is not None:
            table = metric_table(trained, metric.name)
            drawn.append(_drawn(metric.caption, svg, metric.name.replace("_", "-"), table))
    return drawn


def _drawn(caption: str, svg: str, name: str, table: Table) -> Drawn:
    return Drawn(caption, Markup(svg), name, csv_address(table))  # noqa: S704 - matplotlib escapes its text


def _rows(artifacts: Artifacts, curves: list[Curve]) -> list[dict[str, Any]]:
    """Build a row for the base policy and for every stage: accuracy by set, change since the previous evaluation."""
    stages = sorted({p.stage for c in curves for p in c.points} | set(artifacts.stages("policy")))
    rows, before = [], None
    for stage in stages:
        cells = [
            {
                "point": c.at(stage),
                "change": None if before is None else c.change(stage, before),
                "unclear": before is not None and c.unclear(stage, before),
            }
            for c in curves
        ]
        steps, seconds = steps_after(artifacts, stage), stage_seconds(artifacts, stage)
        rows.append({"stage": stage, "cells": cells, "steps": steps, "seconds": seconds})
        if any(c.at(stage) for c in curves):
            before = stage
    return rows


def _matrix(choices: list[StageChoice], compare: Any) -> list[tuple[int, list[float | None]]]:
    """Compare every stage with every other; empty with fewer than two comparable stages."""
    rows = [(one.stage, [compare(one, other) for other in choices]) for one in choices]
    has_values = any(v is not None for i, (_, row) in enumerate(rows) for j, v in enumerate(row) if i != j)
    return rows if has_values else []


def _score_figures(choices: list[StageChoice], metric: str) -> list[Drawn]:
    names = sorted({name for c in choices for name in c.by_set})[:MOST_SETS]
    figures = []
    for number, name in enumerate(names):
        values = {c.stage: c.by_set[name] for c in choices if name in c.by_set}
        svg = plots.score_histogram(values, name, number, metric)
        figures.append(_drawn("", svg, f"scores-{number}", score_table(values)))
    return figures


def _elapsed(record: RunRecord) -> float | None:
    """Return the seconds between the record's two times."""
    if record.finished is None:
        return None
    try:
        begin, end = (datetime.fromisoformat(moment) for moment in (record.started, record.finished))
        return (end - begin).total_seconds()
    except (ValueError, TypeError):
        return None


def _progress(artifacts: Artifacts) -> str:
    """Describe the progress of the run."""
    finished = len(artifacts.stages("evaluation"))
    progress = f"{finished} of {artifacts.config.stages} stages finished"
    last = list(artifacts.record.slots)[-1:]
    return f"{progress}; the last artifact is {last[0]}" if last else f"{progress}; no artifact yet"


def _absent(config: Config) -> str | None:
    """Name the parts of the report that do not apply to the strategy, and why."""
    strategy = config.selection.strategy
    if not config.needs_rollouts:
        return (
            f"The strategy {strategy} uses no trajectories and no gradients, so this run has "
            "no pass rates, scores, statuses, or best and worst prompts."
        )
    if not config.needs_gradients:
        return (
            f"The strategy {strategy} uses trajectories but no gradients, so this run has no scores by "
            "validation set, no split-half agreement and no reliability metrics."
        )
    return None
