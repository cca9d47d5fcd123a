"""Tables of rollouts: completions with behaviour log-probabilities and rewards, read and checked."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from cropi_core.artifacts import JSONL, check_field_names, read_parquet
from cropi_core.errors import ConfigError, DataError, foreign_errors, in_one_line
from cropi_core.statistics import pass_rate_counts
from data_schemas import ROLLOUTS, Sampling, rollouts_schema


def part_path(directory: Path, index: int) -> Path:
    """Return the path of a shard's part."""
    return directory / f"part-{index:05d}.parquet"


def read_rollouts(path: Path) -> pa.Table:
    """Read rollouts from a directory of parts, in order, or from one Parquet file.

    Raises:
        DataError: There are no rollouts, a column is missing or has another type, or a prompt's rows are not adjacent.
    """
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"{path} holds no rollouts. Give a directory of part-*.parquet or one Parquet file")
    combined = join_rollouts([read_part(file) for file in files])
    check_rollouts(combined, path)
    return combined


def read_part(file: Path) -> pa.Table:
    """Read one file of rollouts, without checking its rows.

    Raises:
        ConfigError: It is JSONL.
        DataError: A column is missing or has another type.
    """
    if file.suffix in JSONL:
        raise ConfigError(
            f"{file} is JSONL, and rollouts are read as Parquet here: `cropi artifacts import rollouts {file}` "
            "checks and converts it"
        )
    table = read_parquet(file)
    check_field_names(table.schema, str(file))
    missing = [name for name in ROLLOUTS.names if name not in table.column_names]
    if missing:
        raise DataError(f"{file} lacks the rollout columns {', '.join(missing)}; it has {table.column_names}")
    schema = rollouts_schema(table.column_names)
    with foreign_errors(f"{file} does not have the column types of rollouts"):
        return table.select(schema.names).cast(schema.with_metadata(table.schema.metadata))


