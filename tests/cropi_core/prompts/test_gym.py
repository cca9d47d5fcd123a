"""reasoning-gym: its tasks as prompts, and its scorers on untrusted completions."""

import json
import re
from importlib import util
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from cropi_core.curriculum.slots import source_settings
from cropi_core.errors import ConfigError, DataError
from cropi_core.prompts.loading import check_disjoint, load_source, read_prompts, write_prompts
from cropi_core.rewards.reasoning_gym import check_plain, claimed, literal, pack, unpack
from cropi_core.rewards.verifier import Verifier
from data_schemas.data import GymTask, ReasoningGymSource, Source

reasoning_gym = pytest.importorskip("reasoning_gym")

EVALUATING = (
    *(
        "binary_matrix",
        "bitwise_arithmetic",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
    ),
    *("polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
)
"""Tasks with scorers that pass text to `eval` or `parse_expr`."""


def gym(split="pool", seed=0, **tasks):
    sizes = {name: {"size": task} if isinstance(task, int) else task for name, task in tasks.items()}
    source = TypeAdapter(Source).validate_python({"kind": "reasoning_gym", "tasks": sizes, "seed": seed})
    table, dropped = load_source(source, split, None)
    return table.to_pylist(), dropped


def entry_of(row):
    return json.loads(row["answer"])["entry"]


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


def test_a_task_becomes_prompts_that_its_scorer_grades(verifier):
    rows, dropped = gym(chain_sum={"size": 20, "config": {"max_terms": 3}}, leg_counting=5)
    assert [row["source"] for row in rows] == ["chain_sum"] * 20 + ["leg_counting"] * 5
    assert len({row["prompt_id"] for row in rows}) == 25
    assert dropped == {"duplicates": 0, "failed": 0}
    right = [("reasoning_gym", f"2 <answer> {entry_of(r)['answer']} </answer>", r["answer"]) for r in rows]
    wrong = [("reasoning_gym", "<answer>no</answer>", r["answer"]) for r in rows]
    assert [grade.reward for grade in verifier.grade_many(right)] == [1.0] * 25
    assert [grade.reward for grade in verifier.grade_many(wrong)] == [0.0] * 25


def test_partial_credit_is_the_scorers(verifier):
    (row,), _ = gym(countdown=1)
    numbers = entry_of(row)["metadata"]["numbers"]
    completions = ["<answer>x = 3</answer>", "<answer>" + " + ".join(map(str, numbers)) + "</answer>", ""]
    rewards = [verifier.grade("reasoning_gym", text, row["answer"]).reward for text in completions]
    dataset = reasoning_gym.create_dataset("countdown")
    assert rewards == [dataset.score_answer(claimed(text), entry_of(row)) for text in completions]
    assert rewards[1] == 0.05


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a <answer>1</answer> b <answer>\n2 </answer> c", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>a<answer>b</answer>", "a<answer>b"),
        ("  the sum is 7\n", "the sum is 7"),
        ("<answer></answer>", ""),
        ("", ""),
        ("</answer>3<answer>", "</answer>3<answer>"),
    ],
)
def test_the_answer_is_between_the_last_tags_or_the_whole_text(completion, answer):
    assert claimed(completion) == answer
    theirs = reasoning_gym.utils.extract_answer(completion)
    assert theirs is None or theirs == answer


def test_a_task_is_graded_by_another_verifier_against_the_entrys_answer(verifier):
    task = {"size": 10, "config": {"max_terms": 3}}
    own, _ = gym(chain_sum=task)
    rows, _ = gym(chain_sum={**task, "verifier": "numeric"})
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in own]
    assert [row["answer"] for row in rows] == [entry_of(row)["answer"] for row in own]
    said = [f"The sum is {row['answer']}." for row in rows]
    others = [(row["verifier"], text, row["answer"]) for row, text in zip(rows, said, strict=True)]
    theirs = [(row["verifier"], text, row["answer"]) for row, text in zip(own, said, strict=True)]
    assert [grade.reward for grade in verifier.grade_many(others)] == [1.0] * 10
    assert all(grade.reward < 1 for grade in verifier.grade_many(theirs))  # it requires the bare answer
    with pytest.raises(DataError, match=r"without an answer, so verifier=exact"):
        gym(graph_color={"size": 1, "verifier": "exact"})


