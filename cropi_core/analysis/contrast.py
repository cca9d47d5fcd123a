"""Comparison of one metric between selected prompts and their pool. Pure functions on arrays.

    contrast(entropy, selected)              # means, and the interval of random subsets of the same size
    change(difficulty, first, last)          # whether the mean differs between two selections

Prompts with an unknown value (NaN) are excluded from the selection and from the pool, so that both are compared on the
same prompts: entropy is known only for prompts with a gradient, and random subsets are drawn from those.

References:
    Cochran, Sampling Techniques (1977), theorem 2.2: variance of the mean of a sample without replacement.
    Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), ch. 6: infinitesimal jackknife.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Z = 1.959964
"""Quantile of the standard normal distribution for a two-sided 95 % interval."""

LONGEST_LEVEL = 40
"""Maximum length, in characters, of a level name that is parsed as a number with a word."""

Side = Literal["lower", "higher", "like chance"]


@dataclass(frozen=True)
class Contrast:
    """One metric of the selected prompts, compared with the pool and with random subsets.

    Attributes:
        pool_count: Number of pool prompts with a known value.
        selected_count: Number of selected prompts among them.
        pool_mean: Mean of the former.
        selected_mean: Mean of the latter.
        low: 2.5 % quantile of the mean of a random subset of the same size.
        high: 97.5 % quantile of the same.
    """

    pool_count: int
    selected_count: int
    pool_mean: float
    selected_mean: float
    low: float
    high: float

    @property
    def side(self) -> Side:
        """Whether the mean of the selection is outside the interval of random subsets, and on which side."""
        # If the metric is constant, or everything is selected, the interval has no width: rounding must not count as a
        # difference.
        slack = 1e-9 * max(1.0, abs(self.pool_mean))
        if self.selected_mean < self.low - slack:
            return "lower"
        return "higher" if self.selected_mean > self.high + slack else "like chance"

    @property
    def reach(self) -> float | None:
        """Difference from the pool's mean in half-widths of the interval of random subsets; None if it has no width."""
        half = (self.high - self.low) / 2
        return (
            None
            if half <= 1e-9 * max(1.0, abs(self.pool_mean))
            else (self.selected_mean - self.pool_mean) / half
        )


def contrast_json(contrast: Contrast) -> dict[str, Any]:
    """Return a contrast as JSON values, with the names that its readers know."""
    return {
        "known": contrast.pool_count,
        "selected": contrast.selected_count,
        "pool": contrast.pool_mean,
        "chosen": contrast.selected_mean,
        "low": contrast.low,
        "high": contrast.high,
        "side": contrast.side,
    }


def contrast(values: np.ndarray, selected: np.ndarray) -> Contrast | None:
    """Compare the mean of selected prompts with the means of their pool and of random subsets.

    The mean and the variance over all subsets of the same size are exact. The interval assumes a normal distribution,
    which is a rough approximation below about ten prompts.

    Args:
        values: ``(n,)`` float, NaN if unknown.
        selected: ``(n,)`` bool.

    Returns:
        The comparison; None if fewer than two values, or no value of a selected prompt, are known.
    """
    finite = np.isfinite(values)
    finite_values = values[finite].astype(np.float64)
    chosen_values = finite_values[selected[finite]]
    if len(finite_values) < 2 or not len(chosen_values):
        return None
    mean = float(finite_values.mean())
    variance = (
        float(finite_values.var(ddof=1)) / len(chosen_values) * (1 - len(chosen_values) / len(finite_values))
    )
    half = Z * math.sqrt(max(0.0, variance))
    return Contrast(
        len(finite_values), len(chosen_values), mean, float(chosen_values.mean()), mean - half, mean + half
    )


@dataclass(frozen=True)
class Change:
    """Difference in the mean of a metric between two selections, with a 95 % interval over prompts."""

    before: float
    after: float
    difference: float
    low: float
    high: float

    @property
    def side(self) -> Side:
        """Whether the later selection is higher, lower, or not significantly different."""
        slack = 1e-9 * max(1.0, abs(self.before))
        if self.low > slack:
            return "higher"
        return "lower" if self.high < -slack else "like chance"


def change(values: np.ndarray, before: np.ndarray, after: np.ndarray) -> Change | None:
    """Compare the means of two selections of one pool; prompts in both selections enter both means and cancel.

    Args:
        values: ``(n,)`` float, NaN if unknown.
        before: ``(n,)`` bool, the earlier selection.
        after: ``(n,)`` bool, the later selection.

    Returns:
        The difference with an infinitesimal-jackknife interval over the prompts of either selection; without common
        prompts it equals Welch's interval. None if one selection has fewer than two known values.
    """
    finite = np.isfinite(values)
    one, other = before & finite, after & finite
    if one.sum() < 2 or other.sum() < 2:
        return None
    x = np.where(finite, values, 0.0).astype(np.float64)
    means = [float(x[rows].mean()) for rows in (one, other)]
    pull = other * (x - means[1]) / other.sum() - one * (x - means[0]) / one.sum()
    united = int((one | other).sum())
    half = Z * math.sqrt(float((pull**2).sum()) * united / (united - 1))
    difference = means[1] - means[0]
    return Change(means[0], means[1], difference, difference - half, difference + half)


def level_numbers(levels: Sequence[str | None]) -> np.ndarray:
    """Parse human difficulty levels as numbers: ``3``, ``Level 3``, ``difficulty: 0.5``.

    Args:
        levels: ``(n,)`` names; None and the empty string mean no level.

    Returns:
        ``(n,)`` float64, NaN for prompts without a level. All NaN if any level, such as ``easy``, is not a single
        number surrounded by words, because the order of such names is unknown.
    """
    level_values = np.full(len(levels), np.nan)
    for row, level in enumerate(levels):
        if not level:
            continue
        numbers = re.findall(r"-?\d+(?:\.\d+)?", level) if len(level) <= LONGEST_LEVEL else []
        if len(numbers) != 1:
            return np.full(len(levels), np.nan)
        level_values[row] = float(numbers[0])
    return level_values


def fixed(value: float, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals, a typographic minus sign, and no sign on zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def chance_jaccard(one: int, other: int, pool: int) -> float | None:
    """Return the approximate Jaccard index of two random subsets of a pool: expected overlap ÷ expected union."""
    both = one * other / pool if pool else 0.0
    union = one + other - both
    return both / union if union else None
