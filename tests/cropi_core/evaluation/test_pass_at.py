"""pass@k is unbiased, its interval covers the truth, and parts of a set add up to the set."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cropi_core.evaluation.accuracy import EvaluationFiles, evaluate, set_accuracy
from cropi_core.evaluation.intervals import interval
from cropi_core.evaluation.parts import MOST_PARTS, set_parts
from cropi_core.evaluation.pass_at import pass_at, set_pass_at
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.prompts.loading import write_prompts
from cropi_core.runs.accuracy import accuracies, accuracy_grid, detail_grid, details
from cropi_core.world import base_checkpoint, build
from data_schemas.evaluation import Evaluation
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import PROMPTS


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_passing_completion(passes, data):
    k = data.draw(st.integers(1, len(passes)))
    subsets = list(itertools.combinations(passes, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at(k, passed=sum(passes), graded=len(passes)) == pytest.approx(expected)


def test_the_estimate_is_unbiased_where_the_plain_one_is_not():
    random = np.random.default_rng(0)
    rate, k, graded = 0.2, 4, 8
    truth = 1 - (1 - rate) ** k
    passed = random.binomial(graded, rate, size=200_000)
    estimates = np.array([pass_at(k, passed=c, graded=graded) for c in range(graded + 1)])[passed]
    assert estimates.mean() == pytest.approx(truth, abs=0.004)
    assert abs((1 - (1 - passed / graded) ** k).mean() - truth) > 0.02


def test_pass_at_1_is_the_accuracy_and_a_prompt_with_too_few_grades_is_left_out():
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.5]]
    figures = set_pass_at(groups, [1, 4, 8])
    low, high = interval(np.array([0.25, 0.5, 0.0]), 10)
    assert figures["1"] == {"value": 0.25, "low": low, "high": high, "prompts": 3}
    assert (figures["4"]["value"], figures["4"]["prompts"]) == (1.0, 2)
    assert figures["8"] == {"value": None, "low": None, "high": None, "prompts": 0}


@pytest.mark.parametrize("k", [2, 4])
def test_the_interval_covers_pass_at_k_of_the_population_about_95_times_in_100(k):
    """80 prompts of beta-distributed difficulty, eight completions each, evaluated 1,000 times."""
    random = np.random.default_rng(1)
    difficulty = random.beta(0.5, 1.5, size=(1000, 80))
    truth = 1 - np.mean((1 - random.beta(0.5, 1.5, size=1_000_000)) ** k)
    estimates = np.array([pass_at(k, passed=c, graded=8) for c in range(9)])
    values = estimates[random.binomial(8, difficulty)]
    covered = [low <= truth <= high for low, high in (interval(v, 80 * (8 // k)) for v in values)]
    assert 0.925 < np.mean(covered) < 0.98


@pytest.mark.parametrize(
    ("ks", "message"), [([1, 8], "evaluation.pass_at=8 needs 8 completions"), ([1, 1], "names a value twice")]
)
def test_a_k_that_cannot_be_estimated_is_refused(ks, message):
    with pytest.raises(ValidationError, match=message):
        Evaluation(pass_at=ks, sampling=Sampling(samples=4))


def test_the_key_of_an_evaluation_without_pass_at_is_unchanged():
    assert "pass_at" not in Evaluation().for_key()
    assert Evaluation(pass_at=(1, 4)).for_key()["pass_at"] == (1, 4)


# -- parts of a set -----------------------------------------------------------------------------------------


def prompts(sources: list[str], levels: list[str | None]) -> pa.Table:
    row = {"messages": [], "answer": "", "verifier": "exact", "tags": []}
    rows = [
        row | {"prompt_id": f"p{i}", "source": source, "level": level}
        for i, (source, level) in enumerate(zip(sources, levels, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def test_parts_are_measured_by_source_and_level_over_graded_prompts():
    table = prompts(["a", "a", "b", "b"], ["1", "2", None, "2"])
    parts = set_parts(table, {"p0": [1.0, 1.0], "p1": [0.0, 1.0], "p2": [0.0], "p3": []})
    assert {name: (one["accuracy"], one["prompts"]) for name, one in parts["source"].items()} == {
        "a": (0.75, 2),
        "b": (0.0, 1),
    }
    assert {name: one["accuracy"] for name, one in parts["level"].items()} == {
        "1": 1.0,
        "2": 0.5,
        "none": 0.0,
    }
    assert set_parts(prompts(["a", "a"], ["1", "1"]), {"p0": [1.0], "p1": [0.0]}) == {}


def test_many_levels_are_limited_and_nothing_is_lost():
    count = MOST_PARTS + 5
    parts = set_parts(
        prompts(["a"] * count, [str(i) for i in range(count)]),
        {f"p{i}": [float(i % 2)] for i in range(count)},
    )
    assert len(parts["level"]) == MOST_PARTS
    assert sum(one["prompts"] for one in parts["level"].values()) == count


# -- an evaluation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("pass_at")
    path = directory / "mixed.parquet"
    write_prompts(build({"sort": 12, "copy": 12}, "test", 0), path)
    summary = evaluate(
        policy=Checkpoint(base_checkpoint(), digest="0" * 64),
        sets={"mixed": path},
        files=EvaluationFiles(
            completions=directory / "completions.parquet",
            accuracy=directory / "accuracy.json",
            scratch=directory / ".scratch",
        ),
        settings=Evaluation(sampling=Sampling(samples=4, max_new_tokens=12), pass_at=(1, 4)),
        grading=Grading(),
        runtime=Runtime(device="cpu", threads=1),
    )
    return directory, json.loads(json.dumps(summary))


def test_an_evaluation_states_pass_at_k_and_its_parts(evaluated):
    directory, summary = evaluated
    measured = summary["accuracy"]["mixed"]
    assert json.loads((directory / "accuracy.json").read_text())["mixed"]["pass_at"] == measured["pass_at"]
    assert measured["pass_at"]["1"]["value"] == pytest.approx(measured["accuracy"])
    assert measured["pass_at"]["4"]["value"] >= measured["accuracy"]
    sources = summary["parts"]["mixed"]["source"]
    assert {name: one["prompts"] for name, one in sources.items()} == {"copy": 12, "sort": 12}
    assert np.mean([one["accuracy"] for one in sources.values()]) == pytest.approx(measured["accuracy"])


def test_details_are_listed_by_set_and_part(evaluated):
    _, summary = evaluated
    rows = details(summary, 0) + details(summary, 1, ["mixed"])
    header, lines = detail_grid(rows)
    assert header == ["set", "part", "prompts", "base", "stage 1"]
    assert {"pass@1", "pass@4", "source: copy", "source: sort"} <= {line[1] for line in lines}
    assert lines[0][3] == lines[0][4]
    assert accuracy_grid(accuracies(summary, 0))[1][0][:2] == ["mixed", "validation"]


def test_accuracy_alone_states_no_pass_at(evaluated):
    import pyarrow.parquet as pq

    table = pq.read_table(evaluated[0] / "completions.parquet")
    assert "pass_at" not in set_accuracy(table, "mixed")
