"""Compare two runs: settings that differ, accuracy with intervals, selections by stage, seconds by step.

comparison = compare_runs(Store(".cropi"), "demo-0123abcd", "demo-4567cdef")
[(row.setting, row.one, row.other) for row in comparison.settings]
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cropi_core.analysis.selection_diff import compare_selections
from cropi_core.artifacts import SELECTION_FILE, Store
from cropi_core.errors import SelectionError
from cropi_core.runs import Accuracy, Artifacts, accuracies, load_run, read_note

NOT_SET = "not set"
SELECTION = ("prompt_id", "selected", "rank", "score")


@dataclass(frozen=True)
class Setting:
    """A setting that differs, by its path in the configuration."""

    setting: str
    one: Any
    other: Any


@dataclass(frozen=True)
class SetAccuracy:
    """Accuracy on one set after the last stage that both runs evaluated.

    Attributes:
        set: Name of the set.
        split: `validation` or `test`.
        stage: The stage; 0 is the base policy.
        one: Accuracy in the first run.
        other: Accuracy in the second run.
        unclear: Whether the intervals overlap, so that the difference may be chance.
    """

    set: str
    split: str
    stage: int
    one: Accuracy
    other: Accuracy
    unclear: bool

    @property
    def points(self) -> float:
        """The difference, second minus first, in percentage points."""
        return 100 * (self.other.accuracy - self.one.accuracy)


@dataclass(frozen=True)
class StageOverlap:
    """The selections of one stage: their sizes, the prompts in both, and the rank correlation of the scores."""

    stage: int
    selected: tuple[int, int]
    both: int
    spearman: float | None


@dataclass(frozen=True)
class RunComparison:
    """The comparison of two runs.

    Attributes:
        runs: Ids of the runs.
        notes: Their notes; empty for a run without one.
        settings: Settings that differ, by path.
        accuracy: Accuracy on the sets of both, test sets first.
        selections: Selections of the stages that both have.
        seconds: By step, what the artifacts of each run took when they were computed.
        problems: What could not be read or compared.
    """

    runs: tuple[str, str]
    notes: tuple[str, str]
    settings: list[Setting]
    accuracy: list[SetAccuracy]
    selections: list[StageOverlap]
    seconds: dict[str, tuple[float, float]]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def compare_runs(store: Store, one: str, other: str) -> RunComparison:
    """Compare two runs of a store.

    Args:
        store: Store with both runs.
        one: Id of the first run.
        other: Id of the second run.

    Raises:
        ArtifactError: A run does not exist, or its record cannot be read.
    """
    records = load_run(store, one), load_run(store, other)
    a, b = Artifacts(store, records[0]), Artifacts(store, records[1])
    problems: list[str] = []
    overlaps = list(_overlaps(a, b, problems))
    return RunComparison(
        runs=(one, other),
        notes=(read_note(store, one), read_note(store, other)),
        settings=different_settings(records[0].config, records[1].config),
        accuracy=_accuracy(a, b),
        selections=overlaps,
        seconds=_seconds(a, b),
        problems=[*(f"{r.record.run}: {problem}" for r in (a, b) for problem in r.problems), *problems],
    )


def different_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Setting]:
    """List the settings of two configurations that differ; a setting of only one of them is `not set` in the other."""
    a, b = dict(_leaves(one)), dict(_leaves(other))
    paths = [*a, *(path for path in b if path not in a)]
    pairs = [(path, a.get(path, NOT_SET), b.get(path, NOT_SET)) for path in paths]
    return [Setting(*row) for row in pairs if row[1] != row[2]]


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def _accuracy(a: Artifacts, b: Artifacts) -> list[SetAccuracy]:
    rows: dict[str, SetAccuracy] = {}
    for stage in [0, *a.stages("evaluation")]:
        first, second = (
            {row.set: row for row in accuracies(r.summary(f"evaluation@{stage}"), stage, r.config.data.test)}
            for r in (a, b)
        )
        for name in first.keys() & second.keys():
            x, y = first[name], second[name]
            rows[name] = SetAccuracy(name, x.split, stage, x, y, x.overlaps(y))
    return sorted(rows.values(), key=lambda row: (row.split != "test", row.set))


def _overlaps(a: Artifacts, b: Artifacts, problems: list[str]) -> Iterator[StageOverlap]:
    for stage in sorted(set(a.stages("selection")) & set(b.stages("selection"))):
        slot = f"selection@{stage}"
        tables = [r.table(slot, SELECTION_FILE, SELECTION) for r in (a, b)]
        if tables[0] is None or tables[1] is None:
            continue  # a problem of the run is recorded
        try:
            diff = compare_selections(tables[0], tables[1])
        except SelectionError as error:
            problems.append(f"{slot}: {error}")
            continue
        yield StageOverlap(stage, diff.selected, diff.both, diff.spearman)


def _seconds(a: Artifacts, b: Artifacts) -> dict[str, tuple[float, float]]:
    first, second = _seconds_by_step(a), _seconds_by_step(b)
    return {step: (first.get(step, 0.0), second.get(step, 0.0)) for step in {**first, **second}}


def _seconds_by_step(artifacts: Artifacts) -> dict[str, float]:
    totals: dict[str, float] = {}
    for slot in artifacts.record.slots:
        if (manifest := artifacts.manifest(slot)) is not None:
            totals[manifest.step] = totals.get(manifest.step, 0.0) + manifest.seconds
    return totals
