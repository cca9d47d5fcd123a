"""What is finished of a study, for the benchmarks that compare it and run nothing.

done = finished_study(__doc__, "acceleration")
done.write(figures)             # benchmarks/results/acceleration.json, and on the terminal
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine, write_figures

from cropi_core.artifacts.store import Store
from cropi_core.study.measure import Curve
from cropi_core.study.plan import cells, load_study
from data_schemas import Study
from flows.study.command import read_curves

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class FinishedStudy:
    """A study and its finished curricula.

    Attributes:
        study: The study.
        curves: Its finished curricula, at least one.
        planned: Number of its curricula.
        json: File of the figures.
    """

    study: Study
    curves: list[Curve]
    planned: int
    json: Path

    def write(self, figures: Mapping[str, Any]) -> None:
        """Write and print the figures, after the number of curricula and before the machine."""
        counts = {"study": self.study.name, "curricula": {"planned": self.planned, "done": len(self.curves)}}
        found = counts | dict(figures) | {"machine": machine()}
        write_figures(found, self.json)
        print(json.dumps(found, indent=1))


def finished_study(description: str | None, name: str) -> FinishedStudy:
    """Read the study that the command line names.

    Args:
        description: Docstring of the benchmark.
        name: Default study, and name of its file of figures.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="root that the study was run under")
    parser.add_argument("--study", default=name)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    given = parser.parse_args()
    study = load_study(given.study)
    planned = cells(study)
    curves = read_curves(study, planned, Store(given.root))
    if not curves:
        sys.exit(f"nothing of study {study.name} is finished under {given.root}")
    return FinishedStudy(study, curves, len(planned), given.json)
