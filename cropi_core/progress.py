"""Progress reports of long work: a callable that receives the progress of a step.

A :class:`Progress` is plain data, so that the same report can update a progress bar in a terminal, update a progress
artifact in Prefect's UI, or be one JSON line on the standard output of a subprocess.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Progress of a step: ``done`` of ``total`` ``unit``, a note such as ``reward 0.41``, metrics of a training."""

    done: int
    total: int
    unit: str
    note: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore progress."""
