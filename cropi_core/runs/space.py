"""Measure the space of runs, and choose the runs that a rule of retention removes.

    for space in run_spaces(Store(".cropi")):
        space.run, space.kinds, space.alone
    expired(records, keep=10)

A run refers to its artifacts and, through their lineage, to everything that these were made from. Removing a run
removes its record and its report. Its artifacts stay until they are collected, because other runs may use them.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from cropi_core.artifacts import Store
from cropi_core.errors import ArtifactError
from cropi_core.runs.records import list_runs, load_run, state_name
from data_schemas import Manifest, RunRecord

UNSUCCESSFUL = ("Failed", "Cancelled", "Crashed")
ENDED = ("Completed", *UNSUCCESSFUL)
"""States of runs that a rule of retention may remove; it never removes a run in progress or one that waits."""


@dataclass(frozen=True)
class RunSpace:
    """The space of a run's artifacts, in bytes.

    Attributes:
        run: Id of the run.
        kinds: Bytes by kind of the artifacts that the run refers to.
        alone: Bytes of those that no other run and no tag refers to.
    """

    run: str
    kinds: dict[str, int]
    alone: int

    @property
    def total(self) -> int:
        """Bytes of all artifacts that the run refers to."""
        return sum(self.kinds.values())


class Lineage:
    """Manifests of a store, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._manifests: dict[str, Manifest | None] = {}

    def manifest(self, key: str) -> Manifest | None:
        """Read a manifest; None if it does not exist or is damaged."""
        if key not in self._manifests:
            self._manifests[key] = None
            with contextlib.suppress(ArtifactError):
                self._manifests[key] = self.store.manifest(key)
        return self._manifests[key]

    def with_inputs(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """Return the artifacts with these keys and everything that they were made from, by key."""
        manifests: dict[str, Manifest] = {}
        queue = list(keys)
        while queue:
            key = queue.pop()
            if key not in manifests and (manifest := self.manifest(key)) is not None:
                manifests[key] = manifest
                queue += [ref.key for ref in manifest.inputs.values()]
        return manifests


def size_of(manifest: Manifest) -> int:
    """Return the bytes of an artifact's files."""
    return sum(entry.size for entry in manifest.files)


def run_spaces(store: Store) -> list[RunSpace]:
    """Measure the space of every run whose record can be read, the oldest record first."""
    lineage = Lineage(store)
    reached: dict[str, dict[str, Manifest]] = {}
    for run in list_runs(store):
        with contextlib.suppress(ArtifactError):
            slots = load_run(store, run).slots.values()
            reached[run] = lineage.with_inputs(slot.ref.key for slot in slots)
    uses = Counter(key for manifests in reached.values() for key in manifests)
    uses.update(lineage.with_inputs(store.tags().values()).keys())
    spaces = []
    for run, manifests in reached.items():
        kinds: Counter[str] = Counter()
        for manifest in manifests.values():
            kinds[manifest.kind] += size_of(manifest)
        alone = sum(size_of(manifest) for key, manifest in manifests.items() if uses[key] == 1)
        spaces.append(RunSpace(run, dict(kinds), alone))
    return spaces


def expired(
    records: Sequence[RunRecord],
    *,
    ended_before: datetime | None = None,
    keep: int = 0,
) -> list[str]:
    """Choose the runs that a rule of retention removes, the oldest first.

    Args:
        records: Records of runs that have ended.
        ended_before: Only runs that ended before this time.
        keep: Number of these runs to keep: the ones that ended last.
    """
    ended = sorted((_end(record), record.run) for record in records)
    beyond = ended[: max(0, len(ended) - keep)]
    return [run for end, run in beyond if ended_before is None or end < ended_before]


def unsuccessful(store: Store) -> list[str]:
    """List the failed, cancelled and crashed runs.

    Raises:
        ArtifactError: The record of a run cannot be read.
    """
    records = [load_run(store, run) for run in list_runs(store)]
    return [record.run for record in records if state_name(store, record) in UNSUCCESSFUL]


def _end(record: RunRecord) -> datetime:
    """Return when a run ended; a run without an end is as old as its start."""
    return datetime.fromisoformat(record.finished or record.started)
