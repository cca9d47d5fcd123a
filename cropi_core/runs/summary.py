"""Summarise a run: accuracy by stage and set, selected prompts by source, artifacts and seconds.

:func:`summarise` reads a run's record and the manifests that it names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cropi_core.runs.accuracy import Accuracy, Detail, accuracies, details
from data_schemas import Manifest, RunRecord, StageCheck

FORWARD_AND_BACKWARD = 3
"""Cost of a forward and backward pass, in forward passes: the backward has twice as many matrix products."""

PURPOSES: dict[str, str] = {"training": "training", "evaluation": "evaluation"}
"""Purpose of the steps that are not part of the selection."""


@dataclass(frozen=True)
class Tokens:
    """Tokens that a step processed; a pass reads every completion together with its prompt.

    Attributes:
        generated: Tokens of sampled completions.
        passed: Tokens of forward and backward passes.
        forward: Tokens of forward passes without a backward pass through all layers (`gradients.layers`).
    """

    generated: int = 0
    passed: int = 0
    forward: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(
            self.generated + other.generated, self.passed + other.passed, self.forward + other.forward
        )

    @property
    def forwards(self) -> int:
        """Cost in token forwards: one per generated token, three per token of a forward and backward pass."""
        return self.generated + FORWARD_AND_BACKWARD * self.passed + self.forward


@dataclass(frozen=True)
class Spending:
    """Tokens and seconds of one purpose: selection, training or evaluation.

    Attributes:
        tokens: Tokens when the artifacts were computed, those taken from the store included.
        seconds: Seconds when the artifacts were computed.
        spent: Seconds in this run.
    """

    tokens: Tokens = Tokens()
    seconds: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True)
class SlotSummary:
    """One artifact of a run.

    Attributes:
        seconds: Time that it took when it was computed.
        spent: Time that it took in this run; 0 if it came from the store.
        made_from: Its inputs, by the slot that names them in this run, otherwise by key.
        tokens: Tokens processed when it was computed.
        steps: Training steps; 0 for other steps.
    """

    slot: str
    step: str
    key: str
    digest: str
    origin: str
    seconds: float
    spent: float
    made_from: list[str]
    tokens: Tokens = Tokens()
    steps: int = 0


@dataclass(frozen=True)
class RunSummary:
    """The results of a run.

    Attributes:
        selected: Number of prompts by stage and source.
        details: Accuracy by source and level, and pass@k.
    """

    run: str
    status: str
    error: str | None
    accuracy: list[Accuracy]
    selected: dict[int, dict[str, int]]
    pool: dict[str, int]
    slots: list[SlotSummary]
    checks: list[StageCheck]
    notes: list[str]
    details: list[Detail] = field(default_factory=list)


def summarise(record: RunRecord, manifest: Callable[[str], Manifest]) -> RunSummary:
    """Summarise a run.

    Args:
        record: The run, finished or not.
        manifest: Reads the manifest of a key.
    """
    manifests = {slot: manifest(entry.ref.key) for slot, entry in record.slots.items()}
    tests = record.config["data"].get("test", {})
    pool = manifests.get("prompts/pool")
    evaluations = [
        (stage_of(slot), m.summary) for slot, m in manifests.items() if slot.startswith("evaluation@")
    ]
    return RunSummary(
        run=record.run,
        status=record.status,
        error=record.error,
        accuracy=[row for stage, found in evaluations for row in accuracies(found, stage, tests)],
        selected={
            stage_of(slot): {name: counts["selected"] for name, counts in m.summary["sources"].items()}
            for slot, m in manifests.items()
            if slot.startswith("selection@")
        },
        pool=dict(pool.summary["by_source"]) if pool else {},
        slots=slot_summaries(record, manifests),
        checks=list(record.checks),
        notes=list(record.notes),
        details=[row for stage, found in evaluations for row in details(found, stage, tests)],
    )


def slot_summaries(record: RunRecord, manifests: Mapping[str, Manifest]) -> list[SlotSummary]:
    """Summarise the artifacts of a run whose manifests are given, in the order in which it used them.

    Args:
        record: The run.
        manifests: Manifest by slot.
    """
    names = {entry.ref.key: slot for slot, entry in record.slots.items()}
    return [
        SlotSummary(
            slot=slot,
            step=manifests[slot].step,
            key=entry.ref.key,
            digest=entry.ref.digest,
            origin=entry.origin,
            seconds=manifests[slot].seconds,
            spent=round(entry.seconds, 3),
            made_from=[names.get(ref.key, ref.key) for ref in manifests[slot].inputs.values()],
            tokens=tokens_of(manifests[slot]),
            steps=manifests[slot].summary.get("steps", 0) if manifests[slot].step == "training" else 0,
        )
        for slot, entry in record.slots.items()
        if slot in manifests
    ]


def stage_of(slot: str) -> int:
    """Return the stage of a slot such as ``selection@2``."""
    return int(slot.rpartition("@")[2])


def seconds_by_step(summary: RunSummary) -> dict[str, tuple[float, float]]:
    """Sum by step the seconds when the artifacts were computed, and the seconds spent in this run."""
    totals: dict[str, tuple[float, float]] = {}
    for slot in summary.slots:
        made, spent = totals.get(slot.step, (0.0, 0.0))
        totals[slot.step] = (made + slot.seconds, spent + slot.spent)
    return totals


def tokens_of(manifest: Manifest) -> Tokens:
    """Read the tokens that a step processed from its manifest; an imported artifact states none."""
    summary = manifest.summary
    if manifest.step == "training":
        return Tokens(summary.get("tokens_generated", 0), summary.get("tokens_trained", 0))
    if manifest.step in ("rollouts", "evaluation"):
        return Tokens(summary.get("sampled_tokens", summary.get("tokens", 0)))
    if manifest.step == "gradients":
        some = manifest.settings.get("layout", {}).get("layers", "all") != "all"
        count = summary.get("tokens", 0)
        return Tokens(forward=count) if some else Tokens(passed=count)
    return Tokens()


def spending(slots: Iterable[SlotSummary]) -> dict[str, Spending]:
    """Sum tokens and seconds by purpose, an artifact that several slots name once."""
    totals: dict[str, Spending] = {}
    for slot in {slot.key: slot for slot in slots}.values():
        purpose = PURPOSES.get(slot.step, "selection")
        before = totals.get(purpose, Spending())
        totals[purpose] = Spending(
            before.tokens + slot.tokens, before.seconds + slot.seconds, before.spent + slot.spent
        )
    return {name: totals[name] for name in ("selection", "training", "evaluation") if name in totals}


def cost_grid(slots: Iterable[SlotSummary]) -> tuple[list[str], list[list[str]]]:
    """Arrange the cost in a grid: one row per purpose, tokens and seconds when the artifacts were computed."""
    header = ["purpose", "tokens generated", "forward and backward", "forward only", "seconds", "seconds now"]
    return header, [
        [
            purpose,
            *[f"{count:,}" for count in (one.tokens.generated, one.tokens.passed, one.tokens.forward)],
            f"{one.seconds:.1f}",
            f"{one.spent:.1f}",
        ]
        for purpose, one in spending(slots).items()
    ]


def selection_in_steps(slots: Sequence[SlotSummary]) -> tuple[float, float] | None:
    """Convert the cost of the selection into training steps of this run.

    Returns:
        The steps that generate as many tokens as the selection, and the steps that cost as many token forwards; None
        if nothing was selected or trained.
    """
    costs, steps = spending(slots), sum({slot.key: slot.steps for slot in slots}.values())
    if not steps or "selection" not in costs or not costs["training"].tokens.generated:
        return None
    selection, training = costs["selection"].tokens, costs["training"].tokens
    return steps * selection.generated / training.generated, steps * selection.forwards / training.forwards


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Convert numbers of prompts by source into shares, the largest first."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {source: n / total for source, n in ordered if n} if total else {}
