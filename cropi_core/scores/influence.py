"""Score the prompts of a pool by their influence on validation sets, and fuse the sets into one ranking.

    summary = score(
        train=Path("pool.zarr"), validation={"gsm8k": Path("gsm8k.zarr")}, out=Path("scores.parquet"),
        settings=Scores(), seed=0,
    )

Scoring reads gradient stores, not the model: another metric, target or fusion costs one pass over the pool's
features. Memory holds a block of features and a few numbers a prompt, whatever the size of the pool; with target
``nearest``, the features of the validation sets as well.

References:
    CROPI, arXiv 2510.26491: the influence of a prompt on a validation set is the cosine of its gradient with the set's
    mean gradient (POPI), here target ``mean``; the rankings of several sets are fused by reciprocal rank. Why the
    default is ``nearest``: docs/background/decisions.md and docs/background/evidence.md.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import places, read_parquet, write_parquet
from cropi_core.errors import ArtifactError, ConfigError, SelectionError
from cropi_core.gradients import GradientStore, in_order, threads_here
from cropi_core.progress import Report, silent
from cropi_core.scores.fusion import SETTINGS_KEY, best, fuse, remember, standardise, tie_keys
from cropi_core.scores.neighbours import prompt_vectors, with_neighbours
from cropi_core.scores.pool import Pool, describe_statuses, status_counts
from cropi_core.scores.reliability import (
    Reliability,
    by_validation_halves,
    clustered,
    reliability,
    shrunk,
    sketched,
)
from cropi_core.scores.similarity import stream_nearest, stream_similarities
from cropi_core.scores.targets import set_targets, target_prompts, with_gradient
from data_schemas import SCORE_FIXED, STATUSES, Scores, scores_schema

PROJECTION_FIELDS = ("kind", "k", "density", "form", "seed")


def score(
    *,
    train: Path,
    validation: Mapping[str, Path],
    out: Path,
    settings: Scores = Scores(),
    seed: int = 0,
    previous: Path | None = None,
    prompts: Path | None = None,
    halves: Path | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Write the scores table of a pool.

    Scores do not depend on the number of threads that read and multiply: one a core, at most eight.

    Args:
        train: Gradient store of the pool.
        validation: Gradient store by validation set. Sets are used in the order of their names, not of
            this mapping: an artifact's key does not depend on the order in which its inputs were listed.
        out: Parquet file to write; it is published in one step.
        settings: Metric, target and fusion.
        seed: Seed of the order among equal scores, and of the halves of the split-half agreement.
        previous: Scores table of the previous stage, required by ``settings.memory``; a set's column then holds the
            result of :func:`remember` instead of the similarities.
        prompts: Prompts table of the pool, required by ``settings.neighbours``; prompts that were not sampled are
            scored too.
        halves: Gradient store of halves of some prompts' completions (:mod:`cropi_core.rollouts.halving`); weak scores
            are then shrunk to clusters.
        report: Receives the number of prompts scored.

    Returns:
        A summary in JSON types: counts by status, quantiles, and by validation set the norm of its target and
        the agreement of two halves of the set on direction and on the best tenth of the pool.

    Raises:
        ConfigError: No validation set, or one with the name of a fixed column; memory without a previous stage, or a
            previous stage without memory; neighbours without a prompts table.
        ArtifactError: A store is damaged, or was made with another projection, objective or policy.
        SelectionError: The pool or a validation set has no prompt with a gradient.
    """
    names = _check_request(validation, settings, previous, prompts)
    features, stores = _open(train, [validation[name] for name in names])
    pool = sampled = _read_pool(features)
    live = pool.with_gradient
    pairs = zip(names, stores, strict=True)
    targets = np.stack([set_targets(name, store, settings, seed) for name, store in pairs])  # (V, 3, k)
    similar = _similar(features, stores, targets, settings, seed, report)[live]
    keys = tie_keys(list(pool.ids[live]), seed)
    values, scored = similar[:, :, 0], live
    values, found = _reliability(features, stores, similar, live, halves, settings, seed)
    if prompts is not None and settings.neighbours:
        ids, vectors = prompt_vectors(prompts, list(sampled.ids))
        pool = sampled.among(ids)
        values = values[places(list(pool.ids[pool.with_gradient]), list(sampled.ids[live]))]
        values, scored = with_neighbours(values, pool.with_gradient, vectors, settings.neighbours)
    if previous is not None:
        values = remember(values, _previous(previous, names, list(pool.ids[scored])), settings.memory)
    fused, rank, _ = fuse(values, settings, tie_keys(list(pool.ids[scored]), seed))
    recipe = {"settings": settings.for_key(), "seed": seed}
    metadata = {SETTINGS_KEY: json.dumps(recipe, sort_keys=True).encode()}
    table = _table(pool, scored, dict(zip(names, values.T, strict=True)), fused, rank)
    write_parquet(table.replace_schema_metadata(metadata), out)
    return {
        "prompts": len(pool.ids),
        "scored": int(live.sum()),
        **({"scored_by_neighbours": int(scored.sum() - live.sum())} if settings.neighbours else {}),
        **({"not_sampled": unsampled} if (unsampled := len(pool.ids) - len(sampled.ids)) else {}),
        "status": status_counts(sampled.status),
        **settings.for_key(),
        "median_ess": _median(sampled.ess[live]),
        "score": _quantiles(fused),
        "reliability": found,
        "sets": _describe_sets(names, stores, targets, similar, keys),
    }


