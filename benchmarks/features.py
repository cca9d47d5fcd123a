"""Measure the feature engine beside an ordinary forward and backward, the released recipe, and other programs.

    python benchmarks/features.py                                    # the embedded policy, about two minutes
    python benchmarks/features.py --policy smollm2 --rollouts speed.parquet --limit 4 --json features.json
    python benchmarks/features.py --policy smollm2 --rollouts speed.parquet --peers peers/bin/python

Rollouts of a real model come from ``benchmarks/gsm8k_rollouts.py``; the peers' environment is described in
``benchmarks/peers.py``. All figures of a run are of the same prompts and threads. The passes run in turn, ``--repeats``
times. Times are the least of these, by the clock and by the processor. A ratio is of processor seconds of the same
turn; its median over the turns is given, and its smallest and largest, which show what other work did to it.

The ordinary pass is what a trainer does: right-padded rows of like length under the same token budget, gradients of
all parameters, logits of completion tokens alone. Its padding is taken off its time, none of ours is off ours.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import machine, write_figures
from peers import run_peer
from recipe import Stopwatch, compare_projections, released_recipe
from torch import Tensor

from cropi_core.diagnostics import agreement
from cropi_core.gradients import OK, FeatureSettings, Group, group_rollouts
from cropi_core.gradients.batches import Budget, project_blocks
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.groups import ZERO_VARIANCE
from cropi_core.gradients.job import Job
from cropi_core.planning.meter import Meter
from cropi_core.policy import load_policy
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.rollouts import read_rollouts, sampling_of
from cropi_core.scores.similarity import mean_of_largest, similarities
from cropi_core.world import base_checkpoint
from data_schemas.gradients import Projection
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.scores import Scores

PEERS_K = 8192
"""Numbers a prompt that the peers are measured with; the product's default is that of ``Projection``."""


def forms(k: int) -> dict[str, Projection]:
    """Return the default form, and the subset of rows and columns, by the ending of their figures' names."""
    return {"": Projection(k=k), "_factored": Projection(k=k, form="factored", density=0.1)}


def embedded_rollouts(out: Path, prompts: int) -> Path:
    """Sample rollouts of the embedded policy: short completions of a pool in which some prompts teach nothing."""
    from cropi_core.prompts.loading import write_prompts
    from cropi_core.rollouts import RolloutPlan, sample_rollouts
    from cropi_core.world.families import build
    from data_schemas.grading import Grading

    share = prompts // 4
    families = {"reverse": share, "shift": share, "sort": share, "dedup": share}
    write_prompts(build(families, split="pool", seed=0), out / "prompts.parquet")
    sample_rollouts(
        policy=Checkpoint(base_checkpoint(), digest="embedded"),
        prompts=out / "prompts.parquet",
        out=out / "parts",
        plan=RolloutPlan(Sampling(samples=8, max_new_tokens=12), shard_prompts=256),
        grading=Grading(),
    )
    return out / "parts"


def make_job(policy: Path, sampling: Sampling, projection: Projection, budget: int) -> Job:
    """Describe the work with the product's defaults."""
    settings = FeatureSettings(projection=projection)
    return Job(Checkpoint(policy), settings, sampling, Runtime(token_budget=budget))


def engine_pass(job: Job) -> Callable[[list[Group]], None]:
    """Return a function that computes features with the engine, loaded before."""
    model, _ = load_policy(job.policy.path, job.policy.dtype, "cpu", attention="eager")
    engine = FeatureEngine(model, job.settings.projection)

    def run(groups: list[Group]) -> None:
        for _ in project_blocks(engine, groups, job, Budget(job.runtime.token_budget)):
            pass

    return run


def rows_of(groups: list[Group]) -> list[tuple[list[int], list[int]]]:
    """List the completions with their prompts, the short ones first."""
    rows = [(g.prompt, c) for g in groups for c in g.completions]
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))


def padded_batches(groups: list[Group], budget: int) -> list[tuple[Tensor, Tensor, int]]:
    """Pad rows of like length: ids and mask (rows, longest), and the longest completion."""
    batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows_of(groups):
        if batches[-1] and (len(batches[-1]) + 1) * (len(row[0]) + len(row[1])) > budget:
            batches.append([])
        batches[-1].append(row)
    found = []
    for batch in batches:
        longest = max(len(p) + len(c) for p, c in batch)
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for i, (prompt, completion) in enumerate(batch):
            ids[i, longest - len(prompt) - len(completion) :] = torch.tensor(prompt + completion)
            mask[i, longest - len(prompt) - len(completion) :] = 1
        found.append((ids, mask, max(len(c) for _, c in batch)))
    return found