def test_splits_share_nothing_and_a_longer_draw_begins_with_the_shorter(tmp_path):
    tasks = {"basic_arithmetic": 40, "coin_flip": 10}
    sets = {split: gym(split, **tasks)[0] for split in ("pool", "validation", "test")}
    paths = {}
    for name, split in (("pool", "pool"), ("val", "validation"), ("held", "test")):
        source = ReasoningGymSource(
            kind="reasoning_gym", tasks={n: GymTask(size=s) for n, s in tasks.items()}
        )
        write_prompts(load_source(source, split, None)[0], tmp_path / f"{name}.parquet")
        paths[name] = tmp_path / f"{name}.parquet"
        assert read_prompts(paths[name]).to_pylist() == sets[split]
    check_disjoint(paths)
    assert gym("pool", basic_arithmetic=15)[0] == sets["pool"][:15]
    assert gym("pool", seed=1, basic_arithmetic=15)[0] != sets["pool"][:15]


def test_what_cannot_be_generated_says_why():
    with pytest.raises(ConfigError, match="did you mean chain_sum"):
        gym(chain_sums=1)
    with pytest.raises(ConfigError, match=r"config=\{'colour': 1\}"):
        gym(chain_sum={"size": 1, "config": {"colour": 1}})
    with pytest.raises(ConfigError, match="max_terms"):
        gym(chain_sum={"size": 1, "config": {"max_terms": 1}})
    with pytest.raises(DataError, match="distinct prompts for test"):
        gym("test", chain_sum={"size": 400, "config": {"max_terms": 2, "max_digits": 1}})
    with pytest.raises(ValidationError, match="next to `config`"):
        gym(chain_sum={"size": 1, "config": {"seed": 1}})


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cropi\[gym\]"):
        Verifier().grade("reasoning_gym", "", "{}")


def test_the_package_version_is_in_the_key():
    source = ReasoningGymSource(kind="reasoning_gym", tasks={"chain_sum": GymTask(size=1)})
    settings, location = source_settings(source, "pool")
    settings = settings.for_key()
    assert settings["reasoning_gym"]
    assert location == {}


def test_an_answer_that_is_no_entry_is_not_gradable(verifier):
    entry = {"question": "q", "answer": "1", "metadata": {}}
    for answer in (
        "7",
        "{}",
        "[1]",
        '{"task": 1}',
        pack("nothing", {}, entry),
        pack("chain_sum", {"x": 1}, entry),
    ):
        assert verifier.grade("reasoning_gym", "<answer>1</answer>", answer).reward is None
    assert verifier.grade("reasoning_gym", "<answer>1</answer>", pack("chain_sum", {}, entry)).reward == 1.0


def test_a_completion_that_breaks_a_scorer_is_wrong(verifier):
    """prime_factorization calls int() on any input."""
    (row,), _ = gym(prime_factorization=1)
    assert verifier.grade("reasoning_gym", "<answer>two and two</answer>", row["answer"]).reward == 0.0
    own = f"<answer>{entry_of(row)['answer']}</answer>"
    assert verifier.grade("reasoning_gym", own, row["answer"]).reward == 1.0


def test_tuples_survive_json():
    entry = {"question": "q", "answer": None, "metadata": {"a": (1, (2, [3])), "b": [()]}}
    assert unpack(pack("t", {}, entry)) == ("t", {}, entry)


