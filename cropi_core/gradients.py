"""Gradients: from rollouts to the gradient store, shard by shard.

A shard is a fixed run of prompts and one Zarr shard; within it, blocks of ``block_rows`` prompts are batched on their
own, so neither the number of workers nor the size of the shards can change a row. Prompts whose gradient is exactly
zero, or undefined, are never run: their status says why.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cropi_core.checkpoint import tree_digest
from cropi_core.features import Batch, FeatureEngine
from cropi_core.gradient_store import GradientStore
from cropi_core.groups import NOT_FINITE, OK, Group, batches, group_rollouts, make_batch
from cropi_core.objective import token_weights
from cropi_core.policy import load_policy
from cropi_core.progress import Progress, Report, silent
from cropi_core.projection import self_test
from cropi_core.rollouts import read_rollouts, sampling_of
from cropi_core.shard_pool import compute_shards
from data_schemas.arrow import STATUSES
from data_schemas.config import Gradients, Objective, Projection, Runtime, Sampling

FIGURES = ("norm", "ess", "max_ratio", "clip_fraction", "kl", "kl_k1", "entropy", "mean_reward")


@dataclass(frozen=True)
class Job:
    """What computes features: everything but the rows, the same for every shard and worker."""

    policy: Path
    dtype: str
    objective: Objective
    projection: Projection
    layout: Gradients
    sampling: Sampling
    max_new_tokens: int
    runtime: Runtime


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
    torch.set_num_threads(threads)
    model, _ = load_policy(job.policy, job.dtype, job.runtime.device)
    return FeatureEngine(model, job.projection)


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


class Worker:
    """A model with its engine, writing shards of one store."""

    def __init__(self, job: Job, engine: FeatureEngine, store: GradientStore) -> None:
        self.job, self.engine, self.store = job, engine, store

    def write(self, shard: int, groups: list[Group]) -> None:
        """Compute and write one shard."""
        features = np.zeros((len(groups), self.engine.k), dtype=np.float32)
        figures = {name: np.full(len(groups), np.nan, dtype=np.float32) for name in FIGURES}
        status = np.array([g.status for g in groups], dtype=np.uint8)
        tokens = np.array([g.tokens if g.status == OK else 0 for g in groups], dtype=np.int32)
        for i, group in enumerate(groups):
            if len(group.rewards):
                figures["mean_reward"][i] = group.rewards.mean()
        for members in batches(groups, self.job.layout.block_rows, self.job.runtime.token_budget):
            rows, per_prompt = project_groups(self.engine, [groups[i] for i in members], self.job)
            for i, row, found in zip(members, rows.cpu().numpy(), per_prompt, strict=True):
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


# -- features --------------------------------------------------------------------------------------------------------


def project_groups(
    engine: FeatureEngine, groups: list[Group], job: Job
) -> tuple[Tensor, list[dict[str, float]]]:
    """Compute the features of groups of one size, and the figures of each.

    One forward and one backward. A single group past the token budget is cut into pieces of completions: weights of
    the whole group come from a forward of their own, and the pieces' gradients are summed.

    Returns:
        (prompts, k) features; per prompt ``ess``, ``max_ratio``, ``clip_fraction``, ``kl``, ``kl_k1``, ``entropy``.
    """
    device, out, found = engine.model.device, engine.accumulators(len(groups)), []
    temperature, size = job.sampling.temperature, len(groups[0].completions)

    def weigh(batch: Batch) -> Any:
        def weights(logprobs: Tensor, entropy: Tensor) -> Tensor:
            nonlocal found
            found, parts = [], []
            for p, group in enumerate(groups):
                rows = slice(p * size, (p + 1) * size)
                part, figures = _weigh_group(
                    group, logprobs[rows], entropy[rows], batch.completion[rows], job
                )
                parts.append(part)
                found.append(figures)
            return torch.cat(parts)

        return weights

    pieces = max(1, job.runtime.token_budget // groups[0].length)
    if len(groups) > 1 or pieces >= size:
        batch = make_batch(groups, slice(None), device)
        engine.project(batch, temperature, weigh(batch), out)
        return engine.features(out), found
    whole = make_batch(groups, slice(None), device)
    cuts = [slice(i, min(i + pieces, size)) for i in range(0, size, pieces)]
    sheets = [engine.logprobs(_rows(whole, cut), temperature) for cut in cuts]
    weights = weigh(whole)(torch.cat([s[0] for s in sheets]), torch.cat([s[1] for s in sheets]))
    for cut in cuts:
        engine.project(_rows(whole, cut), temperature, lambda *_, cut=cut: weights[cut], out)
    return engine.features(out), found


def _rows(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.ids[rows], batch.mask[rows], batch.completion[rows], batch.prompts)


def _weigh_group(
    group: Group, logprobs: Tensor, entropy: Tensor, mask: Tensor, job: Job
) -> tuple[Tensor, dict[str, float]]:
    """Compute one group's token weights (G, T) and figures from its log-probabilities."""
    behavior = torch.zeros(logprobs.shape, dtype=torch.float64)
    for i, values in enumerate(group.behavior):
        behavior[i, : len(values)] = torch.tensor(values, dtype=torch.float64)
    rewards = torch.from_numpy(group.rewards).to(logprobs.device)
    weights = token_weights(
        logprobs, behavior.to(logprobs.device), mask, rewards, job.objective, job.max_new_tokens
    )
    return weights.weights, {
        "ess": weights.ess,
        "max_ratio": weights.max_ratio,
        "clip_fraction": weights.clip_fraction,
        "kl": weights.kl,
        "kl_k1": weights.kl_k1,
        "entropy": float(entropy[mask].mean()),
    }


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
