"""Build the table of score reliability: metrics, limits, and the resulting action, by stage."""

from dataclasses import dataclass
from typing import Any

from cropi_core.diagnostics import (
    FIGURES,
    check_title,
    format_limit,
    format_number,
    format_value,
    format_verdict,
)
from cropi_core.formatting import percent
from cropi_core.report.data import shown_stages
from cropi_core.runs import Artifacts
from data_schemas import StageCheck

ACTIONS = {
    "none": "scores used",
    "refresh": "trajectories collected again",
    "random": "random selection instead",
}
TRAJECTORIES = {"own": "of the current policy", "stored": "of an earlier policy", "pinned": "pinned"}


@dataclass(frozen=True)
class Row:
    """A metric: its limit, and for every check its value and whether the value exceeds the limit."""

    label: str
    meaning: str
    limit: str
    cells: list[tuple[str, bool]]


@dataclass(frozen=True)
class Panel:
    """The table, with a column per check.

    Attributes:
        verdicts: The verdict about the scores of every check, and what followed; empty without one.
        spots: Data behind the metrics of every spot check.
        parity: Difference between the log-probabilities of vLLM and of the local forward pass.
    """

    titles: list[str]
    rows: list[Row]
    trajectories: list[str]
    done: list[tuple[str, bool]]
    verdicts: list[tuple[str, str]]
    limited: bool
    spots: list[str]
    parity: list[str]


def panel(artifacts: Artifacts) -> Panel | None:
    """Lay out the checks of the stages that the report shows in full; None if the run has none."""
    stages = shown_stages(artifacts.stages())
    checks = [check for check in artifacts.record.checks if check.stage in stages]
    if not checks:
        return None
    by_stage = [{finding.figure: finding for finding in check.findings} for check in checks]
    rows = []
    for figure in FIGURES:
        findings = [by_name.get(figure.name) for by_name in by_stage]
        present = [f for f in findings if f is not None]
        if any(f.value is not None or f.rule for f in present):
            cells = [
                ("–", False) if f is None else (format_value(figure, f.value), f.passed) for f in findings
            ]
            rows.append(Row(figure.label, figure.meaning, format_limit(figure, present), cells))
    return Panel(
        titles=[check_title(check) for check in checks],
        rows=rows,
        trajectories=[TRAJECTORIES[check.trajectories] for check in checks],
        done=[(ACTIONS[check.action], check.action != "none") for check in checks],
        verdicts=[
            (format_verdict(check.verdict), check.verdict.follows if check.verdict else "")
            for check in checks
        ]
        if any(check.verdict for check in checks)
        else [],
        limited=any(finding.rule for check in checks for finding in check.findings),
        spots=[text for check in checks if (text := _spot(artifacts, check)) is not None],
        parity=parity(artifacts),
    )


def parity(artifacts: Artifacts) -> list[str]:
    """Describe, for each artifact that vLLM sampled, how far its log-probabilities are from the local forward pass."""
    lines = []
    for slot in artifacts.record.slots:
        summary: dict[str, Any] = artifacts.summary(slot).get("parity") or {}
        if summary:
            beyond = ": beyond the limit" if summary["warning"] else ""
            lines.append(
                f"{slot}: mean {summary['mean_difference']:.2g}, largest {summary['max_difference']:.2g} over "
                f"{summary['tokens']} tokens (limits {summary['mean_limit']:g} and {summary['max_limit']:g}){beyond}"
            )
    return lines


def _spot(artifacts: Artifacts, check: StageCheck) -> str | None:
    """Describe the data of a stage's spot check, and the values expected by chance."""
    kept = "/stored" if check.action == "refresh" else ""
    spot: dict[str, Any] = artifacts.summary(f"diagnostics{kept}@{check.stage}")
    if "compared" not in spot:
        return None
    text = (
        f"{check_title(check)}: of {spot['prompts']} prompts {spot['compared']} have a gradient both times, "
        f"{spot['revived']} only by fresh trajectories, {spot['lost']} only by those that were scored"
    )
    if spot.get("top") is None:
        return f"{text}: too few to compare"
    return (
        f"{text}. Two random orders have {percent(spot['chance'], 0)} of the best {spot['top']} in common; in 19 of "
        f"20 cases they stay within {percent(spot['chance_95'], 0)}, and below a rank correlation of "
        f"{format_number(spot['spearman_95'])}"
    )
