"""What a run does now: the step in progress, and how far it is, in small files that any process can read.

``runs/RUN.now`` names the step in progress and its artifact; ``progress/KEY.json`` has the progress of that artifact's
computation, with the metrics of the last training steps. Both are removed when the work ends, and hold nothing that a
result depends on: work never fails because they cannot be written. At an address they are objects, written less often.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import Field, ValidationError

from cropi_core.artifacts import Store, parse_json
from cropi_core.errors import ArtifactError
from cropi_core.formatting import significant
from cropi_core.progress import Progress, Report
from cropi_core.runs.records import now
from data_schemas import Record

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)

EVERY_S = 1.0
EVERY_REMOTE_S = 10.0
"""Shortest time between two writes of progress, in a directory and at an address."""
MOST_ROWS = 200
"""Training steps whose metrics a file of progress has, the last ones."""
LIVE_METRICS = {
    "loss": "loss",
    "reward": "reward",
    "kl": "KL",
    "completion_length": "tokens a completion",
    "entropy": "entropy",
    "clip_ratio": "clipped",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""Metrics of a training step that are shown while it trains, and their names."""


class CurrentStep(Record):
    """The step that a run executes now."""

    slot: str = Field(max_length=1000)
    key: str = Field(max_length=200)
    since: str = Field(max_length=40, description="UTC, ISO 8601.")


class StepProgress(Record):
    """The progress of a computation."""

    at: str = Field(max_length=40, description="UTC, ISO 8601.")
    done: int
    total: int
    unit: str = Field(max_length=1000)
    note: str = Field(max_length=2000)
    rows: list[dict[str, float]] = Field(
        max_length=MOST_ROWS, description="Metrics of the last training steps, each with its `step`."
    )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Write the metrics of a training step: ``loss 0.0123, reward 0.41, KL 0.002, tokens a completion 143``."""
    return ", ".join(
        f"{name} {significant(metrics[key])}" for key, name in LIVE_METRICS.items() if key in metrics
    )


def progress_text(progress: Progress) -> str:
    """Write progress in one line: ``step 3 of 40  loss 0.0123, reward 0.41``; metrics in place of the note."""
    told = metrics_text(progress.metrics) or progress.note
    return f"{progress.unit} {progress.done} of {progress.total}  {told}".rstrip()


def write_current(store: Store, run: str, slot: str, key: str) -> None:
    """Say which step a run executes now."""
    with _unimportant(f"runs/{run}.now"):
        store.write(f"runs/{run}.now", CurrentStep(slot=slot, key=key, since=now()).model_dump_json())


def remove_current(store: Store, run: str) -> None:
    """Say that a run executes no step."""
    with _unimportant(f"runs/{run}.now"):
        store.remove(f"runs/{run}.now")


def read_current(store: Store, run: str) -> CurrentStep | None:
    """Return the step that a run executes now; None if it executes none, or has not said so."""
    return _read(store, f"runs/{run}.now", CurrentStep)


def read_progress(store: Store, key: str) -> StepProgress | None:
    """Return the progress of an artifact's computation; None if no process computes it, or it has just begun."""
    return _read(store, f"progress/{key}.json", StepProgress)


def _read(store: Store, name: str, kind: type[R]) -> R | None:
    """Read one of the files; what cannot be read counts as missing."""
    try:
        text = store.read(name)
        return None if text is None else kind.model_validate(parse_json(text))
    except (ArtifactError, OSError, ValueError, ValidationError):
        return None


class ProgressFile:
    """Passes progress on, and keeps it in a file for other processes, at limited frequency.

    Args:
        store: Store with the file.
        key: Key of the artifact that is computed.
        report: Receives all progress.
    """

    def __init__(self, store: Store, key: str, report: Report) -> None:
        self.store, self.name, self.report = store, f"progress/{key}.json", report
        self.every_s = EVERY_S if store.remote is None else EVERY_REMOTE_S
        self.due = time.monotonic() + min(EVERY_S, self.every_s)  # most steps are shorter, and write nothing
        self.rows: deque[dict[str, float]] = deque(maxlen=MOST_ROWS)
        self.written = False

    def __call__(self, progress: Progress) -> None:
        """Report progress."""
        self.report(progress)
        metrics = {name: float(v) for name, v in progress.metrics.items() if name in LIVE_METRICS}
        if kept := {name: value for name, value in metrics.items() if math.isfinite(value)}:
            self.rows.append({"step": float(progress.done), **kept})
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + self.every_s
        text = StepProgress(
            at=now(),
            done=progress.done,
            total=progress.total,
            unit=progress.unit[:1000],
            note=progress.note[:2000],
            rows=list(self.rows),
        ).model_dump_json()
        self.written = True
        with _unimportant(self.name):
            self.store.write(self.name, text)
            return
        self.due = time.monotonic() + 60.0

    def close(self) -> None:
        """Remove the file; in a directory also that of a process which was killed."""
        if self.written or self.store.remote is None:
            with _unimportant(self.name):
                self.store.remove(self.name)


@contextlib.contextmanager
def kept_progress(store: Store, key: str, report: Report) -> Iterator[Report]:
    """Keep the progress of a computation in a file while the block runs; see :class:`ProgressFile`."""
    file = ProgressFile(store, key, report)
    try:
        yield file
    finally:
        file.close()


@contextlib.contextmanager
def _unimportant(name: str) -> Iterator[None]:
    """Log that a file cannot be written; hours of work must not end for it."""
    try:
        yield
    except (ArtifactError, OSError, ValueError) as error:
        log.warning(
            "%s could not be written or removed, so no other process sees the progress: %s", name, error
        )
