"""Measure scoring a stored pool beside reading the same bytes and multiplying them with nothing else done.

    python benchmarks/scoring.py                               # 20,000 x 8,192 against 8 sets, a few minutes
    python benchmarks/scoring.py --rows 512 --k 512 --sets 2   # a few seconds
    python benchmarks/scoring.py --rows 1000000 --repeats 2 --json scoring.json   # 32 GB on disk, an hour

Every pass is a process of its own, so that its peak memory is its own; passes take turns and the fastest of each
counts, as others share the machine. CPU time is given too: it says the same with less noise. A target is a
validation set or a half of one (scoring also tells how far two halves of a set agree), so V sets are 3V targets.

* ``score``: all of ``cropi_core.scores.influence.score``, from opening the stores to the Parquet file with its ranks.
* ``stream``: its pass over the features alone.
* ``limit``: read the shard files, decompress, cast to float32, one float32 product with all targets; in as many
  threads, with the same tiles. No norms, no checks of an index, no float64.
* ``zarr``: the same through zarr and numpy in four lines, as one would write it without this library.
* ``memmap``: the limit with an uncompressed memory map in place of the shards.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from machine import machine, peak_memory_mb, write_figures
from numcodecs.zstd import Zstd

from cropi_core.gradients import GradientStore, in_order, threads_here, widen_finite
from cropi_core.scores import score
from cropi_core.scores.similarity import TILE_COLUMNS, TILE_ROWS, stream_similarities
from cropi_core.scores.targets import set_targets
from data_schemas.scores import Scores

SHARD = 128
PROMPTS_A_SET = 100
BASE_ROWS = 2048
WRITERS = 8
"""Threads that write the pool: most of its time is waiting for the disk to say that a shard is there."""
ONE_DIRECTION = Scores(target="mean")
"""One target a set: `nearest` multiplies every validation prompt, so its limit is arithmetic and not reading."""
ATTRIBUTES = {"projection": {"kind": "sjlt"}, "objective": {}, "policy": "benchmark"}
Pass = Callable[[Path], np.ndarray | None]


def draw(base: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Draw float32 features ``(rows, k)`` of heavy-tailed length.

    Gaussian rows of a common base, each in another place and turned by another angle: as incompressible as
    fresh ones and all different, at a twentieth of the time of drawing 8e9 numbers.
    """
    rng = np.random.default_rng(seed)
    chosen = base[rng.integers(0, len(base), rows)]
    chosen = np.roll(chosen, int(rng.integers(base.shape[1])), axis=1)
    return chosen * (1e-3 * rng.lognormal(sigma=1.5, size=(rows, 1))).astype(np.float32)


def write_store(path: Path, rows: int, k: int, seed: int) -> None:
    """Write a store shard by shard."""
    base = np.random.default_rng(0).standard_normal((BASE_ROWS, k), dtype=np.float32)
    ids = [f"{path.stem}-{i}" for i in range(rows)]
    store = GradientStore.create(path, ids, k=k, dtype="float16", rows_per_shard=SHARD, attributes=ATTRIBUTES)

    def write(shard: int) -> None:
        features = draw(base, len(store.shard_rows(shard)), seed * 2**32 + shard)
        status = np.zeros(len(features), dtype=np.uint8)
        store.write_shard(shard, features, {"status": status, "ess": np.ones(len(features))})

    for _ in in_order(write, range(store.shards), WRITERS):
        pass
    store.finish()


def prepare(folder: Path, rows: int, k: int, sets: int, raw: bool) -> None:
    """Write the pool, a raw copy, the validation sets and their targets ``(3V, k)`` below a folder."""
    write_store(folder / "pool.zarr", rows, k, 0)
    if raw:
        with (folder / "pool.raw").open("wb") as stream:
            for _, stored in GradientStore.open(folder / "pool.zarr").map_blocks(
                lambda stored, scale: stored
            ):
                stream.write(stored.data)
    goals = []
    for v in range(sets):
        write_store(folder / f"set{v}.zarr", PROMPTS_A_SET, k, v + 1)
        store = GradientStore.open(folder / f"set{v}.zarr")
        goals.append(set_targets(f"set{v}", store, ONE_DIRECTION, 0))
    np.save(folder / "goals.npy", np.concatenate(goals))


