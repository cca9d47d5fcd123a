"""Read a run by its id, for notebooks and scripts.

    run = Run("demo-0123abcd", root="runs")
    run["scores@1"].table()         # a pyarrow table
    run["scores@1"].path            # the artifact's directory
    run.accuracy()                  # accuracy by set and stage, with 95 % intervals

Reading imports neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.artifacts import Store
from cropi_core.errors import ArtifactError, foreign_errors
from cropi_core.runs.accuracy import Accuracy, Detail, accuracies, details
from cropi_core.runs.records import load_run, slot_ref
from cropi_core.runs.summary import RunSummary, stage_of, summarise
from data_schemas import ArtifactRef, Manifest, RunRecord


class Run(Mapping[str, "RunArtifact"]):
    """A run, as a mapping from slot (``scores@1``) to the artifact that the run used there.

    Args:
        run: Id of the run, as `cropi runs` lists it.
        root: Directory or address of the store.

    Raises:
        ArtifactError: The run does not exist, or its record cannot be read.
    """

    def __init__(self, run: str, root: str | Path = "runs") -> None:
        self.store = Store(root)
        self.record: RunRecord = load_run(self.store, run)

    def __getitem__(self, slot: str) -> "RunArtifact":
        if slot not in self.record.slots:
            raise KeyError(slot)
        return RunArtifact(self.store, slot, slot_ref(self.record, slot))

    def __iter__(self) -> Iterator[str]:
        return iter(self.record.slots)

    def __len__(self) -> int:
        return len(self.record.slots)

    def __repr__(self) -> str:
        return f"Run({self.record.run!r}, {self.store.url!r}, {self.record.status}, {len(self)} artifacts)"

    def accuracy(self) -> list[Accuracy]:
        """Return the accuracy of every set at every evaluation so far, in the order of the stages.

        Raises:
            ArtifactError: The manifest of an evaluation cannot be read.
        """
        return [row for stage, found in self._evaluations() for row in accuracies(found, stage, self._tests)]

    def details(self) -> list[Detail]:
        """Return accuracy by source and level, and pass@k, of every evaluation so far, in the order of the stages.

        The list is empty for evaluations that were stored before these figures were part of their summary.

        Raises:
            ArtifactError: The manifest of an evaluation cannot be read.
        """
        return [row for stage, found in self._evaluations() for row in details(found, stage, self._tests)]

    @property
    def _tests(self) -> Mapping[str, Any]:
        return self.record.config["data"].get("test", {})

    def _evaluations(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Read the summaries of the evaluations by stage."""
        stages = sorted(stage_of(slot) for slot in self if slot.startswith("evaluation@"))
        return [(stage, self[f"evaluation@{stage}"].manifest.summary) for stage in stages]

    def summary(self) -> RunSummary:
        """Summarise the run.

        Raises:
            ArtifactError: A manifest that the run names cannot be read.
        """
        return summarise(self.record, self.store.manifest)


class RunArtifact:
    """One artifact of a run: its manifest, its directory and its Parquet tables."""

    def __init__(self, store: Store, slot: str, ref: ArtifactRef) -> None:
        self.store = store
        self.slot = slot
        self.ref = ref

    def __repr__(self) -> str:
        return f"RunArtifact({self.slot!r}, {self.ref.key!r})"

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            ArtifactError: The store no longer has the artifact, or its manifest cannot be read.
        """
        return self.store.manifest(self.ref)

    @cached_property
    def path(self) -> Path:
        """The artifact's directory; an artifact in an object store is downloaded first."""
        return self.store.directory(self.ref)

    def table(self, name: str | None = None) -> pa.Table:
        """Read a Parquet file of the artifact, or all parts of a directory of Parquet files.

        Args:
            name: File or directory inside the artifact; optional if the artifact has only one table.

        Raises:
            ArtifactError: The table does not exist or cannot be read, or there are several and ``name`` is missing.
        """
        files = [entry.path for entry in self.manifest.files if entry.path.endswith(".parquet")]
        tables = sorted({path.split("/")[0] for path in files})
        if name is None and len(tables) == 1:
            name = tables[0]
        parts = sorted(path for path in files if name and (path == name or path.startswith(f"{name}/")))
        if not parts:
            raise ArtifactError(
                f"{self.slot} ({self.ref.key}) has no table {name!r}. It has: {', '.join(tables) or 'none'}."
                if name
                else f"{self.slot} ({self.ref.key}) has {len(tables)} tables: {', '.join(tables) or 'none'}. "
                "Name one: table(NAME)."
            )
        with foreign_errors(
            f"{self.slot} ({self.ref.key}): {name} cannot be read",
            ArtifactError,
            f"Check the artifact: cropi artifacts verify {self.ref.key}",
        ):
            return pa.concat_tables([pq.read_table(self.path / part) for part in parts])
