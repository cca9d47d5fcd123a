"""The best and worst prompts of a stage with their completions; only the rows that a report shows are read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.dataset as ds

from cropi_core.artifacts import PROMPTS_FILE, ROLLOUTS
from cropi_core.report.stages import StageChoice
from cropi_core.runs import Artifacts, Pool

pc: Any = pyarrow.compute  # pyarrow creates its functions at import time, so type checkers do not see them
SHOWN_COMPLETIONS = 8


@dataclass(frozen=True)
class Completion:
    """A completion; reward None means not gradable, which differs from reward 0."""

    text: str
    reward: float | None
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Example:
    """A prompt of a stage, with its scores and completions."""

    prompt_id: str
    source: str
    level: str
    rank: int
    selected: bool
    score: float
    by_set: dict[str, float]
    pass_rate: float | None
    reason: str
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: str | None = None
    completions: list[Completion] = field(default_factory=list)
    more_completions: int = 0


def examples(
    artifacts: Artifacts, pool: Pool, choice: StageChoice, count: int = 5
) -> tuple[list[Example], list[Example]]:
    """Return the ``count`` best and the ``count`` worst prompts of a stage among those with a score.

    If few prompts have a score, the worst are those that are not among the best.
    """
    scored = np.flatnonzero(~np.isnan(choice.score) & ~np.isnan(choice.rank))
    scored = scored[np.argsort(choice.rank[scored], kind="stable")]
    best, worst = scored[:count], scored[count:][-count:]
    wanted = [pool.ids[i] for i in (*best, *worst)]
    texts = prompt_texts(artifacts, "pool", wanted)
    completions_by_prompt = _completions(artifacts, choice.stage, wanted)

    def example(i: int) -> Example:
        name = pool.ids[i]
        prompt, completions = texts.get(name, {}), completions_by_prompt.get(name, [])
        rate = choice.pass_rate[i]
        return Example(
            prompt_id=name,
            source=pool.sources[i],
            level=pool.levels[i],
            rank=int(choice.rank[i]),
            selected=bool(choice.selected is not None and choice.selected[i]),
            score=float(choice.score[i]),
            by_set={s: float(v[i]) for s, v in choice.by_set.items()},
            pass_rate=None if np.isnan(rate) else float(rate),
            reason=choice.reason[i] if choice.reason else "",
            messages=prompt.get("messages", []),
            answer=prompt.get("answer"),
            completions=completions[:SHOWN_COMPLETIONS],
            more_completions=max(0, len(completions) - SHOWN_COMPLETIONS),
        )

    return [example(int(i)) for i in best], [example(int(i)) for i in worst]


def prompt_texts(artifacts: Artifacts, name: str, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Read messages and answers of the given prompts of a set, by id."""
    slot = f"prompts/{name}"
    path = artifacts.path(slot, PROMPTS_FILE)
    if path is None or not wanted:
        return {}
    columns = {name: ds.field(name) for name in ("prompt_id", "messages", "answer")}
    rows = shown_rows(artifacts, slot, [path], columns, ds.field("prompt_id").isin(wanted))
    return {row["prompt_id"]: row for row in rows}


def _completions(artifacts: Artifacts, stage: int, wanted: list[str]) -> dict[str, list[Completion]]:
    """Read the completions of the given prompts that the stage's gradients were computed from."""
    slot = artifacts.latest("rollouts/pool", stage)
    path = artifacts.path(slot, ROLLOUTS) if slot else None
    if path is None or not wanted:
        return {}
    columns = {n: ds.field(n) for n in ("prompt_id", "sample", "text", "reward", "finish_reason")}
    columns["tokens"] = pc.list_value_length(ds.field("completion_ids"))
    parts, chosen = sorted(path.glob("part-*.parquet")), ds.field("prompt_id").isin(wanted)
    rows = shown_rows(artifacts, slot or "", parts, columns, chosen)
    completions_by_prompt: dict[str, list[Completion]] = {}
    for row in sorted(rows, key=lambda r: (r["prompt_id"], r["sample"])):
        completion = Completion(row["text"], row["reward"], row["tokens"], row["finish_reason"])
        completions_by_prompt.setdefault(row["prompt_id"], []).append(completion)
    return completions_by_prompt


def shown_rows(
    artifacts: Artifacts, slot: str, files: list[Path], columns: dict[str, Any], wanted: ds.Expression
) -> list[dict[str, Any]]:
    """Read the rows that an expression selects.

    They are filtered while the files are scanned, and token ids are only counted, so that a pool's completions are
    never all in memory.
    """
    with artifacts.recorded_problems(slot, "prompts cannot be shown"):
        dataset = ds.dataset([str(file) for file in files], format="parquet")
        return dataset.to_table(columns=columns, filter=wanted).to_pylist()
    return []
