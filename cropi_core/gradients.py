"""Gradients: from rollouts to the gradient store, shard by shard.

A shard is a fixed run of prompts and one Zarr shard; within it, blocks of ``block_rows`` prompts are batched on their
own, so neither the number of workers nor the size of the shards can change a row. Prompts whose gradient is exactly
zero, or undefined, are never run: their status says why.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cropi_core.checkpoint import tree_digest
from cropi_core.features import FeatureEngine
from cropi_core.gradient_store import GradientStore
from cropi_core.group_features import Budget, Job, project_blocks
from cropi_core.groups import NOT_FINITE, OK, Group, group_rollouts
from cropi_core.policy import load_policy
from cropi_core.progress import Progress, Report, silent
from cropi_core.rollouts import read_rollouts, sampling_of
from cropi_core.self_test import check_reading, plain_logprobs, self_test
from cropi_core.shard_pool import compute_shards
from data_schemas.arrow import STATUSES
from data_schemas.config import Gradients, Objective, Projection, Runtime

FIGURES = ("norm", "ess", "max_ratio", "clip_fraction", "kl", "kl_k1", "entropy", "mean_reward")


def compute(
    *,
    policy: Path,
    rollouts: Path,
    out: Path,
    objective: Objective = Objective(),
    projection: Projection = Projection(),
    layout: Gradients = Gradients(),
    dtype: str = "float32",
    policy_digest: str | None = None,
    max_new_tokens: int | None = None,
    runtime: Runtime = Runtime(),
    report: Report = silent,
) -> dict[str, Any]:
    """Compute the features of every prompt of ``rollouts`` under ``policy`` into the store ``out``.

    Args:
        policy: Checkpoint directory of the current policy.
        rollouts: Directory of parts, or one Parquet file.
        out: The Zarr group; whole shards found there are kept.
        objective: Token weights.
        projection: Gradient to feature.
        layout: Rows a shard and a block.
        dtype: Weights' type.
        policy_digest: The policy's content digest; computed when None.
        max_new_tokens: L_max of ``dr_grpo``; that of the rollouts when None.
        runtime: Device, threads, token budget, workers.
        report: Told the prompts done.

    Returns:
        Summary: status counts, medians of ESS, ratios, norm, the projection's self-test.

    Raises:
        DataError: The rollouts cannot be used.
        ProjectionError: The self-test failed, or a parameter is out of the engine's reach.
        StepError: A shard failed, or its process died twice; the others are kept for the next call.
    """
    table = read_rollouts(rollouts)
    groups = group_rollouts(table, objective.min_gradable)
    sampling = sampling_of(table)
    longest = max_new_tokens or sampling.max_new_tokens
    job = Job(policy, dtype, objective, projection, layout, sampling, longest, runtime)
    threads = runtime.threads or max(1, (os.cpu_count() or 1) // runtime.workers)
    engine = load_engine(job, threads)
    attributes = _describe(job, engine, policy_digest or tree_digest(policy), table)
    store = GradientStore.create(
        out,
        [g.prompt_id for g in groups],
        k=engine.k,
        dtype=projection.dtype,
        rows_per_shard=layout.rows_per_shard,
        attributes=attributes,
    )
    todo = [s for s in range(store.shards) if not store.finished and not store.done(s)]
    done = len(groups) - sum(len(store.shard_rows(s)) for s in todo)
    report(Progress(done, len(groups), "prompt"))
    for shard in _run_shards(job, engine, store, groups, todo, threads):
        done += len(store.shard_rows(shard))
        report(Progress(done, len(groups), "prompt"))
    store.finish()
    return summarise(GradientStore.open(out), attributes)


def load_engine(job: Job, threads: int) -> FeatureEngine:
    """Load the model with its hooks, on ``threads`` threads."""
    torch.set_num_threads(1 if job.layout.deterministic else threads)
    model, _ = load_policy(job.policy, job.dtype, job.runtime.device, attention="eager")
    expected = plain_logprobs(model)
    engine = FeatureEngine(model, job.projection)
    check_reading(engine, expected)
    return engine


def _describe(job: Job, engine: FeatureEngine, policy_digest: str, table: pa.Table) -> dict[str, Any]:
    """Test the projection, and say what the features will be."""
    tested = self_test(engine.sketches, job.projection, engine.model.device)
    metadata = table.schema.metadata or {}
    return {
        "projection": job.projection.model_dump(mode="json"),
        "coverage": {name: round(tested[name], 6) for name in ("coverage", "coverage_min", "coverage_max")},
        "objective": job.objective.model_dump(mode="json"),
        "max_new_tokens": job.max_new_tokens,
        "temperature": job.sampling.temperature,
        "samples": job.sampling.samples,
        "policy": policy_digest,
        "behavior_policy": metadata.get(b"cropi.policy", b"unknown").decode(),
        "parameters": sum(s.shape[0] * s.shape[1] for s in engine.sketches.values()),
        "left_out": engine.left_out,
        "norm": "exact" if job.projection.kind == "none" else "estimated by the norm of the feature",
        "dtype": job.dtype,
    }


# -- shards ----------------------------------------------------------------------------------------------------------


def _run_shards(
    job: Job, engine: FeatureEngine, store: GradientStore, groups: list[Group], todo: list[int], threads: int
) -> Iterator[int]:
    """Compute the missing shards, with ``engine`` or in workers of their own; yields each when it is on disk."""
    slices = {s: [groups[i] for i in store.shard_rows(s)] for s in todo}
    workers = min(job.runtime.workers, len(todo))
    if workers <= 1:
        worker = Worker(job, engine, store)
        for shard in todo:
            worker.write(shard, slices[shard])
            yield shard
        return
    arguments = (job, store.path, [g.prompt_id for g in groups], store.k, store.attributes, threads)
    yield from compute_shards(slices, workers, _start_worker, arguments)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch take no algorithm whose sums come in any order, such as atomic adds on a GPU."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Worker:
    """A model with its engine, writing shards of one store."""

    def __init__(self, job: Job, engine: FeatureEngine, store: GradientStore) -> None:
        self.job, self.engine, self.store = job, engine, store
        self.budget = Budget(job.runtime.token_budget)

    def write(self, shard: int, groups: list[Group]) -> None:
        """Compute and write one shard."""
        features = np.zeros((len(groups), self.engine.k), dtype=np.float32)
        figures = {name: np.full(len(groups), np.nan, dtype=np.float32) for name in FIGURES}
        status = np.array([g.status for g in groups], dtype=np.uint8)
        tokens = np.array([g.tokens if g.status == OK else 0 for g in groups], dtype=np.int32)
        for i, group in enumerate(groups):
            if len(group.rewards):
                figures["mean_reward"][i] = group.rewards.mean()
        with deterministic_algorithms(self.job.layout.deterministic):
            for i, row, found in project_blocks(self.engine, groups, self.job, self.budget):
                if not np.isfinite(row).all():
                    status[i] = NOT_FINITE
                    continue
                features[i] = row
                for name, value in found.items():
                    figures[name][i] = value
                figures["norm"][i] = np.linalg.norm(row.astype(np.float64))
        self.store.write_shard(shard, features, {"status": status, "tokens": tokens, **figures})


def _start_worker(
    job: Job, path: Path, ids: list[str], k: int, attributes: dict[str, Any], threads: int
) -> Callable[[int, list[Group]], None]:
    """Load what a process of :func:`cropi_core.shard_pool.compute_shards` needs."""
    store = GradientStore.create(
        path,
        ids,
        k=k,
        dtype=job.projection.dtype,
        rows_per_shard=job.layout.rows_per_shard,
        attributes=attributes,
    )
    return Worker(job, load_engine(job, threads), store).write


def summarise(store: GradientStore, attributes: dict[str, Any]) -> dict[str, Any]:
    """Count and average the store's columns for the manifest."""
    status = store.column("status")
    ok = status == OK

    def median(name: str) -> float | None:
        values = store.column(name)[ok]
        return float(np.median(values)) if len(values) else None

    def mean(name: str) -> float | None:
        return float(np.nanmean(store.column(name)[ok])) if ok.any() else None

    ess = median("ess")
    return {
        "prompts": store.n,
        "k": store.k,
        "status": {name: int((status == i).sum()) for i, name in enumerate(STATUSES)},
        "tokens": int(store.column("tokens").sum()),
        "median_norm": median("norm"),
        "median_ess": ess,
        "median_ess_share": None if ess is None else ess / attributes["samples"],
        "kl": mean("kl"),
        "kl_k1": mean("kl_k1"),
        "max_ratio": float(np.nanmax(store.column("max_ratio")[ok])) if ok.any() else None,
        "mean_clip_fraction": mean("clip_fraction"),
        "median_entropy": median("entropy"),
        "coverage": attributes["coverage"],
        "parameters": attributes["parameters"],
        "left_out": attributes["left_out"],
    }
