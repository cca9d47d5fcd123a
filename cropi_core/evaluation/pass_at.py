"""pass@k: the probability that at least one of k completions of a prompt passes, estimated without bias.

    pass_at(4, passed=1, graded=8)                 # 0.5: a completion is in a random half of eight
    set_pass_at([[1.0, 0.0, 0.0, 0.0]], [1, 2])    # {"1": {"value": 0.25, ...}, "2": {"value": 0.5, ...}}

A completion passes if its reward is 1; partial credit does not count. The estimate of a prompt with n graded
completions, c of which pass, is the share of its subsets of k completions that contain a passing one;
1 − (1 − c/n)^k is biased.

References:
    Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1 and section 2.1.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cropi_core.evaluation.intervals import interval


def pass_at(k: int, *, passed: int, graded: int) -> float:
    """Estimate pass@k of a prompt: ``1 − C(n − c, k) / C(n, k)``.

    Args:
        k: Number of completions that are drawn.
        passed: Number c of its completions that pass.
        graded: Number n of its graded completions, at least ``k``.
    """
    return 1.0 - math.comb(graded - passed, k) / math.comb(graded, k)


def set_pass_at(groups: Sequence[Sequence[float]], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Average pass@k over the prompts of a set, each with a 95 % interval over prompts.

    Args:
        groups: Rewards of the graded completions of each prompt.
        ks: Values of k.

    Returns:
        By k as text: ``value``, ``low`` and ``high``, and ``prompts``, the number of prompts with at least k graded
        completions; all others are dropped. Without such prompts the three figures are None.

        The interval is that of accuracy (:func:`cropi_core.evaluation.intervals.interval`), where a prompt counts as at
        most n // k independent draws; with k = 1 and rewards of 0 and 1 it is equal to that of accuracy.
    """
    figures: dict[str, dict[str, Any]] = {}
    for k in ks:
        enough = [group for group in groups if len(group) >= k]
        if not enough:
            figures[str(k)] = {"value": None, "low": None, "high": None, "prompts": 0}
            continue
        values = np.array(
            [pass_at(k, passed=sum(r >= 1 for r in group), graded=len(group)) for group in enough]
        )
        low, high = interval(values, sum(len(group) // k for group in enough))
        figures[str(k)] = {"value": float(values.mean()), "low": low, "high": high, "prompts": len(enough)}
    return figures
