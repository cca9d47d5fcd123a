"""Two halves of the completions of some prompts, as if each half were a prompt: for the reliability of scores.

A prompt's completions are dealt out reward by reward, so that both halves have both rewards where possible. The rule
reads rewards only: given its reward, a completion of one half is distributed like one of the other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.random_bits import key64
from cropi_core.rollouts.table import part_path, read_rollouts
from cropi_core.statistics import spearman

HALVES = ("#1", "#2")
"""Added to a prompt's id for each of its halves."""


def halve_rollouts(rollouts: Path, out: Path, *, prompts: int, seed: int) -> dict[str, Any]:
    """Write the halves of up to ``prompts`` prompts; no file if there is none whose halves both have two rewards.

    Args:
        rollouts: Rollouts of the pool.
        out: Directory of the part.
        prompts: Most prompts.
        seed: Of the draw.

    Returns:
        ``prompts``, the number of prompts that were halved, ``tokens`` of their completions, ``sampled_tokens``, which
        is 0, and ``pass_rate_correlation``: the rank correlation, over the pool, of the mean rewards of the first and
        the second half of the completions; None with one completion a prompt.
    """
    table = read_rollouts(rollouts)
    groups = _groups(table)
    deals = {name: deal(rewards) for name, (rewards, _) in groups.items()}
    names = [name for name, halves in deals.items() if halves is not None]
    names.sort(key=lambda name: key64("halves", seed, name))
    drawn = sorted(names[:prompts], key=lambda name: groups[name][1][0])
    rows, ids, samples = [], [], []
    for name in drawn:
        for half, members in zip(HALVES, deals[name] or (), strict=True):
            rows += [groups[name][1][member] for member in members]
            ids += [name + half] * len(members)
            samples += range(len(members))
    halved = table.take(pa.array(rows, pa.int64()))
    for column, values in (("prompt_id", ids), ("sample", samples)):
        place = halved.schema.get_field_index(column)
        halved = halved.set_column(
            place, halved.schema.field(place), pa.array(values, halved.schema.field(place).type)
        )
    out.mkdir(parents=True, exist_ok=True)
    if drawn:
        write_parquet(halved.replace_schema_metadata(table.schema.metadata), part_path(out, 0))
    return {
        "prompts": len(drawn),
        "completions": len(rows),
        "tokens": sum(map(len, halved["completion_ids"].to_pylist())),
        "sampled_tokens": 0,
        "pass_rate_correlation": _pass_rate_correlation([rewards for rewards, _ in groups.values()]),
    }


def deal(rewards: list[float | None]) -> tuple[list[int], list[int]] | None:
    """Deal out the graded completions of a prompt to two halves; None if one of them would have one reward only."""
    graded = [i for i, reward in enumerate(rewards) if reward is not None]
    by_reward = sorted(graded, key=lambda i: (-(rewards[i] or 0.0), i))
    halves = sorted(by_reward[0::2]), sorted(by_reward[1::2])
    mixed = all(len({rewards[i] for i in half}) > 1 for half in halves)
    return halves if mixed else None


def _groups(table: pa.Table) -> dict[str, tuple[list[float | None], list[int]]]:
    """Return the rewards and the rows of every prompt, in the order of the table."""
    groups: dict[str, tuple[list[float | None], list[int]]] = {}
    for row, (name, reward) in enumerate(
        zip(table["prompt_id"].to_pylist(), table["reward"].to_pylist(), strict=True)
    ):
        rewards, rows = groups.setdefault(name, ([], []))
        rewards.append(reward)
        rows.append(row)
    return groups


def _pass_rate_correlation(groups: list[list[float | None]]) -> float | None:
    pairs = []
    for rewards in groups:
        graded = [reward for reward in rewards if reward is not None]
        if len(graded) > 1:
            middle = len(graded) // 2
            pairs.append((np.mean(graded[:middle]), np.mean(graded[middle:])))
    if len(pairs) < 3:
        return None
    first, second = np.array(pairs, dtype=np.float64).T
    return spearman(first, second)
