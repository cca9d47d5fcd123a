"""Comparison of blocks of features with targets, tile by tile, at the speed of float32 and with float64 sums.

    compare = Comparison(targets, "cosine")          # (groups, k)
    scores = compare(stored, scale)                  # (rows, k) -> (rows, groups) float32; from any thread

A tile fits into the cache of a core while it is cast, multiplied and squared, and its product is small enough that BLAS
computes it in the calling thread. A block therefore costs one pass over memory, and the threads that read blocks also
multiply them, without a barrier between them.

References:
    CROPI, arXiv 2510.26491: POPI(x, v) = cos(φ(x), φ_v).
"""

from collections.abc import Callable, Sequence

import numpy as np

from cropi_core.errors import ConfigError
from cropi_core.gradients import HALF_LIMIT, GradientStore, widen_finite
from cropi_core.progress import Progress, Report, silent
from cropi_core.statistics import nonzero

TILE_ROWS, TILE_COLUMNS, TILE_TARGETS = 64, 512, 8
"""A tile is 256 KB in float64. The product of the three, 2**18, is the largest that OpenBLAS computes in one thread
(``SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD``). Three products with 8 targets take as long as one with 24."""


class Comparison:
    """Targets, laid out for products with tiles of features.

    Products are summed in float64 and rounded once, to float32. The order of the sums in a matrix product depends on
    the position of a row in its block. In float64 this changes a cosine by 1e-16, which the rounding removes, so equal
    features get equal scores at any position and in blocks of any size. In float32 it would be 1e-8 and break ties.
    """

    def __init__(self, targets: np.ndarray, metric: str, mix: np.ndarray | None = None) -> None:
        """Lay out the targets.

        Args:
            targets: ``(m, k)``.
            metric: ``cosine`` (0 if a norm is zero) or ``dot``.
            mix: ``(groups, m)``: compare with the sums ``mix @ targets``, at the cost of m products per row; by
                default with the targets themselves.
        """
        if metric not in ("cosine", "dot"):
            raise ConfigError(f"scores.metric={metric!r} must be cosine or dot")
        self.metric = metric
        exact = targets.astype(np.float64)
        self.count, self.k = exact.shape
        self._mix = np.eye(self.count) if mix is None else mix.astype(np.float64)
        if metric == "cosine":
            self._mix = self._mix / nonzero(np.linalg.norm(self._mix @ exact, axis=1))[:, None]
        self._groups = _slices(self.count, TILE_TARGETS)
        self._tiles = [
            (columns, [np.ascontiguousarray(exact[group, columns].T) for group in self._groups])
            for columns in _slices(self.k, TILE_COLUMNS)
        ]

    def __call__(self, block: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """Compare features with the targets.

        Args:
            block: ``(rows, k)`` float16, float32 or float64.
            scale: ``(rows,)``: features are ``block`` times this; by default 1. A cosine does not depend on it.

        Returns:
            ``(rows, groups)`` float32.
        """
        products, squares = np.zeros((len(block), self.count)), np.zeros(len(block))
        shape = (min(TILE_ROWS, len(block)), min(TILE_COLUMNS, self.k))
        single, double = np.empty(shape, dtype=np.float32), np.empty(shape)
        for rows in _slices(len(block), TILE_ROWS):
            self._add(block[rows], products[rows], squares[rows], single, double)
        # widen_finite() gives at least HALF_LIMIT for infinity and NaN. Rows of norm one are far below it.
        if block.dtype == np.float16 and (squares >= float(HALF_LIMIT) ** 2).any():
            return self(block.astype(np.float32), scale)
        similar = products @ self._mix.T
        if self.metric == "cosine":
            similar /= nonzero(np.sqrt(squares))[:, None]
        elif scale is not None:
            similar *= scale.astype(np.float64)[:, None]
        with np.errstate(over="ignore"):  # an overflow becomes inf, which fuse() refuses
            return similar.astype(np.float32)

    def _add(
        self,
        block: np.ndarray,
        products: np.ndarray,
        squares: np.ndarray,
        single: np.ndarray,
        double: np.ndarray,
    ) -> None:
        """Add the products of a few rows with the targets ``(rows, m)`` and their squared norms ``(rows,)``.

        ``single`` and ``double`` are buffers for a tile; allocating them for every tile costs a tenth of the time.
        """
        groups = [products[:, group] for group in self._groups]
        for columns, targets in self._tiles:
            part = block[:, columns]
            height, width = part.shape
            tile = double[:height, :width]
            if part.dtype == np.float16:
                widen_finite(part, single[:height, :width])
                part = single[:height, :width]
            np.copyto(tile, part)
            for group, target in zip(groups, targets, strict=True):
                group += tile @ target
            squares += np.vecdot(tile, tile)


def stream_similarities(
    pool: GradientStore,
    targets: np.ndarray,
    sizes: Sequence[int],
    metric: str,
    report: Report = silent,
    threads: int | None = None,
) -> np.ndarray:
    """Compare the pool in one pass with the targets of V validation sets and of their halves.

    The target of a set is the mean of its halves' targets, weighted by their sizes, so two products per set give all
    three similarities.

    Args:
        pool: Gradient store of the pool.
        targets: ``(V, 3, k)``: the target of each set and of its halves.
        sizes: Prompts with a gradient in each set; if the number is odd, the first half is larger.
        metric: See :class:`Comparison`.
        report: Receives the number of rows done.
        threads: Number of threads that read and multiply; by default the cores, at most eight.

    Returns:
        ``(n, V, 3)`` float32.
    """
    mix = np.zeros((len(targets), 3, len(targets), 2))
    for v, size in enumerate(sizes):
        mix[v, :, v] = [[(size + 1) // 2 / size, size // 2 / size], [1, 0], [0, 1]]
    halves = targets[:, 1:].reshape(-1, pool.k)
    compare = Comparison(halves, metric, mix.reshape(-1, len(halves)))
    return _stream(pool, compare, len(targets), report, threads)


def stream_nearest(
    pool: GradientStore,
    sets: Sequence[tuple[np.ndarray, np.ndarray]],
    count: int,
    metric: str,
    report: Report = silent,
    threads: int | None = None,
) -> np.ndarray:
    """Compare the pool in one pass with every prompt of V validation sets; return the mean of the ``count`` largest.

    This costs one product per row and validation prompt, where a target costs one per row and set, and the memory of
    all features of the validation sets.

    Args:
        pool: Gradient store of the pool.
        sets: The features ``(m, k)`` of each set's prompts, and ``(m, 2)`` bool: the half that each belongs to.
        count: Number of a set's prompts in the mean, or all if there are fewer.
        metric: See :class:`Comparison`.
        report: Receives the number of rows done.
        threads: See :func:`stream_similarities`.

    Returns:
        ``(n, V, 3)`` float32: over all prompts of a set, and over those of its halves; 0 for an empty half.
    """
    compare = Comparison(np.concatenate([features for features, _ in sets]), metric)
    ends = np.cumsum([len(features) for features, _ in sets])

    def nearest(block: np.ndarray, scale: np.ndarray) -> np.ndarray:
        means = np.zeros((len(block), len(sets), 3), dtype=np.float32)
        by_set = np.split(compare(block, scale), ends[:-1], axis=1)
        for v, (similar, (_, halves)) in enumerate(zip(by_set, sets, strict=True)):
            means[:, v, 0] = mean_of_largest(similar, count)
            for half in (0, 1):
                means[:, v, 1 + half] = mean_of_largest(similar[:, halves[:, half]], count)
        return means

    return _stream(pool, nearest, len(sets), report, threads)


def _stream(
    pool: GradientStore,
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
    sets: int,
    report: Report,
    threads: int | None,
) -> np.ndarray:
    """Compare the pool block by block; return ``(n, sets, 3)`` float32."""
    similar = np.empty((pool.n, sets, 3), dtype=np.float32)
    for rows, part in pool.map_blocks(compare, threads=threads):
        similar[rows] = part.reshape(-1, sets, 3)
        report(Progress(rows.stop, pool.n, "prompts"))
    return similar


def mean_of_largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return ``(rows,)`` float64: the mean of each row's ``count`` largest values of ``(rows, m)``; 0 if m is 0."""
    count = min(count, values.shape[1])
    if not count:
        return np.zeros(len(values))
    # Sorting makes the sum independent of the order of the columns.
    largest = np.sort(np.partition(values, -count, axis=1)[:, -count:], axis=1)
    return largest.mean(axis=1, dtype=np.float64)


def similarities(block: np.ndarray, targets: np.ndarray, metric: str) -> np.ndarray:
    """Compare one block of features ``(rows, k)`` with targets ``(groups, k)``; see :class:`Comparison`."""
    return Comparison(targets, metric)(block)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]
