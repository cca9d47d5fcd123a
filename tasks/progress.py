"""Progress of a long step as a bar in Prefect's UI, cheap enough to forget about."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from cropi_core.progress import Progress, Report

FIRST_S = 5.0
"""A step that is over sooner gets no bar: one costs a request, and most steps are short."""
EVERY_S = 5.0

log = logging.getLogger("cropi_core.flows")


@contextmanager
def in_the_ui(slot: str, report: Report) -> Iterator[Report]:
    """Pass progress on to ``report`` and, now and then, to a progress artifact of the running task."""
    bar = _Bar(slot)

    def both(progress: Progress) -> None:
        report(progress)
        bar.show(progress)

    yield both
    bar.finish()


class _Bar:
    """One progress artifact: made at the first report after ``FIRST_S``, moved at most every ``EVERY_S``."""

    def __init__(self, slot: str) -> None:
        self.slot = slot
        self.due = time.monotonic() + FIRST_S
        self.artifact: UUID | None = None

    def show(self, progress: Progress) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + EVERY_S
        self._put(100.0 * progress.done / max(progress.total, 1))

    def finish(self) -> None:
        if self.artifact is not None:
            self._put(100.0)

    def _put(self, percent: float) -> None:
        try:
            if self.artifact is None:
                artifact = create_progress_artifact(percent, description=self.slot)
                self.artifact = artifact if isinstance(artifact, UUID) else None
            else:
                update_progress_artifact(self.artifact, percent)
        except Exception as error:  # hours of work are not stopped by a server that is away for a moment
            log.warning("%s: its progress bar could not be moved: %s", self.slot, error)
            self.due = time.monotonic() + 60.0
