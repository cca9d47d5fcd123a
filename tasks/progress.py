"""Progress bars of long steps in Prefect's UI, at negligible cost."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from cropi_core.markdown import escaped
from cropi_core.progress import Progress, Report
from cropi_core.runs import progress_text

FIRST_S = 5.0
"""Delay before the bar is created: a bar costs a request, and most steps are shorter."""
EVERY_S = 5.0

log = logging.getLogger("cropi_core.flows")


@contextmanager
def in_the_ui(slot: str, report: Report) -> Iterator[Report]:
    """Forward progress to ``report`` and, at limited frequency, to a progress artifact of the running task."""
    bar = _Bar(slot)

    def both(progress: Progress) -> None:
        report(progress)
        bar.show(progress)

    try:
        yield both
    except BaseException:
        bar.stop()
        raise
    bar.finish()


class _Bar:
    """One progress artifact, created at the first report after ``FIRST_S`` and updated at most every ``EVERY_S``."""

    def __init__(self, slot: str) -> None:
        self.slot = slot
        self.due = time.monotonic() + FIRST_S
        self.artifact: UUID | None = None
        self.percent = 0.0

    def show(self, progress: Progress) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + EVERY_S
        self.percent = 100.0 * progress.done / max(progress.total, 1)
        self._put(escaped(f"{self.slot}: {progress_text(progress)}"))

    def finish(self) -> None:
        if self.artifact is not None:
            self.percent = 100.0
            self._put(f"{self.slot}: finished")

    def stop(self) -> None:
        if self.artifact is not None:
            self._put(f"{self.slot}: stopped at {self.percent:.0f} %")

    def _put(self, text: str) -> None:
        try:
            if self.artifact is None:
                artifact = create_progress_artifact(self.percent, description=text)
                self.artifact = artifact if isinstance(artifact, UUID) else None
            else:
                update_progress_artifact(self.artifact, self.percent, description=text)
        except Exception as error:  # a server outage must not stop hours of work
            log.warning("%s: its progress bar could not be moved: %s", self.slot, error)
            self.due = time.monotonic() + 60.0
