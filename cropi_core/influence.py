"""Score the prompts of a pool by their influence on validation sets, and fuse the sets into one order.

    summary = score(
        train=Path("pool.zarr"), validation={"gsm8k": Path("gsm8k.zarr")}, out=Path("scores.parquet"),
        settings=Scores(), seed=0,
    )

Reads gradient stores, never the model: another metric, target or fusion costs one pass over the pool's
features. Memory is a block of features and a few numbers a prompt, whatever the size of the pool.

References:
    CROPI, arXiv 2510.26491: the influence of a prompt on a validation set is the cosine of their gradients
    (POPI); the orders of several sets are fused by reciprocal rank.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.errors import ArtifactError, ConfigError, SelectionError
from cropi_core.gradient_store import GradientStore
from cropi_core.progress import Report, silent
from cropi_core.shard_reader import in_order, threads_here
from cropi_core.similarity import nonzero, stream_similarities
from cropi_core.tables import write_parquet
from data_schemas.arrow import SCORE_FIXED, STATUSES, scores_schema
from data_schemas.config import Scores

SETTINGS_KEY = b"cropi.scores"
"""Parquet metadata of a scores table: JSON of settings and seed, so that a selection can say who voted."""
PROJECTION_FIELDS = ("kind", "k", "density", "form", "seed")


def score(
    *,
    train: Path,
    validation: Mapping[str, Path],
    out: Path,
    settings: Scores = Scores(),
    seed: int = 0,
    previous: Path | None = None,
    report: Report = silent,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the scores table of a pool.

    Args:
        train: Gradient store of the pool.
        validation: Gradient store by validation set. Sets are taken in the order of their names, not of
            this mapping: an artifact's key does not know the order in which its inputs were listed.
        out: Parquet file to write; it appears whole or not at all.
        settings: Metric, target and fusion.
        seed: Of the order among equal scores, and of the halves of the split-half agreement.
        previous: Scores table of the stage before, which ``settings.memory`` needs; a set's column then holds what
            :func:`remember` makes, and not the similarities alone.
        report: Told how many prompts of the pool are scored.
        threads: That read and multiply, by default a core each, at most eight; no score depends on it.

    Returns:
        A summary in JSON types: counts by status, quantiles, and by validation set the norm of its target and
        how far two halves of the set agree on direction and on the best tenth of the pool.

    Raises:
        ConfigError: No validation set, or one named as a column of its own; memory without a stage before, or the
            other way round.
        ArtifactError: A store is damaged, or was made with another projection, objective or policy.
        SelectionError: The pool or a validation set has no prompt with a gradient.
    """
    if not validation:
        raise ConfigError("no validation set: scores need at least one gradient store to score against")
    names = sorted(validation)
    if taken := [name for name in names if name in SCORE_FIXED]:
        raise ConfigError(f"validation sets {taken} have the names of columns of the scores table")
    if bool(settings.memory) != (previous is not None):
        raise ConfigError(
            f"scores.memory={settings.memory} {'without' if previous is None else 'with'} the scores of the stage "
            "before: memory takes both, and the first stage has neither"
        )
    pool = GradientStore.open(train)
    stores = {name: GradientStore.open(validation[name]) for name in names}
    for store in stores.values():
        check_comparable(pool, store)
    ok = pool.column("status") == 0
    if not ok.any():
        raise SelectionError(
            f"no prompt of the pool {train} has a gradient ({_counts(pool)}): collect more samples a prompt, "
            "raise the temperature, or choose another pool"
        )
    goals = np.stack([set_targets(name, stores[name], settings, seed) for name in names])  # (V, 3, k)
    sizes = [int((stores[name].column("status") == 0).sum()) for name in names]
    similar = stream_similarities(pool, goals, sizes, settings.metric, report, threads)[ok]
    ids = pool.column("prompt_id")
    keys = tie_keys(list(ids[ok]), seed)
    values = similar[:, :, 0]
    if previous is not None:
        values = remember(values, _earlier(previous, names, list(ids[ok])), settings.memory)
    fused, rank, _ = fuse(values, settings, keys)
    table = _table(pool, ok, dict(zip(names, values.T, strict=True)), fused, rank)
    recipe = {"settings": settings.for_key(), "seed": seed}
    metadata = {SETTINGS_KEY: json.dumps(recipe, sort_keys=True).encode()}
    write_parquet(table.replace_schema_metadata(metadata), out)
    # numpy sorts without the interpreter's lock: with a million prompts the sets' halves take seconds.
    halves = in_order(lambda v: _agreement(goals[v], similar[:, v], keys), range(len(names)), threads_here())
    sets = {
        names[v]: {"prompts": stores[names[v]].n, "with_gradient": sizes[v]} | agreement
        for v, agreement in halves
    }
    return {
        "prompts": pool.n,
        "scored": int(ok.sum()),
        "status": status_counts(pool.column("status")),
        **settings.for_key(),
        "median_ess": _median(pool.column("ess")[ok]),
        "score": _quantiles(fused),
        "sets": sets,
    }


