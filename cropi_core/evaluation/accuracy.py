"""Accuracy of a policy by set of prompts, with a 95 % interval and the completions it was computed from.

Completions are sampled shard by shard below ``scratch`` (:func:`cropi_core.rollouts.sample_rollouts`), so an
interruption costs at most one shard. The two output files contain no time and no path: equal evaluations give equal
bytes.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import write_atomic, write_parquet
from cropi_core.errors import DataError
from cropi_core.evaluation.intervals import effective_samples, interval
from cropi_core.evaluation.parts import set_parts
from cropi_core.evaluation.pass_at import set_pass_at
from cropi_core.policy import Checkpoint
from cropi_core.progress import Progress, Report, silent
from cropi_core.prompts import read_prompts
from cropi_core.rollouts import (
    RolloutPlan,
    check_sources,
    list_lengths,
    mean_terms,
    open_sampler,
    parity_summary,
    read_rollouts,
    sample_rollouts,
)
from data_schemas import EVALUATION, Evaluation, Grading, Runtime

TERMS = "reward_terms"
"""Column that completions graded by a weighted sum of verifiers also have, as in rollouts."""
SHARD_PROMPTS = 64
"""Prompts in a shard, the most that an interruption can cost. Completions do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFiles:
    """Outputs and scratch directory of one evaluation.

    Attributes:
        completions: Parquet file to write, one row for each completion, sets in the order of their names.
        accuracy: JSON file to write: :func:`set_accuracy` by set.
        scratch: Directory of the shards; deleted at the end.
        keep_scratch: Do not delete ``scratch``; the caller removes it once the manifest is published.
        logs: Directory for the logs of started servers; by default next to ``completions``.
    """

    completions: Path
    accuracy: Path
    scratch: Path
    keep_scratch: bool = False
    logs: Path | None = None


def evaluate(
    *,
    policy: Checkpoint,
    sets: Mapping[str, Path],
    files: EvaluationFiles,
    settings: Evaluation,
    grading: Grading,
    runtime: Runtime,
    report: Report = silent,
) -> dict[str, Any]:
    """Sample, grade and average every set, resuming from the shards in ``files.scratch``.

    Args:
        policy: Policy to measure.
        sets: Prompts tables (Parquet) by name.
        files: Files to write.
        settings: Sampling and seed.
        grading: Verifiers and their limits.
        runtime: Device, threads and rows generated together; servers of vLLM.
        report: Receives the number of prompts done, over all sets.

    Returns:
        ``{"accuracy": {set: {accuracy, low, high, prompts, completions, not_gradable}}, ...}`` and totals, and
        by set the accuracy of its ``parts`` (:func:`cropi_core.evaluation.parts.set_parts`). With `evaluation.pass_at`
        each set also has ``pass_at`` (:func:`cropi_core.evaluation.pass_at.set_pass_at`).

    Raises:
        DataError: There is no set, or no completion of a set can be graded.
    """
    if not sets:
        raise DataError("there is no set to evaluate: name at least one under data.validation or data.test")
    logs = files.logs or files.completions.with_name("vllm.logs")
    plan = RolloutPlan(
        settings.sampling,
        settings.seed,
        SHARD_PROMPTS,
        settings.engine,
        by_source=settings.samples_by_source,
        keep_checksums=True,
    )
    if plan.by_source:
        columns = [read_prompts(path)["source"].to_pylist() for path in sets.values()]
        check_sources(plan.by_source, [source for column in columns for source in column])
    with open_sampler(settings.engine, policy=policy, runtime=runtime, logs=logs) as sampler:
        sample_set = partial(
            sample_rollouts,
            policy=policy,
            plan=plan,
            grading=grading,
            runtime=runtime,
            sampler=sampler,
        )
        tables, reasons = _sample_sets(sample_set, sets, files.scratch, report)
    results = {
        name: set_accuracy(table, name, reasons[name], settings.pass_at) for name, table in tables.items()
    }
    joined = pa.concat_tables(tables.values(), promote_options="default")
    write_parquet(joined.combine_chunks(), files.completions)
    write_atomic(files.accuracy, json.dumps(results, indent=1, sort_keys=True) + "\n")
    summary = _summary(results, tables, settings)
    parts = {
        name: set_parts(read_prompts(path), _graded(tables[name])) for name, path in sorted(sets.items())
    }
    if any(parts.values()):
        summary["parts"] = {name: some for name, some in parts.items() if some}
    if settings.engine == "vllm":
        summary["parity"] = parity_summary(
            [files.scratch / name for name in tables], policy.dtype, runtime.vllm
        )
    if not files.keep_scratch:
        shutil.rmtree(files.scratch)
    return summary


