"""Shards that are being sampled: answers are collected, and compared with cropi's forward pass before a shard is used.

    shards = OpenShards(prompts, expected, settings, sampling, seed)
    complete = shards.add(job, completions, source)      # (index, groups, parity), or None
    shards.foreign                                       # servers with other log-probabilities, and why

A server is checked before it gets work. It may be restarted with other weights later, and then answers well-formed
completions of another policy. Every shard therefore compares a few completions of each server that it has answers of; a
server counts as another one after it was not healthy. The answers of a server whose log-probabilities are not the
policy's are dropped from all shards that are not written, and their prompts are sampled by the other servers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cropi_core.random_bits import key64
from cropi_core.rollouts.parity import Parity, Row, measure, parity_limits
from cropi_core.rollouts.sampling import Completion
from cropi_core.rollouts.vllm.checks import Expected
from cropi_core.rollouts.vllm.client import Job
from cropi_core.rollouts.vllm.fleet import Source
from data_schemas import Sampling, Vllm

Prompts = Sequence[tuple[str, list[int]]]
Complete = tuple[int, list[list[Completion]], Parity]
"""Number of a shard, its completions by prompt, and the comparison of a few of them."""


@dataclass(frozen=True)
class _Answer:
    """The completions of a prompt, and the server that sampled them."""

    job: Job
    completions: list[Completion]
    source: Source


class OpenShards:
    """The answers of shards that are not complete.

    Args:
        shards: (prompt_id, token ids) pairs by the shard's number.
        expected: The policy.
        settings: Limits and number of comparisons.
        sampling: The distribution.
        seed: Seed of the choice of the completions that are compared.

    Attributes:
        places: Shard, and number in it, of each job.
        foreign: Why the answers of a server are not the policy's, by its address.
        again: Jobs that must be sampled again.
    """

    def __init__(
        self,
        shards: Mapping[int, Prompts],
        expected: Expected,
        settings: Vllm,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.shards, self.expected, self.settings = shards, expected, settings
        self.sampling, self.seed = sampling, seed
        self.places = [(index, i) for index in sorted(shards) for i in range(len(shards[index]))]
        self.foreign: dict[str, str] = {}
        self.again: list[Job] = []
        self._answers: dict[int, dict[int, _Answer]] = {}

    def add(self, job: Job, completions: list[Completion], source: Source) -> Complete | None:
        """Add the answer to a job; return its shard if it is complete and no server's answers in it are foreign."""
        if source.url in self.foreign:
            self.again.append(job)
            return None
        index, place = self.places[job.index]
        shard = self._answers.setdefault(index, {})
        shard[place] = _Answer(job, completions, source)
        if len(shard) < len(self.shards[index]):
            return None
        answers = [shard[i] for i in range(len(shard))]
        parity, foreign = self._compare(index, answers)
        if foreign:
            self.foreign |= foreign
            self._drop()
            return None
        del self._answers[index]
        return index, [answer.completions for answer in answers], parity

    def _drop(self) -> None:
        """Drop the answers of foreign servers."""
        for shard in self._answers.values():
            for place in [i for i, answer in shard.items() if answer.source.url in self.foreign]:
                self.again.append(shard.pop(place).job)

    def _compare(self, index: int, answers: list[_Answer]) -> tuple[Parity, dict[str, str]]:
        """Compare some completions of each server with cropi's forward pass; return why servers are foreign."""
        most = self.settings.parity_completions
        limit, _ = parity_limits(self.settings, self.expected.dtype)
        by_source: dict[Source, list[Row]] = {}
        chosen: dict[Source, list[Row]] = {}
        for number, (source, row) in enumerate(self._ordered(index, answers)):
            by_source.setdefault(source, []).append(row)
            if number < most or source not in chosen:
                chosen.setdefault(source, []).append(row)
        total, foreign = Parity(), {}
        for source, rows in chosen.items():
            parity = measure(self.expected.model, rows, self.sampling)
            # One completion has few tokens; a server is judged by as many as a shard compares.
            if parity.mean > limit and len(rows) < min(most, len(by_source[source])):
                parity = measure(self.expected.model, by_source[source][:most], self.sampling)
            if parity.mean > limit:
                foreign[source.url] = (
                    f"shard {index}: its log-probabilities differ by {parity.mean:.3g} per token from cropi's forward "
                    f"pass in float32 (largest {parity.maximum:.3g}, {parity.tokens} tokens), and the limit "
                    f"runtime.vllm.max_mean_difference is {limit:g}; importance ratios would contain this difference. "
                    "Check whether it was restarted with other weights, or raise the limit"
                )
            total += parity
        return total, foreign

    def _ordered(self, index: int, answers: list[_Answer]) -> list[tuple[Source, Row]]:
        """Return all completions of a shard in an order that the seed decides."""
        prompts = self.shards[index]
        pairs = [(p, s) for p in range(len(answers)) for s in range(len(answers[p].completions))]
        pairs.sort(key=lambda pair: key64("parity", self.seed, prompts[pair[0]][0], pair[1]))
        return [
            (answers[p].source, (prompts[p][1], completion.ids, completion.logprobs))
            for p, s in pairs
            for completion in (answers[p].completions[s],)
        ]