def join_rollouts(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate rollouts; an optional column that some lack is null there."""
    return pa.concat_tables(tables, promote_options="default")


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Return the length of every list of a column, (rows,)."""
    return column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def check_rollouts(table: pa.Table, path: Path) -> None:
    """Check the assumptions of the estimator: grouped prompts, unique samples, equal lengths, finite numbers.

    Raises:
        DataError: An assumption is violated; the message lists the first faults.
    """
    faults = []
    if table.num_rows == 0:
        faults.append("it is empty")
    ids = np.asarray(table["prompt_id"].to_pylist(), dtype=object)
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1)] if len(ids) else []
    scattered = [name for name, count in Counter(ids[i] for i in starts).items() if count > 1]
    if scattered:
        faults.append(f"the rows of {scattered[:3]} are not adjacent")
    pairs = Counter(zip(ids, table["sample"].to_pylist(), strict=True))
    if doubled := [pair for pair, count in pairs.items() if count > 1]:
        faults.append(f"(prompt_id, sample) occurs twice: {doubled[:3]}")
    lengths = list_lengths(table["completion_ids"])
    if (lengths != list_lengths(table["behavior_logprobs"])).any():
        faults.append("completion_ids and behavior_logprobs differ in length")
    for name, subject in (("completion_ids", "a completion"), ("prompt_ids", "a prompt")):
        if len(empty := np.flatnonzero(list_lengths(table[name]) == 0)):
            faults.append(
                f"{subject} has no tokens (row {empty[0] + 1}{f', {len(empty)} in all' * (len(empty) > 1)})"
            )
    if "completion_mask" in table.column_names:
        faults += _mask_faults(table["completion_mask"], lengths)
    rewards = table["reward"].drop_null().to_numpy()
    if not np.isfinite(rewards).all():
        faults.append("a reward is NaN or infinite; if a completion is not gradable, its reward must be null")
    logprobs = table["behavior_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not np.isfinite(logprobs).all():
        faults.append("a behaviour log-probability is not finite")
    if faults:
        raise DataError(f"{path} does not hold valid rollouts: " + "; ".join(faults))


def _mask_faults(masks: pa.ChunkedArray, lengths: np.ndarray) -> list[str]:
    """Return what is wrong with the masks of conversations."""
    faults, rows = [], masks.to_pylist()
    if wrong := [i for i, mask in enumerate(rows) if mask is not None and len(mask) != lengths[i]]:
        faults.append(f"completion_mask and completion_ids differ in length (row {wrong[0] + 1})")
    if wrong := [i for i, mask in enumerate(rows) if mask is not None and True not in mask]:
        faults.append(f"completion_mask marks no token that the policy sampled (row {wrong[0] + 1})")
    return faults


def sampling_of(table: pa.Table) -> Sampling:
    """Read the sampling settings from the metadata.

    Raises:
        DataError: There are none; importance ratios require a known distribution.
    """
    raw = (table.schema.metadata or {}).get(b"cropi.sampling")
    if raw is None:
        raise DataError(
            "these rollouts do not state how they were sampled (metadata cropi.sampling). Import them again with "
            "`cropi artifacts import rollouts`"
        )
    try:
        return Sampling.model_validate_json(raw)
    except ValidationError as error:
        raise DataError(
            f"the metadata cropi.sampling of the rollouts is invalid: {in_one_line(error)}"
        ) from error


def summarise_rollouts(table: pa.Table, sources: dict[str, str]) -> dict[str, Any]:
    """Count and average rollouts for the manifest."""
    rewards = table["reward"].to_numpy(zero_copy_only=False).astype(np.float64)
    ids = table["prompt_id"].to_pylist()
    groups: dict[str, list[float]] = {}
    for name, reward in zip(ids, rewards, strict=True):
        groups.setdefault(name, []).append(reward)
    means = {n: float(np.mean([r for r in g if r == r])) for n, g in groups.items() if any(r == r for r in g)}
    dead = sum(1 for g in groups.values() if len({r for r in g if r == r}) < 2)
    by_source: dict[str, list[float]] = {}
    for name, mean in means.items():
        by_source.setdefault(sources.get(name, "unknown"), []).append(mean)
    lengths = list_lengths(table["completion_ids"])
    metadata = table.schema.metadata or {}
    terms = mean_terms(table["reward_terms"].to_pylist()) if "reward_terms" in table.column_names else {}
    return {
        "prompts": len(groups),
        "completions": table.num_rows,
        "tokens": int(lengths.sum()),
        "mean_tokens": float(lengths.mean()),
        "length_histogram": _binned(lengths),
        "mean_reward": float(np.nanmean(rewards)) if means else None,
        **({"mean_reward_terms": terms} if terms else {}),
        "not_gradable": int(np.isnan(rewards).sum()),
        "truncated": table["finish_reason"].to_pylist().count("length"),
        "no_variance": dead,
        "pass_rate_histogram": pass_rate_counts(list(means.values())),
        "pass_rate_by_source": {s: float(np.mean(v)) for s, v in sorted(by_source.items())},
        "sampling": json.loads(metadata[b"cropi.sampling"]) if b"cropi.sampling" in metadata else None,
    }


def mean_terms(terms: Sequence[list[dict[str, Any]] | None]) -> dict[str, float | None]:
    """Average each term of weighted sums over the completions for which it has a value; None if there is none."""
    values: dict[str, list[float]] = {}
    for row in terms:
        for term in row or []:
            known = values.setdefault(term["verifier"], [])
            if term["reward"] is not None:
                known.append(term["reward"])
    return {name: float(np.mean(known)) if known else None for name, known in sorted(values.items())}


def _binned(lengths: np.ndarray) -> dict[str, list[int]]:
    """Count completions by length, in at most 16 equal bins of whole tokens."""
    width = max(1, -(-int(lengths.max(initial=0) + 1) // 16))
    counts = np.bincount(lengths // width)
    return {"counts": counts.tolist(), "edges": [width * i for i in range(len(counts) + 1)]}
