"""Steps to reach, ratios and intervals: properties of every curve."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cropi_core.statistics import bootstrap
from cropi_core.study.statistics import interpolate, mean, mean_curve, median, ratio, reach

accuracies = st.floats(0, 1, allow_nan=False)


@st.composite
def curves(draw):
    n = draw(st.integers(2, 8))
    gaps = draw(st.lists(st.integers(1, 50), min_size=n - 1, max_size=n - 1))
    y = draw(st.lists(accuracies, min_size=n, max_size=n))
    return [float(v) for v in np.concatenate([[0], np.cumsum(gaps)])], y


@given(curves(), accuracies)
def test_a_level_is_reached_where_the_line_has_it_and_nowhere_before(curve, level):
    x, y = curve
    at = reach(x, y, level)
    if math.isinf(at):
        assert max(y) < level
        return
    found = interpolate(x, y, at)
    assert found is not None
    assert found == pytest.approx(max(level, y[0]) if at == 0 else level, abs=1e-9)
    before = [v for p, v in zip(x, y, strict=True) if p < at - 1e-6]
    assert all(v < level for v in before)


@given(curves(), accuracies, accuracies)
def test_a_higher_level_is_never_reached_sooner(curve, one, other):
    low, high = sorted((one, other))
    assert reach(*curve, low) <= reach(*curve, high)


@given(curves(), st.floats(0, 0.5), accuracies)
def test_a_curve_that_is_higher_everywhere_is_never_later(curve, lift, level):
    x, y = curve
    assert reach(x, [v + lift for v in y], level) <= reach(x, y, level) + 1e-9


@given(curves(), st.floats(0.01, 100), accuracies)
def test_another_unit_of_the_axis_changes_no_ratio(curve, unit, level):
    x, y = curve
    at = reach(x, y, level)
    assert reach([unit * v for v in x], y, level) == pytest.approx(unit * at)


@given(curves())
def test_an_arm_that_is_the_reference_is_as_fast_as_it(curve):
    at = reach(*curve, curve[1][-1])
    assume(at > 0)
    assert ratio(at, at) == 1


def test_an_arm_that_never_reaches_the_level_counts_as_the_worst():
    assert ratio(60.0, math.inf) == 0
    assert median(np.array([3.0, 3.0, 0.0, 0.0, 0.0])) == 0
    assert median(np.array([3.0, 0.0])) == 0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9))
def test_a_median_is_one_of_the_values_and_half_are_no_larger(values):
    found = float(median(np.array(values)))
    assert found in values
    assert sum(v <= found for v in values) * 2 >= len(values)
    assert sum(v >= found for v in values) * 2 >= len(values)


def test_a_reference_that_does_not_improve_is_not_compared():
    assert reach([0, 20], [0.5, 0.4], 0.4) == 0
    assert ratio(0.0, 10.0) is None
    assert ratio(0.0, math.inf) is None


def test_the_reference_is_read_by_the_same_rule_as_the_arm():
    # The level is reached at step 20 of 60, followed by a plateau: the reach is not 60 steps.
    x, y = [0, 20, 40, 60], [0.4, 0.6, 0.6, 0.6]
    assert reach(x, y, y[-1]) == 20


@pytest.mark.parametrize("x", [[], [0, 2, 1], [0, 1]])
def test_points_that_are_no_curve_are_refused(x):
    with pytest.raises(ValueError, match="ascend"):
        reach(x, [0.1, 0.2, 0.3], 0.2)


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 99)
)
def test_an_interval_lies_within_the_values_and_depends_on_the_seed_alone(strata, seed):
    flat = [v for stratum in strata for v in stratum]
    low, high = bootstrap(strata, mean, 200, seed)
    assert min(flat) - 1e-9 <= low <= high <= max(flat) + 1e-9
    assert (low, high) == bootstrap(strata, mean, 200, seed)


def test_seeds_are_drawn_within_their_world():
    # The worlds differ a lot, the seeds do not: seeds are drawn within fixed worlds, so the interval has no width.
    assert bootstrap([[1.0] * 5, [9.0] * 5], mean, 500, 0) == (5.0, 5.0)


def test_an_interval_has_its_nominal_coverage():
    random = np.random.default_rng(0)
    covered = sum(
        low <= 2.0 <= high
        for low, high in (bootstrap([random.normal(2, 1, 30)], mean, 300, seed) for seed in range(200))
    )
    assert 0.88 <= covered / 200 <= 0.99


def test_no_values_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([[], []], mean, 100, 0)


@given(st.lists(accuracies, min_size=3, max_size=3), st.integers(1, 5))
def test_the_mean_of_equal_curves_is_that_curve(y, times):
    assert mean_curve([y] * times) == pytest.approx(y)


def test_curves_of_other_lengths_have_no_mean():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        mean_curve([[0.1, 0.2], [0.1]])
