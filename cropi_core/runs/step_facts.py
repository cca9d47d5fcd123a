"""Say in a few words what a step made, from the summary of its manifest."""

from collections.abc import Mapping
from typing import Any

from cropi_core.formatting import percent, significant
from cropi_core.runs.accuracy import accuracies
from data_schemas import StepName

MOST_SETS = 8
LONGEST = 120
"""Characters of a name of a set that are shown, at most."""
COUNTED: dict[StepName, tuple[str, ...]] = {
    "prompts": ("prompts",),
    "policy": ("parameters",),
    "rollouts": ("prompts", "completions", "not_gradable"),
    "gradients": ("prompts", "tokens"),
    "scores": ("prompts", "scored"),
    "diagnostics": ("prompts",),
    "selection": ("selected", "pool"),
    "training": ("steps", "prompts", "completions", "not_gradable"),
    "evaluation": ("completions",),
}
"""Counts of a step's summary that are named; a count of 0 that is not gradable is omitted."""
MEASURED = {
    "mean_reward": "mean reward",
    "first_quarter_reward": "reward in the first quarter",
    "last_quarter_reward": "in the last",
    "spearman": "rank correlation",
}
"""Measured values of a summary, and their names."""


def step_facts(step: StepName, summary: Mapping[str, Any]) -> str:
    """Describe what a step made: ``4 prompts, 32 completions, mean reward 0.445``."""
    numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    facts = [
        f"{significant(numbers[name], 9)} {name.replace('_', ' ')}"
        for name in COUNTED[step]
        if name in numbers and not (name == "not_gradable" and not numbers[name])
    ]
    if step == "gradients":
        status = summary.get("status", {})
        facts += [f"{count} {name.replace('_', ' ')}" for name, count in status.items() if count]
    facts += [f"{words} {significant(numbers[name])}" for name, words in MEASURED.items() if name in numbers]
    if step == "evaluation":
        rows = accuracies(summary, 0)
        facts += [f"{_short(row.set)} {percent(row.accuracy)}" for row in rows[:MOST_SETS]]
        facts += [f"{len(rows) - MOST_SETS} more sets"] if len(rows) > MOST_SETS else []
    return ", ".join(facts)


def _short(name: str) -> str:
    text = " ".join(name.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
