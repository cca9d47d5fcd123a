"""Read and write run records, one JSON file per run in ``<root>/runs`` with its artifacts by slot; traverse lineage."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath

from pydantic import ValidationError

from cropi_core.artifacts import Store, is_locked, parse_json, shared_lock
from cropi_core.errors import ArtifactError, in_one_line
from cropi_core.system import masked_values
from data_schemas import SCHEMA_VERSION, ArtifactRef, Config, Manifest, RunRecord, Slot, canonical_json

STATES = {
    "running": "Running",
    "waiting": "Suspended",
    "done": "Completed",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "crashed": "Crashed",
}
"""Prefect's word for each status of a record."""


def run_id(config: Config) -> str:
    """Derive a run's id from its configuration: the same configuration is the same run, which resumes."""
    settings = {name: value for name, value in config.for_key().items() if name != "runtime"}
    return f"{config.name}-{hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:8]}"


def now() -> str:
    """Return the time in UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run(config: Config) -> RunRecord:
    """Create the record of a run."""
    return RunRecord(run=run_id(config), config=config.model_dump(mode="json"), started=now())


def save_run(store: Store, record: RunRecord) -> None:
    """Write a run's record, with secrets removed from its error."""
    masked = {"error": masked_values(record.error), "notes": masked_values(record.notes)}
    store.write(f"runs/{record.run}.json", record.model_copy(update=masked).model_dump_json(indent=1))


def load_run(store: Store, run: str) -> RunRecord:
    """Read a run's record by its id.

    Raises:
        ArtifactError: The run does not exist, or its record cannot be read.
    """
    path = f"{store.url}/runs/{run}.json"
    text = store.read(f"runs/{run}.json") if run == PurePosixPath(run).name and "\0" not in run else None
    if text is None:
        raise ArtifactError(
            f"no run {run!r} under {store.url}; there are: {', '.join(list_runs(store)) or 'none'}"
        )
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not valid JSON ({error}). Move it away: the run writes a new record when it is started again"
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}")
    try:
        record = RunRecord.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a run record: {in_one_line(error)}") from error
    if record.run != run:  # new records are written under this name
        raise ArtifactError(
            f"{path} is the record of another run, {record.run!r}; give it the name of its run"
        )
    return record


def remove_run(store: Store, run: str) -> None:
    """Remove a run's record, report and note; its artifacts stay until they are collected.

    Raises:
        ArtifactError: The run does not exist, or its record cannot be read.
    """
    load_run(store, run)
    for ending in ("html", "note", "now", "json"):
        store.remove(f"runs/{run}.{ending}")


@contextlib.contextmanager
def run_lock(store: Store, run: str) -> Iterator[None]:
    """Mark a run as in progress while the block runs; the kernel removes the mark when the process dies."""
    store.make_root()
    with shared_lock(store.root, _mark(run)):
        yield


def state_name(store: Store, record: RunRecord) -> str:
    """Name the state of a run with Prefect's word.

    A run whose record says that it is in progress, and that no process on this root holds, is Crashed. At an address,
    the process may be on another machine, so the record counts.
    """
    lost = record.status == "running" and store.remote is None and in_progress(store, record.run) is False
    return "Crashed" if lost else STATES[record.status]


def in_progress(store: Store, run: str) -> bool | None:
    """Return whether a process of this machine holds the run; None if none ever did."""
    return is_locked(store.root, _mark(run))


def _mark(run: str) -> str:
    return f".work/run-{run}.lock"


def list_runs(store: Store) -> list[str]:
    """List run ids, the oldest record first."""
    return [name.removesuffix(".json") for name in store.names("runs") if name.endswith(".json")]


def ancestors(store: Store, *keys: str, complete: bool = False) -> list[Manifest]:
    """List artifacts and their direct and indirect inputs, each once, the given artifacts first.

    Args:
        store: Store of the artifacts.
        keys: The artifacts.
        complete: Refuse inputs that no longer exist; otherwise they are dropped, together with the artifacts that only
            they name.

    Raises:
        ArtifactError: An artifact does not exist or cannot be read.
    """
    manifests = {key: store.manifest(key) for key in keys}
    queue = list(manifests)
    while queue:
        for ref in manifests[queue.pop(0)].inputs.values():
            if ref.key not in manifests and (complete or store.has(ref)):
                manifests[ref.key] = store.manifest(ref)
                queue.append(ref.key)
    return list(manifests.values())


def descendants(store: Store, key: str) -> list[Manifest]:
    """List an artifact and everything made from it, each once, the artifact first."""
    manifests = {}
    for one in store.keys():  # noqa: SIM118 - a Store is not a mapping
        with contextlib.suppress(ArtifactError):  # the inputs of a damaged artifact are unknown
            manifests[one] = store.manifest(one)
    reached, queue = {}, [key]
    while queue:
        current = queue.pop(0)
        if current in reached:
            continue
        reached[current] = manifests.get(current) or store.manifest(current)
        queue += [k for k, m in manifests.items() if any(ref.key == current for ref in m.inputs.values())]
    return list(reached.values())


def unnamed(store: Store, ignoring: Collection[str] = ()) -> list[str]:
    """List the artifacts that may be collected: those that no run or tag refers to, directly or through lineage.

    Args:
        store: Store of the artifacts.
        ignoring: Runs whose artifacts are not kept for them.
    """
    named = set(store.tags().values())
    for run in [run for run in list_runs(store) if run not in ignoring]:
        named |= {slot.ref.key for slot in load_run(store, run).slots.values()}
    kept: set[str] = set()
    for key in named:
        if store.has(key):
            kept |= {m.key for m in ancestors(store, key)}
    return [key for key in store.keys() if key not in kept]  # noqa: SIM118


@dataclass(frozen=True)
class Use:
    """The use of an artifact by a run, at a slot; ``set`` is the slot's set of prompts, empty if it has none."""

    run: str
    slot: str
    set: str


def uses(store: Store) -> dict[str, list[Use]]:
    """Return the uses of each artifact by its key, the oldest record first; runs with damaged records are skipped."""
    uses_by_key: dict[str, list[Use]] = {}
    for run in list_runs(store):
        with contextlib.suppress(ArtifactError):
            for name, slot in load_run(store, run).slots.items():
                uses_by_key.setdefault(slot.ref.key, []).append(Use(run, name, Slot.parse(name).set))
    return uses_by_key


def slot_ref(record: RunRecord, slot: str) -> ArtifactRef:
    """Return the reference of the artifact that a run used at ``slot``.

    Raises:
        ArtifactError: The run has no such slot yet.
    """
    if slot not in record.slots:
        raise ArtifactError(f"run {record.run} has no {slot!r}; it has: {', '.join(record.slots)}")
    return record.slots[slot].ref


def resolve_key(store: Store, name: str) -> str:
    """Resolve a key, the beginning of one, a tag, or ``RUN:slot`` such as ``demo-1a2b3c4d:scores@1`` to a key.

    Raises:
        ArtifactError: The artifact, run or slot does not exist, or several keys begin so.
    """
    run, colon, slot = name.partition(":")
    if colon and name not in store.tags():
        return slot_ref(load_run(store, run), slot).key
    return store.resolve(name)
