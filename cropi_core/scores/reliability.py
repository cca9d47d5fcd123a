"""How reliable the scores of a stage are: one verdict, from halves that have nothing in common.

    found = reliability(halves, clusters)       # halves (n, 2, 2): scores by half of completions and of validation
    found.verdict                               # reliable, weak, noise
    values = shrunk(values, clusters, found)    # empirical Bayes

A score has two sources of noise: the completions that were sampled for the prompt, and the validation prompts. Scores
from one half of a prompt's completions and one half of a validation set are compared with scores from the other half
of both. What the two have in common is what another sample would show again, so no prompt is judged by the noise that
made it look good. Twice the data have the reliability 2 r / (1 + r) (Spearman, Brown).

Where single prompts are noise, groups of them may not be. Prompts whose gradients point alike form clusters; the mean
of a cluster has less noise than its members. A shrunk score is the mean of the cluster plus the share of the distance
from it that the halves show to be reliable (empirical Bayes: Efron and Morris, *Stein's estimation rule and its
competitors*, JASA 1973).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cropi_core.statistics import spearman

Grade = Literal["reliable", "weak", "noise"]

RELIABLE = 0.3
"""Least rank correlation of the scores, of twice the data of a half, with which they are used alone."""
LEAST = 12
"""Fewest prompts with a gradient in both halves that give a figure."""
DIRECTIONS = 64
"""Dimensions in which gradients are clustered."""
MEMBERS, MOST_CLUSTERS = 20, 32
"""Prompts of a cluster on average, and most clusters."""
ROUNDS, PERMUTATIONS = 25, 200


@dataclass(frozen=True)
class Reliability:
    """What the halves show.

    Attributes:
        verdict: ``reliable``: scores of single prompts; ``weak``: of clusters only; ``noise``: neither.
        figure: Rank correlation of scores from other completions and other validation prompts; None if unknown.
        chance: Rank correlation of a half that chance stays below in 19 of 20 cases; None if unknown.
        clustered: The figure of scores that are shrunk to clusters; None if unknown.
        within: Reliability of the distance of a score from the mean of its cluster, 0 to 1.
        compared: Prompts with a gradient in both halves.
        basis: What was halved.
    """

    verdict: Grade | None
    figure: float | None
    chance: float | None
    clustered: float | None
    within: float
    compared: int
    basis: Literal["completions and validation prompts", "validation prompts"]

    def summary(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)


def doubled(correlation: float | None) -> float | None:
    """Return the reliability of twice the data (Spearman, Brown); a negative correlation is none."""
    if correlation is None:
        return None
    positive = max(0.0, correlation)
    return 2 * positive / (1 + positive)


def reliability(halves: np.ndarray, clusters: np.ndarray) -> Reliability:
    """Judge scores by halves of the completions and of the validation prompts.

    Args:
        halves: ``(n, 2, 2)`` scores by half of the completions and half of the validation prompts.
        clusters: ``(n,)`` cluster of each prompt.
    """
    n = len(halves)
    basis: Any = "completions and validation prompts"
    if n < LEAST:
        return Reliability(None, None, None, None, 1.0, n, basis)
    pairs = [(halves[:, 0, 0], halves[:, 1, 1]), (halves[:, 0, 1], halves[:, 1, 0])]
    alone = _mean([spearman(one, other) for one, other in pairs])
    within = _mean([_within(one, other, clusters) for one, other in pairs])
    share = doubled(within) or 0.0
    together = _mean(
        [spearman(_shrunk(one, clusters, share), _shrunk(other, clusters, share)) for one, other in pairs]
    )
    chance = min(1.0, 1.645 / math.sqrt(n - 1))
    grouped = _chance_together(pairs, clusters, share)
    grade = _verdict(alone, chance, clusters_agree=together is not None and together > grouped)
    return Reliability(grade, doubled(alone), chance, doubled(together), share, n, basis)


def _chance_together(pairs: list[tuple[np.ndarray, np.ndarray]], clusters: np.ndarray, share: float) -> float:
    """Return the correlation of shrunk scores that chance stays below in 19 of 20 cases, by permutation.

    Scores that are shrunk to a few clusters have few values that are free, so they agree by chance more often than
    their number of prompts suggests.
    """
    random = np.random.Generator(np.random.PCG64(len(clusters)))
    found = []
    for _ in range(PERMUTATIONS):
        order = random.permutation(len(clusters))
        values = [
            spearman(_shrunk(one, clusters, share), _shrunk(other[order], clusters, share))
            for one, other in pairs
        ]
        found.append(_mean(values) or 0.0)
    return float(np.quantile(found, 0.95))


def by_validation_halves(one: np.ndarray, other: np.ndarray) -> Reliability:
    """Judge scores by halves of the validation prompts alone: an upper bound, the completions are the same."""
    n, basis = len(one), "validation prompts"
    if n < LEAST:
        return Reliability(None, None, None, None, 1.0, n, basis)
    alone = spearman(one, other)
    chance = min(1.0, 1.645 / math.sqrt(n - 1))
    return Reliability(
        _verdict(alone, chance, clusters_agree=False), doubled(alone), chance, None, 1.0, n, basis
    )


def _verdict(alone: float | None, chance: float, *, clusters_agree: bool) -> Grade:
    above = alone is not None and alone > chance
    if above and (doubled(alone) or 0.0) >= RELIABLE:
        return "reliable"
    return "weak" if above or clusters_agree else "noise"


def _within(one: np.ndarray, other: np.ndarray, clusters: np.ndarray) -> float | None:
    """Correlate the distances of two halves' scores from the means of their clusters."""
    first, second = (values - cluster_means(values, clusters)[clusters] for values in (one, other))
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm > 0 else None


