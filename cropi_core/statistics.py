"""Statistics that several steps and readers share: rank correlation, bins of pass rates, bootstrap intervals.

References:
    Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13 (percentile intervals).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

INTERVAL = 0.95
PASS_RATE_BINS = 10


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of ``(n,)`` values, with mean ranks for equal values; None if constant."""
    ranks = [mean_ranks(one), mean_ranks(other)]
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    centred = [r - r.mean() for r in ranks]
    norm = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(np.clip(centred[0] @ centred[1] / norm, -1, 1))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ``(n,)`` ranks of values from 0, the smallest first, equal values at their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def pass_rate_bins(rates: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the bin, 0 to 9, of each of ``(n,)`` pass rates; values outside 0 to 1 fall in the first or last bin.

    Rates are rounded before they are binned, because 0.9 in float32 is less than 0.9. (The edges of `numpy.histogram`
    put 0.3, 0.6 and 0.7 in the bin below.)
    """
    scaled = np.floor(np.round(np.asarray(rates, dtype=float) * PASS_RATE_BINS, 5))
    return np.clip(scaled, 0, PASS_RATE_BINS - 1).astype(int)


def pass_rate_counts(rates: Sequence[float] | np.ndarray) -> list[int]:
    """Count pass rates in ten bins."""
    return np.bincount(pass_rate_bins(rates), minlength=PASS_RATE_BINS).tolist()


def bootstrap(
    strata: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    draws: int,
    seed: int,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of all values together.

    Values are drawn with replacement within each stratum. In a study a stratum is a world, because worlds are chosen
    and seeds are a sample. A value belongs to a pair (an arm and the reference with one seed), so pairs stay together.

    Args:
        strata: Values by stratum; at least one value in total.
        statistic: From ``(draws, n)`` to ``(draws,)``, along the last axis.
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        ValueError: There are no values.
    """
    groups = [np.asarray(values, dtype=float) for values in strata if len(values)]
    if not groups:
        raise ValueError("an interval needs at least one value")
    random = np.random.Generator(np.random.PCG64(seed))
    samples = [values[random.integers(0, len(values), (draws, len(values)))] for values in groups]
    estimates = np.sort(statistic(np.concatenate(samples, axis=1)))
    tail = (1 - INTERVAL) / 2
    # Values of the sample without interpolation, so that a censored ratio stays 0.
    low, high = estimates[math.floor(tail * (draws - 1))], estimates[math.ceil((1 - tail) * (draws - 1))]
    return float(low), float(high)


def nonzero(values: np.ndarray) -> np.ndarray:
    """Replace zeros by ones, for divisors whose dividend is zero too."""
    return np.where(values > 0, values, 1.0)
