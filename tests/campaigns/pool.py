"""A pool of a million prompts through scores and selection: seconds and peak memory of each step.

Features, rewards and texts are drawn; what is measured is cropi's own code on tables and stores of that size. Each step
is a process of its own, so that its peak memory is its own.

    python -m tests.campaigns.pool --count 1000000 --root /data/pool
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.gradients.store import GradientStore
from cropi_core.scores import score
from cropi_core.selection import select
from cropi_core.selection.waking import Sampled, waking_prompts
from data_schemas import Scores, Selection, Waking
from data_schemas.tables import PROMPTS
from tests.campaigns.roots import CONTEXT

K = 256
SHARD = 8192
VALIDATION = 64
SETS = ("one", "other")
ATTRIBUTES = {"projection": {"kind": "sjlt", "k": K}, "objective": {}, "policy": "drawn"}
KINDS = ("add {} and {}", "reverse the word {}{}", "how many letters has {}{}", "sort the numbers {} {}")


def write_prompts(path: Path, rows: int, seed: int) -> None:
    """Write prompts of about forty characters, a row group at a time."""
    rng = np.random.default_rng(seed)
    with pq.ParquetWriter(path, PROMPTS) as writer:
        for start in range(0, rows, 1 << 16):
            count = min(1 << 16, rows - start)
            kinds, numbers = rng.integers(0, len(KINDS), count), rng.integers(0, 10**9, (count, 2))
            texts = [KINDS[kind].format(*pair) for kind, pair in zip(kinds, numbers.tolist(), strict=True)]
            columns = {
                "prompt_id": [f"{path.stem}-{start + i}" for i in range(count)],
                "source": [f"kind {kind}" for kind in kinds],
                "messages": [[{"role": "user", "content": text}] for text in texts],
                "answer": [str(pair[0]) for pair in numbers],
                "verifier": ["exact"] * count,
                "level": [str(kind) for kind in kinds],
                "tags": [[]] * count,
            }
            writer.write_table(pa.table(columns, schema=PROMPTS))


def write_features(path: Path, name: str, rows: int, seed: int) -> None:
    """Write a gradient store; a third of the pool has no gradient, as prompts with equal rewards have none."""
    ids = [f"{name}-{i}" for i in range(rows)]
    store = GradientStore.create(path, ids, k=K, dtype="float16", rows_per_shard=SHARD, attributes=ATTRIBUTES)
    for shard in range(store.shards):
        rng, count = np.random.default_rng([seed, shard]), len(store.shard_rows(shard))
        features = rng.standard_normal((count, K), dtype=np.float32)
        status = (
            (rng.random(count) < 1 / 3).astype(np.uint8) if rows > VALIDATION else np.zeros(count, np.uint8)
        )
        features[status > 0] = 0
        columns = {"status": status, "ess": np.ones(count), "mean_reward": rng.random(count)}
        store.write_shard(shard, features, columns)
    store.finish()


def written(root: Path, count: int) -> None:
    """Write the tables and stores of the pool and of the validation sets."""
    write_prompts(root / "pool.parquet", count, 0)
    write_features(root / "pool.zarr", "pool", count, 0)
    for seed, name in enumerate(SETS, 1):
        write_prompts(root / f"{name}.parquet", VALIDATION, seed)
        write_features(root / f"{name}.zarr", name, VALIDATION, seed)


def scored(root: Path) -> Any:
    """Score the pool against both sets."""
    sets = {name: root / f"{name}.zarr" for name in SETS}
    out = score(train=root / "pool.zarr", validation=sets, out=root / "scores.parquet", settings=Scores())
    return {"scored": out["scored"]}


def selected(root: Path, strategy: str) -> Any:
    """Select a tenth."""
    targets = {name: root / f"{name}.parquet" for name in SETS} if strategy == "text_similarity" else None
    out = select(
        out=root / f"{strategy}.parquet",
        prompts=root / "pool.parquet",
        scores=root / "scores.parquet",
        settings=Selection(strategy=strategy),
        targets=targets,
    )
    return {"selected": out["selected"]}


def woken(root: Path) -> Any:
    """Choose the prompts that a later stage samples again."""
    half = np.full(VALIDATION, 4.0)
    sets = [Sampled(pq.read_table(root / f"{name}.parquet"), half, 2 * half) for name in SETS]
    pool = pq.read_table(root / "pool.parquet")
    return {"woken": waking_prompts(pool, sets, Waking(), group=8, tokens=30, seed=0).num_rows}


def in_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Execute a step in a process of its own; return what it says, its seconds and its peak memory."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=measured, args=(there, function, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def measured(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Send what a step says, with its seconds, its processor time and its peak memory."""
    begin, used = time.monotonic(), time.process_time()
    told = function(*arguments) or {}
    seconds, processor = round(time.monotonic() - begin, 1), round(time.process_time() - used, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send({**told, "seconds": seconds, "processor_seconds": processor, "peak_mb": peak})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--root", type=Path, required=True)
    given = parser.parse_args()
    folder = given.root.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = {}
    steps["write"] = in_process(written, folder, given.count)
    steps["scores"] = in_process(scored, folder)
    for name in ("influence", "random", "text_similarity"):
        steps[f"selection, {name}"] = in_process(selected, folder, name)
        print(json.dumps(steps), flush=True)
    steps["waking"] = in_process(woken, folder)
    told = {"prompts": given.count, "k": K, "validation": f"{len(SETS)} sets of {VALIDATION}", "steps": steps}
    (folder / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))
    sys.exit(0)
