"""95 % intervals of accuracy, over the population that the prompts were drawn from."""

import math

import numpy as np

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def interval(means: np.ndarray, completions: int) -> tuple[float, float]:
    """Return the 95 % interval of accuracy over the population that the prompts were drawn from.

    Args:
        means: (n_prompts,) mean reward of each prompt, in [0, 1].
        completions: Graded completions of all prompts together.

    References:
        :func:`wilson` with the sample size of :func:`effective_samples`, as survey statistics does for
        clustered samples: Korn & Graubard, Survey Methodology 24 (1998) 193-201 (with the exact interval).
    """
    return wilson(float(means.mean()), effective_samples(means, completions))


def effective_samples(means: np.ndarray, completions: int) -> float:
    """Return how many independent completions would know the accuracy as well as these, ``p(1-p) / Var(p)``.

    ``p`` is the mean over prompts and ``Var(p) = s² / n_prompts`` with ``s²`` the variance of ``means`` over
    n - 1. Completions of one prompt are alike, so this lies between the number of prompts and that of
    completions, and is clipped to them: one completion a prompt gives the number of prompts exactly. When all
    rewards are equal the likeness cannot be seen, and the number of prompts is taken.

    Args:
        means: (n_prompts,) mean reward of each prompt.
        completions: Graded completions of all prompts together.
    """
    prompts, p = len(means), float(means.mean())
    spread = p * (1 - p)
    if spread <= 0 or prompts < 2:
        return float(prompts)
    variance = float(means.var(ddof=1)) / prompts
    return float(np.clip(spread / variance if variance > 0 else math.inf, prompts, completions))


def wilson(p: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)``

    Args:
        p: The proportion seen, in [0, 1].
        n: Sample size, effective or real.
        z: Normal quantile; 1.96 for 95 %.

    References:
        Wilson, JASA 22 (1927) 209-212; Brown, Cai & DasGupta, Statistical Science 16 (2001) 101-133, eq. 4.
    """
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At p = 0 and 1 rounding leaves the end a hair off; it is exactly p there.
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))
