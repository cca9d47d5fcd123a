"""Levels of difficulty without annotations, and the coverage of a target without embeddings, from a run's artifacts.

    found = read_levels(artifacts, stage=2)
    found.mean                       # mean known level of the selected prompts
    found.by_belief, found.by_cluster   # rank correlation of the estimated levels with the known ones
    found.coverage                   # share of the target that lies in clusters with a selected prompt

A prompt's difficulty is estimated by one minus its pass rate, believed from its rewards and the pool's distribution of
pass rates; or, for prompts with a gradient, by the mean of that over the cluster of gradients. Both are compared with
the level that the data state. The pool and the validation prompts are clustered together, by the directions of their
gradients, so a selection covers a validation prompt if it has a prompt of the same cluster.
"""

from dataclasses import dataclass

import numpy as np

from cropi_core.analysis.columns import MOST_BYTES, OK, in_order, open_gradients, selected_of
from cropi_core.analysis.contrast import level_numbers
from cropi_core.artifacts import BELIEF_FILE, ROLLOUTS, SELECTION_FILE
from cropi_core.errors import ArtifactError, DataError
from cropi_core.runs import Artifacts, read_pool
from cropi_core.scores import cluster_means, clustered, sketched
from cropi_core.selection import aligned, expected_rates, from_rollouts, read_belief, reward_sums
from cropi_core.statistics import spearman
from data_schemas import SELECTION

FEWEST = 3
"""Prompts that a rank correlation needs."""


@dataclass(frozen=True)
class Levels:
    """Levels of one stage; None where data are missing.

    Attributes:
        stage: Counted from 1.
        mean: Mean known level of the selected prompts.
        pool: Mean known level of the pool.
        by_belief: Rank correlation of known levels with 1 − believed pass rate, over the pool.
        by_cluster: The same with the mean of a prompt's cluster, over the prompts with a gradient.
        coverage: Share of the validation prompts with a gradient whose cluster has a selected prompt.
    """

    stage: int
    mean: float | None
    pool: float | None
    by_belief: float | None
    by_cluster: float | None
    coverage: float | None


def read_levels(artifacts: Artifacts, stage: int) -> Levels | None:
    """Read the levels of a stage; None without a pool or a selection."""
    pool = read_pool(artifacts)
    table = artifacts.table(f"selection@{stage}", SELECTION_FILE, SELECTION.names)
    if pool is None or table is None:
        return None
    chosen = selected_of(artifacts, table, pool.ids)
    levels, rates = level_numbers(pool.levels), believed_rates(artifacts, stage, pool.ids)
    by_cluster = covered = None
    if (found := _clusters(artifacts, stage, pool.ids)) is not None:
        clusters, targets = found
        covered = coverage(clusters, chosen, targets)
        by_cluster = level_correlation(cluster_difficulty(rates, clusters), levels)
    return Levels(
        stage=stage,
        mean=_mean(levels[chosen]),
        pool=_mean(levels),
        by_belief=level_correlation(1 - rates, levels),
        by_cluster=by_cluster,
        coverage=covered,
    )


def level_correlation(difficulty: np.ndarray, levels: np.ndarray) -> float | None:
    """Return the rank correlation of two ``(n,)`` arrays over the prompts that have both; NaN is unknown."""
    both = ~np.isnan(difficulty) & ~np.isnan(levels)
    return spearman(difficulty[both], levels[both]) if both.sum() >= FEWEST else None


def cluster_difficulty(rates: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return ``(n,)`` the mean of 1 − pass rate over a prompt's cluster; NaN for a prompt without one (−1)."""
    known = (clusters >= 0) & ~np.isnan(rates)
    result = np.full(len(rates), np.nan)
    if known.any():
        result[known] = cluster_means(1 - rates[known], clusters[known])[clusters[known]]
    return result


def coverage(clusters: np.ndarray, chosen: np.ndarray, targets: np.ndarray) -> float | None:
    """Return the share of the targets whose cluster has a selected prompt; None without targets.

    Args:
        clusters: ``(n,)`` clusters of the pool's prompts, −1 without a gradient.
        chosen: ``(n,)`` bool.
        targets: ``(m,)`` clusters of the validation prompts with a gradient.
    """
    return float(np.isin(targets, clusters[chosen & (clusters >= 0)]).mean()) if len(targets) else None


def believed_rates(artifacts: Artifacts, stage: int, ids: list[str]) -> np.ndarray:
    """Return ``(n,)`` expected pass rates at a stage: by training's belief, else by rollouts; NaN without either."""
    belief = artifacts.path(f"policy@{stage - 1}", BELIEF_FILE)
    if belief is not None and belief.exists():
        return expected_rates(aligned(read_belief(belief), ids).cells)
    unknown = np.full(len(ids), np.nan)
    slot = artifacts.latest("rollouts/pool", stage)
    path = artifacts.path(slot, ROLLOUTS) if slot else None
    if slot is None or path is None:
        return unknown
    try:
        return expected_rates(from_rollouts(ids, *reward_sums(path, ids)).cells)
    except DataError as error:
        artifacts.problem(slot, error)
        return unknown


def _clusters(artifacts: Artifacts, stage: int, ids: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Cluster the gradients of a stage; return the clusters of the pool and those of the validation prompts.

    None if the gradients are not on this machine, or take more than :data:`MOST_BYTES` to read.
    """
    stores = []
    for name in ["pool", *sorted(artifacts.config.data.validation)]:
        slot = artifacts.latest(f"gradients/{name}", stage)
        try:
            store = open_gradients(artifacts, slot, fetch=False) if slot else None
        except ArtifactError as error:
            artifacts.problem(slot or name, error)
            store = None
        if store is None or 4 * store.n * store.k > MOST_BYTES:
            return None
        live = store.column("status") == OK
        parts = [sketched(block)[live[rows]] for rows, block in store.blocks()]
        stores.append((list(store.column("prompt_id")[live]), np.concatenate(parts)))
    labels = clustered(np.concatenate([directions for _, directions in stores]), 0)
    names, size = stores[0][0], len(stores[0][0])
    of_pool = in_order(ids, names, labels[:size])
    return np.where(np.isnan(of_pool), -1, of_pool).astype(np.int64), labels[size:]


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
