"""Accuracy of the parts of a set: its prompts by source and by level."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.evaluation.intervals import interval

MOST_PARTS = 24
"""Most sources, or levels, of a set that are measured on their own; the smallest ones are measured together."""
UNNAMED = "none"
"""Name of the prompts without a level."""


def set_parts(
    prompts: pa.Table, groups: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Measure the accuracy of a set by the columns ``source`` and ``level`` of its prompts.

    Args:
        prompts: Rows of :data:`data_schemas.tables.PROMPTS`.
        groups: Rewards of the graded completions by prompt; prompts without any are dropped.

    Returns:
        ``{"source": {name: {"accuracy", "low", "high", "prompts"}}, "level": {...}}``, the largest part first. A column
        with one value in the whole set is dropped, because its accuracy is that of the set.
    """
    parts: dict[str, dict[str, Any]] = {}
    for column in ("source", "level"):
        members: dict[str, list[Sequence[float]]] = defaultdict(list)
        values = prompts[column].to_pylist()
        for prompt_id, value in zip(prompts["prompt_id"].to_pylist(), values, strict=True):
            if groups.get(prompt_id):
                members[value or UNNAMED].append(groups[prompt_id])
        if len(set(values)) > 1 and members:
            parts[column] = {name: _accuracy(some) for name, some in _limited(members).items()}
    return parts


def _limited(members: Mapping[str, list[Sequence[float]]]) -> dict[str, list[Sequence[float]]]:
    """Order the parts by size; join the smallest ones beyond the limit to one."""
    names = sorted(members, key=lambda name: (-len(members[name]), name))
    shown = names if len(names) <= MOST_PARTS else names[: MOST_PARTS - 1]
    limited = {name: members[name] for name in shown}
    if rest := names[len(shown) :]:
        limited[f"{len(rest)} others"] = [group for name in rest for group in members[name]]
    return limited


def _accuracy(groups: Sequence[Sequence[float]]) -> dict[str, float | int]:
    means = np.array([np.mean(group) for group in groups])
    low, high = interval(means, sum(map(len, groups)))
    return {"accuracy": float(means.mean()), "low": low, "high": high, "prompts": len(groups)}
