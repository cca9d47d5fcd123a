"""Baselines of a run that its store already holds: the same policy, pool and evaluated sets, without influence.

A baseline trains on a random share of the pool or on the whole pool. The run is compared with it by the mean accuracy
over the test sets (the validation sets if there is no test set), at the total cost of both: the selection has paid for
itself where the run is as accurate at a lower cost.
"""

from dataclasses import dataclass

from cropi_core.errors import ArtifactError
from cropi_core.runs import Artifacts, accuracies, list_runs, load_run
from data_schemas import Config, RunRecord

STRATEGIES = {"random": "a random share of the pool", "full": "the whole pool"}
MOST_RUNS = 4
"""Baselines that are compared: those of the same seed first, then the newest."""


@dataclass(frozen=True)
class Progress:
    """A run after a stage.

    Attributes:
        stage: 0 for the base policy.
        steps: Optimizer steps until then.
        cost: Token forwards of selection and training until then: one per generated token, three per token of a forward
            and backward pass. Evaluations are not counted.
        accuracy: Mean accuracy over the compared sets.
    """

    stage: int
    steps: int
    cost: int
    accuracy: float


@dataclass(frozen=True)
class Baseline:
    """A finished run without influence, and where this run is as accurate as that one at its end.

    Attributes:
        reached: This run after the first stage with at least the baseline's accuracy; None if it has not reached it.
        ratio: Cost of the baseline over that of this run until there; None if one of them is 0.
    """

    run: str
    trained_on: str
    seed: int
    end: Progress
    reached: Progress | None
    ratio: float | None


def compared_role(config: Config) -> str:
    """Return which sets are averaged: ``test`` or ``validation``."""
    return "test" if config.data.test else "validation"


def baselines(artifacts: Artifacts) -> list[Baseline]:
    """Find the baselines of a run in its store and compare the run with each of them; those unreadable are left out."""
    own, config = progress(artifacts), artifacts.config
    if config.selection.strategy in STRATEGIES or len(own) < 2:
        return []
    found = [
        other for name in list_runs(artifacts.store) if (other := _comparable(artifacts, name)) is not None
    ]
    found.sort(key=lambda one: one.record.started, reverse=True)
    found.sort(key=lambda one: one.config.seed != config.seed)
    rows = [_compared(other, own) for other in found[:MOST_RUNS]]
    return [row for row in rows if row is not None]


def progress(artifacts: Artifacts) -> list[Progress]:
    """List the evaluated stages of a run, the base policy first."""
    role, tests = compared_role(artifacts.config), artifacts.config.data.test
    points, paid, steps, cost = [], set[str](), 0, 0
    slots = artifacts.slots()
    for stage in range(artifacts.config.stages + 1):
        for slot in slots:
            if slot.slot.endswith(f"@{stage}") and slot.step != "evaluation" and slot.key not in paid:
                paid.add(slot.key)
                steps, cost = steps + slot.steps, cost + slot.tokens.forwards
        rows = accuracies(artifacts.summary(f"evaluation@{stage}"), stage, tests)
        if means := [row.accuracy for row in rows if row.split == role]:
            points.append(Progress(stage, steps, cost, sum(means) / len(means)))
    return points


def _comparable(artifacts: Artifacts, name: str) -> Artifacts | None:
    """Open a finished run of the store if it is a baseline of this one."""
    if name == artifacts.record.run:
        return None
    try:
        other = Artifacts(artifacts.store, load_run(artifacts.store, name))
    except ArtifactError:  # its own report says what is wrong with it
        return None
    if other.record.status != "done" or other.config.selection.strategy not in STRATEGIES:
        return None
    return other if _basis(other.record) == _basis(artifacts.record) else None


def _basis(record: RunRecord) -> dict[str, str]:
    """Return the keys of the base policy and of all prompt sets, by slot."""
    slots = record.slots.items()
    named = {slot: entry.ref.key for slot, entry in slots if slot.startswith("prompts/") and "@" not in slot}
    return named | {slot: entry.ref.key for slot, entry in slots if slot == "policy@0"}


def _compared(other: Artifacts, own: list[Progress]) -> Baseline | None:
    """Compare a run with a baseline; None if the baseline's last stage was not evaluated."""
    points = progress(other)
    if not points or points[-1].stage != other.config.stages:
        return None
    end = points[-1]
    reached = next((point for point in own if point.stage and point.accuracy >= end.accuracy), None)
    ratio = end.cost / reached.cost if reached is not None and reached.cost and end.cost else None
    return Baseline(
        run=other.record.run,
        trained_on=STRATEGIES[other.config.selection.strategy],
        seed=other.config.seed,
        end=end,
        reached=reached,
        ratio=ratio,
    )