def run_score(folder: Path) -> None:
    """Score the pool: everything."""
    validation = {path.stem: path for path in folder.glob("set*.zarr")}
    score(
        train=folder / "pool.zarr",
        validation=validation,
        out=folder / "scores.parquet",
        settings=ONE_DIRECTION,
    )


def run_stream(folder: Path) -> np.ndarray:
    """Score the pool: its features only."""
    pool, goals = GradientStore.open(folder / "pool.zarr"), np.load(folder / "goals.npy")
    goals = goals.reshape(-1, 3, pool.k)
    return stream_similarities(pool, goals, [PROMPTS_A_SET] * len(goals), "cosine").reshape(pool.n, -1)


def bare(folder: Path, rows: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """Read shard after shard in threads, cast each to float32 and multiply it with the targets, and nothing else."""
    goals = np.load(folder / "goals.npy")
    goals = (goals / np.linalg.norm(goals, axis=1, keepdims=True)).astype(np.float32)
    columns = [slice(c, c + TILE_COLUMNS) for c in range(0, goals.shape[1], TILE_COLUMNS)]
    tiles = [np.ascontiguousarray(goals[:, c].T) for c in columns]
    similar = np.zeros((rows, len(goals)), dtype=np.float32)

    def work(shard: int) -> None:
        half = read(shard)
        single = np.empty((min(TILE_ROWS, len(half)), TILE_COLUMNS), dtype=np.float32)
        for r in range(0, len(half), TILE_ROWS):
            begin = shard * SHARD + r
            for c, tile in zip(columns, tiles, strict=True):
                part = half[r : r + TILE_ROWS, c]
                features = single[: part.shape[0], : part.shape[1]]
                widen_finite(part, features)
                similar[begin : begin + len(part)] += features @ tile

    for _ in in_order(work, range(-(-rows // SHARD)), threads_here()):
        pass
    return similar


def run_limit(folder: Path) -> np.ndarray:
    """Decompress the shard files and multiply."""
    array = zarr.open_group(folder / "pool.zarr", mode="r")["features"]
    (n, k), chunk, decoder = array.shape, array.chunks[0], Zstd()

    def read(shard: int) -> np.ndarray:
        data = (folder / "pool.zarr" / "features" / "c" / str(shard) / "0").read_bytes()
        half = np.empty((SHARD, k), dtype=np.float16)
        index = np.frombuffer(data[-16 * (SHARD // chunk) - 4 : -4], dtype="<u8").reshape(-1, 2).tolist()
        for i, (offset, length) in enumerate(index):
            if offset + length <= len(data):
                decoder.decode(memoryview(data)[offset : offset + length], half[i * chunk : (i + 1) * chunk])
        return half[: n - shard * SHARD]

    return bare(folder, n, read)


def run_memmap(folder: Path) -> np.ndarray:
    """Copy the rows out of a raw memory map and multiply."""
    k = np.load(folder / "goals.npy", mmap_mode="r").shape[1]
    array = np.memmap(folder / "pool.raw", dtype=np.float16, mode="r").reshape(-1, k)
    return bare(folder, len(array), lambda shard: np.array(array[shard * SHARD : (shard + 1) * SHARD]))


def run_zarr(folder: Path) -> np.ndarray:
    """Read through zarr, cast and multiply with numpy, a shard at a time."""
    goals = np.load(folder / "goals.npy")
    goals = (goals / np.linalg.norm(goals, axis=1, keepdims=True)).astype(np.float32)
    array = zarr.open_group(folder / "pool.zarr", mode="r")["features"]
    starts = range(0, array.shape[0], SHARD)
    return np.concatenate([array[start : start + SHARD].astype(np.float32) @ goals.T for start in starts])


PASSES: dict[str, Pass] = {
    "score": run_score,
    "stream": run_stream,
    "limit": run_limit,
    "zarr": run_zarr,
    "memmap": run_memmap,
}


def timed(name: str, folder: Path) -> dict[str, Any]:
    """Run one pass in this process; its figures, and the first products to compare."""
    wall, cpu = time.perf_counter(), time.process_time()
    similar = PASSES[name](folder)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    first = None if similar is None else similar[:SHARD]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "first": first,
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, rows: int, k: int, repeats: int, passes: list[str]) -> dict[str, dict[str, float]]:
    """Let the passes take turns; the fastest of each, with its ratio to the limit."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in passes}
    for turn in range(repeats):
        for name in passes:
            if name == "zarr" and turn:  # several times slower than the others; once says it
                continue
            runs[name].append(alone(timed, name, folder))
    expected = runs["limit"][0]["first"]
    for name in {"stream", "zarr", "memmap"} & set(passes):  # a limit that computes something else is none
        np.testing.assert_allclose(runs[name][0]["first"], expected, atol=1e-4)
    figures = {}
    for name, found in runs.items():
        fastest = {key: min(run[key] for run in found) for key in ("seconds", "cpu_seconds")}
        rate = {
            "rows_per_second": rows / fastest["seconds"],
            "mb_per_second": 2e-6 * rows * k / fastest["seconds"],
        }
        figures[name] = fastest | rate | {"peak_memory_mb": max(run["peak_memory_mb"] for run in found)}
    for figure in figures.values():
        figure["ratio_to_limit"] = figures["limit"]["seconds"] / figure["seconds"]
        figure["cpu_ratio_to_limit"] = figures["limit"]["cpu_seconds"] / figure["cpu_seconds"]
    return figures


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{result['rows']} x {result['k']} float16 against {result['sets']} sets ({result['targets']} targets), "
    )
    print(f"{result['threads']} threads, {result['stored_bytes'] / 1e9:.2f} GB stored")
    print(f"{'':8}{'s':>9}{'rows/s':>10}{'MB/s':>8}{'peak MB':>9}{'of limit':>10}{'by CPU time':>13}")
    for name, f in result["figures"].items():
        speed = f"{f['seconds']:9.2f}{f['rows_per_second']:10.0f}{f['mb_per_second']:8.0f}"
        shares = f"{f['ratio_to_limit']:10.2f}{f['cpu_ratio_to_limit']:13.2f}"
        print(f"{name:8}{speed}{f['peak_memory_mb']:9.0f}{shares}")


def main() -> None:
    """Write a pool, score it, and say how far that is from the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["zarr", "memmap"], help="Passes to leave out."
    )
    parser.add_argument("--folder", type=Path, help="Where to put the pool for the time of the run.")
    parser.add_argument("--json", type=Path, help="Write figures and machine here.")
    options = parser.parse_args()
    rows, k, passes = options.rows, options.k, [name for name in PASSES if name not in options.without]
    needed = 2.1 * rows * k * (1 + ("memmap" in passes))
    folder = Path(tempfile.mkdtemp(prefix="cropi-scoring-", dir=options.folder))
    try:
        if shutil.disk_usage(folder).free < needed:
            parser.error(
                f"{folder} has less than the {needed / 1e9:.0f} GB free that {rows} rows take; see --folder"
            )
        alone(prepare, folder, rows, k, options.sets, "memmap" in passes)
        stored = sum(p.stat().st_size for p in (folder / "pool.zarr").rglob("*") if p.is_file())
        figures = measure(folder, rows, k, options.repeats, passes)
    finally:
        shutil.rmtree(folder)
    head = (
        "seconds",
        "cpu_seconds",
        "rows_per_second",
        "peak_memory_mb",
        "ratio_to_limit",
        "cpu_ratio_to_limit",
    )
    result = {
        "machine": machine(),
        **{
            "rows": rows,
            "k": k,
            "sets": options.sets,
            "targets": 3 * options.sets,
            "repeats": options.repeats,
        },
        **{"threads": threads_here(), "stored_bytes": stored, "bytes_per_dimension": stored / (rows * k)},
        **{name: figures["score"][name] for name in head},
        "stream_ratio_to_limit": figures["stream"]["ratio_to_limit"],
        "figures": figures,
    }
    report(result)
    write_figures(result, options.json)


if __name__ == "__main__":
    main()
