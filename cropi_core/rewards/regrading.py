"""Grade stored completions again with another verifier, and compare the rewards.

rows = [Graded("g1", "The answer is 7.", "7", 0.0)]
compared = regrade(rows, "numeric", verifier)        # one change: 0 became 1
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cropi_core.rewards.verifier import Item, Verifier


@dataclass(frozen=True)
class Graded:
    """A completion with its earlier reward.

    Attributes:
        name: What the row is called in messages.
        completion: The text.
        answer: The dataset's answer.
        reward: The earlier reward; None if the completion was not gradable.
        prompt: The messages, for verifiers over HTTP.
    """

    name: str
    completion: str
    answer: str
    reward: float | None
    prompt: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Change:
    """A completion whose reward changed.

    Attributes:
        row: The completion.
        after: Its reward now; None if it is not gradable.
        reason: Why it is not gradable now.
        terms: Of a weighted sum: the reward that each of its verifiers gave now, before its weight.
    """

    row: Graded
    after: float | None
    reason: str
    terms: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Regraded:
    """What another verifier changed.

    Attributes:
        rows: Number of completions.
        before: Mean of the earlier rewards, None if there are none.
        after: Mean of the new rewards.
        not_gradable: Number of completions without a reward, before and after.
        changes: The changed completions, largest difference first; a reward that is lost or gained is the largest.
        terms: Of a weighted sum: the mean of the rewards that each of its verifiers gave, None if there are none.
    """

    rows: int
    before: float | None
    after: float | None
    not_gradable: tuple[int, int]
    changes: list[Change]
    terms: dict[str, float | None] = field(default_factory=dict)


def regrade(rows: Sequence[Graded], name: str, verifier: Verifier) -> Regraded:
    """Grade completions with the verifier called ``name`` and compare the rewards with the earlier ones.

    Raises:
        ConfigError: The verifier is unknown or cannot grade.
    """
    grades = verifier.grade_many([Item(name, row.completion, row.answer, row.prompt) for row in rows])
    changes = [
        Change(row, grade.reward, grade.reason, grade.terms)
        for row, grade in zip(rows, grades, strict=True)
        if row.reward != grade.reward
    ]
    changes.sort(key=_difference, reverse=True)
    before = [row.reward for row in rows if row.reward is not None]
    after = [grade.reward for grade in grades if grade.reward is not None]
    missing = len(rows) - len(before), len(rows) - len(after)
    terms = {
        name: _mean([value for grade in grades if (value := grade.terms.get(name)) is not None])
        for name in sorted({name for grade in grades for name in grade.terms})
    }
    return Regraded(len(rows), _mean(before), _mean(after), missing, changes, terms)


def _difference(change: Change) -> float:
    before, after = change.row.reward, change.after
    return float("inf") if before is None or after is None else abs(before - after)


def _mean(rewards: Sequence[float]) -> float | None:
    return sum(rewards) / len(rewards) if rewards else None
