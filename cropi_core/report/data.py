"""What a report says about a run as a whole: read from its record, its manifests and small columns.

A report is also written of a run that failed or is under way, and of one whose artifacts were collected
since. So nothing here stops at an artifact that is not there: what a record names and the store cannot give
is a line in :attr:`Artifacts.problems`, and the report prints those lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cropi_core.errors import ArtifactError, in_one_line
from cropi_core.step_functions import METRICS_FILE
from cropi_core.store import Store
from data_schemas.config import Config
from data_schemas.manifest import Manifest, RunRecord

SHOWN_STAGES = 12
"""More stages than these are shown as the first two and the last ten; tables by stage have them all."""

DRAWN_METRICS = ("reward", "entropy")
"""Columns of a stage's metrics that are drawn over its optimizer steps."""


class Artifacts:
    """The artifacts that a run names, by slot; what cannot be read becomes a problem and not an error."""

    def __init__(self, store: Store, record: RunRecord) -> None:
        self.store = store
        self.record = record
        self.problems: list[str] = []
        self._manifests: dict[str, Manifest | None] = {}
        try:
            self.config = Config.model_validate(record.config)
        except ValidationError as error:
            raise ArtifactError(
                f"the record of run {record.run} holds no configuration of this program: {in_one_line(error)}"
            ) from error

    def manifest(self, slot: str) -> Manifest | None:
        """Read the manifest of a slot; None if the run has not filled it or the store has lost it."""
        if slot not in self.record.slots:
            return None
        if slot not in self._manifests:
            try:
                self._manifests[slot] = self.store.manifest(self.record.slots[slot].ref)
            except ArtifactError as error:
                self._manifests[slot] = None
                self.problem(slot, error)
        return self._manifests[slot]

    def summary(self, slot: str) -> dict[str, Any]:
        """Return a manifest's summary, empty where there is none."""
        manifest = self.manifest(slot)
        return manifest.summary if manifest else {}

    def path(self, slot: str, name: str) -> Path | None:
        """Return where a file or directory of a slot's artifact lies; files of another size are a problem."""
        manifest = self.manifest(slot)
        if manifest is None:
            return None
        try:
            directory = self.store.directory(manifest.key)
        except ArtifactError as error:
            self.problem(slot, error)
            return None
        for entry in manifest.files:
            if entry.path == name or entry.path.startswith(f"{name}/"):
                file = directory / entry.path
                if not file.is_file() or file.stat().st_size != entry.size:
                    self.problem(slot, f"{entry.path} of {manifest.key} is missing or damaged")
                    return None
        return directory / name

    def table(self, slot: str, name: str, columns: Sequence[str], *, others: bool = False) -> pa.Table | None:
        """Read the named columns of a Parquet file, with ``others`` all; None where that cannot be done."""
        path = self.path(slot, name)
        return None if path is None else self.read(slot, path, columns, others=others)

    def read(self, slot: str, path: Path, columns: Sequence[str], *, others: bool = False) -> pa.Table | None:
        """Do the same for a file below a directory that :meth:`path` gave."""
        try:
            with pq.ParquetFile(path) as file:
                if lacking := sorted(set(columns) - set(file.schema_arrow.names)):
                    self.problem(slot, f"{path.name} lacks the columns {', '.join(lacking)}")
                    return None
                return file.read(columns=None if others else list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            self.problem(slot, f"{path.name} cannot be read: {error}")
            return None

    def problem(self, slot: str, what: object) -> None:
        """Note once what the report has to do without."""
        if (line := f"{slot}: {what}") not in self.problems:
            self.problems.append(line)

    def latest(self, name: str, stage: int) -> str | None:
        """Return the slot ``name@m`` of the last stage up to this one: trajectories serve several."""
        found = (f"{name}@{m}" for m in range(stage, -1, -1) if f"{name}@{m}" in self.record.slots)
        return next(found, None)

    def stages(self, name: str = "") -> list[int]:
        """List the stages that have the slot ``name@m``, or with no name any slot of their own."""
        found = set()
        for slot in self.record.slots:
            before, at, stage = slot.partition("@")
            if at and stage != "0" and name in ("", before):
                found.add(int(stage))
        return sorted(found)


def shown_stages(stages: list[int], most: int = SHOWN_STAGES) -> list[int]:
    """Choose the stages that are shown in full: all, or the first two and the last ones."""
    return stages if len(stages) <= most else stages[:2] + stages[2 - most :]


# -- accuracy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Accuracy on one set at one point of the run, with its 95 % interval."""

    stage: int
    steps: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Accuracy on one set over the run; ``role`` is validation or test."""

    name: str
    role: str
    points: list[Measured]

    def at(self, stage: int) -> Measured | None:
        """Return what was measured after a stage (0: before the first)."""
        return next((p for p in self.points if p.stage == stage), None)

    def change(self, stage: int, since: int) -> float | None:
        """Return the change in points (hundredths) from one evaluation to another."""
        after, before = self.at(stage), self.at(since)
        return None if after is None or before is None else 100 * (after.accuracy - before.accuracy)

    def unclear(self, stage: int, since: int) -> bool:
        """Whether the two intervals overlap, so that the change may be chance."""
        after, before = self.at(stage), self.at(since)
        return bool(after and before and after.low <= before.high and before.low <= after.high)


def steps_after(artifacts: Artifacts, stage: int) -> int:
    """Return the optimizer steps of the stages up to this one."""
    planned = artifacts.config.training.steps
    return sum(int(artifacts.summary(f"policy@{m}").get("steps") or planned) for m in range(1, stage + 1))


def accuracy_curves(artifacts: Artifacts) -> list[Curve]:
    """Read accuracy by set at every evaluation there is, validation sets first."""
    data = artifacts.config.data
    curves = [Curve(name, "validation", []) for name in data.validation]
    curves += [Curve(name, "test", []) for name in data.test]
    for stage in [0, *artifacts.stages("evaluation")]:
        measured = artifacts.summary(f"evaluation@{stage}").get("accuracy", {})
        steps = steps_after(artifacts, stage)
        for curve in curves:
            if (found := measured.get(curve.name)) is not None:
                curve.points.append(Measured(stage, steps, found["accuracy"], found["low"], found["high"]))
    return [curve for curve in curves if curve.points]


def result_sentence(artifacts: Artifacts, curves: list[Curve], most: int = 3) -> str | None:
    """Say in one sentence what the run did to the validation sets; None before stage 1 is evaluated."""
    done = [c for c in curves if c.role == "validation" and len(c.points) > 1]
    if not done:
        return None
    parts = []
    for curve in done[:most]:
        first, last = curve.points[0], curve.points[-1]
        change = 100 * (last.accuracy - first.accuracy)
        parts.append(f"{curve.name}: {first.accuracy:.2f} → {last.accuracy:.2f} ({signed(change, 0)} points)")
    if len(done) > most:
        parts.append(f"{len(done) - most} more sets below")
    stage = done[0].points[-1].stage
    summaries = [artifacts.summary(f"selection@{m}") for m in range(1, stage + 1)]
    sizes = [s["selected"] for s in summaries if "selected" in s]
    pool = artifacts.summary("prompts/pool").get("prompts")
    if not sizes or pool is None:
        return f"{'; '.join(parts)} after {steps_after(artifacts, stage)} steps"
    counts = f"{len(sizes)} × {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes[:6]))
    more = " + …" if len(set(sizes)) > 1 and len(sizes) > 6 else ""
    return (
        f"{'; '.join(parts)} after {steps_after(artifacts, stage)} steps on {counts}{more} of {pool} prompts"
    )


def signed(value: float, digits: int) -> str:
    """Write a change with its sign, a real minus, and no sign on a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text


# -- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """One stage's training: its counts, and its metrics by optimizer step (None where a step had none)."""

    stage: int
    summary: dict[str, Any]
    seconds: float
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)


def trained_stages(artifacts: Artifacts) -> list[Trained]:
    """Read every stage's training; steps count on from stage to stage."""
    trained = []
    for stage in artifacts.stages("policy"):
        manifest = artifacts.manifest(f"policy@{stage}")
        if manifest is None:
            continue
        found = Trained(stage, manifest.summary, manifest.seconds)
        if manifest.step == "training":  # a pinned checkpoint made elsewhere has no metrics
            before = steps_after(artifacts, stage - 1)
            table = artifacts.table(f"policy@{stage}", METRICS_FILE, ["step", *DRAWN_METRICS])
            if table is not None:
                found.steps.extend(before + step for step in table["step"].to_pylist())
                found.metrics.update({name: table[name].to_pylist() for name in DRAWN_METRICS})
        trained.append(found)
    return trained


def stage_seconds(artifacts: Artifacts, stage: int) -> float:
    """Sum the computing time of a stage's steps, whenever they were computed."""
    slots = [s for s in artifacts.record.slots if s.endswith(f"@{stage}")]
    return sum(manifest.seconds for s in slots if (manifest := artifacts.manifest(s)) is not None)
