"""Follow a run that another process executes: its artifacts as they come, its training steps, its end.

    for event in follow(Store("runs"), "demo-0123abcd"):
        if event: print(event.text)

Only the files of the root are read, so the run may be of another process, or of another machine if the root is an
address. The run is not touched.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cropi_core.artifacts import Store
from cropi_core.errors import ArtifactError
from cropi_core.formatting import duration
from cropi_core.progress import Progress
from cropi_core.runs.live import (
    CurrentStep,
    StepProgress,
    metrics_text,
    progress_text,
    read_current,
    read_progress,
)
from cropi_core.runs.records import load_run, state_name
from cropi_core.runs.space import ENDED
from cropi_core.runs.step_facts import step_facts
from data_schemas import RunRecord, SlotRecord

POLL_S = 1.0
POLL_REMOTE_S = 5.0
"""Seconds between two looks at a directory and at an address."""
UNREADABLE_S = 300.0
"""A root that cannot be read for so long ends the view: a server was restarted, or it is lost."""
QUIET_S = 600.0
"""After so long without news a line says so."""

What = Literal["artifact", "step", "metrics", "progress", "note", "state", "quiet"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        what: An artifact, a step that began, the metrics of a training step, other progress, a note of the run, its
            state, or a long time without news.
        text: One line about it.
        data: The values, for programs.
    """

    what: What
    text: str
    data: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


class Follower:
    """What has been seen of a run.

    Attributes:
        record: The run's record at the last look.
        state: Its state then, in Prefect's words.
        current: The step in progress.
        progress: The progress of that step.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self.record: RunRecord | None = None
        self.state = ""
        self.current: CurrentStep | None = None
        self.progress: StepProgress | None = None
        self._slots: dict[str, SlotRecord] = {}
        self._notes = 0
        self._row = 0.0

    def look(self) -> list[Event]:
        """Return what happened since the last look.

        Raises:
            ArtifactError: The run's record does not exist or cannot be read.
        """
        record = load_run(self.store, self.run)
        state = state_name(self.store, record)
        if state == "Crashed" and record.status == "running":  # it may have ended between the two
            record = load_run(self.store, self.run)
            state = state_name(self.store, record)
        if self.record is not None and record.started != self.record.started:
            self._slots, self._notes = {}, 0
        self.record = record
        events = [
            self._artifact(slot, entry) for slot, entry in record.slots.items() if self._is_new(slot, entry)
        ]
        self._slots = dict(record.slots)
        events += [Event("note", f"note: {note}", {"note": note}) for note in record.notes[self._notes :]]
        self._notes = len(record.notes)
        events += self._work() if state == "Running" else []
        if state != self.state:
            self.state = state
            events += [self._ending(record)] if state != "Running" else []
        return events

    def _is_new(self, slot: str, entry: SlotRecord) -> bool:
        return slot not in self._slots or self._slots[slot].ref != entry.ref

    def _artifact(self, slot: str, entry: SlotRecord) -> Event:
        try:
            manifest = self.store.manifest(entry.ref)
            step = manifest.kind if manifest.step == "import" else manifest.step
            facts = step_facts(step, manifest.summary)
        except ArtifactError as error:
            facts = str(error)
        origin = f"computed in {duration(entry.seconds)}" if entry.origin == "computed" else entry.origin
        text = f"{slot}: {'; '.join(filter(None, (facts, f'{origin}, {entry.ref.key}')))}"
        data = {"slot": slot, "key": entry.ref.key, "origin": entry.origin, "seconds": entry.seconds}
        return Event("artifact", text, data)

    def _work(self) -> list[Event]:
        """Return what is new about the step in progress."""
        events, current = [], read_current(self.store, self.run)
        if current is not None and self.record is not None and current.slot in self.record.slots:
            current = None  # finished; the next one has not begun
        if current != self.current:
            self.current, self.progress, self._row = current, None, 0.0
            if current is not None:
                events.append(
                    Event("step", f"{current.slot}: in progress", {"slot": current.slot, "key": current.key})
                )
        progress = read_progress(self.store, current.key) if current is not None else None
        if current is None or progress is None or progress == self.progress:
            return events
        self.progress = progress
        rows = [row for row in progress.rows if row.get("step", 0.0) > self._row]
        for row in rows:
            self._row = row["step"]
            line = f"{progress.unit} {self._row:.0f} of {progress.total}  {metrics_text(row)}"
            events.append(Event("metrics", f"{current.slot}: {line}", {"slot": current.slot} | row))
        if not progress.rows:
            told = Progress(progress.done, progress.total, progress.unit, progress.note)
            data = {
                "slot": current.slot,
                "done": progress.done,
                "total": progress.total,
                "unit": progress.unit,
            }
            events.append(Event("progress", f"{current.slot}: {progress_text(told)}", data))
        return events

    def _ending(self, record: RunRecord) -> Event:
        text = self.state if not record.error else f"{self.state}: {record.error}"
        if self.state == "Suspended":
            text += " (it continues when a person has answered)"
        return Event("state", text, {"state": self.state, "error": record.error})


def follow(
    store: Store,
    run: str,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Follower, list[Event]]]:
    """Yield what happens in a run until it has ended, and an empty list after every look without news.

    A suspended run has not ended. At an address a process of another machine that was killed looks like a slow one; a
    line says how long nothing has happened.

    Args:
        store: Store of the run.
        run: Id of the run.
        sleep: Waits between two looks.
        clock: Monotonic seconds.

    Raises:
        ArtifactError: There is no such run, or its record could not be read for :data:`UNREADABLE_S`.
    """
    follower = Follower(store, run)
    yield follower, follower.look()
    pause = POLL_S if store.remote is None else POLL_REMOTE_S
    read = changed = clock()
    while follower.state not in ENDED:
        sleep(pause)
        try:
            events = follower.look()
        except ArtifactError:
            if clock() - read > UNREADABLE_S:
                raise
            continue
        read = clock()
        if events:
            changed = read
        elif read - changed > QUIET_S and follower.state == "Running":
            changed = read
            events = [Event("quiet", f"nothing new for {duration(QUIET_S)}", {"seconds": QUIET_S})]
        yield follower, events
