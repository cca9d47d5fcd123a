"""A reward for short completions, to add to a verifier's: grading.sums in docs/guides/rewards.md."""

WORDS = 200
"""Words up to which a completion is short."""


def brief(completion: str, answer: str) -> float:
    """Return 1 for a completion of at most :data:`WORDS` words, 0 for one of twice as many, in between a line."""
    return min(1.0, max(0.0, 2.0 - len(completion.split()) / WORDS))