def _shrunk(values: np.ndarray, clusters: np.ndarray, share: float) -> np.ndarray:
    means = cluster_means(values, clusters)[clusters]
    return means + share * (values - means)


def cluster_means(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the mean of ``(n,)`` values in each cluster; 0 for an empty one."""
    sizes = np.bincount(clusters)
    return np.bincount(clusters, values) / np.maximum(sizes, 1)


def shrunk(values: np.ndarray, clusters: np.ndarray, found: Reliability) -> np.ndarray:
    """Shrink ``(n, V)`` scores to the means of their clusters, set by set, float32."""
    columns = [_shrunk(column.astype(np.float64), clusters, found.within) for column in values.T]
    return np.stack(columns, axis=1).astype(np.float32)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# -- clusters ------------------------------------------------------------------------------------------------


def sketched(block: np.ndarray, directions: int = DIRECTIONS) -> np.ndarray:
    """Fold ``(rows, k)`` features into ``directions`` dimensions by fixed signs, and scale rows to length 1."""
    k = block.shape[1]
    column = np.arange(k, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    place = (column >> np.uint64(40)).astype(np.int64) % directions
    signs = np.where(column >> np.uint64(63), -1.0, 1.0)
    folding = np.zeros((k, directions))
    folding[np.arange(k), place] = signs
    folded = block.astype(np.float64) @ folding
    norms = np.linalg.norm(folded, axis=1, keepdims=True)
    return np.divide(folded, norms, out=np.zeros_like(folded), where=norms > 0)


def clustered(directions: np.ndarray, seed: int) -> np.ndarray:
    """Cluster ``(n, d)`` vectors of length 1 by their cosines; return ``(n,)`` clusters.

    Spherical k-means (Dhillon and Modha 2001) that starts from prompts far apart; equal inputs give equal clusters.
    """
    n = len(directions)
    count = int(np.clip(n // MEMBERS, 1, MOST_CLUSTERS))
    centres = directions[[seed % n]] if n else directions
    while len(centres) < count:
        nearest = (directions @ centres.T).max(axis=1).round(9)
        centres = np.concatenate([centres, directions[[int(np.argmin(nearest))]]])
    labels = np.zeros(n, dtype=np.int64)
    for _ in range(ROUNDS):
        fresh = np.argmax((directions @ centres.T).round(9), axis=1)
        if (fresh == labels).all() and _:
            break
        labels = fresh
        for cluster in range(len(centres)):
            total = directions[labels == cluster].sum(axis=0)
            if (norm := np.linalg.norm(total)) > 0:
                centres[cluster] = total / norm
    return labels
