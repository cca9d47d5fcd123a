"""Which prompts of a pool to sample again at a later stage: those that read like what the policy begins to solve.

    table = waking_prompts(pool, [Sampled(prompts, passed, graded)], Waking(), group=8, tokens=32, seed=0)

A prompt whose completions were all wrong when it was sampled has no gradient, and stored rollouts never change that: a
curriculum on them cannot climb. Sampling the whole pool again costs more than it gains. The validation prompts are few,
and are sampled at every stage; a prompt of the pool is likely to have a gradient now, and one that points to the
target, if it reads like validation prompts whose rewards differ now. Prompts that read like solved or like hopeless
validation prompts keep their stored completions.

The length of a text decides too: the runs of bytes of :mod:`cropi_core.prompts.similarity` say little about it, and
the difficulty of many tasks grows with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cropi_core.errors import DataError
from cropi_core.pass_rates import observe, shared_prior
from cropi_core.prompts import asked_text, row_blocks, text_rarity, text_vectors
from cropi_core.scores import order, tie_keys
from cropi_core.selection.belief import mixed_chance
from data_schemas import Waking

LENGTH_SCALE = 0.3
"""Texts whose lengths differ by this share of the lengths' spread are 1/e as alike."""


@dataclass(frozen=True)
class Sampled:
    """A validation set that the current policy has sampled.

    Attributes:
        prompts: Prompts table.
        passed: ``(n,)`` sum of each prompt's rewards.
        graded: ``(n,)`` number of its graded completions.
    """

    prompts: pa.Table
    passed: np.ndarray
    graded: np.ndarray


def waking_values(pool: pa.Table, sets: list[Sampled], *, group: int, neighbours: int) -> np.ndarray:
    """Value every prompt of the pool, ``(n,)``: the mean over its nearest validation prompts of likeness × chance.

    Args:
        pool: Prompts table.
        sets: Validation sets; a prompt has the largest of its values for single sets.
        group: Samples of a training group, whose chance to have more than one reward counts.
        neighbours: Number of validation prompts that count.

    Raises:
        DataError: No completion of a validation set was graded.
    """
    texts = [asked_text(row) for row in pool.select(["messages"]).to_pylist()]
    values = np.zeros(len(texts))
    for one in sets:
        if not one.graded.any():
            raise DataError(
                "no completion of a validation set was graded, so nothing says which prompts to sample again. Examine "
                "the verifier with `cropi verify-rewards`, or set rollouts.refresh=never"
            )
        others = [asked_text(row) for row in one.prompts.select(["messages"]).to_pylist()]
        prior = np.tile(shared_prior(one.passed, one.graded), (len(others), 1))
        chances = mixed_chance(observe(prior, one.passed, one.graded), group)
        count = min(neighbours, len(others))
        for rows, alike in likeness(texts, others):
            nearest = np.argsort(-alike.round(9), axis=1, kind="stable")[:, :count]
            products = np.take_along_axis(alike * chances, nearest, axis=1)
            values[rows] = np.maximum(values[rows], np.sort(products, axis=1).mean(axis=1))
    return values


def likeness(texts: list[str], others: list[str]) -> Iterator[tuple[slice, np.ndarray]]:
    """Compare texts by their runs of bytes and their lengths; yield rows and ``(rows, m)``, 1 for equal texts.

    A difference of lengths is a difference of their logarithms, in standard deviations over all texts.
    """
    rarity = text_rarity(texts + others)
    wide = text_vectors(others, rarity).astype(np.float64).T
    sizes = np.log([1 + len(text.encode("utf-8", "replace")) for text in texts + others])
    spread = max(float(np.std(sizes)), 1e-9)
    for rows in row_blocks(len(texts)):
        cosines = text_vectors(texts[rows], rarity).astype(np.float64) @ wide
        apart = np.abs(sizes[rows, None] - sizes[None, len(texts) :]) / spread
        yield rows, np.clip(cosines, 0, None) * np.exp(-apart / LENGTH_SCALE)


def waking_prompts(
    pool: pa.Table, sets: list[Sampled], settings: Waking, *, group: int, tokens: float, seed: int
) -> pa.Table:
    """Choose the prompts that are sampled again, in the order of the pool.

    Args:
        pool: Prompts table.
        sets: Validation sets with the rewards of the current policy.
        settings: Budget and neighbours.
        group: Samples of a training group.
        tokens: Expected tokens of a prompt's completions.
        seed: Order of equal values.

    Returns:
        A prompts table; at least one prompt.
    """
    values = waking_values(pool, sets, group=group, neighbours=settings.neighbours)
    count = max(1, min(pool.num_rows, int(settings.tokens / max(tokens, 1e-9))))
    keys = tie_keys(pool["prompt_id"].to_pylist(), seed)
    return pool.take(pa.array(np.sort(order(values.round(9), keys)[:count])))
