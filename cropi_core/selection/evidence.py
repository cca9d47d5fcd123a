"""Evidence about the prompts of a pool, on which a selection is based: status, pass rate, gradient, influence, votes.

    evidence = gather(prompt_ids, scores=Path("scores.parquet"), rollouts=None)

Tables are matched by prompt id, never by position.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.artifacts import floats, read_open_table
from cropi_core.errors import DataError, SelectionError, foreign_errors
from cropi_core.scores import SETTINGS_KEY, fuse, ranks, tie_keys
from cropi_core.selection.belief import Belief, aligned, expected_rates
from data_schemas import SCORE_FIXED, Scores

UNMEASURED = "unmeasured"
"""Status of every prompt when the strategy reads neither scores nor trajectories."""
TOO_FEW = "too_few_gradable"


@dataclass(frozen=True)
class Evidence:
    """Evidence about each prompt of a pool, in the order of the pool; NaN if unknown.

    Attributes:
        prompt_ids: ``(n,)``.
        status: ``(n,)`` names of ``data_schemas.tables.STATUSES``, or ``unmeasured``.
        pass_rate: ``(n,)`` mean of the graded rewards.
        grad_norm: ``(n,)``.
        score: ``(n,)`` fused influence.
        rank: ``(n,)`` rank of the score, from 1.
        votes: ``(n,)`` names of the sets that voted, as a text; empty without influence scores.
        similarity: ``(n,)`` similarity of the text to the validation prompts.
    """

    prompt_ids: list[str]
    status: list[str]
    pass_rate: np.ndarray
    grad_norm: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    votes: list[str]
    similarity: np.ndarray


def gather(prompt_ids: list[str], scores: Path | None, rollouts: Path | None) -> Evidence:
    """Collect the evidence about the prompts of a pool, matched by id.

    Statuses are those of the scores if scores are given, pass rates those of the rollouts if rollouts are given.

    Raises:
        DataError: An id of the pool occurs twice, or a table cannot be read.
        SelectionError: A table has other prompts than the pool.
    """
    if len(set(prompt_ids)) != len(prompt_ids):
        raise DataError(f"{len(prompt_ids) - len(set(prompt_ids))} prompt ids of the pool occur twice")
    unknown = np.full(len(prompt_ids), np.nan)
    figures = {"mean_reward": unknown, "grad_norm": unknown, "score": unknown, "rank": unknown}
    status, votes = [UNMEASURED] * len(prompt_ids), [""] * len(prompt_ids)
    if scores is not None:
        # The other columns are the validation sets.
        table = read_columns(scores, list(SCORE_FIXED), others=True)
        table = table.take(_match(prompt_ids, table.column("prompt_id").to_pylist(), f"scores {scores}"))
        figures = {name: floats(table.column(name)) for name in figures}
        status, votes = table.column("status").to_pylist(), _votes(table)
    if rollouts is not None:
        table = pass_rates(rollouts)
        table = table.take(_match(prompt_ids, table.column("prompt_id").to_pylist(), f"rollouts {rollouts}"))
        figures["mean_reward"] = floats(table.column("pass_rate"))
        if scores is None:
            status = table.column("status").to_pylist()
    return Evidence(
        prompt_ids,
        status,
        figures["mean_reward"],
        figures["grad_norm"],
        figures["score"],
        figures["rank"],
        votes,
        unknown,
    )


def with_expected_rates(evidence: Evidence, belief: Belief) -> Evidence:
    """Replace pass rates by expected ones; a prompt whose stored rewards were all equal may be eligible again."""
    aligned_belief = aligned(belief, evidence.prompt_ids)
    return replace(
        evidence, pass_rate=expected_rates(aligned_belief.cells), status=["ok"] * len(evidence.prompt_ids)
    )


def pass_rates(path: Path) -> pa.Table:
    """Average the graded rewards of each prompt.

    Args:
        path: Directory of ``part-*.parquet``, or one file; only ``prompt_id`` and ``reward`` are read.

    Returns:
        ``prompt_id``, ``pass_rate`` (null if nothing was graded), ``status``.
    """
    groups = _reward_groups(path)
    status = [
        TOO_FEW if count < 2 else "zero_variance" if low == high else "ok"
        for count, low, high in zip(
            *(groups.column(f"reward_{name}").to_pylist() for name in ("count", "min", "max")), strict=True
        )
    ]
    columns = [groups.column("prompt_id"), groups.column("reward_mean"), pa.array(status, pa.string())]
    return pa.table(columns, names=["prompt_id", "pass_rate", "status"])


def reward_sums(path: Path, prompt_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(n,)`` sums of the rewards of each prompt, and ``(n,)`` numbers of its graded completions.

    Args:
        path: As in :func:`pass_rates`.
        prompt_ids: Prompts in the wanted order; one without rollouts has zeros.

    Raises:
        DataError: A mean reward is outside [0, 1].
    """
    groups = _reward_groups(path)
    means, counts = floats(groups.column("reward_mean")), floats(groups.column("reward_count"))
    if ((means < 0) | (means > 1)).any():
        raise DataError(
            f"{path}: a belief about pass rates needs rewards between 0 and 1; the mean rewards range from "
            f"{np.nanmin(means):.3g} to {np.nanmax(means):.3g}. Scale them, or drop training.draw"
        )
    place = {name: row for row, name in enumerate(groups.column("prompt_id").to_pylist())}
    rows = np.array([place.get(name, -1) for name in prompt_ids])
    graded = np.where(rows < 0, 0.0, counts[rows])
    return np.where(graded > 0, means[rows] * counts[rows], 0.0), graded


