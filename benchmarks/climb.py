"""Whether a curriculum climbs, and whether it knows when its scores are noise: the figures of the study `climb`.

    cropi study climb --root /data/climb                     # hours, in parts
    python benchmarks/climb.py --root /data/climb            # seconds

Runs nothing: it compares what is finished of ``configs/studies/climb.yaml`` under the root, and writes
``benchmarks/results/climb.json`` with the figures and the machine. The peer of the cost ratios, influence that is
scored once, is an arm of the same study.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from finished_study import finished_study

from cropi_core.statistics import bootstrap
from cropi_core.study.compare import compare, pair_ratio
from cropi_core.study.measure import Curve
from cropi_core.study.statistics import median, reach
from data_schemas import Study

CLIMBING = ("ladder", "moving")
"""Worlds in which what can be learned changes."""
SINGLE = ("cropi", "once", "pass_rate", "random")
"""Strategies that `auto` could have been."""
POINT = 0.01


def final(curve: Curve, curves: Sequence[Curve]) -> float:
    """Return the accuracy on the targets after the steps that all arms take: `once` takes more."""
    steps, values = curve.line("steps")
    end = min(other.points[-1].steps for other in curves)
    return values[steps.index(end)]


def ratios(curves: Sequence[Curve], arm: str, worlds: Sequence[str]) -> list[list[float]]:
    """Return by world the total cost of `once` to its final accuracy, by that of the arm, seed by seed."""
    found = []
    for world in worlds:
        by = {(c.arm, c.seed): c for c in curves if c.world == world}
        pairs = [(by["once", s], by[arm, s]) for a, s in sorted(by) if a == arm and ("once", s) in by]
        values = [pair_ratio(once, other, "work") for once, other in pairs]
        found.append([value for value in values if value is not None])
    return found


def cost_over_once(study: Study, curves: Sequence[Curve], arm: str, worlds: Sequence[str]) -> dict[str, Any]:
    """Return the median ratio of costs with its interval, and the number of pairs."""
    strata = [values for values in ratios(curves, arm, worlds) if values]
    flat = np.array([value for values in strata for value in values])
    if not len(flat):
        return {"median": None, "ci95_low": None, "ci95_high": None, "pairs": 0}
    low = high = None
    if all(len(values) > 1 for values in strata):
        low, high = bootstrap(strata, median, study.bootstrap.draws, study.bootstrap.seed)
    return {"median": float(median(flat)), "ci95_low": low, "ci95_high": high, "pairs": len(flat)}


def cost_to_arms_level(curves: Sequence[Curve], arm: str, worlds: Sequence[str]) -> dict[str, Any]:
    """Compare the total costs to the arm's final accuracy: the other way round than :func:`cost_over_once`.

    Where `once` never reaches that accuracy, its whole cost counts, so the ratio is a lower bound.
    """
    found, never = [], 0
    for world in worlds:
        by = {(c.arm, c.seed): c for c in curves if c.world == world}
        for name, seed in sorted(by):
            if name != arm or ("once", seed) not in by:
                continue
            (x, y), (ox, oy) = by[name, seed].line("work"), by["once", seed].line("work")
            needed, other = reach(x, y, y[-1]), reach(ox, oy, y[-1])
            never += math.isinf(other)
            if needed > 0:
                found.append(min(other, ox[-1]) / needed)
    return {
        "median_at_least": float(median(np.array(found))) if found else None,
        "once_never": never,
        "pairs": len(found),
    }


def within_one_point(curves: Sequence[Curve]) -> tuple[float | None, int, float | None]:
    """Compare `auto` with the single strategies of the same world and seed.

    Returns:
        The share of runs within a point of the best of them, their number, and the mean lead over `random` in points.
    """
    close, leads = [], []
    by = {(c.world, c.arm, c.seed): final(c, curves) for c in curves}
    for (world, arm, seed), value in by.items():
        others = [by[world, name, seed] for name in SINGLE if (world, name, seed) in by]
        if arm != "auto" or len(others) < len(SINGLE):
            continue
        close.append(value >= max(others) - POINT)
        leads.append(100 * (value - by[world, "random", seed]))
    return (float(np.mean(close)), len(close), float(np.mean(leads))) if close else (None, 0, None)


def levels(curves: Sequence[Curve], arm: str) -> list[float] | None:
    """Return the mean level of what an arm selects in the ladder, by stage, over its seeds."""
    rows = [[facts.mean_level for facts in c.stages] for c in curves if c.world == "ladder" and c.arm == arm]
    return [float(np.mean(stage)) for stage in zip(*rows, strict=True)] if rows else None


def main() -> None:
    """Compare and write."""
    done = finished_study(__doc__, "climb")
    study, curves = done.study, done.curves
    share, runs, lead = within_one_point(curves)
    mean_curves = {
        (row.world, row.arm): asdict(row.speed["work"].curves)
        for row in compare(study, curves)
        if row.speed and row.speed["work"].curves
    }
    climbing = {arm: cost_over_once(study, curves, arm, CLIMBING) for arm in study.arms if arm != "once"}
    figures = {
        "median_cost_ratio_over_once": climbing["cropi"]["median"],
        "cost_over_once_ci95_low": climbing["cropi"]["ci95_low"],
        "auto_within_one_point_share": share,
        "auto_runs_compared": runs,
        "auto_points_over_random": lead,
        "mean_level_by_stage": levels(curves, "cropi"),
        "seed_numbers": sorted({c.seed for c in curves}),
        "seeds": len({c.seed for c in curves if c.arm == "cropi" and c.world in CLIMBING}),
        "cost_over_once": climbing,
        "cost_to_arms_level": {
            arm: cost_to_arms_level(curves, arm, CLIMBING) for arm in study.arms if arm != "once"
        },
        "worlds": {
            world: {
                arm: {
                    "final_points": [
                        round(100 * final(c, curves), 2) for c in curves if (c.world, c.arm) == (world, arm)
                    ],
                    "cost_over_once": cost_over_once(study, curves, arm, [world]) if arm != "once" else None,
                    "cost_over_once_of_mean_curves": mean_curves.get((world, arm)),
                    "verdicts": [
                        [facts.grade for facts in c.stages]
                        for c in curves
                        if (c.world, c.arm) == (world, arm)
                    ],
                }
                for arm in study.arms
            }
            for world in study.worlds
        },
        "mean_level_by_stage_of_arms": {arm: levels(curves, arm) for arm in study.arms},
    }
    done.write(figures)


if __name__ == "__main__":
    main()
