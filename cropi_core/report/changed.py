"""Prompts of the evaluated sets whose mean reward changed between the first and the last evaluation of a run.

The mean is over a prompt's gradable completions, as in the accuracy. Texts are read only of the completions that the
report shows.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow.dataset as ds

from cropi_core.artifacts import EVALUATION_FILE
from cropi_core.report.prompts import Completion, prompt_texts, shown_rows
from cropi_core.runs import Artifacts

SHOWN_PROMPTS = 3
"""Prompts of a set that are shown with their completions, of those that rose and of those that fell."""
SHOWN_COMPLETIONS = 2
"""Completions of a prompt that are shown of each evaluation."""
MOST_SETS = 8


@dataclass(frozen=True)
class ChangedPrompt:
    """A prompt, its mean reward in both evaluations, and completions of both."""

    prompt_id: str
    before: float
    after: float
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: str | None = None
    completions: list[tuple[str, list[Completion]]] = field(default_factory=list)


@dataclass(frozen=True)
class ChangedSet:
    """A set: how many of its prompts rose, fell and stayed, and the prompts with the largest changes."""

    name: str
    role: str
    rose: int
    fell: int
    same: int
    up: list[ChangedPrompt]
    down: list[ChangedPrompt]


def changed_sets(artifacts: Artifacts) -> tuple[int, list[ChangedSet]]:
    """Compare the base policy's evaluation with the last one, test sets first.

    Returns:
        The stage of the last evaluation, and the sets; ``(0, [])`` if there are not two evaluations to compare.
    """
    stages = artifacts.stages("evaluation")
    if not stages or (base := _rewards(artifacts, 0)) is None:
        return 0, []
    if (last := _rewards(artifacts, stages[-1])) is None:
        return 0, []
    data = artifacts.config.data
    roles = [(name, "test") for name in data.test] + [(name, "validation") for name in data.validation]
    found = [_changed_set(artifacts, stages[-1], name, role, base, last) for name, role in roles[:MOST_SETS]]
    return stages[-1], [one for one in found if one is not None]


def _rewards(artifacts: Artifacts, stage: int) -> dict[tuple[str, str], float] | None:
    """Return the mean reward by set and prompt id; prompts without a gradable completion are left out."""
    table = artifacts.table(f"evaluation@{stage}", EVALUATION_FILE, ["set", "prompt_id", "reward"])
    if table is None:
        return None
    means = (
        table.filter(table["reward"].is_valid())
        .group_by(["set", "prompt_id"])
        .aggregate([("reward", "mean")])
    )
    keys = zip(means["set"].to_pylist(), means["prompt_id"].to_pylist(), strict=True)
    return dict(zip(keys, means["reward_mean"].to_pylist(), strict=True))


def _changed_set(
    artifacts: Artifacts,
    stage: int,
    name: str,
    role: str,
    base: dict[tuple[str, str], float],
    last: dict[tuple[str, str], float],
) -> ChangedSet | None:
    """Compare one set; None if the evaluations have no prompt of it in common."""
    ids = [prompt for of, prompt in base if of == name and (of, prompt) in last]
    if not ids:
        return None
    changes = np.array([last[name, prompt] - base[name, prompt] for prompt in ids])
    order = np.argsort(-changes, kind="stable")
    up = [ids[i] for i in order[:SHOWN_PROMPTS] if changes[i] > 0]
    down = [ids[i] for i in order[::-1][:SHOWN_PROMPTS] if changes[i] < 0]
    prompts = prompt_texts(artifacts, name, up + down)
    completions = {m: _completions(artifacts, m, name, up + down) for m in (0, stage)}

    def shown(prompt: str) -> ChangedPrompt:
        found = prompts.get(prompt, {})
        return ChangedPrompt(
            prompt,
            base[name, prompt],
            last[name, prompt],
            found.get("messages", []),
            found.get("answer"),
            [("before", completions[0].get(prompt, [])), ("after", completions[stage].get(prompt, []))],
        )

    return ChangedSet(
        name,
        role,
        rose=int((changes > 0).sum()),
        fell=int((changes < 0).sum()),
        same=int((changes == 0).sum()),
        up=[shown(prompt) for prompt in up],
        down=[shown(prompt) for prompt in down],
    )


def _completions(
    artifacts: Artifacts, stage: int, name: str, wanted: list[str]
) -> dict[str, list[Completion]]:
    """Read the first completions of the given prompts in an evaluation."""
    slot = f"evaluation@{stage}"
    path = artifacts.path(slot, EVALUATION_FILE)
    if path is None:
        return {}
    few = (ds.field("set") == name) & (ds.field("sample") < SHOWN_COMPLETIONS)
    columns = {n: ds.field(n) for n in ("prompt_id", "sample", "text", "reward", "tokens", "finish_reason")}
    found: dict[str, list[Completion]] = {}
    for row in shown_rows(artifacts, slot, [path], columns, few & ds.field("prompt_id").isin(wanted)):
        one = Completion(row["text"], row["reward"], row["tokens"], row["finish_reason"])
        found.setdefault(row["prompt_id"], []).append(one)
    return found