def remember(now: np.ndarray, before: np.ndarray, memory: float) -> np.ndarray:
    """Add to a stage's scores those of the stages before: m_t = z(s_t) + memory · m_(t−1).

    The target of a later stage is mostly noise (docs/evidence.md), and noise that is drawn anew at every stage; what a
    prompt is about stays. Prompts are standardised set by set, so that no stage counts more for its longer gradients.

    Args:
        now: ``(n, V)`` similarities of the prompts with a gradient.
        before: ``(n, V)`` what the stage before came to, standardised; 0 for a prompt that it could not score.
        memory: From 0, the present alone, to 1, where all stages count alike.

    Returns:
        ``(n, V)`` float32.
    """
    return (_z_scores(now) + memory * before).astype(np.float32)


def _earlier(previous: Path, names: Sequence[str], prompt_ids: Sequence[str]) -> np.ndarray:
    """Read ``(n, V)`` standardised scores of the stage before, in the order of the prompts; 0 where it has none.

    Raises:
        ConfigError: It has other validation sets.
        ArtifactError: It lacks prompts, so it is of another pool.
    """
    table = pq.read_table(previous)
    found = [name for name in table.column_names if name not in SCORE_FIXED]
    if sorted(found) != sorted(names):
        raise ConfigError(
            f"the scores of the stage before are of the validation sets {sorted(found)}, and these of {sorted(names)}: "
            "memory adds set to set"
        )
    columns = np.stack([table[name].to_numpy().astype(np.float32) for name in names], axis=1)
    known = ~np.isnan(columns).any(axis=1)
    recipe = json.loads((table.schema.metadata or {}).get(SETTINGS_KEY, b"null")) or {"settings": {}}
    if not recipe["settings"].get("memory"):  # of the first stage: similarities as they are
        columns[known] = _z_scores(columns[known])
    columns[~known] = 0
    place = {prompt_id: row for row, prompt_id in enumerate(table["prompt_id"].to_pylist())}
    if missing := [one for one in prompt_ids if one not in place]:
        raise ArtifactError(
            f"{previous} lacks {len(missing)} prompts of this pool, such as {missing[0]!r}: it is of another pool"
        )
    return columns[[place[one] for one in prompt_ids]]


def tie_keys(prompt_ids: Sequence[str], seed: int) -> np.ndarray:
    """Return ``(n,)`` uint64 that order equal scores: a seeded hash of the id."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(i.encode(), digest_size=8, salt=salt).digest() for i in prompt_ids]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def target(blocks: Iterable[tuple[slice, np.ndarray]], members: np.ndarray, kind: str) -> np.ndarray:
    """Average features over groups of prompts.

    φ_g = mean over x in g of φ(x), or of φ(x)/‖φ(x)‖ for ``normalized_mean``, where no prompt weighs more
    than another; a feature of norm zero then counts as zero.

    Args:
        blocks: Rows and their features ``(rows, k)``.
        members: ``(n, groups)`` bool: who belongs to which group; nobody gives a row of zeros.
        kind: ``mean`` or ``normalized_mean``.

    Returns:
        ``(groups, k)`` float64.
    """
    if kind not in ("mean", "normalized_mean"):
        raise ConfigError(f"scores.target={kind!r} must be mean or normalized_mean")
    total: np.ndarray | None = None
    for rows, block in blocks:
        features = block.astype(np.float64)
        if kind == "normalized_mean":
            features /= nonzero(np.linalg.norm(features, axis=1))[:, None]
        # A selection and not a product with 0: the feature of somebody outside may be anything.
        part = np.stack([features[group].sum(axis=0) for group in members[rows].T])
        total = part if total is None else total + part
    if total is None:
        raise SelectionError("a target needs at least one block of features")
    return total / np.maximum(members.sum(axis=0), 1)[:, None]


def set_targets(name: str, store: GradientStore, settings: Scores, seed: int) -> np.ndarray:
    """Return ``(3, k)``: the target of a validation set, and those of two seeded halves of its prompts.

    Raises:
        SelectionError: No prompt of the set has a gradient, or the gradients cancel out.
    """
    live = np.flatnonzero(store.column("status") == 0)
    if not len(live):
        raise SelectionError(f"no prompt with a gradient in validation set {name} ({_counts(store)})")
    members = np.zeros((store.n, 3), dtype=bool)
    members[live, 0] = True
    shuffled = live[np.argsort(tie_keys(list(store.column("prompt_id")[live]), seed))]
    members[shuffled[0::2], 1] = True
    members[shuffled[1::2], 2] = True
    goals = target(store.blocks(), members, settings.target)
    if not goals[0].any():
        raise SelectionError(
            f"the target of validation set {name} is zero: its {len(live)} gradients cancel out"
        )
    return goals


def order(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the positions of ``(n,)`` values from best to worst, equal ones by their keys.

    As ``np.lexsort((keys, -values))``, three times as fast: numpy sorts one key with vector instructions, and
    what is equal is put right afterwards.
    """
    positions = np.argsort(-values)
    found = values[positions]
    same = (found[1:] == found[:-1]) | (np.isnan(found[1:]) & np.isnan(found[:-1]))
    if same.any():
        same = np.concatenate([[False], same, [False]])
        places = np.flatnonzero(same[1:] | same[:-1])
        run = np.cumsum(~same)[places]  # the number of its group of equals
        among = positions[places]
        positions[places] = among[np.lexsort((keys[among], run))]
    return positions


