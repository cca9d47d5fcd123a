"""Check that a policy's chat template renders the prompts of a run, before anything is sampled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cropi_core.artifacts import read_parquet
from cropi_core.policy import check_messages
from cropi_core.prompts.rows import Row


def check_rendering(checkpoint: Path, chat: Mapping[str, Any] | None, sets: Mapping[str, Path]) -> None:
    """Render one prompt of each sequence of roles in the sets.

    Templates refuse roles rather than texts: a system message, or two messages of one role in a row. Single messages of
    a user are not tried; the policy step has tried one, and the others need transformers, whose import takes a second.

    Args:
        checkpoint: Checkpoint directory.
        chat: Chat template and arguments of the run; None uses the checkpoint's template.
        sets: Prompts tables (Parquet) by name.

    Raises:
        PolicyError: The template refuses a prompt; names the set, the prompt and the remedy.
    """
    examples: dict[tuple[str, ...], tuple[str, Row]] = {}
    for name, path in sets.items():
        for row in read_parquet(path).select(["prompt_id", "messages"]).to_pylist():
            examples.setdefault(tuple(turn["role"] for turn in row["messages"]), (name, row))
    examples.pop(("user",), None)
    named = {f"{name}, prompt {row['prompt_id']}": row["messages"] for name, row in examples.values()}
    check_messages(checkpoint, chat, named)
