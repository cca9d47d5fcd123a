"""Progress of long work: a callable that is told how far a step is.

A :class:`Progress` is data, so that the same report can move a bar in a terminal, a progress artifact in
Prefect's UI, or be one JSON line on a subprocess's standard output.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a step is: ``done`` of ``total`` ``unit``, and a note such as ``reward 0.41``."""

    done: int
    total: int
    unit: str
    note: str = ""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore progress."""
