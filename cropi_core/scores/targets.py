"""The targets of a validation set: what the gradients of the pool are compared with.

    targets = set_targets("gsm8k", store, Scores(target="mean"), seed=0)     # (3, k): the set, and its two halves
    features, halves = target_prompts(store, seed=0)                         # of `nearest`: single prompts

References:
    CROPI, arXiv 2510.26491: the mean gradient of a validation set. LESS, arXiv 2402.04333, normalises the gradients.
"""

from collections.abc import Iterable

import numpy as np

from cropi_core.errors import ConfigError, SelectionError
from cropi_core.gradients import GradientStore
from cropi_core.scores.fusion import tie_keys
from cropi_core.scores.pool import describe_statuses
from cropi_core.statistics import nonzero
from data_schemas import Scores


def target(blocks: Iterable[tuple[slice, np.ndarray]], members: np.ndarray, kind: str) -> np.ndarray:
    """Average features over groups of prompts.

    φ_g = mean over x in g of φ(x), or of φ(x)/‖φ(x)‖ for ``normalized_mean``, where every prompt has the
    same weight; a feature of norm zero then counts as zero.

    Args:
        blocks: Rows and their features ``(rows, k)``.
        members: ``(n, groups)`` bool: the members of each group; an empty group gives a row of zeros.
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
        # Index instead of multiplying by 0: the feature of a prompt outside the group may be infinite or NaN.
        sums = np.stack([features[group].sum(axis=0) for group in members[rows].T])
        total = sums if total is None else total + sums
    if total is None:
        raise SelectionError("a target needs at least one block of features")
    return total / np.maximum(members.sum(axis=0), 1)[:, None]


def set_targets(name: str, store: GradientStore, settings: Scores, seed: int) -> np.ndarray:
    """Return ``(3, k)``: the target of a validation set, and those of two seeded halves of its prompts.

    ``nearest`` has no single target: return the normalized means, which measure the agreement of the halves.

    Raises:
        SelectionError: No prompt of the set has a gradient, or the gradients cancel out.
    """
    members = _members(store, seed)
    live = int(members[:, 0].sum())
    if not live:
        counts = describe_statuses(store.column("status"))
        raise SelectionError(f"no prompt of validation set {name} has a gradient ({counts})")
    nearest = settings.target == "nearest"
    targets = target(store.blocks(), members, "normalized_mean" if nearest else settings.target)
    if not nearest and not targets[0].any():
        raise SelectionError(
            f"the target of validation set {name} is zero: its {live} gradients cancel out. Add prompts to the set"
        )
    return targets


def _members(store: GradientStore, seed: int) -> np.ndarray:
    """Return ``(n, 3)`` bool: the prompts with a gradient, and two seeded halves of them."""
    live = np.flatnonzero(store.column("status") == 0)
    members = np.zeros((store.n, 3), dtype=bool)
    members[live, 0] = True
    shuffled = live[np.argsort(tie_keys(list(store.column("prompt_id")[live]), seed))]
    members[shuffled[0::2], 1] = True
    members[shuffled[1::2], 2] = True
    return members


def target_prompts(store: GradientStore, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Read ``(m, k)``, the features of the prompts with a gradient, and ``(m, 2)`` bool, which half each belongs to."""
    members = _members(store, seed)
    live = members[:, 0]
    features = np.concatenate([block[live[rows]] for rows, block in store.blocks()])
    return features, members[live, 1:]


def with_gradient(store: GradientStore) -> int:
    """Count the prompts with a gradient."""
    return int((store.column("status") == 0).sum())
