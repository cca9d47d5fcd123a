"""Groups: the graded completions of one prompt, which of them are worth a pass, and how they are batched."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from cropi_core.errors import DataError
from cropi_core.features import Batch
from data_schemas.arrow import STATUSES

OK, ZERO_VARIANCE, NOT_FINITE, TOO_FEW_GRADABLE = range(len(STATUSES))


@dataclass(frozen=True)
class Group:
    """The graded completions of one prompt, and the prompt's status before any model work.

    Attributes:
        prompt_id: Its id.
        prompt: Prompt token ids.
        completions: Token ids of the G graded completions.
        behavior: Their behaviour log-probabilities.
        rewards: (G,) float64.
        status: Index of :data:`data_schemas.arrow.STATUSES`.
    """

    prompt_id: str
    prompt: list[int]
    completions: list[list[int]]
    behavior: list[list[float]]
    rewards: np.ndarray
    status: int

    @property
    def length(self) -> int:
        """Padded tokens of one of its rows."""
        return len(self.prompt) + max(map(len, self.completions), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that a pass over it reads, without padding."""
        return sum(len(self.prompt) + len(c) for c in self.completions)


def group_rollouts(table: pa.Table, min_gradable: int) -> list[Group]:
    """Group rows by prompt id, in the order of the table, and settle each prompt's status.

    Completions that are not gradable are left out; a prompt with fewer than ``min_gradable`` others is
    ``too_few_gradable``, one whose rewards are all equal is ``zero_variance``: its gradient is exactly zero.
    """
    columns = {
        name: table[name].to_pylist() for name in ("prompt_id", "prompt_ids", "completion_ids", "reward")
    }
    columns["behavior"] = table["behavior_logprobs"].to_pylist()
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(columns["prompt_id"]):
        rows.setdefault(name, []).append(i)
    groups = []
    for name, members in rows.items():
        prompts = {tuple(columns["prompt_ids"][i]) for i in members}
        if len(prompts) > 1:
            raise DataError(
                f"prompt {name} has {len(prompts)} different prompt_ids; one prompt, one tokenisation"
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
            )
        )
    return groups


def batches(groups: list[Group], block_rows: int, token_budget: int) -> Iterator[list[int]]:
    """Cut the live groups into batches: within a block, of one size, of like length, within the budget.

    Yields:
        Indices into ``groups``; each live group exactly once, dead ones never.
    """
    for begin in range(0, len(groups), block_rows):
        block = [i for i in range(begin, min(begin + block_rows, len(groups))) if groups[i].status == OK]
        for size in sorted({len(groups[i].completions) for i in block}):
            members = sorted(
                (i for i in block if len(groups[i].completions) == size), key=lambda i: (groups[i].length, i)
            )
            batch: list[int] = []
            for i in members:  # ascending length: the new one sets the padded length of all
                if batch and (len(batch) + 1) * size * groups[i].length > token_budget:
                    yield batch
                    batch = []
                batch.append(i)
            if batch:
                yield batch


def make_batch(groups: list[Group], pieces: slice, device: torch.device) -> Batch:
    """Pad completions ``pieces`` of every group into one batch: prompts on the left, completions on the right."""
    rows = [(g.prompt, c) for g in groups for c in g.completions[pieces]]
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = torch.zeros(len(rows), left + right, dtype=torch.long)
    mask = torch.zeros(len(rows), left + right, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        begin, end = left - len(prompt), left + len(completion)
        ids[row, begin:end] = torch.tensor(prompt + completion)
        mask[row, begin:end] = True
    completion_mask = mask.clone()
    completion_mask[:, :left] = False
    return Batch(ids.to(device), mask.to(device), completion_mask[:, left:].to(device), len(groups))
