"""Similarity of the pool's texts to those of the validation sets: a selection without rollouts, gradients or a policy.

The baseline that influence must beat wherever the text of a prompt tells what kind of task it is.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cropi_core.artifacts import read_parquet
from cropi_core.prompts import asked_text, mean_cosine, row_blocks, text_rarity, text_vectors

COUNTED = 5
"""How many validation prompts of a set count, the most alike, as for `scores.nearest`."""


def similarity_to_targets(prompts: Path, targets: Mapping[str, Path]) -> np.ndarray:
    """Return the similarity of every prompt of the pool to the validation sets, ``(n,)`` in the order of the pool.

    It is the largest over the sets of the mean cosine with the set's five most alike prompts; texts are compared by
    their runs of bytes (:mod:`cropi_core.prompts.similarity`), whose rarity is counted in all texts together.

    Args:
        prompts: Prompts table of the pool.
        targets: Prompts tables of the validation sets.

    Raises:
        ArtifactError: A table cannot be read.
    """
    pool, *sets = [_texts(path) for path in (prompts, *targets.values())]
    rarity = text_rarity([text for texts in (pool, *sets) for text in texts])
    others = [text_vectors(texts, rarity) for texts in sets]
    values = np.empty(len(pool))
    for rows in row_blocks(len(pool)):
        vectors = text_vectors(pool[rows], rarity)
        values[rows] = np.max([mean_cosine(vectors, one, COUNTED) for one in others], axis=0)
    return values


def _texts(path: Path) -> list[str]:
    return [asked_text(row) for row in read_parquet(path).select(["messages"]).to_pylist()]