def best(values: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the ``count`` best of ``(n,)`` values, as :func:`order`, without sorting the rest."""
    falling = -values
    limit = np.partition(falling, count - 1)[count - 1]
    among = np.flatnonzero(~(falling > limit))  # not <=, so that NaN, the worst of all, stays among them
    return among[order(values[among], keys[among])[:count]]


def ranks(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return ``(n,)`` int32 places counted from 1, the largest value first, equal ones by their keys."""
    places = np.empty(len(values), dtype=np.int32)
    places[order(values, keys)] = np.arange(1, len(values) + 1, dtype=np.int32)
    return places


def fuse(scores: np.ndarray, settings: Scores, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fuse the orders of V validation sets into one.

    * ``rrf``: Σ_v 1 / (k0 + rank_v); with ``rrf_top`` only the best n of a set get its vote.
    * ``mean``: the mean over the sets of z-scores, so that a set of widely spread scores has no more to say.
    * ``max``: the largest cosine, as cosines mean the same in every set; of ``dot`` the largest z-score, as
      inner products grow with the norm of the target.
    * ``quota``: the sets take turns, each picking its best prompt not yet taken; score 1 − (rank − 1)/n.

    Args:
        scores: ``(n, V)``, finite; prompts without a gradient are left out before.
        settings: ``fusion``, ``rrf_k0``, ``rrf_top``, ``metric``.
        keys: ``(n,)`` unsigned integers that order equal scores, see :func:`tie_keys`.

    Returns:
        ``score`` ``(n,)`` float32; ``rank`` ``(n,)`` int32 from 1, by falling score; ``votes`` ``(n, V)``
        int32, the prompt's rank in each set that spoke for it, 0 where a set did not.

    References:
        thu-coai/CROPI (293c663) is ``rrf`` with k0 = 0 over the best n of each set. Cormack, Clarke and
        Büttcher, *Reciprocal rank fusion*, SIGIR 2009, take k0 = 60.
    """
    if not np.isfinite(scores).all():
        raise SelectionError(
            f"{(~np.isfinite(scores)).sum()} scores are not finite; a fusion would hide them"
        )
    n, sets = scores.shape
    places = np.stack([ranks(scores[:, v], keys) for v in range(sets)], axis=1)
    if settings.fusion == "rrf":
        votes = places if settings.rrf_top is None else np.where(places <= settings.rrf_top, places, 0)
        fused = np.where(votes > 0, 1 / (settings.rrf_k0 + places), 0).sum(axis=1)
    elif settings.fusion == "mean":
        fused, votes = _z_scores(scores).mean(axis=1), places
    elif settings.fusion == "max":
        values = scores.astype(np.float64) if settings.metric == "cosine" else _z_scores(scores)
        fused = values.max(axis=1)
        votes = np.where(values == fused[:, None], places, 0)
    elif settings.fusion == "quota":
        rank, picked_by = take_turns(places)
        votes = np.where(picked_by[:, None] == np.arange(sets), places, 0)
        return (1 - (rank - 1) / n).astype(np.float32), rank, votes
    else:
        raise ConfigError(f"scores.fusion={settings.fusion!r} must be rrf, max, mean or quota")
    fused = fused.astype(np.float32)  # ranked as stored: who reads the table finds the order in it again
    return fused, ranks(fused, keys), votes


def take_turns(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let the sets pick in turn their best prompt that is not taken.

    Args:
        places: ``(n, V)`` ranks from 1.

    Returns:
        ``(n,)`` int32 rank in the order of picking, and ``(n,)`` which set picked.
    """
    n, sets = places.shape
    preference = np.argsort(places, axis=0)
    rank, picked_by = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
    cursor = [0] * sets
    for turn in range(n):
        v = turn % sets
        while rank[preference[cursor[v], v]]:
            cursor[v] += 1
        chosen = preference[cursor[v], v]
        rank[chosen], picked_by[chosen] = turn + 1, v
    return rank, picked_by


def check_comparable(train: GradientStore, validation: GradientStore) -> None:
    """Refuse to compare features of different projections, objectives or policies.

    Raises:
        ArtifactError: Something differs or is not stated; every difference is named with both values.
    """
    ours, theirs = _identity(train), _identity(validation)
    different = [f"{name} is {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise ArtifactError(
            f"{train.path} and {validation.path} cannot be compared: {'; '.join(different)}. "
            "Compute both with the same policy, objective and projection"
        )


def _identity(store: GradientStore) -> dict[str, Any]:
    attributes = store.attributes
    if missing := [n for n in ("projection", "objective", "policy") if n not in attributes]:
        raise ArtifactError(
            f"{store.path} does not state its {', '.join(missing)}; its features mean nothing"
        )
    projection = {f"projection.{name}": attributes["projection"].get(name) for name in PROJECTION_FIELDS}
    others = {name: attributes[name] for name in ("objective", "policy")}
    return {"dimensions": store.k, **projection, **others}


def _table(
    pool: GradientStore, ok: np.ndarray, sets: dict[str, np.ndarray], fused: np.ndarray, rank: np.ndarray
) -> pa.Table:
    def column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        """Spread the scored prompts' values over the pool; the others are null."""
        everyone = np.zeros(pool.n, dtype=values.dtype)
        everyone[ok] = values
        return pa.array(everyone, mask=~ok).cast(kind)

    def figures(name: str) -> pa.Array:
        values = pool.column(name)
        return pa.array(values, mask=np.isnan(values))

    columns = [
        pa.array(list(pool.column("prompt_id")), pa.string()),
        pa.array([STATUSES[code] for code in pool.column("status")], pa.string()),
        *[column(values, pa.float32()) for values in sets.values()],
        column(fused, pa.float32()),
        column(rank, pa.int32()),
        figures("mean_reward"),
        figures("norm"),
    ]
    return pa.table(columns, schema=scores_schema(list(sets)))


def status_counts(codes: np.ndarray) -> dict[str, int]:
    """Count prompts by status; every status is named."""
    return {name: int((codes == code).sum()) for code, name in enumerate(STATUSES)}


def _counts(store: GradientStore) -> str:
    return ", ".join(f"{name} {count}" for name, count in status_counts(store.column("status")).items())


def _agreement(goals: np.ndarray, similar: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """Tell how far two halves of a validation set agree, on direction and on the best tenth of the pool.

    Args:
        goals: ``(3, k)`` targets of the set and its halves.
        similar: ``(n, 3)`` the prompts' similarities to them.
        keys: ``(n,)`` for ties.
    """
    norms = np.linalg.norm(goals, axis=1)
    result: dict[str, Any] = {"target_norm": float(norms[0]), "quantiles": _quantiles(similar[:, 0])}
    if not norms[1:].all():  # a set of one prompt has no halves
        return result | {"split_half_cosine": None, "split_half_top_overlap": None}
    top = max(1, (2 * len(similar) + 10) // 20)
    first, second = (best(similar[:, half], keys, top) for half in (1, 2))
    return result | {
        "split_half_cosine": float(goals[1] @ goals[2] / (norms[1] * norms[2])),
        "split_half_top_overlap": len(np.intersect1d(first, second)) / top,
    }


def _z_scores(scores: np.ndarray) -> np.ndarray:
    """Standardise each column of ``(n, V)``; exact sums, so that the rows' order decides no tie."""
    values = scores.astype(np.float64)
    n = len(values)
    centred = values - np.array([math.fsum(column) / n for column in values.T])
    centred[:, np.ptp(values, axis=0) == 0] = (
        0  # without this a constant column is its rounding error, scaled up
    )
    return centred / nonzero(np.array([math.sqrt(math.fsum(column**2) / n) for column in centred.T]))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    points = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    found = np.quantile(values, np.array(list(points.values()), dtype=values.dtype))
    return {name: float(value) for name, value in zip(points, found, strict=True)}


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None