@pytest.mark.parametrize("task", EVALUATING)
def test_no_scorer_runs_what_a_completion_or_an_entry_says(task, tmp_path, verifier):
    (row,), _ = gym(**{task: 1})
    mark = tmp_path / "run"
    numbers = "+".join(f"chr({ord(c)})" for c in str(mark))
    attacks = [
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"[__import__('pathlib').Path({str(mark)!r}).touch()]",
        f"[open({str(mark)!r}, 'w')]",
        f"open({numbers}, chr(119))",
        f"sqrt(open({numbers}, chr(119)))",
    ]
    for attack in attacks:
        grade = verifier.grade("reasoning_gym", f"<answer>{attack}</answer>", row["answer"])
        assert grade.reward is not None
        assert grade.reward < 1
        hostile = json.loads(row["answer"])
        hostile["entry"]["answer"] = attack
        for name, value in hostile["entry"]["metadata"].items():
            hostile["entry"]["metadata"][name] = attack if isinstance(value, str) else value
        verifier.grade("reasoning_gym", "<answer>[1, 2]</answer>", json.dumps(hostile))
    assert not mark.exists()


def test_the_attacks_of_these_tests_do_run_without_the_guard(tmp_path):
    """Verify that the attacks work without the guard; otherwise the test above would prove nothing."""
    dataset = reasoning_gym.create_dataset("string_insertion", seed=0, size=1)
    dataset.score_answer(f"[open({str(tmp_path / 'run')!r}, 'w').name]", dataset[0])
    assert (tmp_path / "run").exists()


def test_nothing_else_in_the_package_evaluates_text():
    """A later version can add scorers that the guard does not cover."""
    root = Path(util.find_spec("reasoning_gym").origin).parent
    found = re.compile(
        r"\b(pickle|marshal|subprocess|os\.system|__import__|import_module|sympify|lambdify|S\()"
    )
    bare = re.compile(r"(?<![.\w])eval\(|(?<!\w)(?:sp\.|sympy\.)?parse_expr\((?!expr|left|right|sub)")
    evaluating = set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not found.search(text), path
        if "gsm_symbolic" not in path.parts and bare.search(text):
            evaluating.add(path.stem)
    assert evaluating <= {*EVALUATING, "basic_arithmetic", "propositional_logic"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("[1, 'a', (2,)]", [1, "a", (2,)]), ("(0x3 << 2) - ~1", 14), ("-2.5", -2.5), ("None", None)],
)
def test_literals_and_whole_number_arithmetic_are_evaluated(text, value):
    assert literal(text) == value


@pytest.mark.parametrize(
    "text", ["f(1)", "a", "[].x", "[1][0]", "'a' * 9", "True + 1", "2 ** 9", "x for", "lambda: 1"]
)
def test_anything_else_is_no_literal(text):
    with pytest.raises((ValueError, SyntaxError)):
        literal(text)


def test_plain_expressions():
    for text in ("3*x**2/2 + sin(x) - C", "(1 + 2) * -4", "exp(2*x)*log(x)", "2^3"):
        check_plain(text)
    for text in (
        "x.y",
        "f(x)",
        "open(1)",
        "'a'",
        "__import__",
        "sin(x, y=1)",
        "x if y else z",
        "[x]",
        "x = 3",
        "",
    ):
        with pytest.raises((ValueError, SyntaxError)):
            check_plain(text)


@pytest.mark.slow
@pytest.mark.extended
def test_every_task_of_the_package_is_scored_in_the_worker_as_it_scores_itself(verifier):
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})  # it combines other tasks, which are tested by name
    rows, _ = gym(**dict.fromkeys(names, 1))
    assert [row["source"] for row in rows] == names
    items, wanted = [], []
    for row in rows:
        entry = unpack(row["answer"])[2]
        dataset = reasoning_gym.create_dataset(row["source"])
        for answer in ("7", "[1, 2]", *([entry["answer"]] if entry["answer"] is not None else [])):
            items.append(("reasoning_gym", f"<answer>{answer}</answer>", row["answer"]))
            try:
                wanted.append(dataset.score_answer(claimed(items[-1][1]), entry))
            except Exception:
                wanted.append(0.0)
    grades = verifier.grade_many(items)
    assert [(i[1], g.reward) for i, g in zip(items, grades, strict=True)] == [
        (i[1], pytest.approx(w)) for i, w in zip(items, wanted, strict=True)
    ]
