"""Decide whether a stage's scores are reliable: metrics, limits, and the resulting action.

    values = collect_figures(gradients_summary, scores_summary, spot_summary)
    check = judge(stage, values, config.diagnostics, trajectories="stored", rules=RULES)
    check.action                               # none, refresh, random
    header, rows = check_grid(checks)          # as the terminal and the UI show it

Pure functions over the summaries of manifests; the artifacts are not read. The curriculum carries out the action.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_schemas import Diagnostics, Finding, StageCheck, Verdict


@dataclass(frozen=True)
class Figure:
    """A metric: its name, display label, meaning and format.

    Attributes:
        name: Key of :func:`collect_figures`.
        label: A few words.
        meaning: One sentence.
        percent: Whether it is a share.
        rule: Field of :class:`~data_schemas.diagnostics.Diagnostics` that sets its limit.
    """

    name: str
    label: str
    meaning: str
    percent: bool = False
    rule: str | None = None


FIGURES = (
    Figure(
        "kl",
        "KL(β‖π) a token",
        "How far the policy has moved from the one that sampled; 0 on policy. Estimator k3, never negative.",
        rule="max_kl",
    ),
    Figure("kl_k1", "the same, estimator k1", "Mean log-ratio: unbiased with top-p too, but noisier."),
    Figure(
        "ess_share",
        "effective samples",
        "Effective sample size ÷ samples, median: what a group of trajectories is still worth.",
        percent=True,
        rule="min_ess",
    ),
    Figure("max_ratio", "largest ratio", "One token of this weight can decide a prompt's gradient."),
    Figure("clip_fraction", "clipped", "Share of tokens at which PPO's clip would be active.", percent=True),
    Figure(
        "entropy",
        "entropy of a token",
        "In nats; a policy with little entropy samples the same completions again.",
    ),
    Figure(
        "dead_share",
        "prompts without a gradient",
        "All completions have the same reward, or too few can be graded.",
        percent=True,
        rule="max_dead_share",
    ),
    Figure(
        "target_agreement",
        "halves: cosine of the targets",
        "Of two halves of a validation set, in the worst set; near 0, another sample of the set has another target.",
        rule="min_target_agreement",
    ),
    Figure(
        "top_agreement",
        "halves: common in their best tenth",
        "Share of the pool's best tenth on which the halves agree, in the worst set; chance is 10 %.",
        percent=True,
        rule="min_top_agreement",
    ),
    Figure(
        "spot_correlation",
        "spot check: rank correlation",
        "Spearman, of these scores and scores from fresh trajectories of the current policy.",
        rule="min_spot_correlation",
    ),
    Figure(
        "spot_overlap",
        "spot check: common at the top",
        "Share of the best prompts by these scores that are the best by fresh trajectories too.",
        percent=True,
    ),
    Figure(
        "spot_chance",
        "spot check: common by chance",
        "Share that two random orders have in common.",
        percent=True,
    ),
)
GRADIENT_RULES = ("max_kl", "min_ess", "max_dead_share")
"""Rules about the trajectories: they apply to every strategy that reads gradients, before scoring."""
RULES = (*GRADIENT_RULES, "min_target_agreement", "min_top_agreement", "min_spot_correlation")
"""All rules; the last three are about influence scores."""


def collect_figures(
    gradients: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    spot: Mapping[str, Any] | None = None,
) -> dict[str, float | None]:
    """Collect a stage's metrics, in the order of :data:`FIGURES`.

    Args:
        gradients: Summary of the pool's gradients. Its KL is the mean over prompts of :func:`divergence
            <cropi_core.gradients.objective.divergence>`. Its other metrics are of the same prompts, those with
            a gradient.
        scores: Summary of the scores, if the stage has any yet.
        spot: Summary of the spot check, if there was one.

    Returns:
        Metrics by name; None if unknown.
    """
    ok, prompts = gradients.get("status", {}).get("ok"), gradients.get("prompts")
    sets = (scores or {}).get("sets", {}).values()
    halves = [value for s in sets if (value := s.get("split_half_cosine")) is not None]
    tops = [value for s in sets if (value := s.get("split_half_top_overlap")) is not None]
    compared = spot or {}
    return {
        "kl": gradients.get("kl"),
        "kl_k1": gradients.get("kl_k1"),
        "ess_share": gradients.get("median_ess_share"),
        "max_ratio": gradients.get("max_ratio"),
        "clip_fraction": gradients.get("mean_clip_fraction"),
        "entropy": gradients.get("median_entropy"),
        "dead_share": 1 - ok / prompts if prompts and ok is not None else None,
        "target_agreement": min(halves, default=None),
        "top_agreement": min(tops, default=None),
        "spot_correlation": compared.get("spearman"),
        "spot_overlap": compared.get("overlap"),
        "spot_chance": compared.get("chance"),
    }


def judge(
    stage: int,
    values: Mapping[str, float | None],
    limits: Diagnostics,
    *,
    trajectories: Literal["own", "pinned", "stored"],
    rules: Sequence[str] = RULES,
) -> StageCheck:
    """Compare metrics with their limits and decide on an action.

    Trajectories are collected again if an exceeded limit requests it and it can have an effect: not if they are already
    from the current policy, nor if they are pinned. Otherwise the selection is random if an exceeded limit requests
    that. An unknown metric exceeds no limit.

    Args:
        stage: Counted from 1.
        values: Result of :func:`collect_figures`.
        limits: The section of the configuration.
        trajectories: Origin of the trajectories: the current policy, an earlier one, or pinned.
        rules: The subset of :data:`RULES` that applies.
    """
    findings = []
    for figure in FIGURES:
        value, rule = values.get(figure.name), figure.rule if figure.rule in rules else None
        limit = getattr(limits, rule) if rule else None
        if rule is None or limit is None:
            findings.append(Finding(figure=figure.name, value=value))
            continue
        passed = value is not None and (value > limit if rule.startswith("max_") else value < limit)
        action = getattr(limits, f"{rule}_action")
        findings.append(
            Finding(figure=figure.name, value=value, rule=rule, limit=limit, action=action, passed=passed)
        )
    wanted = {finding.action for finding in findings if finding.passed}
    decided: Literal["none", "refresh", "random"] = "random" if "random" in wanted else "none"
    if "refresh" in wanted and trajectories == "stored":
        decided = "refresh"
    return StageCheck(stage=stage, trajectories=trajectories, findings=findings, action=decided)


def consequence(check: StageCheck) -> str | None:
    """Describe the exceeded limits and the resulting action, or the limits with an unknown metric; None if neither."""
    if passed := [_sentence(finding) for finding in check.findings if finding.passed]:
        return f"stage {check.stage}: {', '.join(passed)}: {_decision(check)}"
    unknown = [f.rule for f in check.findings if f.rule and f.value is None]
    if unknown and check.action == "none":
        named = ", ".join(f"diagnostics.{rule}" for rule in unknown)
        return f"stage {check.stage}: {named} could not be checked, there was nothing to measure; the scores are used"
    return None


def _sentence(finding: Finding) -> str:
    """Describe an exceeded limit."""
    label = next(figure.label for figure in FIGURES if figure.name == finding.figure)
    side = "above" if (finding.rule or "").startswith("max_") else "below"
    return f"{label} {format_number(finding.value)} is {side} diagnostics.{finding.rule}={finding.limit:g}"


def _decision(check: StageCheck) -> str:
    """Describe the action of a check."""
    if check.action == "refresh":
        return "the trajectories are collected again"
    if check.action == "random":
        return "the prompts are selected at random"
    why = "they are from the current policy" if check.trajectories == "own" else "they are pinned"
    return f"the trajectories are not collected again, {why}, and the scores are used anyway"


def random_limits(check: StageCheck) -> list[str]:
    """List the rules that make a selection random, in the order of :data:`RULES`."""
    return [f.rule for f in check.findings if f.passed and f.rule and f.action == "random"]


def verdict_sentence(verdict: Verdict) -> str:
    """Describe a verdict: its grade, the figure and what followed."""
    if verdict.figure is None:
        return f"the reliability of the scores is unknown ({verdict.basis}); {verdict.follows}"
    return (
        f"the scores are {verdict.grade} (rank correlation {format_number(verdict.figure)} by halves of the "
        f"{verdict.basis}); {verdict.follows}"
    )


def format_verdict(verdict: Verdict | None) -> str:
    """Format a verdict for a cell: its grade and its figure."""
    if verdict is None:
        return "–"
    return verdict.grade if verdict.figure is None else f"{verdict.grade}, {format_number(verdict.figure)}"


# -- display -------------------------------------------------------------------------------------------------


def check_grid(checks: Sequence[StageCheck]) -> tuple[list[str], list[list[str]]]:
    """Lay out checks with a row per metric and a column per check; an exceeded limit is marked with ``!``.

    Metrics without a known value and without a limit are omitted. Without checks the result is empty.
    """
    header = ["figure", "limit", *[check_title(check) for check in checks]]
    rows = []
    for position, figure in enumerate(FIGURES):
        row = [check.findings[position] for check in checks]
        if not any(f.value is not None or f.rule for f in row):
            continue
        cells = [format_value(figure, f.value) + (" !" if f.passed else "") for f in row]
        rows.append([figure.label, format_limit(figure, row), *cells])
    if any(check.verdict for check in checks):
        rows.insert(0, ["verdict", "", *[format_verdict(check.verdict) for check in checks]])
        done = [check.verdict.follows if check.verdict else "" for check in checks]
        rows.insert(1, ["what followed", "", *done])
    if rows:
        rows.append(["done", "", *[check.action for check in checks]])
    return header, rows


def check_title(check: StageCheck) -> str:
    """Format the heading of a check: its stage, and whether it preceded a refresh."""
    return f"stage {check.stage}" + (", before the refresh" if check.action == "refresh" else "")


def format_limit(figure: Figure, findings: Sequence[Finding]) -> str:
    """Format the limit of a metric with its direction and its action; empty without a limit."""
    ruled = next((f for f in findings if f.rule), None)
    if ruled is None:
        return ""
    side = "≤" if (ruled.rule or "").startswith("max_") else "≥"
    return f"{side} {format_value(figure, ruled.limit)}, else {ruled.action}"


def format_value(figure: Figure, value: float | None) -> str:
    """Format a value of a metric."""
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if figure.percent else format_number(value)


def format_number(value: float | None) -> str:
    """Format a number with three significant digits; a rounding residue is formatted as zero."""
    if value is None:
        return "–"
    return "0" if abs(value) < 5e-6 else f"{value:.3g}"