def ordinary_pass(policy: Path, budget: int, *, backward: bool = True) -> Callable[[list[Group]], None]:
    """Return a function that runs forward and backward as a trainer does; without ``backward`` the graph is kept."""
    model, _ = load_policy(policy, "float32", "cpu")

    def run(groups: list[Group]) -> None:
        for ids, mask, longest in padded_batches(groups, budget):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=longest + 1,
                use_cache=False,
            ).logits[:, :-1]
            chosen = logits.float().log_softmax(-1).gather(-1, ids[:, -longest:, None])
            if backward:
                chosen.sum().backward()
                model.zero_grad()

    return run


def recipe_pass(policy: Path, temperature: float) -> Callable[[list[Group]], None]:
    """Return a function that runs the released recipe's steps, without its projection."""
    model, _ = load_policy(policy, "float32", "cpu")

    def run(groups: list[Group]) -> None:
        for _ in released_recipe(model, groups, temperature=temperature):
            pass

    return run


def turns(
    passes: dict[str, Callable[[list[Group]], None]], groups: list[Group], repeats: int
) -> dict[str, list[Stopwatch]]:
    """Run the passes in turn, ``repeats`` times, after a first prompt that is not timed."""
    watches: dict[str, list[Stopwatch]] = {name: [] for name in passes}
    for run in passes.values():
        run(groups[:1])
    for _ in range(repeats):
        for name, run in passes.items():
            with Stopwatch() as watch:
                run(groups)
            watches[name].append(watch)
    return watches


def least(watches: list[Stopwatch]) -> Stopwatch:
    """Return the turn that took the fewest processor seconds."""
    return min(watches, key=lambda watch: watch.cpu_seconds)


def timed(
    passes: dict[str, Callable[[list[Group]], None]], groups: list[Group], repeats: int
) -> dict[str, Stopwatch]:
    """Run the passes in turn, and return the least of each; see :func:`turns`."""
    return {name: least(watches) for name, watches in turns(passes, groups, repeats).items()}


def ratio(name: str, a: list[Stopwatch], b: list[Stopwatch], factor: float = 1.0) -> dict[str, float]:
    """Return the median, the smallest and the largest ratio of processor seconds over the turns, times ``factor``."""
    ratios = [factor * x.cpu_seconds / y.cpu_seconds for x, y in zip(a, b, strict=True)]
    return {name: median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}


def speed(
    policy: Path, rollouts: Path, limit: int | None, budget: int, repeats: int, k: int
) -> dict[str, Any]:
    """Compare the engine with the ordinary pass and with the released recipe."""
    table = read_rollouts(rollouts)
    sampling = sampling_of(table)
    groups = [g for g in group_rollouts(table, 2) if g.status == OK][:limit]
    passes = {
        f"engine{end}": engine_pass(make_job(policy, sampling, p, budget)) for end, p in forms(k).items()
    }
    passes |= {"ordinary": ordinary_pass(policy, budget), "recipe": recipe_pass(policy, sampling.temperature)}
    watches = turns(passes, groups, repeats)
    tokens = sum(g.tokens for g in groups)
    padded = sum(ids.numel() for ids, _, _ in padded_batches(groups, budget))
    found: dict[str, Any] = {
        "k": k,
        "repeats": repeats,
        "prompts": len(groups),
        "tokens": tokens,
        "packed_tokens": sum(g.packed for g in groups),
        "padded_tokens_of_the_ordinary_pass": padded,
    }
    packed = tokens / found["packed_tokens"]
    for end in forms(k):
        own = watches[f"engine{end}"]
        found |= ratio(f"ratio_to_forward_backward{end}", own, watches["ordinary"], padded / tokens)
        found[f"ratio_a_packed_token{end}"] = found[f"ratio_to_forward_backward{end}"] * packed
        found |= ratio(f"speedup_over_released_recipe{end}", watches["recipe"], own)
        found[f"tokens_per_cpu_second{end}"] = tokens / least(own).cpu_seconds
        found[f"tokens_per_second{end}"] = tokens / least(own).seconds
    return found | {"cpu_seconds": {name: least(w).cpu_seconds for name, w in watches.items()}}


def dead(policy: Path, rollouts: Path, limit: int | None, budget: int, repeats: int) -> dict[str, float]:
    """Time a pool of which six groups in ten are dead, beside its live ones alone."""
    table = read_rollouts(rollouts)
    live = [g for g in group_rollouts(table, 2) if g.status == OK][:limit]
    mixed = [g if i % 5 < 2 else replace(g, status=ZERO_VARIANCE) for i, g in enumerate(live)]
    alone = [g for g in mixed if g.status == OK]
    run = engine_pass(make_job(policy, sampling_of(table), Projection(), budget))
    watches = timed({"mixed": lambda _: run(mixed), "alone": lambda _: run(alone)}, live, repeats)
    return {
        "live_share": len(alone) / len(live),
        "time_over_live_alone": watches["mixed"].cpu_seconds / watches["alone"].cpu_seconds,
    }