def _reward_groups(path: Path) -> pa.Table:
    """Aggregate the rewards of each prompt: mean, count, min and max."""
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise DataError(f"{path} has no part-*.parquet")
    table = pa.concat_tables([read_columns(part, ["prompt_id", "reward"]) for part in parts])
    if np.isnan(table.column("reward").drop_null().to_numpy()).any():
        raise DataError(
            f"{path} has rewards that are NaN; the reward of a completion that is not gradable must be null"
        )
    by_prompt = table.group_by("prompt_id", use_threads=False)  # one thread: sums in one order
    return by_prompt.aggregate(
        [("reward", "mean"), ("reward", "count"), ("reward", "min"), ("reward", "max")]
    )


def _votes(table: pa.Table) -> list[str]:
    """Describe the votes of the sets for each row of scores: ``rrf: reverse #3 (0.412), sort #87 (0.055)``."""
    names = [name for name in table.column_names if name not in SCORE_FIXED]
    live = np.flatnonzero(~np.isnan(floats(table.column("rank"))))
    descriptions = [""] * table.num_rows
    if not len(live) or not names:
        return descriptions
    values = np.stack([floats(table.column(name))[live] for name in names], axis=1).astype(np.float32)
    ids = np.array(table.column("prompt_id").to_pylist(), dtype=object)[live]
    recipe = json.loads((table.schema.metadata or {}).get(SETTINGS_KEY, b"null"))
    if recipe:
        settings = Scores.model_validate(recipe["settings"])
        kind, (_, _, votes) = settings.fusion, fuse(values, settings, tie_keys(list(ids), recipe["seed"]))
    else:  # a table of another program: its fusion is unknown, the rank of a prompt in each set is not
        keys = tie_keys(list(ids), 0)
        kind, votes = "influence", np.stack([ranks(values[:, v], keys) for v in range(len(names))], axis=1)
    for row, places, figures in zip(live, votes, values, strict=True):
        voters = sorted((place, v) for v, place in enumerate(places) if place)
        listed = ", ".join(f"{names[v]} #{place} ({figures[v]:.3f})" for place, v in voters)
        descriptions[row] = f"{kind}: {listed or 'no set voted'}"
    return descriptions


def _match(prompt_ids: list[str], table_ids: list[str], title: str) -> list[int]:
    """Return the row of each prompt of the pool in a table.

    Raises:
        SelectionError: The table and the pool do not have the same prompts, each once.
    """
    place = {prompt_id: row for row, prompt_id in enumerate(table_ids)}
    faults = []
    if len(place) != len(table_ids):
        faults.append(f"{len(table_ids) - len(place)} ids occur twice")
    for text, missing in (
        ("of the pool are missing", [i for i in prompt_ids if i not in place]),
        ("are not in the pool", sorted(set(place) - set(prompt_ids))),
    ):
        if missing:
            named = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
            faults.append(f"{len(missing)} prompts {text} ({named})")
    if faults:
        raise SelectionError(
            f"{title} and the pool do not match: {'; '.join(faults)}. Compute them again for this pool"
        )
    return [place[prompt_id] for prompt_id in prompt_ids]


def read_columns(path: Path, columns: list[str], *, others: bool = False) -> pa.Table:
    """Read the given columns of a Parquet file, with ``others`` all columns.

    Raises:
        DataError: The file cannot be read, or a given column is missing.
    """
    with foreign_errors(f"{path} cannot be read as Parquet"), pq.ParquetFile(path) as file:
        if lacking := sorted(set(columns) - set(file.schema_arrow.names)):
            raise DataError(f"{path} lacks the columns {', '.join(lacking)}")
        return read_open_table(file, path, None if others else columns)
