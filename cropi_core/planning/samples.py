"""Parts of a calibration: its clock, its choice of prompts, and the rates and lengths derived from them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cropi_core.artifacts import read_parquet, write_parquet
from cropi_core.gradients import OK, Group
from cropi_core.planning.terms import Rate, Sample, Source
from cropi_core.progress import Progress
from cropi_core.rollouts import list_lengths, pass_counts, read_rollouts
from data_schemas import Passes


class EnoughError(Exception):
    """Raised to stop a step between two shards."""


@dataclass
class Clock:
    """A progress callback that records the time of each report, and stops the step when its budget is used up.

    Attributes:
        budget_s: Seconds after which the step is stopped.
        least: Units that must be done before a stop.
        started_at: Start of the step.
        marks: Time of each report, and the units done.
    """

    budget_s: float = math.inf
    least: int = 1
    started_at: float = field(default_factory=time.monotonic)
    marks: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        """Record a report.

        Raises:
            EnoughError: The budget is used up and work remains.
        """
        now = time.monotonic()
        self.marks.append((now, progress.done))
        if self.least <= progress.done < progress.total and now - self.started_at > self.budget_s:
            raise EnoughError

    def since_start(self) -> float:
        """Return the seconds until the first report."""
        return self.marks[0][0] - self.started_at

    def laps(self) -> list[tuple[float, int, int]]:
        """List the intervals between reports: seconds, and the units done before and after."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(b[0] - a[0], a[1], b[1]) for a, b in pairs if b[1] > a[1]]


def rate_of(clock: Clock, table: pa.Table, samples: int, tail: float) -> Rate:
    """Compute a rate from the reports of a collection.

    The first batch starts the verifier and warms up: its extra time compared with the other batches counts as start-up
    cost.

    Args:
        clock: The reports.
        table: The rollouts.
        samples: Completions per prompt.
        tail: Seconds after the last report.
    """
    counts = list_lengths(table["completion_ids"]).tolist()
    laps = clock.laps()
    steady = laps[1:] or laps
    token_s = sum(s for s, _, _ in steady) / sum(sum(counts[a * samples : b * samples]) for _, a, b in steady)
    first = laps[0][0] - token_s * sum(counts[: laps[0][2] * samples])
    start = clock.since_start() + (max(0.0, first) if len(laps) > 1 else 0.0)
    return Rate(0.0, start, token_s + tail / sum(counts))


def steady_rate(clock: Clock, table: pa.Table, tail: float) -> Rate:
    """Compute a rate from the reports of a collection by servers.

    Servers work on all shards at once, so that only the whole collection gives their rate; with few prompts they are
    not fully loaded, and slower than in a run.

    Args:
        clock: The reports; the first is made when the servers are ready.
        table: The rollouts.
        tail: Seconds after the last report.
    """
    spent = clock.marks[-1][0] - clock.marks[0][0] + tail
    return Rate(0.0, clock.since_start(), spent / int(list_lengths(table["completion_ids"]).sum()))


def packed(groups: Sequence[Group]) -> int:
    """Count the tokens of passes over the groups with a gradient."""
    return sum(group.packed for group in groups if group.status == OK)


def shared(rates: list[Rate]) -> dict[Source, Rate]:
    """Split off the costs that are paid once per process: the extra time of the first call compared with the second."""
    pool, validation = rates
    first = max(0.0, pool.start_s - validation.start_s)
    return {
        "pool": Rate(first, validation.start_s, pool.token_s),
        "validation": Rate(first, validation.start_s, validation.token_s),
    }


def spread(table: pa.Table, wanted: int, shards: int) -> pa.Table:
    """Take prompts at even distances from a table; each of the ``shards`` parts covers the whole table."""
    places = np.unique(np.linspace(0, table.num_rows - 1, min(wanted, table.num_rows)).round().astype(int))
    return table.take(pa.array(np.concatenate([places[i::shards] for i in range(shards)])))


def lengths(table: pa.Table, groups: Sequence[Group]) -> Sample:
    """Describe sampled prompts.

    Args:
        table: Their rollouts.
        groups: The same rollouts, grouped; completions that are not gradable are in the table only.
    """
    live = [group for group in groups if group.status == OK]

    def mean(members: Sequence[Group]) -> float:
        return sum(len(g.prompt) for g in members) / len(members) if members else 0.0

    return Sample(
        prompts=len(groups),
        prompt_tokens=mean(groups),
        lengths=tuple(int(n) for n in list_lengths(table["completion_ids"])),
        live=len(live) / len(groups),
        live_prompt_tokens=mean(live),
        live_lengths=tuple(len(c) for g in live for c in g.completions),
    )


def in_passes(folder: Path, passes: Passes) -> pa.Table:
    """Remove the completions that passes would not have sampled from the parts of a collection, and read the rest."""
    rewards: dict[str, list[float | None]] = {}
    table = read_rollouts(folder)
    for name, reward in zip(table["prompt_id"].to_pylist(), table["reward"].to_pylist(), strict=True):
        rewards.setdefault(name, []).append(reward)
    sizes = dict(zip(rewards, pass_counts(list(rewards.values()), passes), strict=True))
    for path in sorted(folder.glob("part-*.parquet")):
        part = read_parquet(path)
        rows = zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True)
        write_parquet(part.filter(pa.array([sample < sizes[name] for name, sample in rows])), path)
    return read_rollouts(folder)


def with_sizes(sample: Sample) -> Sample:
    """Add the mean completions of a prompt, and of a prompt with a gradient, to a sample."""
    live = round(sample.live * sample.prompts)
    return replace(
        sample,
        samples=len(sample.lengths) / sample.prompts,
        live_samples=len(sample.live_lengths) / live if live else None,
    )
