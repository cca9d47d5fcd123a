"""Which prompts each generation batch trains on, and what is learned from their rewards.

    draws = Draws(rows, training, seed, belief, weights)
    draws.batch(0)                                # positions in rows
    draws.observe(0, [Group(...), ...])           # updates the belief, so that batch 1 is drawn with it
    draws.restore(draws.state())                  # in another process: draws the same batches

A batch is a function of the seed, its number and the groups observed before it. State in a checkpoint is therefore the
list of groups; the belief is computed from it again, in the same order of operations and to the same bits.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.random_bits import key64
from cropi_core.selection import (
    Belief,
    drifted,
    mixed,
    mixed_chance,
    observe,
    sampled_rates,
    weighted_draw,
)
from cropi_core.training.metrics import TrainingError
from data_schemas import GROUPS, Training

STATE = "draws.json"
"""The state of the draws, in a checkpoint of the stage's scratch directory."""


@dataclass(frozen=True)
class Group:
    """The rewards of a prompt's completions in one generation batch.

    Attributes:
        prompt_id: The prompt.
        graded: Number of completions with a reward.
        passed: Sum of their rewards.
        mixed: Whether the rewards differ: only then the group has a gradient.
        trained: Whether the stage trained on the group; one that is not mixed may have been replaced.
        tokens: Tokens of its completions.
    """

    prompt_id: str
    graded: int
    passed: float
    mixed: bool
    trained: bool
    tokens: int


def group_of(prompt_id: str, rewards: Sequence[float | None], tokens: int, *, trained: bool = True) -> Group:
    """Summarise the rewards of a group; None is not gradable."""
    graded = [reward for reward in rewards if reward is not None]
    return Group(
        prompt_id, len(graded), math.fsum(graded), len(set(graded)) > 1, trained=trained, tokens=tokens
    )


