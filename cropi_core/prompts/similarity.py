"""Prompts that read alike: vectors of texts by their short runs of bytes, without a model.

    vectors = text_vectors([asked_text(row) for row in rows])    # (n, DIMENSIONS)
    nearest(vectors[few], vectors[many], 8)                      # positions in many, the most alike first

A text is counted by its runs of one to four bytes, which serves every language and notation and words of any length. A
run counts 1 + log of its number, times the root of the log of how rare it is among the texts, so that a product of two
texts weighs rarity once: weighing it twice finds texts with the same names and numbers, not of the same kind. Runs are
added up by a signed hash, which keeps cosines in expectation (Weinberger et al., *Feature Hashing for Large Scale
Multitask Learning*, ICML 2009).
"""

from collections.abc import Iterator, Sequence

import numpy as np

DIMENSIONS = 1024
RUNS = (1, 2, 3, 4)
"""Lengths of the counted runs, in bytes."""
BUCKETS = 1 << 20
"""Buckets in which the texts that contain a run are counted."""
MOST_BYTES = 16_384
"""A longer text is compared by its beginning."""
BLOCK = 1024
"""Texts compared at once."""
DIGITS = 9
"""Cosines are rounded, so that the order of equal ones does not depend on the order of additions."""


def text_vectors(texts: Sequence[str], rarity: np.ndarray | None = None) -> np.ndarray:
    """Return ``(n, DIMENSIONS)`` float32 vectors of length 1; an empty text has a vector of zeros.

    Args:
        texts: The texts.
        rarity: From :func:`text_rarity` of all texts that are compared, if these are some of them; default: of these.
    """
    rarity = text_rarity(texts) if rarity is None else rarity
    vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    for row, (runs, counts) in enumerate(_counted(texts)):
        hashed = _hashed(runs)
        weights = (1 + np.log(counts)) * rarity[hashed % BUCKETS]
        signs = np.where(hashed >> np.uint64(63), -1.0, 1.0)
        place = (hashed >> np.uint64(40)) % DIMENSIONS
        vectors[row] = np.bincount(place.astype(np.int64), weights * signs, DIMENSIONS)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def text_rarity(texts: Sequence[str]) -> np.ndarray:
    """Return how rare the runs of each bucket are in the texts, ``(BUCKETS,)``."""
    frequencies = np.zeros(BUCKETS)
    for runs, _ in _counted(texts):
        np.add.at(frequencies, _hashed(runs) % BUCKETS, 1)
    return np.sqrt(np.log((1 + len(texts)) / (1 + np.minimum(frequencies, len(texts)))))


def row_blocks(count: int) -> Iterator[slice]:
    """Yield the rows of ``count`` texts in blocks, so that a pool of a million is never one matrix."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def nearest(vectors: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Return ``(n, count)`` positions in ``others``, the most alike first; equal ones in their order.

    Args:
        vectors: ``(n, DIMENSIONS)``.
        others: ``(m, DIMENSIONS)``; with fewer than ``count`` all are returned.
        count: Number of neighbours.
    """
    count = min(count, len(others))
    indices = np.empty((len(vectors), count), dtype=np.int64)
    for rows, cosines in _cosines(vectors, others):
        indices[rows] = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return indices


def mean_cosine(vectors: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Return ``(n,)`` mean cosines with the most alike of ``others``; arguments as in :func:`nearest`."""
    count = min(count, len(others))
    means = np.empty(len(vectors))
    for rows, cosines in _cosines(vectors, others):
        means[rows] = np.sort(cosines, axis=1)[:, -count:].mean(axis=1)
    return means


def _cosines(vectors: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rounded cosines with all of ``others``, ``(rows, m)``, a block of rows at a time."""
    wide = others.T.astype(np.float64)
    for rows in row_blocks(len(vectors)):
        yield rows, (vectors[rows].astype(np.float64) @ wide).round(DIGITS)


def _counted(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the runs of each text as numbers, and how often each occurs."""
    for text in texts:
        data = np.frombuffer(text.encode("utf-8", "replace")[:MOST_BYTES], dtype=np.uint8).astype(np.uint64)
        numbers = []
        for length in RUNS:
            size = max(0, len(data) - length + 1)
            run = np.full(size, length, dtype=np.uint64)
            for place in range(length):
                run = run << np.uint64(8) | data[place : place + size]
            numbers.append(run)
        yield np.unique(np.concatenate(numbers), return_counts=True)


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers (SplitMix64)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
