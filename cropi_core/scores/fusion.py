"""Orders of a pool: ties by seeded keys, fusion of several validation sets, memory of earlier stages.

    keys = tie_keys(prompt_ids, seed)
    score, rank, votes = fuse(scores, Scores(fusion="quota"), keys)      # (n, V) -> (n,), (n,), (n, V)

Pure functions of small arrays; :mod:`cropi_core.scores.influence` reads the features.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from cropi_core.errors import ConfigError, SelectionError
from cropi_core.statistics import nonzero
from data_schemas import Scores

SETTINGS_KEY = b"cropi.scores"
"""Parquet metadata of a scores table: JSON of settings and seed, so that a selection can explain the ranks."""


def tie_keys(prompt_ids: Sequence[str], seed: int) -> np.ndarray:
    """Return ``(n,)`` uint64 keys that order equal scores: a seeded hash of the id."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(i.encode(), digest_size=8, salt=salt).digest() for i in prompt_ids]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def order(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the positions of ``(n,)`` values from best to worst, equal values by their keys.

    The result of ``np.lexsort((keys, -values))``, three times as fast: numpy sorts one key with vector instructions,
    and only equal values are sorted by the second key afterwards.
    """
    positions = np.argsort(-values)
    ordered = values[positions]
    same = (ordered[1:] == ordered[:-1]) | (np.isnan(ordered[1:]) & np.isnan(ordered[:-1]))
    if same.any():
        same = np.concatenate([[False], same, [False]])
        places = np.flatnonzero(same[1:] | same[:-1])
        run = np.cumsum(~same)[places]  # number of the run of equal values
        tied = positions[places]
        positions[places] = tied[np.lexsort((keys[tied], run))]
    return positions


def best(values: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return the first ``count`` positions of :func:`order`, without sorting the rest."""
    falling = -values
    limit = np.partition(falling, count - 1)[count - 1]
    candidates = np.flatnonzero(~(falling > limit))  # not <=, so that NaN, the worst value, is included
    return candidates[order(values[candidates], keys[candidates])[:count]]


def ranks(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return ``(n,)`` int32 ranks from 1, the largest value first, equal values by their keys."""
    places = np.empty(len(values), dtype=np.int32)
    places[order(values, keys)] = np.arange(1, len(values) + 1, dtype=np.int32)
    return places


def fuse(scores: np.ndarray, settings: Scores, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fuse the orders of V validation sets into one.

    * ``rrf``: Σ_v 1 / (k0 + rank_v); with ``rrf_top`` a set votes only for its best n prompts.
    * ``mean``: the mean of the sets' z-scores, so that sets with a wide spread of scores do not weigh more.
    * ``max``: the largest cosine, because cosines are comparable between sets; for ``dot``, whose inner products grow
      with the norm of the target, the largest z-score.
    * ``quota``: the sets take turns, and each picks its best prompt that is not taken; score 1 − (rank − 1)/n.

    Args:
        scores: ``(n, V)``, finite, of the prompts with a gradient.
        settings: ``fusion``, ``rrf_k0``, ``rrf_top``, ``metric``.
        keys: ``(n,)`` unsigned integers that order equal scores; see :func:`tie_keys`.

    Returns:
        ``score`` ``(n,)`` float32; ``rank`` ``(n,)`` int32 from 1, by falling score; ``votes`` ``(n, V)`` int32: the
        prompt's rank in each set that votes for it, 0 for the other sets.

    Raises:
        SelectionError: A score is not finite.

    References:
        thu-coai/CROPI (293c663) is ``rrf`` with k0 = 0 over the best n of each set. Cormack, Clarke and Büttcher,
        *Reciprocal rank fusion*, SIGIR 2009, use k0 = 60.
    """
    if not np.isfinite(scores).all():
        raise SelectionError(
            f"{(~np.isfinite(scores)).sum()} scores are not finite, and a fusion would hide them. Compute the "
            "gradients again, or set scores.metric=cosine"
        )
    n, sets = scores.shape
    places = np.stack([ranks(scores[:, v], keys) for v in range(sets)], axis=1)
    if settings.fusion == "rrf":
        votes = places if settings.rrf_top is None else np.where(places <= settings.rrf_top, places, 0)
        fused = np.where(votes > 0, 1 / (settings.rrf_k0 + places), 0).sum(axis=1)
    elif settings.fusion == "mean":
        fused, votes = standardise(scores).mean(axis=1), places
    elif settings.fusion == "max":
        values = scores.astype(np.float64) if settings.metric == "cosine" else standardise(scores)
        fused = values.max(axis=1)
        votes = np.where(values == fused[:, None], places, 0)
    elif settings.fusion == "quota":
        rank, picked_by = take_turns(places)
        votes = np.where(picked_by[:, None] == np.arange(sets), places, 0)
        return (1 - (rank - 1) / n).astype(np.float32), rank, votes
    else:
        raise ConfigError(f"scores.fusion={settings.fusion!r} must be rrf, max, mean or quota")
    fused = fused.astype(np.float32)  # ranked as stored, so that a reader of the table gets the same order
    return fused, ranks(fused, keys), votes


def take_turns(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let the sets take turns in picking their best prompt that is not taken.

    Args:
        places: ``(n, V)`` ranks from 1.

    Returns:
        ``(n,)`` int32 rank in the order of picking, and ``(n,)`` int32 the set that picked.
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


def remember(now: np.ndarray, before: np.ndarray, memory: float) -> np.ndarray:
    """Add the scores of the earlier stages to those of a stage: m_t = z(s_t) + memory · m_(t−1).

    The target of a later stage is mostly noise (docs/background/evidence.md) that is independent between stages, while
    the subject of a prompt stays the same. Scores are standardised set by set, so that a stage with larger gradients
    does not weigh more.

    Args:
        now: ``(n, V)`` similarities of the prompts with a gradient.
        before: ``(n, V)`` standardised result of the previous stage; 0 for a prompt that it did not score.
        memory: From 0, for this stage alone, to 1, for equal weights of all stages.

    Returns:
        ``(n, V)`` float32.
    """
    return (standardise(now) + memory * before).astype(np.float32)


def standardise(scores: np.ndarray) -> np.ndarray:
    """Shift and scale each column of ``(n, V)`` to mean 0 and standard deviation 1, float64.

    The sums are exact, so the order of the rows does not decide ties.
    """
    values = scores.astype(np.float64)
    n = len(values)
    centred = values - np.array([math.fsum(column) / n for column in values.T])
    # A constant column would otherwise be its rounding error, scaled up.
    centred[:, np.ptp(values, axis=0) == 0] = 0
    return centred / nonzero(np.array([math.sqrt(math.fsum(column**2) / n) for column in centred.T]))
