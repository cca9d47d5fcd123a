"""Groups: the graded completions of each prompt, its status before any computation, and batches of groups."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cropi_core.errors import DataError
from cropi_core.gradients.packing import packed_tokens
from data_schemas import STATUSES

OK, ZERO_VARIANCE, NOT_FINITE, TOO_FEW_GRADABLE = range(len(STATUSES))


@dataclass(frozen=True)
class Group:
    """The graded completions of one prompt, and the prompt's status before any computation.

    Attributes:
        prompt_id: Id of the prompt.
        prompt: Prompt token ids.
        completions: Token ids of the G graded completions.
        behavior: Behaviour log-probabilities of the completions.
        rewards: (G,) float64.
        status: Index in :data:`data_schemas.tables.STATUSES`.
        masks: Of each completion, which of its tokens the policy sampled; None if these are all.
    """

    prompt_id: str
    prompt: list[int]
    completions: list[list[int]]
    behavior: list[list[float]]
    rewards: np.ndarray
    status: int
    masks: list[list[bool] | None] | None = None

    @property
    def packed(self) -> int:
        """Number of tokens in a pack, which contains the prompt once."""
        return packed_tokens(self.prompt, self.completions)

    @property
    def tokens(self) -> int:
        """Number of tokens of the sequences, each with its prompt."""
        return sum(len(self.prompt) + len(c) for c in self.completions)


def group_rollouts(table: pa.Table, min_gradable: int) -> list[Group]:
    """Group rows by prompt id, in the order of the table, and set each prompt's status.

    Completions that are not gradable are dropped. A prompt with fewer than ``min_gradable`` graded completions is
    ``too_few_gradable``; a prompt whose rewards are all equal is ``zero_variance``, and its gradient is exactly zero.

    Raises:
        DataError: A prompt has several tokenisations.
    """
    columns = {
        name: table[name].to_pylist() for name in ("prompt_id", "prompt_ids", "completion_ids", "reward")
    }
    columns["behavior"] = table["behavior_logprobs"].to_pylist()
    masks = table["completion_mask"].to_pylist() if "completion_mask" in table.column_names else None
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(columns["prompt_id"]):
        rows.setdefault(name, []).append(i)
    groups = []
    for name, members in rows.items():
        prompts = {tuple(columns["prompt_ids"][i]) for i in members}
        if len(prompts) > 1:
            raise DataError(
                f"prompt {name} has {len(prompts)} different prompt_ids; a prompt must have one tokenisation"
            )
        graded = [i for i in members if columns["reward"][i] is not None]
        rewards = np.array([columns["reward"][i] for i in graded], dtype=np.float64)
        status = OK
        if len(graded) < min_gradable:
            status = TOO_FEW_GRADABLE
        elif np.ptp(rewards) == 0:
            status = ZERO_VARIANCE
        groups.append(
            Group(
                name,
                list(prompts.pop()),
                [columns["completion_ids"][i] for i in graded],
                [columns["behavior"][i] for i in graded],
                rewards,
                status,
                [masks[i] for i in graded] if masks else None,
            )
        )
    return groups


def batch_groups(groups: list[Group], block_rows: int, token_budget: int) -> Iterator[list[int]]:
    """Cut the groups with status ``ok`` into batches of similar length, within a block and within the token budget.

    Yields:
        Indices into ``groups``, each group with status ``ok`` exactly once.
    """
    for begin in range(0, len(groups), block_rows):
        block = [i for i in range(begin, min(begin + block_rows, len(groups))) if groups[i].status == OK]
        yield from cut_batch(groups, sorted(block, key=lambda i: (groups[i].packed, i)), token_budget)


def cut_batch(groups: list[Group], indices: list[int], token_budget: int) -> list[list[int]]:
    """Cut a list of groups, in its order, into batches within the token budget, or of a single group."""
    batches: list[list[int]] = []
    tokens = 0
    for i in indices:
        if batches and tokens + groups[i].packed <= token_budget:
            batches[-1].append(i)
            tokens += groups[i].packed
        else:
            batches.append([i])
            tokens = groups[i].packed
    return batches
