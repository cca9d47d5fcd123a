"""Reward functions that are wrong on a share of the completions: a dial for the noise of rewards.

    grading.functions: {noisy: "cropi_core.world.noisy_rewards:wrong_10"}
    data.pool: {kind: world, families: {reverse: 100}, verifier: noisy}

A completion is graded wrongly or rightly for good: whether it is depends on its text and the answer alone, so runs can
be repeated, and a cache of rewards is right. Imports only the standard library: it runs in the verifier's process.
"""

import hashlib


def wrong_5(completion: str, answer: str) -> float:
    """Grade 5 % of the completions wrongly."""
    return _graded(completion, answer, 5)


def wrong_10(completion: str, answer: str) -> float:
    """Grade 10 % of the completions wrongly."""
    return _graded(completion, answer, 10)


def wrong_20(completion: str, answer: str) -> float:
    """Grade 20 % of the completions wrongly."""
    return _graded(completion, answer, 20)


def _graded(completion: str, answer: str, percent: int) -> float:
    digest = hashlib.blake2b(f"{answer}\n{completion}".encode(), digest_size=8).digest()
    wrong = int.from_bytes(digest, "big") % 100 < percent
    return float((completion.strip() == answer) != wrong)
