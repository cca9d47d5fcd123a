"""The command `cropi plan`: predict the cost of a curriculum before it runs.

    cropi plan configs/demo.yaml -o stages=3
    cropi plan my.yaml --root /data/run --json --no-calibration

Options and output only: :mod:`cropi_core.planning.prediction` combines what :mod:`cropi_core.planning.rehearsal` lists,
:mod:`cropi_core.planning.calibration` measures and :mod:`cropi_core.planning.estimate` computes.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from cropi_core.cli.output import (
    DEFAULT_ROOT,
    AsJson,
    Overrides,
    Root,
    print_json,
    print_table,
    say,
)
from cropi_core.formatting import human_bytes

COLUMNS = ("slot", "origin", "tokens generated", "tokens passed", "seconds", "peak memory", "disk")


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a preset.")],
    root: Root = DEFAULT_ROOT,
    override: Overrides = None,
    calibration: Annotated[
        bool,
        typer.Option(
            help="Measure on a few prompts; without it only tokens and disk are known, as upper bounds."
        ),
    ] = True,
    card: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Compare the memory of each step with a GPU, such as h100-80gb."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the cost of a run: tokens, seconds, memory and disk, by step and stage."""
    from cropi_core.config import load_config
    from cropi_core.planning import predict

    settings = load_config(config, override or [])
    with tempfile.TemporaryDirectory(prefix="cropi-plan-") as folder:
        result = predict(settings, root, Path(folder), calibrated=calibration, card=card)
    if as_json:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print a plan as a table with notes."""
    rows = [*result["steps"], *result["stages"], result["totals"]]
    print_table(COLUMNS, [_cells(row) for row in rows])
    if result["device_memory"]:
        show_device(result["device_memory"])
    measured = result["calibration"]
    if measured:
        say(
            f"\nmeasured in {measured['seconds'] + measured['imports_s']:.0f} s, imports included; "
            f"peak memory is that of the {measured['memory_of']}"
        )
    for note in result["notes"]:
        say(f"- {note}")


def show_device(memory: dict[str, Any]) -> None:
    """Print the memory of each step on a GPU, whether it fits, and what to change."""
    card = memory["card"]
    where = f"{card} ({human_bytes(memory['memory_bytes'])})" if card else "no card was named"
    say(f"\nmemory on each GPU, {where}")
    rows = []
    for step in memory["steps"]:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in step["parts"].items())
        fits = {None: None, True: "yes", False: "no"}[step["fits"]]
        least = step["least_seconds"]
        rows.append(
            [step["step"], human_bytes(step["bytes"]), fits, f"{least:.0f}" if least else None, parts]
        )
    print_table(("step", "needs", "fits", "least seconds", "parts"), rows)
    for step in memory["steps"]:
        if step["fault"]:
            say(f"- {step['step']} does not fit: {step['fault']}. Change: {step['advice']}")


def _cells(row: dict[str, Any]) -> list[Any]:
    tokens = [f"{row[name]:,}" if row[name] else None for name in ("tokens_generated", "tokens_passed")]
    seconds = None if row["seconds"] is None else f"{row['seconds']:.1f}"
    sizes = [human_bytes(row[name]) if row[name] else None for name in ("peak_memory_bytes", "disk_bytes")]
    return [row["slot"], row["origin"], *tokens, seconds, *sizes]
