"""User-defined reward functions, choice letters, repeated content, and the verifiers' part in artifact keys."""

import hashlib
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cropi_core.errors import ConfigError
from cropi_core.rewards.cache import GradeCache
from cropi_core.rewards.functions import source_digest
from cropi_core.rewards.keys import grading_location, grading_of, key_settings
from cropi_core.rewards.process import MAY
from cropi_core.rewards.text_answers import choice, chosen
from cropi_core.rewards.verifier import Grade, Item, Verifier, open_verifier
from data_schemas.config import Config
from data_schemas.grading import Grading, HttpVerifier
from data_schemas.steps import StepSpec, canonical_json
from tests.support.verifiers import gone

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SOURCE = """
from __future__ import annotations
import dataclasses, os, subprocess, sys, time

@dataclasses.dataclass
class Weights:
    length: float = 0.25

CALLS = []

def partial(completion: str, answer: str) -> float:
    return Weights().length * sum(a == b for a, b in zip(completion, answer))

def counting(completion, answer):
    CALLS.append(completion)
    return len(CALLS)

def hangs(completion, answer):
    time.sleep(1000)

def aborts(completion, answer):
    os.abort()

def eats(completion, answer):
    blocks = []
    while True:
        blocks.append(bytearray(1 << 24))

def forks(completion, answer):
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
        os._exit(0)
    return float(pid)

def starts_and_waits(completion, answer):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    open(completion, "w").write(str(child.pid))
    child.wait()

def prints(completion, answer):
    print('[0.0, "forged", false]', flush=True)
    os.write(1, b"noise")
    return 1

def nan(completion, answer):
    return float("nan")

def text(completion, answer):
    return "1.0"

def huge(completion, answer):
    return 1e300

def beyond(completion, answer):
    return 10**400
"""
REASONS = {
    "hangs": "timed out after 1 s",
    "aborts": "crashed (signal 6)",
    "eats": "MemoryError",
    "nan": "returned nan, not finite",
    "text": "returned str, not a number",
    "huge": "returned 1e+300, beyond 1e+06",
    "beyond": "OverflowError: int too large to convert to float",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(SOURCE)
    return path


def functions(file: Path, *names: str) -> dict[str, str]:
    return {name: f"{file}:{name}" for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", REASONS)
def test_a_hostile_function_affects_only_its_own_item(file: Path, name: str):
    items = [
        ("partial", "ab", "ab"),
        (name, "x", ""),
        ("exact", "a", "b"),
        (name, "y", ""),
        ("partial", "ab", "cb"),
    ]
    timeout = 1.0 if name == "hangs" else 30.0
    grading = Grading(timeout_s=timeout, memory_mb=256, functions=functions(file, "partial", name))
    with open_verifier(grading) as verifier:
        grades = verifier.grade_many(items)
    bad = Grade(None, REASONS[name])
    assert grades == [Grade(0.5, ""), bad, Grade(0.0, ""), bad, Grade(0.25, "")]


def test_what_a_function_prints_is_no_reply(file: Path):
    with Verifier(functions=functions(file, "prints"), cache=GradeCache()) as verifier:
        assert verifier.grade_many([("prints", str(i), "") for i in range(9)]) == [Grade(1.0, "")] * 9


@linux
def test_what_a_function_starts_ends_with_its_process(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(MAY, "files")
    pid_file = tmp_path / "pid"
    chosen = functions(file, "forks", "starts_and_waits")
    with Verifier(timeout=2.0, functions=chosen, cache=GradeCache()) as verifier:
        grade, waiting = verifier.grade_many([("forks", "", ""), ("starts_and_waits", str(pid_file), "")])
        assert waiting == Grade(None, "timed out after 2 s")
        assert grade.reward
        assert gone(int(pid_file.read_text()))
        again = verifier.grade("forks", "again", "")
        assert again.reward
        os.kill(int(again.reward), 0)
    assert gone(int(grade.reward))
    assert gone(int(again.reward))


def test_a_module_is_found_without_importing_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nif not os.environ.get('HOME'): raise SystemExit\nSEEN = 1\n"
    )
    (package / "rewards.py").write_text("from my_package import SEEN\ndef f(c, a):\n    return SEEN\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where a verifier's process finds modules
    with Verifier(functions={"mine": "my_package.rewards:f"}, cache=GradeCache()) as verifier:
        assert "my_package" not in sys.modules
        assert verifier.grade("mine", "", "") == Grade(1.0, "")


def test_a_function_may_stand_in_directories_without_init_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_tree" / "inner").mkdir(parents=True)
    (tmp_path / "my_tree" / "inner" / "rewards.py").write_text("def f(c, a):\n    return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where a verifier's process finds modules
    with Verifier(functions={"mine": "my_tree.inner.rewards:f"}, cache=GradeCache()) as verifier:
        assert "my_tree" not in sys.modules
        assert verifier.grade("mine", "", "") == Grade(0.5, "")


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_function_that_changes_while_it_grades_stops_the_grading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    path = tmp_path / f"changing_{kind}.py"
    path.write_text(
        "import time\ndef f(c, a):\n    if c == 'slow':\n        time.sleep(1000)\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where a verifier's process finds modules
    name = f"{path}:f" if kind == "file" else f"changing_{kind}:f"
    with Verifier(timeout=1.0, functions={"mine": name}, cache=GradeCache()) as verifier:
        assert verifier.grade("mine", "a", "").reward == 1.0
        path.write_text("def f(c, a):\n    return 0.0\n")
        assert verifier.grade("mine", "b", "").reward == 1.0  # by the process that loaded the first version
        assert verifier.grade("mine", "slow", "").reason.startswith("timed out")
        with pytest.raises(ConfigError, match="has changed since this step began"):
            verifier.grade("mine", "c", "")


def test_a_function_that_cannot_be_loaded_is_reported_before_grading(tmp_path: Path):
    cases = {
        "import no_such_thing\n": "ModuleNotFoundError",
        "raise SystemExit(3)\n": "SystemExit: 3",
        "f = 3\n": "is a int, not callable",
        "def g(): pass\n": "AttributeError",
        "def f(:\n": "SyntaxError",
    }
    for source, word in cases.items():
        (tmp_path / "mine.py").write_text(source)
        with pytest.raises(ConfigError, match=word):
            Verifier(functions={"mine": f"{tmp_path / 'mine.py'}:f"})


# -- repeats --------------------------------------------------------------------------------------------------


def test_equal_content_is_graded_once_and_the_rewards_are_those_of_grading_all(file: Path):
    items = [("partial", c, a) for c in ("ab", "ac", "ab", "") for a in ("ab", "ac")] * 3
    cache = GradeCache()
    with Verifier(functions=functions(file, "partial"), cache=cache) as verifier:
        one_by_one = [
            Verifier(functions=functions(file, "partial"), cache=GradeCache()).grade(*i) for i in items[:8]
        ]
        assert verifier.grade_many(items) == one_by_one * 3
        assert (verifier.repeated, len(cache)) == (24 - 6, 6)
        assert verifier.grade_many(items[:2]) == one_by_one[:2]
        assert verifier.repeated == 24 - 6 + 2


def test_a_call_counts(file: Path):
    """``counting`` returns its number of calls; cached verdicts cause no call."""
    with Verifier(functions=functions(file, "counting"), cache=GradeCache()) as verifier:
        assert [g.reward for g in verifier.grade_many([("counting", c, "") for c in "aabab"])] == [
            1,
            1,
            2,
            1,
            2,
        ]
        assert verifier.grade("counting", "a", "").reward == 1
        assert verifier.grade("counting", "a", "another answer").reward == 3


def test_a_failure_is_not_kept_and_another_function_of_the_name_is_another(file: Path, tmp_path: Path):
    cache, mark = GradeCache(), tmp_path / "mark"
    flaky = tmp_path / "flaky.py"
    flaky.write_text(
        f"import os\ndef f(c, a):\n    if not os.path.exists({str(mark)!r}): raise OSError('not yet')\n    return 1\n"
    )
    with Verifier(functions={"mine": f"{flaky}:f"}, cache=cache) as verifier:
        assert verifier.grade("mine", "a", "") == Grade(None, "OSError: not yet")
        mark.touch()
        assert verifier.grade("mine", "a", "") == Grade(1.0, "")
    flaky.write_text("def f(c, a):\n    return 0\n")
    with Verifier(functions={"mine": f"{flaky}:f"}, cache=cache) as verifier:
        assert verifier.grade("mine", "a", "") == Grade(0.0, "")


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    cache = GradeCache(entries=2)
    cache.put(b"a", 1.0)
    cache.put(b"b", 0.0)
    assert cache.get(b"a") == 1.0
    cache.put(b"c", 0.5)
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c"), len(cache)) == (1.0, None, 0.5, 2)


# -- letters --------------------------------------------------------------------------------------------------

CHOSEN = {
    "The answer is (B).": "B",
    "the answer is B": "B",
    "Therefore, the correct answer is: **C**": "C",
    "**Answer:** D": "D",
    "Answer: $E$": "E",
    "Answer:\n\n(F)": "F",
    "\\boxed{C}": "C",
    "\\boxed{\\text{(D)}}": "D",
    "\\boxed{A}, no: \\boxed{B}": "B",
    "So it is \\boxed{42}": None,
    "The answer is A. \\boxed{A, B}": None,
    "reasoning\n#### J": "J",
    "B.": "B",
    "(b)": "B",
    "The answer is (b)": "B",
    "the answer is b.": "B",
    "The correct option is C because of A.": "C",
    "The correct choice would be option G.": "G",
    "The answer is A. Wait, the answer is D.": "D",
    "The answer is A or B": None,
    "The answer is (A) and (C).": None,
    "The answer is A, B, C": None,
    "The answer is A/B": None,
    "The answer is B, and A is wrong.": "B",
    "The answer is B, A is a trap": "B",
    "the answer is a prime number": None,
    "I think A cat would do": None,
    "I would say H": "H",
    "It can only be A": "A",
    "either C or D": None,
    "first C, then D": "D",
    "It can't be D's": None,
    "answer is AB": None,
    "K": "K",
    "": None,
    "答案是B": "B",
    "**B**": "B",
}


@pytest.mark.parametrize(("text", "letter"), CHOSEN.items())
def test_the_letter_that_a_text_chooses(text: str, letter: str | None):
    assert chosen(text) == letter
    for gold in "ABCDEFGHIJK":
        assert choice(text, gold) == float(gold == letter)


@pytest.mark.parametrize(
    "gold", ["B", " b ", "(B)", "B.", "B)", "**B**", "B) the second", "\\boxed{B}", "so\n#### B"]
)
def test_answers_that_are_a_letter(gold: str):
    assert choice("The answer is (B)", gold) == 1.0
    assert choice("The answer is (C)", gold) == 0.0


@pytest.mark.parametrize("gold", ["1", "AB", "A or B", "", "Paris", "because"])
def test_an_answer_that_is_no_letter_is_not_gradable(gold: str):
    with Verifier(cache=GradeCache()) as verifier:
        grade = verifier.grade("choice", "The answer is (B)", gold)
    assert grade.reward is None
    assert "is not a letter A to Z" in grade.reason


@given(st.text("ABJab (){}*.,:$\\\nisoranwe", max_size=80))
def test_any_text_chooses_one_letter_or_none(text: str):
    assert chosen(text) in (None, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.mark.parametrize(
    "piece", [" ", "*", "answer is ", "answer is  *", "A or ", "A, ", "(", "\\text{", "I ", "a'"]
)
def test_a_long_text_is_read_in_no_time(piece: str):
    text = "answer is" + piece * (60_000 // len(piece))
    start = time.process_time()
    chosen(text)
    chosen(text + "!")
    assert time.process_time() - start < 2


# -- keys -----------------------------------------------------------------------------------------------------


def spec(grading: Grading) -> StepSpec:
    return StepSpec(
        step="rollouts",
        slot="rollouts/pool@1",
        settings={"grading": key_settings(grading)},
        location=grading_location(grading),
    )


def test_a_configuration_without_verifiers_of_its_own_has_the_keys_it_had():
    assert canonical_json(key_settings(Grading())) == '{"memory_mb":1024,"timeout_s":5.0}'
    assert Grading().for_key() == {"timeout_s": 5.0, "memory_mb": 1024}
    assert grading_location(Grading()) == {}
    assert grading_of(spec(Grading(timeout_s=2.0))) == Grading(timeout_s=2.0)
    older = StepSpec(step="rollouts", slot="s", settings={"grading": {"timeout_s": 5.0, "memory_mb": 1024}})
    assert grading_of(older) == Grading()


def test_the_key_is_of_what_grades_and_not_of_where_it_lies_or_how_long_it_may_take(
    file: Path, tmp_path: Path
):
    grading = Grading(functions=functions(file, "partial"), http={"judge": HttpVerifier(url="http://a/b")})
    key = key_settings(grading)
    assert grading_of(spec(grading)) == grading
    moved = tmp_path / "elsewhere.py"
    moved.write_text(SOURCE)
    patient = HttpVerifier(url="http://a/b", timeout_s=9, retries=0, headers_from_env={"X": "Y"})
    assert key_settings(Grading(functions={"partial": f"{moved}:partial"}, http={"judge": patient})) == key
    moved.write_text(SOURCE + "\n")
    changed = key_settings(Grading(functions={"partial": f"{moved}:partial"}, http={"judge": patient}))
    assert changed["functions"] != key["functions"]
    assert key_settings(Grading(functions={"partial": f"{file}:nan"}))["functions"] != key["functions"]
    renamed = Grading(http={"judge": HttpVerifier(url="http://c/d", version="7b, prompt 3")})
    assert key_settings(renamed)["http"] == {"judge": "7b, prompt 3"}


def test_a_step_refuses_a_function_that_is_not_the_one_of_its_key(file: Path):
    before = spec(Grading(functions=functions(file, "partial", "nan")))
    file.write_text(SOURCE.replace("0.25", "0.5"))
    with pytest.raises(
        ConfigError, match=r"grading\.functions\.nan, grading\.functions\.partial is not what"
    ):
        grading_of(before)
    with pytest.raises(ConfigError, match=r"grading\.functions\.partial"):
        grading_of(before.model_copy(update={"location": {}}))


WORLD = {"kind": "world", "families": {"sort": 4}}


def test_invalid_names_are_refused_together(file: Path):
    with pytest.raises(
        ValidationError, match=r"'math'\], which are built in.*'a'\], which functions names too"
    ):
        Grading(functions={"math": "a:b", "a": "a:b"}, http={"a": HttpVerifier(url="http://x")})
    for url in ("ftp://x", "http://user:secret@x", "http://x?token=1", "x"):
        with pytest.raises(ValidationError):
            HttpVerifier(url=url)
    table = {"kind": "file", "path": "p.jsonl", "verifier": "mine"}
    with pytest.raises(
        ValidationError, match=r"data\.pool\.verifier=mine is not one of exact, .* grading\.functions"
    ):
        Config.model_validate({"data": {"pool": table, "validation": {"v": WORLD}}})
    mix = {"kind": "mix", "sources": [table | {"verifier": "exact"}, table]}
    with pytest.raises(ValidationError, match=r"data\.test\.t\.sources\.1\.verifier=mine"):
        Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}, "test": {"t": mix}}})
    grading = {"functions": functions(file, "partial") | {"mine": f"{file}:nan"}}
    made = Config.model_validate({"data": {"pool": table, "validation": {"v": WORLD}}, "grading": grading})
    assert Config.model_validate_json(made.model_dump_json()) == made


def test_the_prompt_is_not_part_of_the_cache_key_of_a_function(file: Path):
    with Verifier(functions=functions(file, "partial"), cache=GradeCache()) as verifier:
        one, two = (Item("partial", "a", "a", [{"role": "user", "content": text}]) for text in "xy")
        verifier.grade_many([one, two])
        assert verifier.repeated == 1


def test_the_digest_is_of_the_file(file: Path):
    assert source_digest(f"{file}:partial") == source_digest(f"{file}:nan")


def test_a_function_below_packages_without_init_is_found_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = tmp_path / "outer_namespace/inner_namespace/rewards.py"
    module.parent.mkdir(parents=True)
    module.write_text("def grade(completion, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    digest = source_digest("outer_namespace.inner_namespace.rewards:grade")
    assert digest == hashlib.sha256(module.read_bytes()).hexdigest()
    assert "outer_namespace" not in sys.modules
