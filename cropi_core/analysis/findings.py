"""Tests of the paper's findings about selected prompts on a run, with one sentence for each.

References:
    CROPI, arXiv 2510.26491: selected prompts have lower entropy than the pool, are closer to the validation sets, and
    become harder from stage to stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cropi_core.analysis.contrast import Change, Contrast, Side, fixed

Outcome = Literal[
    "holds", "holds in part", "does not hold", "measures disagree", "inconclusive", "not measured"
]


@dataclass(frozen=True)
class Verdict:
    """One finding, whether it holds in this run, and the metrics behind the result."""

    finding: str
    outcome: Outcome
    figures: str

    @property
    def sentence(self) -> str:
        """The sentence that a report prints."""
        return f"{self.finding}: {self.outcome}" + (f" ({self.figures})" if self.figures else "")


def over_stages(finding: str, wanted: Side, stages: Mapping[int, Contrast | None]) -> Verdict:
    """Test a finding on every stage: on the expected side of random subsets, on the other side, or neither.

    The finding holds if every measured stage agrees, and holds in part if some do. It does not hold if a stage shows
    the opposite and none agrees. Otherwise the result is inconclusive.
    """
    measured = {stage: contrast for stage, contrast in stages.items() if contrast is not None}
    if not measured:
        return Verdict(finding, "not measured", "")
    agree = [contrast.side == wanted for contrast in measured.values()]
    against = [contrast.side not in (wanted, "like chance") for contrast in measured.values()]
    outcome: Outcome = "inconclusive"
    if all(agree):
        outcome = "holds"
    elif any(agree):
        outcome = "holds in part"
    elif any(against):
        outcome = "does not hold"
    return Verdict(
        finding, outcome, "; ".join(_beside(stage, contrast) for stage, contrast in measured.items())
    )


def later_is_harder(changes: Mapping[str, Change | None]) -> Verdict:
    """Test whether the last stage's prompts are harder than the first stage's, by each measure of difficulty.

    The finding holds if every measure agrees, and in part if one agrees and the others are inconclusive.

    Args:
        changes: Change from the first stage to the last, by the name of the measure.
    """
    finding = "later stages are harder"
    measured = {name: contrast for name, contrast in changes.items() if contrast is not None}
    if not measured:
        return Verdict(finding, "not measured", "")
    sides = [contrast.side for contrast in measured.values()]
    outcome: Outcome = "inconclusive"
    if {"higher", "lower"} <= set(sides):
        outcome = "measures disagree"
    elif all(side == "higher" for side in sides):
        outcome = "holds"
    elif "higher" in sides:
        outcome = "holds in part"
    elif "lower" in sides:
        outcome = "does not hold"
    sentences = [
        f"{name} {fixed(c.before)} → {fixed(c.after)}, 95 % of the change {fixed(c.low)} to {fixed(c.high)}"
        for name, c in measured.items()
    ]
    return Verdict(finding, outcome, "; ".join(sentences))


def _beside(stage: int, contrast: Contrast) -> str:
    return (
        f"stage {stage}: {fixed(contrast.selected_mean)} compared with {fixed(contrast.pool_mean)}, "
        f"chance {fixed(contrast.low)} to {fixed(contrast.high)}"
    )