class Draws:
    """Draws the prompts of a stage's generation batches.

    Attributes:
        rows: The selected prompts.
        belief: Current belief about the pass rates of the pool; None if the stage has none.
        groups: Groups observed so far, by batch.
        expected: For each of them, the probability that it is mixed, as believed before it was sampled.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        training: Training,
        seed: int,
        belief: Belief | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self.training = training
        self.seed = seed
        self.belief = belief
        self.groups: list[list[Group]] = []
        self.expected: list[list[float]] = []
        self._cursor = 0
        self._weights = np.ones(len(rows)) if weights is None else weights**training.draw.influence
        # Of every prompt of the belief, its place, and the places of the selected ones.
        self._place = {name: i for i, name in enumerate(belief.prompt_ids)} if belief else {}
        self._selected = np.array([self._place[row["prompt_id"]] for row in rows]) if belief else None
        rounds = math.ceil(self.count * training.draw.oversampling)
        self._order = stage_order(len(rows), training.prompts_per_step, rounds, seed)

    @property
    def count(self) -> int:
        """Number of generation batches of the stage."""
        return -(-self.training.steps // self.training.iterations)

    @property
    def deciding_samples(self) -> int:
        """Number of completions that decide whether a group is trained on or replaced."""
        return self.training.draw.first_samples or self.training.sampling.samples

    def batch(self, number: int) -> list[int]:
        """Return the positions of a batch's prompts in ``rows``, no prompt twice."""
        if self.training.draw.method == "uniform":
            return self._order[number]
        return self._preferred(number)[: self.training.prompts_per_step]

    def more(self, number: int, seen: Collection[int], count: int) -> list[int]:
        """Take the next prompts for a batch that has sampled others already.

        Args:
            number: The batch.
            seen: Positions that it has sampled.
            count: How many are wanted; fewer are returned once all prompts, or all that ``draw.oversampling`` allows,
                were taken.
        """
        most = math.floor(self.training.prompts_per_step * self.training.draw.oversampling)
        count = min(count, most - len(seen), len(self.rows) - len(seen))
        if self.training.draw.method != "uniform":
            return [i for i in self._preferred(number) if i not in seen][:count]
        in_turn, taken = [i for batch in self._order for i in batch], []
        while len(taken) < count:
            position = in_turn[self._cursor % len(in_turn)]
            self._cursor += 1
            if position not in seen and position not in taken:
                taken.append(position)
        return taken

    def _preferred(self, number: int) -> list[int]:
        """Order all positions of ``rows`` by the draw of a batch, as the belief is before it."""
        assert self.belief is not None
        draw, samples = self.training.draw, self.deciding_samples
        cells = self.belief.cells[self._selected]
        random = np.random.Generator(np.random.PCG64(key64("draw", self.seed, number) % 2**64))
        uniforms = random.random(len(self.rows))
        if draw.method == "thompson":
            values = self._weights * mixed(sampled_rates(cells, uniforms), samples)
            return np.argsort(-values, kind="stable").tolist()
        chances = mixed_chance(cells, samples) ** draw.sharpness
        return weighted_draw(self._weights * chances, uniforms, len(self.rows)).tolist()

    def observe(self, number: int, groups: list[Group]) -> None:
        """Take in the groups of a batch, in the order of the processes that sampled them.

        Raises:
            TrainingError: Batches are missing before this one, or a mean reward is outside [0, 1].
        """
        if self.belief is None:
            return
        if number != len(self.groups):
            raise TrainingError(
                f"generation batch {number} follows {len(self.groups)} batches; it cannot be used"
            )
        self.groups.append(groups)
        if wrong := [g for g in groups if not 0 <= g.passed <= g.graded]:
            raise TrainingError(
                f"training.draw needs rewards between 0 and 1; those of prompt {wrong[0].prompt_id!r} have the mean "
                f"{wrong[0].passed / max(1, wrong[0].graded):.3g}. Scale the rewards, or drop training.draw"
            )
        places = np.array([self._place[group.prompt_id] for group in groups])
        cells, before = self.belief.cells.copy(), self.belief.cells[places]
        self.expected.append(mixed_chance(before, self.deciding_samples).tolist())
        passed, graded = (
            np.array([getattr(g, name) for g in groups], float) for name in ("passed", "graded")
        )
        cells[places] = observe(before, passed, graded)
        drift = self.training.draw.drift * math.sqrt(self.training.iterations)
        self.belief = Belief(self.belief.prompt_ids, drifted(cells, drift))

    def trained(self, batches: int) -> list[str]:
        """List the prompts of the first ``batches``, one entry a group that the stage trained on."""
        if self.belief is None:
            return [self.rows[i]["prompt_id"] for batch in self._order[:batches] for i in batch]
        return [group.prompt_id for batch in self.groups for group in batch if group.trained]

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs, in JSON types."""
        return {"cursor": self._cursor, "groups": [[asdict(g) for g in batch] for batch in self.groups]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the state of another process's draws, from the beginning of the stage."""
        for number, batch in enumerate(state["groups"]):
            self.observe(number, [Group(**group) for group in batch])
        self._cursor = state["cursor"]

    def table(self) -> pa.Table:
        """Return the groups as a table of :data:`data_schemas.tables.GROUPS`."""
        rows = [
            {**asdict(group), "batch": number, "expected": chance}
            for number, (batch, chances) in enumerate(zip(self.groups, self.expected, strict=True))
            for group, chance in zip(batch, chances, strict=True)
        ]
        return pa.Table.from_pylist([{n: r[n] for n in GROUPS.names} for r in rows], schema=GROUPS)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the draws for the manifest; empty without a belief."""
        if self.belief is None:
            return {}
        pairs = [
            (group, chance)
            for batch, chances in zip(self.groups, self.expected, strict=True)
            for group, chance in zip(batch, chances, strict=True)
        ]
        dropped = [group for group, _ in pairs if not group.trained]
        return {
            "draw": self.training.draw.method,
            "prompts_drawn": len({group.prompt_id for group, _ in pairs}),
            "groups_sampled": len(pairs),
            "groups_dropped": len(dropped),
            "tokens_dropped": sum(group.tokens for group in dropped),
            "mixed": float(np.mean([group.mixed for group, _ in pairs])),
            "expected_mixed": float(np.mean([chance for _, chance in pairs])),
        }


def stage_order(prompts: int, per_step: int, batches: int, seed: int) -> list[list[int]]:
    """Choose the prompts of every generation batch, in turn.

    The batches run through permutations of the subset, one after another: counts of any two prompts differ by
    at most one, and no prompt is twice in a batch. (TRL's sampler drops the remainder of every epoch, and
    loses its order when it resumes after the first epoch.)

    Args:
        prompts: Size of the subset, at least ``per_step``.
        per_step: Prompts in a batch.
        batches: Number of batches.
        seed: Seed of the permutations.

    Returns:
        ``batches`` lists of ``per_step`` indices below ``prompts``.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    queue: list[int] = []
    order = []
    for _ in range(batches):
        if len(queue) < per_step:
            permutation, waiting = random.permutation(prompts).tolist(), set(queue)
            # Prompts still in the queue come last in the new permutation, so no batch has a prompt twice.
            queue += [i for i in permutation if i not in waiting] + [i for i in permutation if i in waiting]
        order.append(queue[:per_step])
        queue = queue[per_step:]
    return order
