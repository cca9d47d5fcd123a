"""Warnings about verifiers whose first rewards look broken."""

from cropi_core.rewards import answer_warnings, open_verifier, verifier_warnings
from data_schemas import Grading


def graded(rewards, samples: int = 4):
    return [("own", f"p{i // samples}", reward) for i, reward in enumerate(rewards)]


def test_rewards_that_look_broken_are_reported_once_per_verifier():
    assert "none of the first 64" in verifier_warnings(graded([None] * 64))[0]
    assert "40 of the first 64" in verifier_warnings(graded([None] * 40 + [0.0, 1.0] * 12))[0]
    assert "reward 0: either the policy" in verifier_warnings(graded([0.0] * 128))[0]


def test_plausible_rewards_and_few_completions_are_not_suspicious():
    assert verifier_warnings(graded([0.0, 1.0] * 64)) == []
    assert verifier_warnings(graded([None] * 20 + [0.0, 1.0] * 22)) == []
    assert verifier_warnings(graded([0.0] * 64)) == []  # 16 prompts may all be hopeless
    assert verifier_warnings(graded([None] * 16)) == []
    assert verifier_warnings(graded([None] * 64, samples=64)) == []  # one prompt


def test_answers_that_a_verifier_cannot_read_are_known_before_sampling():
    answers = [
        ("choice", "p1", "B"),
        ("choice", "p2", "Paris"),
        ("numeric", "p3", "7"),
        ("exact", "p4", "Rome"),
    ]
    with open_verifier(Grading()) as verifier:
        assert answer_warnings(verifier, answers[:1] + answers[2:]) == []
        (warning,) = answer_warnings(verifier, answers)
    assert "1 of 2 different answers" in warning
    assert "prompt p2: the answer 'Paris' is not a letter" in warning
