"""Read the artifacts of a run that may be incomplete, for its report and for the analysis of its selections.

A run may have failed or still be running, and artifacts may have been collected since. An artifact that the record
names and the store cannot provide becomes a line in :attr:`Artifacts.problems`; readers show these lines.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cropi_core.artifacts import PROMPTS_FILE, Store, read_open_table, size_below
from cropi_core.errors import ArtifactError, in_one_line, recorded_errors
from cropi_core.runs.summary import SlotSummary, slot_summaries
from data_schemas import Config, Manifest, RunRecord


class Artifacts:
    """The artifacts of a run, by slot; an artifact that cannot be read is recorded as a problem, not raised."""

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
        """Read the manifest of a slot; None if the run has not filled it or the artifact no longer exists."""
        if slot not in self.record.slots:
            return None
        if slot not in self._manifests:
            try:
                self._manifests[slot] = self.store.manifest(self.record.slots[slot].ref)
            except ArtifactError as error:
                self._manifests[slot] = None
                self.problem(slot, error)
        return self._manifests[slot]

    def slots(self) -> list[SlotSummary]:
        """Summarise the artifacts whose manifests can be read, in the order in which the run used them."""
        manifests = {slot: m for slot in self.record.slots if (m := self.manifest(slot)) is not None}
        return slot_summaries(self.record, manifests)

    def summary(self, slot: str) -> dict[str, Any]:
        """Return a manifest's summary, empty if there is no manifest."""
        manifest = self.manifest(slot)
        return manifest.summary if manifest else {}

    def path(self, slot: str, name: str) -> Path | None:
        """Return the path of a file or directory of a slot's artifact; files of the wrong size are a problem."""
        manifest = self.manifest(slot)
        if manifest is None:
            return None
        try:
            directory = self.store.directory(manifest.key)
        except ArtifactError as error:
            self.problem(slot, error)
            return None
        for entry in manifest.files:
            matching = entry.path == name or entry.path.startswith(f"{name}/")
            if matching and size_below(directory, entry.path) != entry.size:
                self.problem(slot, f"{entry.path} of {manifest.key} is missing or damaged")
                return None
        return directory / name

    def table(self, slot: str, name: str, columns: Sequence[str], *, others: bool = False) -> pa.Table | None:
        """Read the named columns of a Parquet file, or all columns with ``others``; None if it cannot be read."""
        path = self.path(slot, name)
        return None if path is None else self.read(slot, path, columns, others=others)

    def read(self, slot: str, path: Path, columns: Sequence[str], *, others: bool = False) -> pa.Table | None:
        """Read the named columns of a file below a directory that :meth:`path` returned."""
        with self.recorded_problems(slot, f"{path.name} cannot be read"), pq.ParquetFile(path) as file:
            if lacking := sorted(set(columns) - set(file.schema_arrow.names)):
                self.problem(slot, f"{path.name} lacks the columns {', '.join(lacking)}")
                return None
            return read_open_table(file, path, None if others else columns)
        return None

    def recorded_problems(self, slot: str, what: str) -> AbstractContextManager[None]:
        """Record any exception of a block that reads a file of a slot as a problem."""
        return recorded_errors(what, partial(self.problem, slot))

    def problem(self, slot: str, what: object) -> None:
        """Record a problem once."""
        if (line := f"{slot}: {what}") not in self.problems:
            self.problems.append(line)

    def latest(self, name: str, stage: int) -> str | None:
        """Return the slot ``name@m`` of the latest stage up to this one: trajectories can serve several stages."""
        slots = (f"{name}@{m}" for m in range(stage, -1, -1) if f"{name}@{m}" in self.record.slots)
        return next(slots, None)

    def stages(self, name: str = "") -> list[int]:
        """List the stages that have the slot ``name@m``; without a name, those that have any slot."""
        numbers = set()
        for slot in self.record.slots:
            before, at, stage = slot.partition("@")
            if at and stage != "0" and name in ("", before):
                numbers.add(int(stage))
        return sorted(numbers)


@dataclass(frozen=True)
class Pool:
    """The pool's prompts, in its order."""

    ids: list[str]
    sources: list[str]
    levels: list[str]

    @property
    def has_levels(self) -> bool:
        """Whether any prompt has a level."""
        return any(self.levels)


def read_pool(artifacts: Artifacts) -> Pool | None:
    """Read the pool's ids, sources and levels; None if it does not exist."""
    table = artifacts.table("prompts/pool", PROMPTS_FILE, ["prompt_id", "source", "level"])
    if table is None:
        return None
    levels = [level or "" for level in table["level"].to_pylist()]
    return Pool(table["prompt_id"].to_pylist(), table["source"].to_pylist(), levels)
