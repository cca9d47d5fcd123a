"""Compare the arms of a study: steps and cost to the reference's final accuracy, and accuracy at equal steps.

:func:`compare` is a pure function of the finished curves. Unfinished curricula are not included, and every row gives
its number of seeds. If a reference's final accuracy is not above its initial one, no ratio is defined; such pairs are
dropped and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cropi_core.statistics import bootstrap
from cropi_core.study.measure import Curve
from cropi_core.study.statistics import interpolate, mean, mean_curve, median, ratio, reach
from data_schemas import Study

AXES = ("steps", "work", "generated", "trained", "seconds")
"""Axes of the comparison: optimizer steps, and the fields of :class:`cropi_core.study.measure.Cost`."""
ALL = "all"
"""Name of the row over all worlds."""


@dataclass(frozen=True)
class Estimate:
    """A statistic over seeds with its 95 % interval, from ``n`` pairs.

    There is no interval if a world has one seed: resampling a single seed would suggest certainty.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Speed:
    """The speedup of an arm in reaching the reference's final accuracy.

    Attributes:
        median: Median over pairs of one world and seed; a pair in which the arm never reaches the level counts as 0.
        curves: Ratio of the mean curves over seeds, of one world; None if it is undefined.
        pairs: Ratios by world and seed; None if undefined.
        never: Number of pairs in which the arm never reaches the level.
        undefined: Number of pairs in which the reference does not improve.
    """

    median: Estimate | None
    curves: Estimate | None
    pairs: dict[str, dict[int, float | None]]
    never: int
    undefined: int


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm in one world, or over all worlds."""

    world: str
    arm: str
    seeds: list[int]
    speed: dict[str, Speed] = field(default_factory=dict)
    targets: dict[int, Estimate] = field(default_factory=dict)
    others: dict[int, Estimate] = field(default_factory=dict)
    ahead: dict[int, Estimate] = field(default_factory=dict)


def compare(study: Study, curves: Sequence[Curve]) -> list[ArmResult]:
    """Compare every arm with the reference, in each world and over all worlds.

    Args:
        study: Names the reference, the subject and the bootstrap.
        curves: Finished curricula.

    Returns:
        Rows by world in the study's order, all worlds last, arms in the study's order. ``targets`` and ``others`` are
        mean accuracies at the steps at which the arm was evaluated, ``ahead`` the subject's lead over the arm on the
        targets at the steps that both share, paired by seed.
    """
    worlds = [world for world in study.worlds if any(c.world == world for c in curves)]
    groups = [(world, [world]) for world in worlds]
    if len(worlds) > 1:
        groups.append((ALL, worlds))
    return [
        _arm(study, name, arm, members, curves)
        for name, members in groups
        for arm in study.arms
        if any(c.arm == arm and c.world in members for c in curves)
    ]


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """Return the steps at which every curve was evaluated."""
    steps = [{point.steps for point in curve.points} for curve in curves]
    return sorted(set.intersection(*steps)) if steps else []


def _arm(study: Study, name: str, arm: str, worlds: list[str], curves: Sequence[Curve]) -> ArmResult:
    groups = [[c for c in curves if c.arm == arm and c.world == world] for world in worlds]
    speed = {}
    if arm != study.reference:
        speed = {axis: _speed(study, arm, worlds, curves, axis) for axis in AXES}
    targets, others, ahead = {}, {}, {}
    for step in common_steps([c for group in groups for c in group]):
        for into, role in ((targets, "targets"), (others, "others")):
            values = [[v for c in group if (v := _accuracy(c, role, step)) is not None] for group in groups]
            if estimate := _estimate(study, values, mean):
                into[step] = estimate
    if arm != study.subject:
        both = [c for c in curves if c.arm in (arm, study.subject) and c.world in worlds]
        for step in common_steps(both):
            leads = [_leads(study.subject, arm, world, curves, step) for world in worlds]
            if estimate := _estimate(study, leads, mean):
                ahead[step] = estimate
    return ArmResult(
        name, arm, sorted({c.seed for group in groups for c in group}), speed, targets, others, ahead
    )


def _accuracy(curve: Curve, role: str, step: int) -> float | None:
    sets = curve.targets if role == "targets" else curve.others
    values = [curve.mean(point, sets) for point in curve.points]
    accuracies = [value for value in values if value is not None]
    if len(accuracies) < len(values):
        return None
    return interpolate([point.steps for point in curve.points], accuracies, step)


def _leads(subject: str, arm: str, world: str, curves: Sequence[Curve], step: int) -> list[float]:
    """Return the subject's accuracy minus the arm's, for each seed that both have."""
    pairs = _paired(subject, arm, world, curves)
    accuracies = [
        (_accuracy(one, "targets", step), _accuracy(other, "targets", step)) for one, other in pairs
    ]
    return [a - b for a, b in accuracies if a is not None and b is not None]


def _paired(one: str, other: str, world: str, curves: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    """Return the curves of two arms with the same seed, ordered by seed."""
    first = {c.seed: c for c in curves if c.world == world and c.arm == one}
    second = {c.seed: c for c in curves if c.world == world and c.arm == other}
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


# -- speed ---------------------------------------------------------------------------------------------------


def pair_ratio(reference: Curve, arm: Curve, axis: str) -> float | None:
    """Return an arm's speedup in reaching the reference's final accuracy, for one seed."""
    level = reference.line(axis)[1][-1]
    return ratio(reach(*reference.line(axis), level), reach(*arm.line(axis), level))


def _speed(study: Study, arm: str, worlds: list[str], curves: Sequence[Curve], axis: str) -> Speed:
    paired = {world: _paired(study.reference, arm, world, curves) for world in worlds}
    pairs = {
        world: {compared.seed: pair_ratio(reference, compared, axis) for reference, compared in couples}
        for world, couples in paired.items()
    }
    ratios = [[value for value in by_seed.values() if value is not None] for by_seed in pairs.values()]
    flat = [value for by_seed in pairs.values() for value in by_seed.values()]
    return Speed(
        median=_estimate(study, ratios, median),
        curves=_mean_curve_ratio(study, paired[worlds[0]], axis) if len(worlds) == 1 else None,
        pairs=pairs,
        never=flat.count(0.0),
        undefined=flat.count(None),
    )


def _mean_curve_ratio(study: Study, couples: list[tuple[Curve, Curve]], axis: str) -> Estimate | None:
    """Return the ratio of the mean curves over seeds; averaging reduces noise before the level is read."""

    def ratio_of(chosen: np.ndarray) -> float | None:
        lines = []
        for side in (0, 1):
            drawn = [couples[i][side].line(axis) for i in chosen]
            lines.append((mean_curve([x for x, _ in drawn]), mean_curve([y for _, y in drawn])))
        (rx, ry), (ax, ay) = lines
        return ratio(reach(rx, ry, ry[-1]), reach(ax, ay, ry[-1]))

    if not couples or (value := ratio_of(np.arange(len(couples)))) is None:
        return None
    if len(couples) == 1:
        return Estimate(value, None, None, 1)
    random = np.random.Generator(np.random.PCG64(study.bootstrap.seed))
    draws = min(study.bootstrap.draws, 1000)
    estimates = [ratio_of(random.integers(0, len(couples), len(couples))) for _ in range(draws)]
    # The ratio is undefined for a bootstrap sample in which the reference does not improve; it counts as the worst.
    ordered = np.sort([0.0 if value is None else value for value in estimates])
    low, high = ordered[int(0.025 * (draws - 1))], ordered[int(np.ceil(0.975 * (draws - 1)))]
    return Estimate(value, float(low), float(high), len(couples))


def _estimate(
    study: Study, strata: list[list[float]], statistic: Callable[[np.ndarray], np.ndarray]
) -> Estimate | None:
    values = [value for stratum in strata for value in stratum]
    if not values:
        return None
    if any(len(stratum) == 1 for stratum in strata):
        return Estimate(float(statistic(np.array(values))), None, None, len(values))
    low, high = bootstrap(strata, statistic, study.bootstrap.draws, study.bootstrap.seed)
    return Estimate(float(statistic(np.array(values))), low, high, len(values))


# -- machine-readable results --------------------------------------------------------------------------------


def headline(study: Study, results: Sequence[ArmResult]) -> dict[str, Any]:
    """Return the subject's results over all worlds, and by world, for the file of a benchmark."""
    rows = [row for row in results if row.arm == study.subject and row.speed]
    if not rows:
        return {
            "median_step_ratio": None,
            "ci95_low": None,
            "seeds": 0,
            "median_cost_ratio": None,
            "median_generated_ratio": None,
            "worlds": {},
        }
    overall = next((row for row in rows if row.world == ALL), rows[0])
    others = [row for row in results if row.speed and row.world == overall.world]
    return _figures(overall) | {
        "arms": {row.arm: _figures(row) for row in others},
        "worlds": {
            row.world: _figures(row)
            | {
                "targets": study.worlds[row.world].targets,
                "dead_weight": study.worlds[row.world].dead_weight,
            }
            for row in rows
            if row.world != ALL
        },
    }


def _figures(row: ArmResult) -> dict[str, Any]:
    steps, work, generated = (row.speed[axis] for axis in ("steps", "work", "generated"))
    return {
        "median_step_ratio": steps.median.value if steps.median else None,
        "ci95_low": steps.median.low if steps.median else None,
        "ci95_high": steps.median.high if steps.median else None,
        "median_cost_ratio": work.median.value if work.median else None,
        "cost_ci95_low": work.median.low if work.median else None,
        "median_generated_ratio": generated.median.value if generated.median else None,
        "generated_ci95_low": generated.median.low if generated.median else None,
        "mean_curve_step_ratio": asdict(steps.curves) if steps.curves else None,
        "mean_curve_cost_ratio": asdict(work.curves) if work.curves else None,
        "seeds": len(row.seeds),
        "pairs": steps.median.n if steps.median else 0,
        "never_reached": steps.never,
        "reference_did_not_rise": steps.undefined,
    }
