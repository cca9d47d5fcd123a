"""Read the report's data about the whole run from its record, its manifests and single columns of tables."""

from dataclasses import dataclass, field
from typing import Any

from cropi_core.artifacts import METRICS_FILE
from cropi_core.formatting import signed
from cropi_core.runs import Accuracy, Artifacts, accuracies

SHOWN_STAGES = 12
"""Maximum number of stages shown in full. Beyond it these are the first two and the last ones; tables by stage list
all.
"""


@dataclass(frozen=True)
class Metric:
    """A column of a stage's metrics that is plotted over its optimizer steps, with the label of its axis."""

    name: str
    label: str
    caption: str


METRICS = (
    Metric("reward", "mean training reward", "Training reward of the completions drawn for each step"),
    Metric("entropy", "entropy of a token", "Entropy of the policy in training"),
    Metric("kl", "KL divergence", "KL divergence from the reference policy"),
    Metric("completion_length", "tokens", "Mean length of the completions drawn for each step"),
    Metric("clip_ratio", "share of tokens", "Share of tokens whose importance ratio was clipped"),
    Metric("loss", "loss", "Loss"),
    Metric("grad_norm", "gradient norm", "Gradient norm before clipping"),
    Metric("learning_rate", "learning rate", "Learning rate"),
)
"""The metrics that are plotted, in order; those without values are omitted."""


def shown_stages(stages: list[int], most: int = SHOWN_STAGES) -> list[int]:
    """Return the stages that are shown in full: all, or the first two and the last ones."""
    return stages if len(stages) <= most else stages[:2] + stages[2 - most :]


# -- accuracy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Accuracy on one set over the run.

    Attributes:
        name: Name of the set.
        role: ``validation`` or ``test``.
        points: Accuracy of each evaluation, ordered by stage.
        steps: Optimizer steps of the run before each evaluation, by stage.
    """

    name: str
    role: str
    points: list[Accuracy]
    steps: dict[int, int]

    def at(self, stage: int) -> Accuracy | None:
        """Return the accuracy after a stage (0: before the first)."""
        return next((p for p in self.points if p.stage == stage), None)

    def change(self, stage: int, since: int) -> float | None:
        """Return the change in percentage points between two evaluations."""
        after, before = self.at(stage), self.at(since)
        return None if after is None or before is None else 100 * (after.accuracy - before.accuracy)

    def unclear(self, stage: int, since: int) -> bool:
        """Return whether the two intervals overlap, so that the change may be chance."""
        after, before = self.at(stage), self.at(since)
        return bool(after and before and after.overlaps(before))


def steps_after(artifacts: Artifacts, stage: int) -> int:
    """Return the number of optimizer steps up to and including this stage."""
    planned = artifacts.config.training.steps
    return sum(int(artifacts.summary(f"policy@{m}").get("steps") or planned) for m in range(1, stage + 1))


def accuracy_curves(artifacts: Artifacts) -> list[Curve]:
    """Read accuracy by set at every evaluation of the run, validation sets first."""
    data = artifacts.config.data
    curves = {name: Curve(name, "validation", [], {}) for name in data.validation}
    curves |= {name: Curve(name, "test", [], {}) for name in data.test}
    for stage in [0, *artifacts.stages("evaluation")]:
        steps = steps_after(artifacts, stage)
        for row in accuracies(artifacts.summary(f"evaluation@{stage}"), stage, data.test):
            if (curve := curves.get(row.set)) is not None:
                curve.points.append(row)
                curve.steps[stage] = steps
    return [curve for curve in curves.values() if curve.points]


@dataclass(frozen=True)
class Change:
    """The accuracy on one set before the first stage and after the last one.

    Attributes:
        name: Name of the set.
        role: ``test`` or ``validation``.
        before: Accuracy of the base policy.
        after: Accuracy after the last stage that was evaluated.
        unclear: Whether the two intervals overlap, so that the change may be chance.
    """

    name: str
    role: str
    before: Accuracy
    after: Accuracy
    unclear: bool

    @property
    def points(self) -> float:
        """The change in percentage points."""
        return 100 * (self.after.accuracy - self.before.accuracy)

    @property
    def text(self) -> str:
        """The change in one line: ``shift (test): 40.3 % (35.0–45.9) → 81.7 % (76.7–85.8), +41.4 points``."""
        change = f"{signed(self.points, 1)} points" + (", may be chance" if self.unclear else "")
        return f"{self.name} ({self.role}): {self.before.text} → {self.after.text}, {change}"


@dataclass(frozen=True)
class Headline:
    """The result of a run: the changes on its first sets, test sets first, and what they took.

    Attributes:
        changes: The changes that are shown.
        more: Number of sets that are not.
        effort: Optimizer steps and prompts, such as ``after 40 steps on 2 × 116 of 1160 prompts``.
    """

    changes: list[Change]
    more: int
    effort: str


def headline(artifacts: Artifacts, curves: list[Curve], most: int = 4) -> Headline | None:
    """Summarize the change on the sets, the test sets first; None before stage 1 is evaluated."""
    evaluated = sorted((c for c in curves if len(c.points) > 1), key=lambda curve: curve.role != "test")
    if not evaluated:
        return None
    changes = [
        Change(c.name, c.role, c.points[0], c.points[-1], c.points[-1].overlaps(c.points[0]))
        for c in evaluated
    ]
    return Headline(changes[:most], len(changes[most:]), _effort(artifacts, evaluated[0].points[-1].stage))


def _effort(artifacts: Artifacts, stage: int) -> str:
    """State the optimizer steps up to a stage, and the sizes of its selections if they are known."""
    summaries = [artifacts.summary(f"selection@{m}") for m in range(1, stage + 1)]
    sizes = [s["selected"] for s in summaries if "selected" in s]
    pool = artifacts.summary("prompts/pool").get("prompts")
    steps = f"after {steps_after(artifacts, stage)} steps"
    if not sizes or pool is None:
        return steps
    counts = f"{len(sizes)} × {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes[:6]))
    more = " + …" if len(set(sizes)) > 1 and len(sizes) > 6 else ""
    return f"{steps} on {counts}{more} of {pool} prompts"


# -- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The training of one stage: counts, and metrics by optimizer step (None if a step has no value)."""

    stage: int
    summary: dict[str, Any]
    seconds: float
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)


def trained_stages(artifacts: Artifacts) -> list[Trained]:
    """Read the training of every stage; steps are numbered across stages."""
    trained = []
    for stage in artifacts.stages("policy"):
        manifest = artifacts.manifest(f"policy@{stage}")
        if manifest is None:
            continue
        stage_training = Trained(stage, manifest.summary, manifest.seconds)
        if manifest.step == "training":  # a pinned external checkpoint has no metrics
            before = steps_after(artifacts, stage - 1)
            table = artifacts.table(f"policy@{stage}", METRICS_FILE, ["step", "reward"], others=True)
            if table is not None:
                stage_training.steps.extend(before + step for step in table["step"].to_pylist())
                names = [m.name for m in METRICS if m.name in table.column_names]  # older ones have fewer
                stage_training.metrics.update({name: table[name].to_pylist() for name in names})
        trained.append(stage_training)
    return trained


def stage_seconds(artifacts: Artifacts, stage: int) -> float:
    """Sum the computing time of a stage's steps, including steps computed by earlier runs."""
    slots = [s for s in artifacts.record.slots if s.endswith(f"@{stage}")]
    return sum(manifest.seconds for s in slots if (manifest := artifacts.manifest(s)) is not None)
