"""Lines of the Logs tab: what each step did, one line a step, in place of Prefect's "Finished in state Completed()".

rollouts/pool@1: 1160 prompts, 9280 completions, mean reward 0.445; computed in 12 s, rollouts-v1-0123456789abcdef
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from cropi_core.curriculum import StepResult
from cropi_core.formatting import duration, percent, significant
from cropi_core.progress import Progress
from cropi_core.runs import accuracies
from data_schemas import StepName, StepSpec
from tasks.ui import plain

EVERY_S = 30.0
"""Shortest time between two lines about the progress of a training."""
MOST_SETS = 8
COUNTED: dict[StepName, tuple[str, ...]] = {
    "prompts": ("prompts",),
    "policy": ("parameters",),
    "rollouts": ("prompts", "completions", "not_gradable"),
    "gradients": ("prompts", "tokens"),
    "scores": ("prompts", "scored"),
    "diagnostics": ("prompts",),
    "selection": ("selected", "pool"),
    "training": ("steps", "prompts", "completions", "not_gradable"),
    "evaluation": ("completions",),
}
"""Counts of a step's summary that its line names; a count of 0 that is not gradable is omitted."""
MEASURED = {
    "mean_reward": "mean reward",
    "first_quarter_reward": "reward in the first quarter",
    "last_quarter_reward": "in the last",
    "spearman": "rank correlation",
}
"""Measured values of a summary, and their names in the line."""


def step_line(spec: StepSpec, result: StepResult, summary: Mapping[str, Any]) -> str:
    """Describe a finished step: counts, measured values, whether its artifact was found or computed, and its key."""
    facts = [
        f"{significant(summary[name], 9)} {name.replace('_', ' ')}"
        for name in COUNTED[spec.step]
        if summary.get(name) is not None and not (name == "not_gradable" and not summary[name])
    ]
    if spec.step == "gradients":
        facts += [f"{count} {name.replace('_', ' ')}" for name, count in summary["status"].items() if count]
    facts += [
        f"{words} {significant(summary[name])}"
        for name, words in MEASURED.items()
        if summary.get(name) is not None
    ]
    if spec.step == "evaluation":
        rows = accuracies(summary, 0)
        facts += [f"{plain(row.set)} {percent(row.accuracy)}" for row in rows[:MOST_SETS]]
        facts += [f"{len(rows) - MOST_SETS} more sets"] if len(rows) > MOST_SETS else []
    origin = "found" if result.cached else f"computed in {duration(result.seconds)}"
    parts = [", ".join(facts), f"{origin}, {result.ref.key}"]
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
            line = f"{self.slot}: {progress.unit} {progress.done} of {progress.total}  {progress.note}"
            self.log.info("%s", line.rstrip())


class _WithoutCompleted(logging.Filter):
    """Drops Prefect's line that a task run has completed; the line of :func:`step_line` says what it did."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every other record."""
        return record.levelno > logging.INFO or not str(record.msg).startswith("Finished in state ")


_WITHOUT_COMPLETED = _WithoutCompleted()


def drop_completed() -> None:
    """Keep the lines "Finished in state Completed()" of task runs out of the log; failures stay."""
    logging.getLogger("prefect.task_runs").addFilter(_WITHOUT_COMPLETED)  # a second call adds nothing
