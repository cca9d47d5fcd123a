"""Compute the gradient store of rollouts, shard by shard.

A shard is a fixed run of prompts and one Zarr shard. Within it, blocks of ``block_rows`` prompts are batched
independently, so a row depends neither on the number of workers nor on the size of the shards. Prompts whose gradient
is exactly zero or undefined are not run; their status gives the reason.
"""

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cropi_core.errors import ConfigError, DataError
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.groups import Group, group_rollouts
from cropi_core.gradients.job import FeatureSettings, Job, ShardPlan, Spread
from cropi_core.gradients.self_checks import self_test
from cropi_core.gradients.shards import compute_here, compute_in_workers, load_engine
from cropi_core.gradients.store import GradientStore
from cropi_core.gradients.summary import summarise
from cropi_core.policy import Checkpoint, release_device
from cropi_core.progress import Progress, Report, silent
from cropi_core.rollouts import read_rollouts, sampling_of
from data_schemas import Runtime

pc: Any = pyarrow.compute  # its functions are made at import time; type checkers see none of them


def extract_gradients(
    *,
    policy: Checkpoint,
    rollouts: Path,
    out: Path,
    settings: FeatureSettings = FeatureSettings(),
    runtime: Runtime = Runtime(),
    report: Report = silent,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Compute the features of every prompt of ``rollouts`` under ``policy`` into the store ``out``.

    Args:
        policy: The current policy.
        rollouts: Directory of parts, or one Parquet file.
        out: The Zarr group; complete shards in it are kept.
        settings: Objective, projection and layout.
        runtime: Device, threads, token budget, workers.
        report: Receives the number of prompts done.
        spread: Dispatches the shards, as ``runtime.ray`` requires; None computes them in this process and its workers.

    Returns:
        Summary: status counts, medians of ESS, ratios, norm, the projection's self-test.

    Raises:
        DataError: The rollouts cannot be used.
        ProjectionError: The self-test failed, or the engine does not support a parameter.
        StepError: A shard failed, or its process died twice; the other shards are kept for the next call.
        ConfigError: ``runtime.ray`` is set without ``spread``.
    """
    if runtime.ray and spread is None:
        raise ConfigError(
            "runtime.ray distributes shards through Prefect, and this call runs without Prefect. Use `cropi run` or "
            "a flow of flows/single_steps.py, or remove runtime.ray and set runtime.workers"
        )
    table = read_rollouts(rollouts)
    groups = group_rollouts(table, settings.objective.min_gradable)
    job = Job(replace(policy, path=policy.path.absolute()), settings, sampling_of(table), runtime)
    plan = ShardPlan(job, out.absolute(), _threads(runtime))
    engine = load_engine(job, plan.threads)
    check_vocabulary(table, int(engine.model.get_input_embeddings().weight.shape[0]), str(rollouts))  # pyright: ignore
    attributes = _describe(job, engine, table)
    store = _create_store(plan, groups, engine.k, attributes)
    run = spread or (
        compute_in_workers if runtime.workers > 1 and store.shards > 1 else partial(compute_here, engine)
    )
    del engine  # workers load their own, possibly onto the same GPU
    release_device(runtime.device)
    _fill(plan, store, groups, run, report)
    store.finish()
    return summarise(GradientStore.open(out), attributes, Counter(table["prompt_id"].to_pylist()))


def check_vocabulary(table: pa.Table, size: int, what: str) -> None:
    """Refuse token ids that a checkpoint does not have.

    Raises:
        DataError: Names the first row with one.
    """
    for name in ("prompt_ids", "completion_ids"):
        column = table[name].combine_chunks()
        ids = column.flatten().to_numpy(zero_copy_only=False)
        outside = np.flatnonzero((ids < 0) | (ids >= size))
        if len(outside):
            row = int(pc.list_parent_indices(column)[int(outside[0])].as_py()) + 1
            raise DataError(
                f"{what}: {name} of row {row} holds the token {ids[outside[0]]}, and the policy has {size} tokens. "
                "Were the rollouts sampled by another model?"
            )


def _create_store(plan: ShardPlan, groups: list[Group], k: int, attributes: dict[str, Any]) -> GradientStore:
    """Create the store of a plan, or open the one that an interrupted call left."""
    return GradientStore.create(
        plan.store,
        [g.prompt_id for g in groups],
        k=k,
        dtype=plan.job.settings.projection.dtype,
        rows_per_shard=plan.job.settings.layout.rows_per_shard,
        attributes=attributes,
    )


def _threads(runtime: Runtime) -> int:
    """Return the number of torch threads in each process; on a cluster, the processors that a worker requests."""
    if runtime.threads or runtime.ray:
        return runtime.threads or 1
    return max(1, (os.cpu_count() or 1) // runtime.workers)


def _describe(job: Job, engine: FeatureEngine, table: pa.Table) -> dict[str, Any]:
    """Test the projection and return the attributes of the store."""
    projection = job.settings.projection
    sketches = {name: replace(sketch, metric=None) for name, sketch in engine.sketches.items()}
    tested = self_test(sketches, projection, engine.model.device)
    metadata = table.schema.metadata or {}
    return {
        "projection": projection.model_dump(mode="json"),
        "coverage": {name: round(tested[name], 6) for name in ("coverage", "coverage_min", "coverage_max")},
        "objective": job.settings.objective.model_dump(mode="json"),
        "max_new_tokens": job.max_new_tokens,
        "temperature": job.sampling.temperature,
        "samples": job.sampling.samples,
        "policy": job.policy.content_digest(),
        "behavior_policy": metadata.get(b"cropi.policy", b"unknown").decode(),
        "parameters": sum(s.shape[0] * s.shape[1] for s in engine.sketches.values()),
        "left_out": engine.left_out,
        **({} if engine.layers == "all" else {"layers": engine.layers}),
        "norm": "exact" if projection.kind == "none" else "estimated by the norm of the feature",
        "dtype": job.policy.dtype,
    }


def _fill(plan: ShardPlan, store: GradientStore, groups: list[Group], run: Spread, report: Report) -> None:
    """Compute the missing shards and report the prompts done."""
    missing = {s: [groups[i] for i in store.shard_rows(s)] for s in range(store.shards) if not store.done(s)}
    left = sum(map(len, missing.values()))

    def report_shard(shard: int) -> None:
        nonlocal left
        left -= len(missing[shard])
        report(Progress(len(groups) - left, len(groups), "prompt"))

    report(Progress(len(groups) - left, len(groups), "prompt"))
    if missing:
        run(plan, missing, report_shard)
