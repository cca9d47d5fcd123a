"""Fixed shares of a selection by source of the prompts (`selection.shares`).

    share_sizes({"algebra": 0.5, "code": 0.3}, 116)      # {"algebra": 58, "code": 35}; 23 are of other sources
    take(best, sources, 116, {"algebra": 0.5})           # positions, best first

Each named source gets its best prompts up to its number; all other sources share the rest by rank. A source with too
few eligible prompts leaves its places empty: filling them would change the shares.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from cropi_core.errors import SelectionError


def share_sizes(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Return the number of prompts by source: shares of ``size`` by the method of largest remainders.

    The numbers add up to the sum of the shares times ``size``, rounded half up. The arithmetic is decimal. Equal
    remainders are ordered by name.
    """
    exact = {name: Fraction(str(share)) * size for name, share in shares.items()}
    sizes = {name: math.floor(value) for name, value in exact.items()}
    missing = math.floor(sum(exact.values(), Fraction(1, 2))) - sum(sizes.values())
    ordered = sorted(exact, key=lambda name: (sizes[name] - exact[name], name))
    for name in ordered[:missing]:
        sizes[name] += 1
    return sizes


def take(best: np.ndarray, sources: Sequence[str], size: int, shares: Mapping[str, float]) -> np.ndarray:
    """Return the selected positions, best first.

    Args:
        best: Positions of the eligible prompts, best first.
        sources: ``(n,)`` source of every prompt of the pool.
        size: Number of prompts of the selection.
        shares: Share of the selection by source; empty takes the best of all sources.

    Raises:
        SelectionError: The pool has no prompt of a source that is named.
    """
    if not shares:
        return best[:size]
    if missing := sorted(set(shares) - set(sources)):
        present = [name for name, _ in Counter(sources).most_common(10)]
        raise SelectionError(
            f"selection.shares names the source {missing[0]!r}, and the pool has none of its prompts. Its sources are "
            f"{', '.join(map(repr, present))}"
        )
    sizes = share_sizes(shares, size)
    left = Counter(sizes)
    others = size - sum(sizes.values())
    chosen = []
    for position in best.tolist():
        name = str(sources[position])
        if name in shares:
            if left[name] > 0:
                left[name] -= 1
                chosen.append(position)
        elif others > 0:
            others -= 1
            chosen.append(position)
    return np.array(chosen, dtype=best.dtype)
