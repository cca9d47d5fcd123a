"""Rollouts: completions of a policy with behaviour log-probabilities and rewards, part by part in Parquet.

Each part is one shard of prompts, written whole and renamed into place, so that a stop costs at most the part under
way. The policy's digest, the sampling settings and the seed travel in every part's metadata.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cropi_core.errors import DataError
from cropi_core.policy import load_policy, render
from cropi_core.progress import Progress, Report
from cropi_core.prompts import read_prompts
from cropi_core.sampling import sample
from cropi_core.tables import write_parquet
from cropi_core.verifiers import Grade, Verifier
from data_schemas.arrow import ROLLOUTS
from data_schemas.config import Grading, Runtime, Sampling


def collect(
    *,
    policy: Path,
    policy_digest: str,
    prompts: Path,
    out: Path,
    sampling: Sampling,
    grading: Grading,
    dtype: str,
    seed: int,
    shard_prompts: int,
    runtime: Runtime,
    report: Report,
) -> dict[str, Any]:
    """Sample and grade completions of every prompt into ``out/part-*.parquet``, going on from the parts there.

    Args:
        policy: Checkpoint directory of the behaviour policy.
        policy_digest: Its content digest, for the metadata.
        prompts: Prompts table (Parquet).
        out: Directory of the parts.
        sampling: Distribution and number of samples.
        grading: Limits of the verifier.
        dtype: Weights' type.
        seed: See :func:`cropi_core.sampling.sample`.
        shard_prompts: Prompts a part.
        runtime: Device, threads and rows generated together.
        report: Told the prompts done.

    Returns:
        Summary: counts, mean reward, share truncated and not gradable, pass rates by source.

    Raises:
        DataError: A prompt is too long for the policy.
        PolicyError: The checkpoint cannot be used.
    """
    table = read_prompts(prompts)
    out.mkdir(parents=True, exist_ok=True)
    rows = table.to_pylist()
    shards = [rows[i : i + shard_prompts] for i in range(0, len(rows), shard_prompts)]
    metadata = {
        b"cropi.policy": policy_digest.encode(),
        b"cropi.sampling": sampling.model_dump_json().encode(),
        b"cropi.seed": str(seed).encode(),
    }
    missing = [i for i in range(len(shards)) if not part_path(out, i).exists()]
    if missing:
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        model, tokenizer = load_policy(policy, dtype, runtime.device)
        with Verifier(timeout=grading.timeout_s, memory_mb=grading.memory_mb) as verifier:
            for i in missing:
                done = sum(len(s) for j, s in enumerate(shards) if j < i)
                report(Progress(done, len(rows), "prompt"))
                part = _shard(model, tokenizer, verifier, shards[i], sampling, seed, runtime.generation_rows)
                write_parquet(part.replace_schema_metadata(metadata), part_path(out, i))
    report(Progress(len(rows), len(rows), "prompt"))
    return summarise(
        read_rollouts(out),
        dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True)),
    )


def _shard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    verifier: Verifier,
    rows: list[dict[str, Any]],
    sampling: Sampling,
    seed: int,
    batch: int,
) -> pa.Table:
    """Sample and grade one shard of prompts."""
    prompt_ids = {row["prompt_id"]: render(tokenizer, row["messages"]) for row in rows}
    groups = sample(model, tokenizer, list(prompt_ids.items()), sampling, seed=seed, rows=batch)
    records: list[dict[str, Any]] = []
    items = []
    for row, group in zip(rows, groups, strict=True):
        for i, completion in enumerate(group):
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            items.append((row["verifier"], text, row["answer"]))
            records.append(
                {
                    "prompt_id": row["prompt_id"],
                    "sample": i,
                    "prompt_ids": prompt_ids[row["prompt_id"]],
                    "completion_ids": completion.ids,
                    "behavior_logprobs": completion.logprobs,
                    "text": text,
                    "finish_reason": completion.finish_reason,
                }
            )
    grades: list[Grade] = verifier.grade_many(items)
    for record, grade in zip(records, grades, strict=True):
        record["reward"] = grade.reward
    return pa.Table.from_pylist(records, schema=ROLLOUTS)


def part_path(directory: Path, index: int) -> Path:
    """Name the part of a shard."""
    return directory / f"part-{index:05d}.parquet"


def read_rollouts(path: Path) -> pa.Table:
    """Read rollouts from a directory of parts, in order, or from one Parquet file.

    Raises:
        DataError: There is none, a column is missing or of another type, or a prompt's rows are not together.
    """
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(
            f"{path} holds no rollouts; a directory of part-*.parquet or one Parquet file is wanted"
        )
    tables = []
    for file in files:
        table = pq.read_table(file)
        missing = [name for name in ROLLOUTS.names if name not in table.column_names]
        if missing:
            raise DataError(
                f"{file} lacks the columns {', '.join(missing)} of rollouts; it has {table.column_names}"
            )
        try:
            tables.append(table.select(ROLLOUTS.names).cast(ROLLOUTS.with_metadata(table.schema.metadata)))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise DataError(f"{file} does not have the types of rollouts: {error}") from error
    whole = pa.concat_tables(tables)
    check_rollouts(whole, path)
    return whole


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Return the length of every list of a column, (rows,)."""
    return column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def check_rollouts(table: pa.Table, path: Path) -> None:
    """Check what the estimator relies on: grouped prompts, unique samples, equal lengths, finite numbers.

    Raises:
        DataError: Names the first faults.
    """
    faults = []
    if table.num_rows == 0:
        faults.append("it is empty")
    ids = np.asarray(table["prompt_id"].to_pylist(), dtype=object)
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1)] if len(ids) else []
    scattered = [name for name, count in Counter(ids[i] for i in starts).items() if count > 1]
    if scattered:
        faults.append(f"rows of {scattered[:3]} are not together")
    pairs = Counter(zip(ids, table["sample"].to_pylist(), strict=True))
    if doubled := [pair for pair, count in pairs.items() if count > 1]:
        faults.append(f"(prompt_id, sample) occurs twice: {doubled[:3]}")
    lengths = list_lengths(table["completion_ids"])
    if (lengths != list_lengths(table["behavior_logprobs"])).any():
        faults.append("completion_ids and behavior_logprobs differ in length")
    if (lengths == 0).any():
        faults.append("a completion has no tokens")
    rewards = table["reward"].drop_null().to_numpy()
    if not np.isfinite(rewards).all():
        faults.append("a reward is NaN or infinite; not gradable is null")
    logprobs = table["behavior_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not np.isfinite(logprobs).all():
        faults.append("a behaviour log-probability is not finite")
    if faults:
        raise DataError(f"{path} holds no usable rollouts: " + "; ".join(faults))


def sampling_of(table: pa.Table) -> Sampling:
    """Read the sampling settings from the metadata.

    Raises:
        DataError: There are none: a ratio to an unknown distribution means nothing.
    """
    raw = (table.schema.metadata or {}).get(b"cropi.sampling")
    if raw is None:
        raise DataError(
            "these rollouts do not say how they were sampled (metadata cropi.sampling); import them again"
        )
    return Sampling.model_validate_json(raw)


def summarise(table: pa.Table, sources: dict[str, str]) -> dict[str, Any]:
    """Count and average rollouts for the manifest: what a person asks first."""
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
    return {
        "prompts": len(groups),
        "completions": table.num_rows,
        "tokens": int(lengths.sum()),
        "mean_tokens": float(lengths.mean()),
        "mean_reward": float(np.nanmean(rewards)) if means else None,
        "not_gradable": int(np.isnan(rewards).sum()),
        "truncated": table["finish_reason"].to_pylist().count("length"),
        "no_variance": dead,
        "pass_rate_histogram": np.histogram(list(means.values()), bins=10, range=(0, 1))[0].tolist(),
        "pass_rate_by_source": {s: float(np.mean(v)) for s, v in sorted(by_source.items())},
        "sampling": json.loads(metadata[b"cropi.sampling"]) if b"cropi.sampling" in metadata else None,
    }
