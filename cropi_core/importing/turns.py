"""Conversations of several turns: the tokens of a completion, and which of them the policy sampled.

A completion begins with the policy's first turn and ends with its last. What it is told in between is part of it, so
that later turns are conditioned on it, and is masked: it was not sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from cropi_core.policy import Message, render


class TurnsError(Exception):
    """A conversation cannot be converted to tokens; the message is the reason."""


@dataclass(frozen=True)
class Conversation:
    """The tokens of a completion of several turns.

    Attributes:
        ids: Token ids.
        mask: True for the tokens that the policy sampled.
    """

    ids: list[int]
    mask: list[bool]


def conversation_tokens(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[Message],
    turns: Sequence[Message],
    end: int,
    *,
    cut: bool = False,
) -> Conversation:
    """Convert turns to tokens by the chat template; the policy sampled its turns with the token that ends each.

    Args:
        tokenizer: The policy's, with a chat template.
        prompt: Messages before the policy's first turn.
        turns: The policy's turns and what it was told between them; the last is the policy's.
        end: Token that the template puts at the end of a turn.
        cut: The last turn was cut at the length limit and has no end token.

    Raises:
        TurnsError: There is no chat template, or it renders earlier turns differently when later ones follow (some
            templates remove the reasoning of earlier turns): the sampled tokens are then not known.
    """
    if not tokenizer.chat_template:
        raise TurnsError("has several turns, and the checkpoint has no chat template")
    messages = list(prompt)
    before = render(tokenizer, messages, opened=True)
    start, mask = len(before), [False] * len(before)
    for turn in turns:
        messages.append(turn)
        if turn["role"] != "assistant":
            continue
        # What stands before the turn: the prompt, or the turns before with the beginning of this one.
        opened = render(tokenizer, messages[:-1], opened=True)
        _check_continues(before, opened)
        closed = render(tokenizer, messages, opened=False)
        _check_continues(opened, closed)
        ends = [i for i, token in enumerate(closed) if token == end and i >= len(opened)]
        stop = ends[-1] + 1 if ends else len(closed)
        before = closed[:stop]
        mask += [False] * (len(opened) - len(mask)) + [True] * (stop - len(opened))
    if cut and before[-1] == end:
        before, mask = before[:-1], mask[:-1]
    return Conversation(before[start:], mask[start:])


def _check_continues(first: list[int], second: list[int]) -> None:
    if second[: len(first)] != first:
        raise TurnsError(
            "has several turns, and the chat template renders earlier turns differently when later ones follow; log "
            "token ids"
        )
