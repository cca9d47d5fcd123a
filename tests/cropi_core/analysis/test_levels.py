"""Estimated levels and the coverage of the target's clusters."""

import numpy as np
import pytest

from cropi_core.analysis.levels import cluster_difficulty, coverage, level_correlation


def test_the_correlation_is_over_prompts_with_both():
    levels = np.array([3, 4, 5, 6, np.nan])
    assert level_correlation(np.array([0.1, 0.2, 0.6, 0.9, 0.0]), levels) == pytest.approx(1)
    assert level_correlation(np.array([0.9, 0.5, np.nan, 0.1, 0.0]), levels) == pytest.approx(-1)
    assert level_correlation(np.array([0.9, np.nan, np.nan, 0.1, 0.0]), levels) is None


def test_a_cluster_has_one_difficulty():
    rates = np.array([1.0, 0.5, 0.0, 0.5, 0.3])
    difficulty = cluster_difficulty(rates, np.array([0, 0, 2, 2, -1]))
    assert difficulty[:4] == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert np.isnan(difficulty[4])


def test_a_target_is_covered_by_a_selected_prompt_of_its_cluster():
    clusters, targets = np.array([0, 0, 1, 2, -1]), np.array([0, 0, 1, 3])
    assert coverage(clusters, np.array([False, True, False, True, True]), targets) == 0.5
    assert coverage(clusters, np.array([False, False, True, False, True]), targets) == 0.25
    assert coverage(clusters, np.ones(5, dtype=bool), np.array([])) is None
