"""Scores of prompts without a gradient: those of the prompts that read most alike.

A prompt has no gradient if it was not sampled, or if its few completions had equal rewards. With two completions that
is at least half of all prompts, whatever their influence would be. What they ask is known, and prompts that read alike
tend to have gradients alike.

References:
    Influence of landmarks, spread to other samples by cheap embeddings: *Influence Distillation*, arXiv 2505.19051.
"""

from pathlib import Path

import numpy as np

from cropi_core.artifacts import places, read_parquet
from cropi_core.errors import ArtifactError
from cropi_core.prompts import asked_text, nearest, text_vectors


def with_neighbours(
    values: np.ndarray, live: np.ndarray, vectors: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add the prompts without a gradient: the mean values of their nearest prompts with one.

    Args:
        values: ``(live, V)`` of the prompts with a gradient.
        live: ``(n,)`` bool: the prompts with a gradient.
        vectors: ``(n, d)`` of all prompts, of length 1; a row of zeros has no neighbours and no value.
        count: Number of neighbours.

    Returns:
        ``(scored, V)`` values in the order of the pool, and ``(n,)`` bool: the prompts that have one.
    """
    scored = live | vectors.any(axis=1)
    result = np.zeros((len(live), values.shape[1]), dtype=values.dtype)
    result[live] = values
    added = scored & ~live
    result[added] = values[nearest(vectors[added], vectors[live], count)].mean(axis=1)
    return result[scored], scored


def prompt_vectors(prompts: Path, prompt_ids: list[str]) -> tuple[list[str], np.ndarray]:
    """Return the ids of a pool's prompts and the vectors of their texts, ``(n, d)``.

    Args:
        prompts: Prompts table of the pool.
        prompt_ids: Ids that the pool must have.

    Raises:
        ArtifactError: The prompts table lacks prompts.
    """
    table = read_parquet(prompts)
    ids = table["prompt_id"].to_pylist()
    rows = places(prompt_ids, ids)
    if missing := [name for name, row in zip(prompt_ids, rows, strict=True) if row < 0]:
        raise ArtifactError(
            f"{prompts} lacks {len(missing)} prompts of this pool, such as {missing[0]!r}: it belongs to another pool"
        )
    return ids, text_vectors([asked_text(row) for row in table.select(["messages"]).to_pylist()])
