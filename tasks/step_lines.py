"""Lines of the Logs tab: what each step did, one line a step, in place of Prefect's "Finished in state Completed()".

rollouts/pool@1: 1160 prompts, 9280 completions, mean reward 0.445; computed in 12 s, rollouts-v1-0123456789abcdef
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from cropi_core.curriculum import StepResult
from cropi_core.formatting import duration
from cropi_core.progress import Progress
from cropi_core.runs import progress_text, step_facts
from data_schemas import StepSpec

EVERY_S = 30.0
"""Shortest time between two lines about the progress of a training."""


def step_line(spec: StepSpec, result: StepResult, summary: Mapping[str, Any]) -> str:
    """Describe a finished step: counts, measured values, whether its artifact was found or computed, and its key."""
    origin = "found" if result.cached else f"computed in {duration(result.seconds)}"
    parts = [step_facts(spec.step, summary), f"{origin}, {result.ref.key}"]
    return f"{spec.slot}: {'; '.join(filter(None, parts))}"


class TrainingLines:
    """Says how far a training is, at most every ``EVERY_S``."""

    def __init__(self, slot: str, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self.slot, self.log = slot, log
        self.due = time.monotonic() + EVERY_S

    def moved(self, progress: Progress) -> None:
        """Log a line, unless the previous one is too recent."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + EVERY_S
            self.log.info("%s", f"{self.slot}: {progress_text(progress)}")


class _WithoutCompleted(logging.Filter):
    """Drops Prefect's line that a task run has completed; the line of :func:`step_line` says what it did."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every other record."""
        return record.levelno > logging.INFO or not str(record.msg).startswith("Finished in state ")


_WITHOUT_COMPLETED = _WithoutCompleted()


def drop_completed() -> None:
    """Keep the lines "Finished in state Completed()" of task runs out of the log; failures stay."""
    logging.getLogger("prefect.task_runs").addFilter(_WITHOUT_COMPLETED)  # a second call adds nothing