def _sample_sets(
    sample_set: Callable[..., dict[str, Any]], sets: Mapping[str, Path], scratch: Path, report: Report
) -> tuple[dict[str, pa.Table], dict[str, dict[str, int]]]:
    """Sample and grade every set, in the order of their names.

    Args:
        sample_set: :func:`cropi_core.rollouts.sample_rollouts` with the arguments that all sets share.
        sets: Prompts tables by name.
        scratch: Directory of the shards, one subdirectory a set.
        report: Receives the number of prompts done, over all sets.

    Returns:
        Rows of :data:`data_schemas.tables.EVALUATION` by set, and why completions are not gradable by set.
    """
    sizes = {name: read_prompts(path).num_rows for name, path in sorted(sets.items())}
    tables: dict[str, pa.Table] = {}
    reasons: dict[str, dict[str, int]] = {}
    before = 0
    for name, size in sizes.items():
        graded = sample_set(
            prompts=sets[name], out=scratch / name, report=_within(report, before, sizes, name)
        )
        tables[name] = evaluation_table(name, read_rollouts(scratch / name))
        reasons[name] = graded.get("not_gradable_reasons", {})
        before += size
    return tables, reasons


def _summary(
    results: Mapping[str, Mapping[str, Any]], tables: Mapping[str, pa.Table], settings: Evaluation
) -> dict[str, Any]:
    """Summarise an evaluation for its manifest."""
    shown = (
        "accuracy",
        "low",
        "high",
        "prompts",
        "completions",
        "not_gradable",
        "pass_at",
        "mean_reward_terms",
    )
    return {
        "accuracy": {
            name: {key: result[key] for key in shown if key in result} for name, result in results.items()
        },
        "completions": sum(table.num_rows for table in tables.values()),
        "tokens": sum(int(table["tokens"].to_numpy().sum()) for table in tables.values()),
        "samples": settings.sampling.samples,
        **({"samples_by_source": dict(settings.samples_by_source)} if settings.samples_by_source else {}),
    }


def _within(report: Report, before: int, sizes: dict[str, int], name: str) -> Report:
    """Convert the progress of one set to progress over all sets."""
    total = sum(sizes.values())
    return lambda progress: report(Progress(before + progress.done, total, "prompt", name))


def evaluation_table(name: str, rollouts: pa.Table) -> pa.Table:
    """Convert a set's rollouts to rows of :data:`data_schemas.tables.EVALUATION`."""
    columns = {
        "set": pa.array([name] * rollouts.num_rows, pa.string()),
        "tokens": pa.array(list_lengths(rollouts["completion_ids"])),
        **{key: rollouts[key] for key in ("prompt_id", "sample", "text", "reward", "finish_reason")},
    }
    table = pa.Table.from_arrays([columns[key] for key in EVALUATION.names], schema=EVALUATION)
    if TERMS not in rollouts.column_names:
        return table
    return table.append_column(rollouts.schema.field(TERMS), rollouts[TERMS])


def set_accuracy(
    table: pa.Table,
    name: str,
    reasons: Mapping[str, int] = MappingProxyType({}),
    pass_at: Sequence[int] = (),
) -> dict[str, Any]:
    """Average the rewards of one set: first over a prompt's graded completions, then over prompts.

    Args:
        table: The set's rows of :data:`data_schemas.tables.EVALUATION`.
        name: Name of the set, for error messages.
        reasons: Why completions are not gradable, for error messages, the most frequent first.
        pass_at: Values of k whose pass@k is estimated.

    Returns:
        ``accuracy`` with its interval ``low`` to ``high`` (:func:`cropi_core.evaluation.intervals.interval`),
        ``prompts`` and ``completions`` of the set, ``graded_prompts`` with at least one graded completion,
        ``not_gradable`` completions, ``mean_tokens`` of a completion, ``truncated`` share of the completions,
        ``effective_samples``, ``pass_at`` if it has values of k, and with weighted sums of verifiers
        ``mean_reward_terms``, the mean over completions by term.

    Raises:
        DataError: No completion of the set can be graded, or a reward is outside [0, 1].
    """
    groups = _graded(table)
    graded = [group for group in groups.values() if group]
    if not graded:
        raise DataError(
            f"set {name}: none of {table.num_rows} completions can be graded. Check its answers and verifiers, "
            "grading.timeout_s and grading.memory_mb"
            + "".join(f". Most often: {reason}" for reason in list(reasons)[:1])
        )
    if outside := [r for group in graded for r in group if not 0 <= r <= 1]:
        raise DataError(f"set {name}: accuracy needs rewards in [0, 1], and there are others: {outside[:3]}")
    means = np.array([np.mean(group) for group in graded])
    completions = sum(map(len, graded))
    low, high = interval(means, completions)
    terms = mean_terms(table[TERMS].to_pylist()) if TERMS in table.column_names else {}
    return {
        "accuracy": float(means.mean()),
        "low": low,
        "high": high,
        "prompts": len(groups),
        "graded_prompts": len(graded),
        "completions": table.num_rows,
        "not_gradable": table.num_rows - completions,
        "effective_samples": effective_samples(means, completions),
        "mean_tokens": float(table["tokens"].to_numpy().mean()),
        "truncated": table["finish_reason"].to_pylist().count("length") / table.num_rows,
        **({"pass_at": set_pass_at(graded, pass_at)} if pass_at else {}),
        **({"mean_reward_terms": terms} if terms else {}),
    }


def _graded(table: pa.Table) -> dict[str, list[float]]:
    """Return the rewards of the graded completions by prompt; a prompt may have none."""
    groups: dict[str, list[float]] = {}
    for row in table.select(["prompt_id", "reward"]).to_pylist():
        group = groups.setdefault(row["prompt_id"], [])
        if row["reward"] is not None:
            group.append(row["reward"])
    return groups
