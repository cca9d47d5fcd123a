"""Measured accuracy of a run: by stage and set, by source and level, and pass@k.

:class:`Accuracy` is the only model of a measured accuracy: the command line, the report, the study and the events of
Prefect all read it here.

    for row in accuracies(manifest.summary, stage=1): print(row.set, row.text)
    for row in details(manifest.summary, stage=1): print(row.set, row.part, row.text)
    header, rows = detail_grid(summary.details)        # one row per set and part, one column per stage
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cropi_core.formatting import percent, points


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one set under the policy after ``stage`` (0: the base), with a 95 % interval over prompts."""

    set: str
    split: str
    stage: int
    accuracy: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The accuracy and its interval: ``62.5 % (55.8–68.8)``."""
        return f"{percent(self.accuracy)} ({points(self.low)}–{points(self.high)})"

    def overlaps(self, other: "Accuracy") -> bool:
        """Return whether the two intervals overlap, so that the difference may be chance."""
        return self.low <= other.high and other.low <= self.high


def accuracies(summary: Mapping[str, Any], stage: int, tests: Collection[str] = ()) -> list[Accuracy]:
    """List the accuracies of one evaluation, validation sets first.

    Args:
        summary: The summary in the manifest of the evaluation; without accuracies the list is empty.
        stage: The stage that was evaluated.
        tests: Names of the test sets; all other sets are validation sets.
    """
    rows = [
        Accuracy(
            set=name,
            split="test" if name in tests else "validation",
            stage=stage,
            accuracy=measured["accuracy"],
            low=measured["low"],
            high=measured["high"],
        )
        for name, measured in summary.get("accuracy", {}).items()
    ]
    return sorted(rows, key=lambda row: row.split == "test")


@dataclass(frozen=True)
class Detail(Accuracy):
    """Accuracy of some prompts of a set, or pass@k of the whole set, with a 95 % interval.

    Attributes:
        part: What was measured, such as ``source: algebra``, ``level: 3`` or ``pass@4``.
        prompts: Number of prompts.
    """

    part: str
    prompts: int


def details(summary: Mapping[str, Any], stage: int, tests: Collection[str] = ()) -> list[Detail]:
    """List the details of one evaluation, those of validation sets first; empty if it states none.

    Args:
        summary: The summary in the manifest of the evaluation.
        stage: The stage that was evaluated.
        tests: Names of the test sets; all other sets are validation sets.
    """
    rows = []
    for name, measured in summary.get("accuracy", {}).items():
        split = "test" if name in tests else "validation"
        for k, figures in measured.get("pass_at", {}).items():
            if figures["prompts"]:
                rows.append(_detail(name, split, stage, f"pass@{k}", figures, figures["value"]))
        for column, parts in summary.get("parts", {}).get(name, {}).items():
            for part, figures in parts.items():
                rows.append(_detail(name, split, stage, f"{column}: {part}", figures, figures["accuracy"]))
    return sorted(rows, key=lambda row: row.split == "test")


def _detail(name: str, split: str, stage: int, part: str, figures: Mapping[str, Any], value: float) -> Detail:
    return Detail(
        set=name,
        split=split,
        stage=stage,
        accuracy=value,
        low=figures["low"],
        high=figures["high"],
        part=part,
        prompts=figures["prompts"],
    )


def accuracy_grid(rows: Sequence[Accuracy]) -> tuple[list[str], list[list[str]]]:
    """Arrange accuracy in a grid: one row per set, one column per stage."""
    stages = sorted({row.stage for row in rows})
    header = ["set", "use", *map(_column, stages)]
    cells = {(row.set, row.stage): row.text for row in rows}
    sets = list(dict.fromkeys((row.set, row.split) for row in rows))
    sets.sort(key=lambda pair: pair[1] == "test")
    return header, [
        [name, split, *[cells.get((name, stage), "") for stage in stages]] for name, split in sets
    ]


def detail_grid(rows: Sequence[Detail]) -> tuple[list[str], list[list[str]]]:
    """Arrange details in a grid: one row per set and part, one column per stage."""
    stages = sorted({row.stage for row in rows})
    cells = {(row.set, row.part, row.stage): row.text for row in rows}
    prompts = {(row.set, row.part): row.prompts for row in rows}
    header = ["set", "part", "prompts", *map(_column, stages)]
    return header, [
        [name, part, str(count), *[cells.get((name, part, stage), "") for stage in stages]]
        for (name, part), count in prompts.items()
    ]


def _column(stage: int) -> str:
    """Name the column of a stage."""
    return "base" if stage == 0 else f"stage {stage}"
