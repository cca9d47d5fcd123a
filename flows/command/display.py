"""Terminal display of a run: live progress, one line per step, and the tables at its end.

Progress goes to standard error and results go to standard output, so that each can be redirected. Without a terminal,
progress is printed as plain lines, at most one per step every ``PLAIN_EVERY_S``.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.progress import Task as Bar
from rich.table import Table
from rich.text import Text

from cropi_core.curriculum import StepResult
from cropi_core.diagnostics import check_grid
from cropi_core.errors import ConfigError
from cropi_core.progress import Progress
from cropi_core.runs import RunSummary, accuracy_grid, cost_grid, seconds_by_step
from cropi_core.system import shown
from flows.command.summary import SHOWN_CHECKS, selection_grid

PLAIN_EVERY_S = 10.0


class _Seconds(ProgressColumn):
    """Progress column: the seconds a step took, or a note that its artifact already existed."""

    def render(self, task: Bar) -> Text:
        if task.fields.get("cached"):
            return Text("cached", style="dim")
        return Text(f"{(task.finished_time if task.finished else task.elapsed) or 0.0:6.1f} s")


class LiveWatcher:
    """Shows progress as bars in a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            _Seconds(),
            console=Console(file=stream),
            refresh_per_second=4,
        )
        self.rows: dict[str, Any] = {}

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which the bars are drawn."""
        return self.bars

    def started(self, slot: str) -> None:
        """Add a bar for the step."""
        self.rows[slot] = self.bars.add_task(slot, total=None, note="", cached=False)

    def moved(self, slot: str, progress: Progress) -> None:
        """Update the step's bar."""
        note = f"{progress.unit}  {progress.note}".strip()
        self.bars.update(self.rows[slot], completed=progress.done, total=progress.total, note=shown(note))

    def finished(self, slot: str, result: StepResult) -> None:
        """Complete the step's bar."""
        row = self.rows[slot]
        total = self.bars.tasks[self.bars.task_ids.index(row)].total or 1
        self.bars.update(row, completed=total, total=total, cached=result.cached)

    def ask(self, question: str) -> str:
        """Ask a question below the bars, which are paused meanwhile."""
        self.bars.stop()
        try:
            return read_answer(question)
        finally:
            self.bars.start()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(escape(shown(text)))


class PlainWatcher:
    """Prints progress lines for a log or a pipe; prints none if quiet."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self.stream, self.quiet = stream, quiet
        self.due = 0.0

    def context(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def started(self, slot: str) -> None:
        """Print nothing; the first progress report prints a line."""
        self.due = time.monotonic() + PLAIN_EVERY_S

    def moved(self, slot: str, progress: Progress) -> None:
        """Print a progress line, unless the previous one is too recent."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + PLAIN_EVERY_S
            self.note(f"{slot}  {progress.done}/{progress.total} {progress.unit}  {progress.note}".rstrip())

    def finished(self, slot: str, result: StepResult) -> None:
        """Print the step's result."""
        self.note(f"{slot}  {'cached' if result.cached else f'{result.seconds:.1f} s'}")

    def ask(self, question: str) -> str:
        """Ask a question, even if quiet."""
        return read_answer(question)

    def note(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            print(shown(text), file=self.stream, flush=True)


def read_answer(question: str) -> str:
    """Print a question to standard error and read a line from standard input.

    Raises:
        ConfigError: Standard input has ended.
    """
    print(shown(question), end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise ConfigError("standard input ended before --approve was answered; the same command asks again")
    return line


def watcher(*, quiet: bool, stream: TextIO | None = None) -> LiveWatcher | PlainWatcher:
    """Choose a watcher: bars if the stream is a terminal, otherwise plain lines."""
    out = stream or sys.stderr
    return LiveWatcher(out) if out.isatty() and not quiet else PlainWatcher(out, quiet=quiet)


def show_summary(summary: RunSummary, stream: TextIO | None = None) -> None:
    """Print the summary of a run."""
    out = stream or sys.stdout
    console = Console(file=out, width=None if out.isatty() else 200)
    for title, (header, rows) in (
        ("Accuracy (95 % interval)", accuracy_grid(summary.accuracy)),
        ("Prompts trained on, by source", selection_grid(summary)),
        ("Are the scores reliable?", check_grid(summary.checks[-SHOWN_CHECKS:])),
        ("Cost by purpose", cost_grid(summary.slots)),
    ):
        if rows:
            console.print(_table(title, header, rows))
    steps = [
        [step, f"{spent:.1f}", f"{made:.1f}"] for step, (made, spent) in seconds_by_step(summary).items()
    ]
    console.print(_table("Seconds", ["step", "now", "when made"], steps))
    for note in summary.notes:
        console.print(escape(shown(note)))


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(
            escape(shown(name)), justify="left" if index == 0 or name == "use" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*[escape(shown(cell)) for cell in row])
    return table