def _open(train: Path, validation: Sequence[Path]) -> tuple[GradientStore, list[GradientStore]]:
    """Open the stores of the pool and of the validation sets, and check that they can be compared."""
    features = GradientStore.open(train)
    stores = [GradientStore.open(path) for path in validation]
    for store in stores:
        check_comparable(features, store)
    return features, stores


def _read_pool(features: GradientStore) -> Pool:
    """Read the columns of the pool.

    Raises:
        SelectionError: No prompt has a gradient.
    """
    pool = Pool.read(features)
    if not pool.with_gradient.any():
        raise SelectionError(
            f"no prompt of the pool {features.path} has a gradient ({describe_statuses(pool.status)}). Collect more "
            "samples a prompt, raise the temperature, or choose another pool"
        )
    return pool


def _describe_sets(
    names: Sequence[str],
    stores: Sequence[GradientStore],
    targets: np.ndarray,
    similar: np.ndarray,
    keys: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """Summarise every validation set: its prompts, its target and the agreement of its halves."""
    # numpy releases the interpreter's lock while it sorts; with a million prompts the sets' halves take seconds.
    agreements = in_order(
        lambda v: _agreement(targets[v], similar[:, v], keys), range(len(names)), threads_here()
    )
    return {
        names[v]: {"prompts": stores[v].n, "with_gradient": with_gradient(stores[v])} | agreement
        for v, agreement in agreements
    }


def _check_request(
    validation: Mapping[str, Path], settings: Scores, previous: Path | None, prompts: Path | None
) -> list[str]:
    """Check the arguments of :func:`score` before a store is opened; return the sorted names of the sets.

    Raises:
        ConfigError: See :func:`score`.
    """
    if not validation:
        raise ConfigError(
            "there is no validation set: scores need at least one gradient store to score against"
        )
    names = sorted(validation)
    if reserved := [name for name in names if name in SCORE_FIXED]:
        raise ConfigError(
            f"the validation sets {reserved} have names of columns of the scores table; rename them"
        )
    if bool(settings.memory) != (previous is not None):
        raise ConfigError(
            f"scores.memory={settings.memory} {'without' if previous is None else 'with'} the scores of the previous "
            "stage: memory needs both, and the first stage has neither"
        )
    if settings.neighbours and prompts is None:
        raise ConfigError(
            f"scores.neighbours={settings.neighbours} compares the texts of prompts, and no prompts table was given. "
            "Give the pool's, or set scores.neighbours=0"
        )
    return names


def _similar(
    features: GradientStore,
    stores: Sequence[GradientStore],
    targets: np.ndarray,
    settings: Scores,
    seed: int,
    report: Report,
) -> np.ndarray:
    """Compare the pool with each set and with its halves in one pass: ``(n, V, 3)``."""
    if settings.target == "nearest":
        prompts = [target_prompts(store, seed) for store in stores]
        return stream_nearest(features, prompts, settings.nearest, settings.metric, report)
    sizes = [with_gradient(store) for store in stores]
    return stream_similarities(features, targets, sizes, settings.metric, report)


def _reliability(
    features: GradientStore,
    stores: Sequence[GradientStore],
    similar: np.ndarray,
    live: np.ndarray,
    halves: Path | None,
    settings: Scores,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Judge the scores ``(live, V, 3)``; return the scores to use, ``(live, V)``, and the verdict in JSON types."""
    values = similar[:, :, 0]
    if halves is None:
        one, other = (standardise(similar[:, :, half]).mean(axis=1) for half in (1, 2))
        return values, by_validation_halves(one, other).summary()
    of_halves = GradientStore.open(halves)
    check_comparable(features, of_halves)
    directions = [sketched(block)[live[rows]] for rows, block in features.blocks()]
    clusters = clustered(np.concatenate(directions), seed)
    scores, names = _half_scores(of_halves, stores, settings, seed)
    place = {name: row for row, name in enumerate(features.column("prompt_id")[live])}
    known = [row for row, name in enumerate(names) if name in place]
    found: Reliability = reliability(scores[known], clusters[[place[names[row]] for row in known]])
    if found.verdict == "weak":
        values = shrunk(values, clusters, found)
    return values, {**found.summary(), "clusters": int(clusters.max(initial=-1)) + 1}


def _half_scores(
    halves: GradientStore, stores: Sequence[GradientStore], settings: Scores, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Score the halves against halves of the sets: ``(n, 2, 2)``, by half of completions and of sets, and the ids."""
    pairs = zip([str(number) for number in range(len(stores))], stores, strict=True)
    targets = np.stack([set_targets(name, store, settings, seed) for name, store in pairs])
    similar = _similar(halves, stores, targets, settings, seed, silent)[:, :, 1:]
    row_of = {
        name: row
        for row, (name, status) in enumerate(
            zip(halves.column("prompt_id"), halves.column("status"), strict=True)
        )
        if status == 0
    }
    suffixes = ("#1", "#2")
    names = [name[:-2] for name in row_of if name.endswith("#1") and f"{name[:-2]}#2" in row_of]
    rows = np.array([[row_of[name + suffix] for suffix in suffixes] for name in names], dtype=np.int64)
    if not names:
        return np.zeros((0, 2, 2)), names
    chosen = similar[rows.reshape(-1)].reshape(len(names), 2, len(stores), 2)
    spread = [[standardise(chosen[:, c, :, v]).mean(axis=1) for v in (0, 1)] for c in (0, 1)]
    return np.array(spread).transpose(2, 0, 1), names


def _previous(previous: Path, names: Sequence[str], prompt_ids: Sequence[str]) -> np.ndarray:
    """Read ``(n, V)`` standardised scores of the previous stage, in the order of the prompts; 0 where it has none.

    Raises:
        ConfigError: The table has other validation sets.
        ArtifactError: The table lacks prompts: it belongs to another pool.
    """
    table = read_parquet(previous)
    previous_names = sorted(name for name in table.column_names if name not in SCORE_FIXED)
    if previous_names != sorted(names):
        raise ConfigError(
            f"the previous stage was scored against the validation sets {previous_names}, this one against "
            f"{sorted(names)}. Memory adds the scores of each set: keep the sets, or set scores.memory=0"
        )
    columns = np.stack([table[name].to_numpy().astype(np.float32) for name in names], axis=1)
    scored = ~np.isnan(columns).any(axis=1)
    recipe = json.loads((table.schema.metadata or {}).get(SETTINGS_KEY, b"null")) or {"settings": {}}
    if not recipe["settings"].get("memory"):  # the first stage stores similarities, not yet standardised
        columns[scored] = standardise(columns[scored])
    columns[~scored] = 0
    rows = places(prompt_ids, table["prompt_id"].to_pylist())
    if missing := [prompt_id for prompt_id, row in zip(prompt_ids, rows, strict=True) if row < 0]:
        raise ArtifactError(
            f"{previous} lacks {len(missing)} prompts of this pool, such as {missing[0]!r}: it belongs to another pool"
        )
    return columns[rows]


def check_comparable(train: GradientStore, validation: GradientStore) -> None:
    """Refuse to compare features of different projections, objectives or policies.

    Raises:
        ArtifactError: A property differs or is missing; the message gives both values of every difference.
    """
    pool, other = _identity(train), _identity(validation)
    different = [
        f"{name} is {value} and {other[name]}" for name, value in pool.items() if value != other[name]
    ]
    if different:
        raise ArtifactError(
            f"{train.path} and {validation.path} cannot be compared: {'; '.join(different)}. "
            "Compute both with the same policy, objective and projection"
        )


def _identity(store: GradientStore) -> dict[str, Any]:
    """Return the properties that features must share to be comparable."""
    attributes = store.attributes
    if missing := [n for n in ("projection", "objective", "policy") if n not in attributes]:
        raise ArtifactError(
            f"{store.path} does not state its {', '.join(missing)}, so its features cannot be interpreted. "
            "Compute it again with the gradients step"
        )
    projection = {f"projection.{name}": attributes["projection"].get(name) for name in PROJECTION_FIELDS}
    others = {name: attributes[name] for name in ("objective", "policy")}
    layers = attributes.get("layers", "all")  # stores of all layers do not state it
    return {"dimensions": store.k, "layers": layers, **projection, **others}


def _table(
    pool: Pool, scored: np.ndarray, sets: dict[str, np.ndarray], fused: np.ndarray, rank: np.ndarray
) -> pa.Table:
    """Build the scores table; ``scored`` marks the prompts that have values."""

    def column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        """Spread the scored prompts' values over the pool; the others are null."""
        spread = np.zeros(len(scored), dtype=values.dtype)
        spread[scored] = values
        return pa.array(spread, mask=~scored).cast(kind)

    columns = [
        pa.array(list(pool.ids), pa.string()),
        pa.array([STATUSES[code] for code in pool.status], pa.string()),
        *[column(values, pa.float32()) for values in sets.values()],
        column(fused, pa.float32()),
        column(rank, pa.int32()),
        *[pa.array(values, mask=np.isnan(values)) for values in (pool.mean_reward, pool.norm)],
    ]
    return pa.table(columns, schema=scores_schema(list(sets)))


def _agreement(targets: np.ndarray, similar: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """Measure the agreement of two halves of a validation set on direction and on the best tenth of the pool.

    Args:
        targets: ``(3, k)`` targets of the set and its halves.
        similar: ``(n, 3)`` similarities of the prompts with them.
        keys: ``(n,)`` order of equal scores.
    """
    norms = np.linalg.norm(targets, axis=1)
    result: dict[str, Any] = {"target_norm": float(norms[0]), "quantiles": _quantiles(similar[:, 0])}
    if not norms[1:].all():  # a set of one prompt has no halves
        return result | {"split_half_cosine": None, "split_half_top_overlap": None}
    top = max(1, (2 * len(similar) + 10) // 20)
    first, second = (best(similar[:, half], keys, top) for half in (1, 2))
    return result | {
        "split_half_cosine": float(targets[1] @ targets[2] / (norms[1] * norms[2])),
        "split_half_top_overlap": len(np.intersect1d(first, second)) / top,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    points = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    quantiles = np.quantile(values, np.array(list(points.values()), dtype=values.dtype))
    return {name: float(value) for name, value in zip(points, quantiles, strict=True)}


def _median(values: np.ndarray) -> float | None:
    finite = values[~np.isnan(values)]
    return float(np.median(finite)) if len(finite) else None
