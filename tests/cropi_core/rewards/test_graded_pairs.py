"""Built-in verifiers on labeled pairs of completion and answer."""

import importlib.util
import json
import logging
import time

import pytest

from cropi_core.rewards import worker
from cropi_core.rewards.claims import final_answer, stated
from cropi_core.rewards.costs import may_exceed_memory, too_costly
from cropi_core.rewards.keys import key_settings
from cropi_core.rewards.notation import ascii_mathematics
from cropi_core.rewards.quantities import quantity
from cropi_core.rewards.text_answers import numeric
from data_schemas.grading import Grading
from tests.support.paths import CHECKOUT, TESTS

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
PAIRS = [json.loads(line) for line in (TESTS / "support/graded_pairs.jsonl").open()]
SHARED = CHECKOUT.parent / "shared/cases/grading/pairs.jsonl"


@pytest.fixture(scope="module")
def verifiers():
    pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found, errors = worker.load({"imported": ["math"], "functions": {}})
    assert not errors
    return found


@needs_math
@pytest.mark.slow
@pytest.mark.parametrize("name", ["math", "numeric", "choice", "exact"])
def test_every_pair_is_graded_as_it_should_be(verifiers, name: str):
    pairs = [pair for pair in PAIRS if pair["verifier"] == name]
    assert len(pairs) >= 4
    wrong = [
        (pair, grade)
        for pair in pairs
        if (grade := worker.grade(verifiers[name], pair["completion"], pair["answer"]))[0] != pair["right"]
    ]
    assert not wrong


@needs_math
@pytest.mark.skipif(not SHARED.exists(), reason="the file of further pairs is not beside this checkout")
def test_the_further_pairs_reach_97_per_cent_without_a_false_positive(verifiers):
    rows = [json.loads(line) for line in SHARED.open()]
    grades = [worker.grade(verifiers[r["verifier"]], r["completion"], r["answer"])[0] for r in rows]
    assert not [r for r, reward in zip(rows, grades, strict=True) if reward == 1 and r["expected"] == 0]
    assert sum(reward == r["expected"] for r, reward in zip(rows, grades, strict=True)) >= 0.97 * len(rows)


@needs_math
@pytest.mark.parametrize(
    "bomb", ["9^{9^{9^{9}}}", "9**9**9**9", "10^{1000000000}", "100000!", "9!!!!", "3^{9999!}"]
)
def test_an_expression_that_costs_too_much_is_refused_before_it_is_evaluated(verifiers, bomb: str):
    began = time.process_time()
    reward, reason, broken = worker.grade(verifiers["math"], f"\\boxed{{{bomb}}}", "x+1")
    assert reward is None
    assert "too costly" in reason
    assert not broken
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "fine", ["2^{10}", "x^{2^3}", "10^{-12}", "100!", "2^{2^3}", "\\frac{1}{2006!}", "(x+1)^{12}"]
)
def test_ordinary_powers_and_factorials_are_not_too_costly(fine: str):
    assert not too_costly(fine)


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("<think>\\boxed{1}</think> so \\boxed{2}", "2"),
        ("<think>\\boxed{1}", None),
        ("#### Plan\nwe add\n\nand stop", None),
        ("#### 7", "7"),
        ("\\fbox{3}", "3"),
        ("\\boxed{1}, \\boxed{2}", "1, 2"),
        ("<answer>4</answer>", "4"),
    ],
)
def test_the_final_answer_is_located(text: str, claim: str | None):
    assert final_answer(text) == claim


def test_a_statement_that_denies_is_no_answer():
    assert stated("The answer is not 5.") is None
    assert stated("The answer is 5.5 metres. It is long.") == "5.5 metres"


def test_other_scripts_become_ascii():
    assert ascii_mathematics("−１２") == "-12"
    assert ascii_mathematics("√5") == "\\sqrt{5}"
    assert ascii_mathematics("x²³") == "x^{23}"


def test_long_texts_are_read_in_no_time():
    began = time.process_time()
    for piece in ("####", "\\boxed{", "answer is ", "1,", "{", "<answer>", "√", "1 "):
        final_answer(piece * (60_000 // len(piece)))
        stated(piece * (60_000 // len(piece)))
    quantity("1," * 2000)
    quantity("9" * 5000)
    assert time.process_time() - began < 4


def test_keys_name_the_versions_of_the_verifiers_whose_rewards_changed():
    assert key_settings(Grading(), {"exact"}) == key_settings(Grading())
    assert key_settings(Grading(), {"exact", "math"})["verifiers"] == {"math": 4}


@pytest.mark.parametrize(
    ("text", "traced"),
    [
        ("\\frac{\\sqrt{2}}{2}", False),
        ("(x+1)^{12}", False),
        ("2^{1000}", False),
        ("45^\\circ", False),
        ("(x+y)^{99}", True),
        ("((x+1)^9)^9", True),
        ("x^{99999}", True),
        ("100!", True),
        ("\\sum_{n=1}^{9} n", True),
    ],
)
def test_only_texts_that_may_need_much_memory_are_traced(text: str, traced: bool):
    assert may_exceed_memory(text) is traced


@pytest.mark.parametrize("before", [0, 50, 530, 560, 590, 596, 599, 700])
@pytest.mark.parametrize("number", ["1,234,567", "3 1/2", "-\\frac{3}{4}", "12.5"])
def test_the_last_number_of_a_long_text_is_complete_for_any_start_of_the_search(before: int, number: str):
    assert numeric("word " * 200 + number + " x" * (before // 2), number) == 1.0
