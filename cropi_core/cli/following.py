"""``cropi runs follow``: a live view of a run, or one line per event where the output is not a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Root, say
from cropi_core.system import shown
from cropi_core.visible import json_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cropi_core.runs import Event, Follower

EXITS = {"Completed": 0, "Failed": 1, "Cancelled": 3, "Crashed": 4}
"""Exit code by the state in which a run ended."""
ROWS = 12
"""Training steps of the live view, the last ones."""
BAR = 30


def follow(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, as `cropi runs` lists it.")],
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show a run as it goes: artifacts, the metrics of each training step, its end; Ctrl-C leaves the run alone.

    Exit code: 0 Completed, 1 Failed, 3 Cancelled, 4 Crashed. The run may be of another process, and of another machine
    at an address. With --json, one object a line.
    """
    from cropi_core.artifacts import Store
    from cropi_core.runs import follow as events_of

    live = sys.stdout.isatty() and not as_json
    state = ""
    with _view(live) as show:
        for follower, events in events_of(Store(root), run):
            show(follower, events, as_json)
            state = follower.state
    raise typer.Exit(EXITS[state])


@contextmanager
def _view(live: bool) -> Iterator[Any]:
    """Return the function that shows events, and below them the step in progress if the output is a terminal."""
    if not live:
        yield _print
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, transient=True) as display:

        def show(follower: "Follower", events: "list[Event]", as_json: bool) -> None:
            for event in events:
                if event.what not in ("metrics", "progress", "step"):  # these are below
                    display.console.print(Text(shown(event.text)))
            display.update(screen(follower), refresh=True)

        yield show


def _print(follower: "Follower", events: "list[Event]", as_json: bool) -> None:
    for event in events:
        if as_json:
            typer.echo(" ".join(json_text(event.as_json()).split("\n ")).replace("\n", " "))
        else:
            say(event.text)
    sys.stdout.flush()


def screen(follower: "Follower") -> "RenderableType":
    """Return the view of the step in progress: how far it is, and a table of the last training steps."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from cropi_core.formatting import significant
    from cropi_core.runs import LIVE_METRICS

    current, progress = follower.current, follower.progress
    if current is None:
        return Text(f"{follower.state}", style="dim")
    if progress is None:
        return Text(shown(f"{current.slot}: in progress since {current.since}"))
    filled = round(BAR * min(1.0, max(0.0, progress.done / max(progress.total, 1))))
    bar = "━" * filled + "╌" * (BAR - filled)
    head = Text(
        shown(f"{current.slot}  {bar}  {progress.unit} {progress.done} of {progress.total}  {progress.note}")
    )
    names = [name for name in LIVE_METRICS if any(name in row for row in progress.rows)]
    if not names:
        return head
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", *(LIVE_METRICS[name] for name in names)):
        table.add_column(name, justify="right")
    for row in progress.rows[-ROWS:]:
        cells = [significant(row[name]) if name in row else "" for name in names]
        table.add_row(f"{row.get('step', 0.0):.0f}", *cells)
    return Group(head, table)
