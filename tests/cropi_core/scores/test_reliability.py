"""The verdict about scores: what halves of the data agree on, and nothing else."""

from typing import Any

import numpy as np
import pytest

from cropi_core.scores.reliability import (
    by_validation_halves,
    clustered,
    doubled,
    reliability,
    shrunk,
    sketched,
)


def drawn(seed: int, *, single: float, group: float, noise: float, n: int = 128, groups: int = 6):
    """Draw true scores, and scores by half of the completions and of the validation set, with noise of their own."""
    random = np.random.default_rng(seed)
    clusters = random.integers(0, groups, n)
    truth = random.normal(0, group, groups)[clusters] + random.normal(0, single, n)
    errors = random.normal(0, noise, (n, 2))
    halves = np.stack([np.stack([truth + errors[:, c]] * 2, axis=1) for c in (0, 1)], axis=1)
    return halves, clusters, truth, (truth + errors.mean(axis=1))[:, None].astype(np.float32)


def grades(**spread: Any) -> list[str]:
    return [reliability(*drawn(seed, **spread)[:2]).verdict or "" for seed in range(10)]


def test_scores_of_single_prompts_that_repeat_are_reliable():
    assert set(grades(single=1, group=1, noise=0.5)) == {"reliable"}


def test_scores_of_which_only_the_clusters_repeat_are_weak():
    assert grades(single=0, group=1, noise=3.5, n=512).count("weak") >= 7


def test_chance_is_noise():
    assert grades(single=0, group=0, noise=1).count("noise") >= 8


def test_the_figure_is_the_reliability_of_the_whole_data():
    """Noise of variance 4 a half: halves correlate by 0.2, the mean of both has the reliability 1/3."""
    figures = [
        reliability(*drawn(s, single=1, group=0, noise=2, n=4000, groups=1)[:2]).figure for s in (0, 1)
    ]
    assert figures == pytest.approx([1 / 3] * 2, abs=0.06)
    assert (doubled(0.5), doubled(-0.2), doubled(None)) == (pytest.approx(2 / 3), 0.0, None)


def test_shrinking_brings_weak_scores_nearer_to_the_truth():
    gains = []
    for seed in range(10):
        halves, clusters, truth, scores = drawn(seed, single=0.1, group=1, noise=3)
        better = shrunk(scores, clusters, reliability(halves, clusters))[:, 0]
        gains.append(np.corrcoef(truth, better)[0, 1] - np.corrcoef(truth, scores[:, 0])[0, 1])
    assert np.median(gains) > 0.2


def test_too_few_prompts_give_no_figure():
    found = reliability(np.zeros((5, 2, 2)), np.zeros(5, dtype=int))
    assert (found.verdict, found.figure, found.compared) == (None, None, 5)
    assert by_validation_halves(np.arange(5.0), np.arange(5.0)).verdict is None


def test_halves_of_the_validation_prompts_alone_say_so():
    values = np.random.default_rng(0).normal(size=100)
    found = by_validation_halves(values, values + 0.1)
    assert (found.verdict, found.basis) == ("reliable", "validation prompts")
    assert by_validation_halves(values, -values).verdict == "noise"


def test_prompts_whose_gradients_point_alike_share_a_cluster():
    random = np.random.default_rng(0)
    kinds = np.repeat(np.arange(3), 40)
    features = random.normal(size=(3, 512))[kinds] + 0.3 * random.normal(size=(120, 512))
    labels = clustered(sketched(features), 0)
    assert all(len(set(kinds[labels == label])) == 1 for label in set(labels))
    again = clustered(sketched(7 * features), 0)  # lengths do not count
    assert (labels == again).all()
