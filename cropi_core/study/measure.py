"""Read the accuracy and the cost of a curriculum from its record and the manifests that it names.

An artifact's cost is charged to every curriculum that uses it, even if it was reused from the store. A curriculum is
charged for its trajectories, gradients, scores, selections and training, but not for its evaluations, which are the
measurement. An artifact that several stages use is charged once, where it is first used.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cropi_core.artifacts import ROLLOUTS, Store
from cropi_core.errors import ArtifactError
from cropi_core.runs import FORWARD_AND_BACKWARD, Accuracy, accuracies
from cropi_core.study.plan import Cell
from cropi_core.study.stages import StageFacts, stage_facts
from data_schemas import STATUSES, Manifest, RunRecord

FORWARDS = {"head": 1.0, "last_quarter": 1.5}
"""Cost of the gradients of some layers (`gradients.layers`), in forward passes."""


@dataclass(frozen=True)
class Cost:
    """Tokens and seconds spent up to an evaluation.

    Attributes:
        generated: Tokens sampled.
        trained: Tokens of forward and backward passes, for gradients of the selection and for training, as the passes
            process them: the gradient engine reads a prompt once per group and skips dead prompts, the trainer reads it
            once per completion.
        forward: Forward passes of one token without a backward pass, for gradients of some layers: one a token for
            the output layer; one and a half for the last quarter of the layers: a quarter of a backward is half one.
        seconds: Computing time of the steps when their artifacts were made, on the machine that made them.
    """

    generated: int = 0
    trained: int = 0
    forward: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.generated + other.generated,
            self.trained + other.trained,
            self.forward + other.forward,
            self.seconds + other.seconds,
        )

    @property
    def work(self) -> int:
        """Work in forward passes of one token: one per generated token, three per trained token."""
        return self.generated + self.forward + FORWARD_AND_BACKWARD * self.trained


@dataclass(frozen=True)
class Point:
    """An evaluation of a curriculum after ``stage`` stages and ``steps`` optimizer steps, at the cost ``cost``."""

    stage: int
    steps: int
    cost: Cost
    sets: dict[str, Accuracy]


@dataclass(frozen=True)
class Curve:
    """A finished curriculum.

    Attributes:
        targets: Test sets that are the study's targets.
        others: Other test sets.
        validation: Validation sets.
        stages: Facts about each stage's selection and training.
    """

    world: str
    arm: str
    seed: int
    run: str
    points: list[Point]
    targets: list[str]
    others: list[str]
    validation: list[str]
    stages: list[StageFacts]

    def mean(self, point: Point, sets: list[str]) -> float | None:
        """Average accuracy over sets with equal weights; None without sets."""
        return sum(point.sets[name].accuracy for name in sets) / len(sets) if sets else None

    def line(self, axis: str) -> tuple[list[float], list[float]]:
        """Return positions and mean target accuracies; ``axis`` is ``steps`` or a field of :class:`Cost`."""
        at = [float(p.steps if axis == "steps" else getattr(p.cost, axis)) for p in self.points]
        return at, [self.mean(p, self.targets) or 0.0 for p in self.points]


def curve(cell: Cell, targets: list[str], record: RunRecord, store: Store) -> Curve:
    """Read a finished curriculum.

    Args:
        cell: The curriculum in the study.
        targets: Names of its target sets.
        record: Its run.
        store: Store of its artifacts.

    Raises:
        ArtifactError: The run is not finished, or an artifact was made by a version that did not count tokens.
    """
    if record.status != "done":
        raise ArtifactError(
            f"run {record.run} ({cell.label}) is {record.status}, not finished. Run `cropi study` again to resume it"
        )
    paid: set[str] = set()
    manifest = store.manifest
    total, steps, points, stages = Cost(), 0, [], []
    for stage in range(cell.config.stages + 1):
        for slot, entry in record.slots.items():
            if not slot.endswith(f"@{stage}") or entry.ref.key in paid or slot == "policy@0":
                continue
            paid.add(entry.ref.key)
            total += cost(slot, manifest(entry.ref.key), store)
        if stage:
            steps += int(manifest(record.slots[f"policy@{stage}"].ref.key).summary["steps"])
            stages.append(stage_facts(stage, cell.config, record, store))
        summary = manifest(record.slots[f"evaluation@{stage}"].ref.key).summary
        rows = accuracies(summary, stage, cell.config.data.test)
        points.append(Point(stage, steps, total, {row.set: row for row in rows}))
    data = cell.config.data
    return Curve(
        world=cell.world,
        arm=cell.arm,
        seed=cell.seed,
        run=record.run,
        points=points,
        targets=targets,
        others=[name for name in data.test if name not in targets],
        validation=list(data.validation),
        stages=stages,
    )


def cost(slot: str, made: Manifest, store: Store) -> Cost:
    """Return the cost of an artifact, to be charged to the curriculum that uses it.

    Raises:
        ArtifactError: The tokens of a trained policy were not counted.
    """
    if made.step == "evaluation":
        return Cost()
    summary = made.summary
    if made.step == "training":
        if "tokens_trained" not in summary:
            raise ArtifactError(
                f"{slot} {made.key} was trained by a version that did not count its tokens; "
                "make it again: --refresh training, or another root"
            )
        return Cost(summary["tokens_generated"], summary["tokens_trained"], seconds=made.seconds)
    if made.step == "gradients" and "merged" in made.settings:  # no token passed through the model
        return Cost(seconds=made.seconds)
    if made.step == "gradients":
        rollouts = store.directory(made.inputs["rollouts"]) / ROLLOUTS
        passed = passed_tokens(rollouts, made.settings["objective"]["min_gradable"])
        layers = made.settings["layout"].get("layers", "all")
        if layers == "all":
            return Cost(trained=passed, seconds=made.seconds)
        return Cost(forward=round(passed * FORWARDS[layers]), seconds=made.seconds)
    if made.step == "rollouts":
        return Cost(int(summary.get("sampled_tokens", summary["tokens"])), seconds=made.seconds)
    return Cost(seconds=made.seconds)


@cache
def passed_tokens(rollouts: Path, min_gradable: int) -> int:
    """Count the tokens that a gradient pass over rollouts reads; cached, because artifacts never change."""
    from cropi_core.gradients import group_rollouts
    from cropi_core.rollouts import read_rollouts

    groups = group_rollouts(read_rollouts(rollouts), min_gradable)
    return sum(group.packed for group in groups if STATUSES[group.status] == "ok")