def _peak(kind: str, policy: Path, rollouts: Path, limit: int, budget: int, answer: Any) -> None:
    """Tell how far a pass raises this process's memory, in bytes."""
    table = read_rollouts(rollouts)
    groups = [g for g in group_rollouts(table, 2) if g.status == OK][:limit]
    if kind == "forward":
        run = ordinary_pass(policy, budget, backward=False)
    else:
        run = engine_pass(make_job(policy, sampling_of(table), Projection(), budget))
    meter = Meter(torch.device("cpu"))
    meter.reset()
    before = meter.now()
    run(groups)
    answer.send(max(0.0, meter.peak() - before))


def memory(policy: Path, rollouts: Path, budget: int) -> dict[str, float]:
    """Compare the peak of one batch of two prompts with that of an ordinary forward that keeps its graph."""
    found = {}
    for kind in ("forward", "engine"):
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_peak, args=(kind, policy, rollouts, 2, budget, there))
        process.start()
        there.close()
        found[f"{kind}_bytes"] = here.recv()
        process.join()
    return found | {"peak_over_forward": found["engine_bytes"] / found["forward_bytes"]}


def precision(prompts: int, budget: int) -> dict[str, Any]:
    """Compare orders by features and by whole gradients on the embedded world, at the defaults."""
    with tempfile.TemporaryDirectory() as scratch:
        rollouts = embedded_rollouts(Path(scratch), prompts)
        table = read_rollouts(rollouts)
        groups = [g for g in group_rollouts(table, 2) if g.status == OK]
        rows = {}
        for name, projection in (
            ("features", Projection()),
            ("whole", Projection(kind="none", dtype="float32")),
        ):
            job = make_job(base_checkpoint(), sampling_of(table), projection, budget)
            model, _ = load_policy(job.policy.path, "float32", "cpu", attention="eager")
            engine, out = FeatureEngine(model, projection), {}
            for i, row, _ in project_blocks(engine, groups, job, Budget(budget)):
                out[i] = row
            rows[name] = np.stack([out[i] for i in range(len(groups))]).astype(np.float64)
    goal = [i for i, g in enumerate(groups) if g.prompt_id.startswith("reverse")][: prompts // 12]
    rest = [i for i in range(len(groups)) if i not in goal]
    found = {"precision_prompts": len(rest)}
    for name, settings in (("precision_at_10", Scores()), ("precision_at_10_mean", Scores(target="mean"))):
        scores = [scored(x[rest], x[goal], settings) for x in rows.values()]
        found[name] = agreement(*scores, np.arange(len(rest)), 0.1)["overlap"]
    return found


def scored(pool: np.ndarray, validation: np.ndarray, settings: Scores) -> np.ndarray:
    """Score features ``(n, k)`` against those of one validation set, as ``influence.score`` does with stores."""
    if settings.target == "nearest":
        return mean_of_largest(similarities(pool, validation, settings.metric), settings.nearest)
    return similarities(pool, validation.mean(0)[None], settings.metric)[:, 0]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, help="checkpoint; the embedded policy when left out")
    parser.add_argument("--rollouts", type=Path, help="its rollouts, Parquet")
    parser.add_argument("--limit", type=int, help="live prompts to take")
    parser.add_argument("--budget", type=int, default=4096, help="tokens a pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--k", type=int, default=PEERS_K, help="numbers a prompt; the peers' by default")
    parser.add_argument(
        "--precision-prompts", type=int, default=360, help="of the embedded world, 40 or more"
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peers", type=Path, help="interpreter of an environment with bergson and dattri")
    parser.add_argument("--dense", action="store_true", help="also a slice of a dense projection")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        policy = options.policy or base_checkpoint()
        rollouts = options.rollouts or embedded_rollouts(Path(scratch), options.limit or 256)
        found: dict[str, Any] = {
            "policy": policy.name if options.policy else "embedded",
            "threads": torch.get_num_threads(),
        }
        found |= speed(policy, rollouts, options.limit, options.budget, options.repeats, options.k)
        found |= dead(policy, rollouts, options.limit, options.budget, options.repeats)
        found |= memory(policy, rollouts, options.budget)
        found |= precision(options.precision_prompts, options.budget)
        if options.dense:
            found["dense_projection"] = compare_projections(policy)
        found["machine"] = machine()
        if options.peers:
            write_figures(found, options.json)  # an environment of others may fail, and the rest took minutes
            for peer in ("bergson", "dattri"):
                asked = {"peer": peer, "policy": policy, "rollouts": rollouts, "limit": options.limit}
                found[peer] = run_peer(options.peers, asked)
            fastest = max(found[peer]["tokens_per_cpu_second"] for peer in ("bergson", "dattri"))
            found["speedup_over_the_faster_program"] = found["tokens_per_cpu_second"] / fastest
    print(json.dumps(found, indent=1))
    write_figures(found, options.json)


if __name__ == "__main__":
    main()
