"""Facts about each stage of a curriculum: selected prompts, reliability of its scores, and dead groups.

They explain an arm's speed: a stage teaches little if its prompts are not from the target families, or if most of its
groups have a single reward at its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cropi_core.artifacts import METRICS_FILE, Store, read_table
from data_schemas import Config, RunRecord, WorldSource


@dataclass(frozen=True)
class StageFacts:
    """Facts about one stage.

    Attributes:
        stage: Counted from 1.
        selected: Number of selected prompts by source.
        of_targets: Share of selected prompts from the families of the validation sets; None outside the embedded world.
        checked: Metrics of :data:`cropi_core.diagnostics.limits.FIGURES` by name, at the time of the selection; empty
            if the stage computed no scores.
        reward_first: Mean reward of the completions sampled in the stage's first quarter.
        reward_last: The same for its last quarter.
        mean_level: Mean level of the selected prompts whose level is a number; None if none is.
        grade: Verdict about the stage's scores; None without one.
        dead_groups: Share of groups with a single reward in the last quarter; such groups have no gradient.
    """

    stage: int
    selected: dict[str, int]
    of_targets: float | None
    checked: dict[str, float | None]
    reward_first: float | None
    reward_last: float | None
    dead_groups: float | None
    mean_level: float | None = None
    grade: str | None = None


def stage_facts(stage: int, config: Config, record: RunRecord, store: Store) -> StageFacts:
    """Read one stage of a finished run."""
    trained = record.slots[f"policy@{stage}"].ref
    choice = store.manifest(record.slots[f"selection@{stage}"].ref).summary
    sources = choice["sources"]
    selected = {name: counts["selected"] for name, counts in sources.items()}
    wanted = target_families(config)
    summary = store.manifest(trained).summary
    return StageFacts(
        stage=stage,
        selected=selected,
        of_targets=_share(selected, wanted) if wanted else None,
        checked=_checked(stage, record),
        reward_first=summary["first_quarter_reward"],
        reward_last=summary["last_quarter_reward"],
        dead_groups=dead_groups(
            read_table(store.directory(trained) / METRICS_FILE, ["frac_reward_zero_std"])[0].to_pylist()
        ),
        mean_level=mean_level(choice.get("levels", {})),
        grade=_grade(stage, record),
    )


def mean_level(levels: Mapping[str, Mapping[str, int]]) -> float | None:
    """Average the levels of selected prompts; ``levels`` has the counts by level, as a selection's summary has them."""
    numbers = {float(name): counts["selected"] for name, counts in levels.items() if name.isdecimal()}
    total = sum(numbers.values())
    return sum(level * count for level, count in numbers.items()) / total if total else None


def _grade(stage: int, record: RunRecord) -> str | None:
    """Return the last verdict about a stage's scores."""
    verdicts = [check.verdict.grade for check in record.checks if check.stage == stage and check.verdict]
    return verdicts[-1] if verdicts else None


def target_families(config: Config) -> set[str]:
    """Return the families of the validation sets; empty unless all sets are from the embedded world."""
    sources = list(config.data.validation.values())
    worlds = [source for source in sources if isinstance(source, WorldSource)]
    return {name for source in worlds for name in source.families} if len(worlds) == len(sources) else set()


def dead_groups(shares: Sequence[float | None]) -> float | None:
    """Average the share of groups with a single reward over the last quarter of a stage's steps, at least one step."""
    available = [share for share in shares[-max(1, len(shares) // 4) :] if share is not None]
    return float(np.mean(available)) if available else None


def mean_of_available(values: Sequence[float | None]) -> float | None:
    """Average the available values; None if there are none."""
    available = [value for value in values if value is not None]
    return float(np.mean(available)) if available else None


def _share(selected: dict[str, int], wanted: set[str]) -> float:
    return sum(n for name, n in selected.items() if name in wanted) / max(1, sum(selected.values()))


def _checked(stage: int, record: RunRecord) -> dict[str, float | None]:
    """Return the metrics of a stage's last check; after a refresh there are two checks."""
    checks = [check for check in record.checks if check.stage == stage]
    return {finding.figure: finding.value for finding in checks[-1].findings} if checks else {}
