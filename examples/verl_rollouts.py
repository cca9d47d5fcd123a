"""Write a batch of verl as rollouts: tokens, log-probabilities, rewards, and the mask of the policy's own tokens.

Call it in verl's trainer after the rewards of a step (`calculate_log_probs: true` in its rollout settings), with the
stable ids that `--format verl` put into `extra_info`, and import the file:

    ids = [one["id"] for one in batch.non_tensor_batch["extra_info"]]
    append(Path("rollouts.jsonl"), rollout_rows(batch.batch, ids, tokenizer.decode))

    cropi artifacts import rollouts rollouts.jsonl --policy unknown --sampling '{samples: 8, max_new_tokens: 1024}'

Field names are those of verl's `DataProto` in November 2026: `prompts` is padded on the left, `responses` on the right;
`response_mask` is 1 for tokens of the policy and 0 for those of users and environments.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def rollout_rows(
    batch: Mapping[str, Any], prompt_ids: Sequence[str], decode: Callable[[list[int]], str]
) -> Iterator[dict[str, Any]]:
    """Yield a row of the rollouts format for each response of a batch.

    Args:
        batch: Tensors `prompts`, `responses`, `attention_mask`, `response_mask`, `rollout_log_probs` and
            `token_level_scores`, a row a response.
        prompt_ids: Stable id of the prompt of each response.
        decode: The tokenizer's.
    """
    width, samples = batch["prompts"].shape[1], Counter[str]()
    for row, name in enumerate(prompt_ids):
        real = batch["attention_mask"][row].bool()
        ids = batch["responses"][row][real[width:]].tolist()
        mask = batch["response_mask"][row][real[width:]].bool().tolist()
        logprobs = batch["rollout_log_probs"][row][real[width:]].tolist()
        last = len(mask) - mask[::-1].index(True)  # what follows the policy's last token conditions nothing
        yield {
            "prompt_id": name,
            "sample": samples[name],
            "prompt_ids": batch["prompts"][row][real[:width]].tolist(),
            "completion_ids": ids[:last],
            "behavior_logprobs": [p if own else 0.0 for p, own in zip(logprobs, mask, strict=True)][:last],
            "text": decode(ids[:last]),
            "reward": float(batch["token_level_scores"][row].sum()),
            "finish_reason": "length" if bool(real[width:].all()) else "stop",
            "completion_mask": mask[:last],
        }
        samples[name] += 1


def append(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Append rows to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
