"""Signs that a verifier is wrong: answers that it cannot read, and the rewards of the first completions."""

from collections.abc import Iterable, Sequence

from cropi_core.rewards.verifier import Item, Verifier

FEWEST_COMPLETIONS = 32
"""Completions of one verifier below which no share is judged."""
FEWEST_PROMPTS = 8
"""Prompts that these completions must come from."""
EQUAL_COMPLETIONS, EQUAL_PROMPTS = 128, 32
"""Completions and prompts from which equal rewards are suspicious: a policy can solve all or none of a few prompts."""
NOT_GRADABLE_SHARE = 0.5
"""Share of completions without a reward from which a verifier is suspicious."""


READABLE = ("choice", "numeric")
"""Built-in verifiers that read the answer before the completion."""
MOST_ANSWERS = 5000
"""Different answers of one verifier that are read before sampling."""


def answer_warnings(verifier: Verifier, answers: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return a warning for each built-in verifier that cannot read some of the dataset's answers.

    Args:
        verifier: Grades an empty completion with each answer.
        answers: The verifier, the prompt and the answer of each prompt.
    """
    prompts: dict[str, dict[str, str]] = {name: {} for name in READABLE}
    for name, prompt, answer in answers:
        if len(prompts.get(name, range(MOST_ANSWERS))) < MOST_ANSWERS:
            prompts[name].setdefault(answer, prompt)
    warnings = []
    for name, by_answer in prompts.items():
        grades = verifier.grade_many([Item(name, "", answer) for answer in by_answer])
        unread = [(a, g.reason) for a, g in zip(by_answer, grades, strict=True) if g.reward is None]
        if unread:
            answer, reason = unread[0]
            warnings.append(
                f"{len(unread)} of {len(by_answer)} different answers cannot be read by the verifier {name}: their "
                f"completions will have no reward. The first is that of prompt {by_answer[answer]}: {reason}. Correct "
                "the answers, or choose another verifier"
            )
    return warnings


def verifier_warnings(graded: Iterable[tuple[str, str, float | None]]) -> list[str]:
    """Return a warning for each verifier whose rewards look broken: all null, most not gradable, all equal.

    Args:
        graded: The verifier, the prompt and the reward of each completion.
    """
    by_verifier: dict[str, list[tuple[str, float | None]]] = {}
    for name, prompt, reward in graded:
        by_verifier.setdefault(name, []).append((prompt, reward))
    return [text for name, rows in by_verifier.items() if (text := _warning(name, rows))]


def _warning(name: str, rows: Sequence[tuple[str, float | None]]) -> str:
    rewards = [reward for _, reward in rows if reward is not None]
    prompts, missing = len({prompt for prompt, _ in rows}), len(rows) - len(rewards)
    if len(rows) < FEWEST_COMPLETIONS or prompts < FEWEST_PROMPTS:
        return ""
    remedy = "Examine it with `cropi verify-rewards`"
    if not rewards:
        return f"the verifier {name} gave none of the first {len(rows)} completions a reward. {remedy}"
    if missing > NOT_GRADABLE_SHARE * len(rows):
        return f"{missing} of the first {len(rows)} completions are not gradable by the verifier {name}. {remedy}"
    if len(rows) >= EQUAL_COMPLETIONS and prompts >= EQUAL_PROMPTS and len(set(rewards)) == 1:
        return (
            f"the verifier {name} gave all of the first {len(rewards)} completions, of {prompts} prompts, the reward "
            f"{rewards[0]:g}: either the policy solves all or none of them, or the verifier is wrong. {remedy}"
        )
    return ""
