"""Features that a training stage collected: from its passes to a gradient store, and from there to the next scoring.

    gather_passes(directory, out=Path("features.zarr"), table=Path("features.parquet"), attributes={...})
    merge_trained(stored, trained, out, samples, policy)

A prompt that was trained on in several steps has the feature of its newest group. The table has all of them, and by how
much the feature of each differs from the one before: the cosine of two groups of one prompt, some steps apart.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.errors import DataError
from cropi_core.gradients.groups import OK
from cropi_core.gradients.layout import COLUMNS
from cropi_core.gradients.store import GradientStore
from cropi_core.gradients.summary import summarise
from data_schemas import STATUSES, TRAINED

ROWS_PER_SHARD = 128
KEPT = tuple(name for name in COLUMNS if name not in ("scale", "norm"))
"""Columns of a store that the file of a pass has."""


def gather_passes(
    directory: Path, *, out: Path, table: Path, attributes: Mapping[str, Any], dtype: str = "float16"
) -> dict[str, Any]:
    """Write the newest feature of every prompt as a gradient store, and the table of all groups.

    Args:
        directory: Files of the passes, as :class:`cropi_core.training.FeatureCollector` writes them.
        out: The store.
        table: Parquet file of :data:`data_schemas.tables.TRAINED`.
        attributes: Description of the features, as that of other stores.
        dtype: Type of the stored features.

    Returns:
        Summary: number of prompts, groups and groups with a gradient, and the median cosine of two groups of one
        prompt that follow each other.

    Raises:
        DataError: There are no files.
    """
    newest: dict[str, dict[str, Any]] = {}
    last: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    k = 0
    for step, arrays in _passes(directory):
        k = arrays["features"].shape[1]
        for i, name in enumerate(arrays["prompt_id"].tolist()):
            feature = arrays["features"][i]
            one = {column: arrays[column][i] for column in KEPT}
            norm = float(np.linalg.norm(feature.astype(np.float64)))
            live = one["status"] == OK
            cosine = _cosine(last[name], feature) if live and name in last else None
            if live:
                last[name] = feature
            newest[name] = {**one, "features": feature, "norm": norm if live else np.nan}
            rows.append(_row(name, step, arrays["policy_step"][i], one, norm if live else None, cosine))
    if not rows:
        raise DataError(f"{directory} has no features: the trainer has not finished a step")
    write_parquet(pa.Table.from_pylist(rows, schema=TRAINED), table)
    store = GradientStore.create(
        out, list(newest), k=k, dtype=dtype, rows_per_shard=ROWS_PER_SHARD, attributes=dict(attributes)
    )
    values = list(newest.values())
    for shard in range(store.shards):
        part = [values[i] for i in store.shard_rows(shard)]
        columns = {name: np.array([row[name] for row in part]) for name in (*KEPT, "norm")}
        store.write_shard(shard, np.stack([row["features"] for row in part]), columns)
    store.finish()
    cosines = [row["cosine"] for row in rows if row["cosine"] is not None]
    return {
        "prompts": len(newest),
        "groups": len(rows),
        "groups_ok": sum(row["status"] == STATUSES[OK] for row in rows),
        "cosine_between_groups": float(np.median(cosines)) if cosines else None,
    }


def merge_trained(
    stored: Path, trained: Path, out: Path, samples: Mapping[str, int], policy: str
) -> dict[str, Any]:
    """Replace the stored features of the prompts that a stage trained on by those that it collected.

    Args:
        stored: Gradient store of the pool, of an earlier policy.
        trained: Store of :func:`gather_passes`.
        out: The store to write; complete shards in it are kept.
        samples: Number of completions of each prompt behind the stored features.
        policy: Digest of the trained policy. The features of all prompts count as its features.

    Returns:
        The summary of a gradient store, and ``trained``: number of prompts with a new feature, and the median cosine
        of their old and their new feature.

    Raises:
        DataError: The stores have no prompt in common, or features of different projections.
    """
    old, new = GradientStore.open(stored), GradientStore.open(trained)
    _check_alike(old, new)
    place = {str(name): i for i, name in enumerate(new.column("prompt_id"))}
    ids = [str(name) for name in old.column("prompt_id")]
    if not any(name in place for name in ids):
        raise DataError(f"{trained} has no prompt of {stored}; was the stage trained on another pool?")
    attributes = {**old.attributes, "policy": policy, "pool_features": "training"}
    store = GradientStore.create(
        out, ids, k=old.k, dtype=old.dtype, rows_per_shard=old.rows_per_shard, attributes=attributes
    )
    fresh = new.rows(0, new.n)
    cosines: list[float] = []
    for shard in range(store.shards):
        span = store.shard_rows(shard)
        features = old.rows(span.start, span.stop)
        columns = {name: old.column(name)[span.start : span.stop].copy() for name in (*KEPT, "norm")}
        for i, name in enumerate(ids[span.start : span.stop]):
            if name not in place:
                continue
            source = place[name]
            if columns["status"][i] == OK and new.column("status")[source] == OK:
                cosines.append(_cosine(features[i], fresh[source]))
            features[i] = fresh[source]
            for column, values in columns.items():
                values[i] = new.column(column)[source]
        if not store.done(shard):
            store.write_shard(shard, features, columns)
    store.finish()
    counts = {name: new.attributes["samples"] if name in place else samples.get(name, 0) for name in ids}
    replaced = {
        "prompts": sum(name in place for name in ids),
        "cosine_to_stored": float(np.median(cosines)) if cosines else None,
    }
    made = summarise(GradientStore.open(out), attributes, counts)
    return {**made, "tokens": 0, "trained": replaced}  # no token passed through the model


def _passes(directory: Path) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
    """Read the files of passes in order, with the number of the optimizer step that each ended."""
    for path in sorted(directory.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            yield int(path.stem.partition("-")[0]), {name: arrays[name] for name in arrays.files}


def _row(
    name: str, step: int, policy_step: int, one: Mapping[str, Any], norm: float | None, cosine: float | None
) -> dict[str, Any]:
    reward = float(one["mean_reward"])
    return {
        "prompt_id": name,
        "step": step,
        "policy_step": int(policy_step),
        "status": STATUSES[int(one["status"])],
        "norm": norm,
        "mean_reward": None if np.isnan(reward) else reward,
        "tokens": int(one["tokens"]),
        "cosine": cosine,
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def _check_alike(old: GradientStore, new: GradientStore) -> None:
    """Refuse features of different projections, layers or objectives.

    Raises:
        DataError: Names what differs.
    """
    pairs = {
        name: (old.attributes.get(name), new.attributes.get(name))
        for name in ("projection", "objective", "layers")
    }
    if different := [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]:
        raise DataError(f"{old.path} and {new.path} cannot be merged: they have {'; '.join(different)}")
