"""Accuracies match the rewards, and their intervals have the stated coverage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.errors import DataError
from cropi_core.evaluation.accuracy import EvaluationFiles, evaluate, set_accuracy
from cropi_core.evaluation.intervals import effective_samples, interval, wilson
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.progress import Progress
from cropi_core.prompts.loading import write_prompts
from cropi_core.world import base_checkpoint, build
from data_schemas.evaluation import Evaluation
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import EVALUATION, PROMPTS


def rows(rewards: list[list[float | None]]) -> pa.Table:
    """Return an evaluation with one prompt per list."""
    return pa.Table.from_pylist(
        [
            {
                "set": "s",
                "prompt_id": f"p{i}",
                "sample": j,
                "text": "",
                "reward": reward,
                "finish_reason": "stop" if j else "length",
                "tokens": 2 + 2 * j,
            }
            for i, group in enumerate(rewards)
            for j, reward in enumerate(group)
        ],
        schema=EVALUATION,
    )


# -- intervals ----------------------------------------------------------------------------------------------


def test_wilson_is_the_textbook_interval():
    # Brown, Cai & DasGupta's formula calculated by hand for 8 of 10, and the closed forms at the ends.
    low, high = wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    z2 = 1.959963984540054**2
    assert wilson(0.0, 10) == (0.0, pytest.approx(z2 / (10 + z2)))
    assert wilson(1.0, 10) == (pytest.approx(10 / (10 + z2)), 1.0)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=200))
def test_one_completion_a_prompt_is_plain_wilson(rewards):
    means = np.array(rewards)
    assert effective_samples(means, len(means)) == len(means)
    assert interval(means, len(means)) == wilson(float(means.mean()), len(means))


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=2, max_size=50),
)
def test_the_effective_size_lies_between_prompts_and_completions(groups):
    means = np.array(groups).mean(axis=1)
    size = effective_samples(means, 4 * len(groups))
    low, high = interval(means, 4 * len(groups))
    assert len(groups) <= size <= 4 * len(groups)
    assert 0 <= low <= means.mean() <= high <= 1


def test_copies_of_one_completion_add_nothing_and_independent_ones_count_in_full():
    random = np.random.default_rng(0)
    coins = (random.random(400) < 0.3).astype(float)
    assert effective_samples(coins, 8 * 400) == 400
    independent = (random.random((400, 8)) < 0.3).mean(axis=1)
    assert effective_samples(independent, 8 * 400) == pytest.approx(3200, rel=0.15)
    assert effective_samples(np.full(10, 0.5), 40) == 40
    assert effective_samples(np.ones(10), 40) == 10


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 6.0), (8.0, 1.0)])
def test_the_interval_covers_the_population_about_95_times_in_100(a, b):
    """80 prompts of beta-distributed difficulty, four completions each, evaluated 3,000 times."""
    random = np.random.default_rng(1)
    difficulty = random.beta(a, b, size=(3000, 80))
    means = random.binomial(4, difficulty) / 4
    truth = a / (a + b)
    covered = [low <= truth <= high for low, high in (interval(m, 320) for m in means)]
    assert 0.935 < np.mean(covered) < 0.97


# -- averages -----------------------------------------------------------------------------------------------


def test_accuracy_averages_prompts_over_their_graded_completions():
    result = set_accuracy(rows([[1.0, 1.0], [0.0, None], [None, None]]), "s")
    assert result["accuracy"] == 0.5
    assert (result["prompts"], result["graded_prompts"]) == (3, 2)
    assert (result["completions"], result["not_gradable"]) == (6, 3)
    assert (result["mean_tokens"], result["truncated"]) == (3.0, 0.5)


def test_a_set_without_grades_or_with_unknown_rewards_is_an_error():
    with pytest.raises(DataError, match=r"set s: none of 2 completions can be graded"):
        set_accuracy(rows([[None, None]]), "s")
    with pytest.raises(DataError, match=r"rewards in \[0, 1\].*2\.0"):
        set_accuracy(rows([[2.0, 1.0]]), "s")


# -- a policy -----------------------------------------------------------------------------------------------

HOT = Sampling(samples=3, max_new_tokens=12, temperature=2.0)
SETTINGS = Evaluation(sampling=Sampling(samples=3, max_new_tokens=12))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("sets")
    paths = {}
    for name, families in {"sorted_words": {"sort": 70}, "copied": {"copy": 10}}.items():
        paths[name] = directory / f"{name}.parquet"
        write_prompts(build(families, "test", 0), paths[name])
    return paths


def run(directory: Path, sets: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """Evaluate the embedded base into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "policy": Checkpoint(base_checkpoint(), digest="0" * 64),
        "sets": sets,
        "files": EvaluationFiles(
            completions=directory / "completions.parquet",
            accuracy=directory / "accuracy.json",
            scratch=directory / ".scratch",
        ),
        "settings": SETTINGS,
        "grading": Grading(),
        "runtime": Runtime(device="cpu", threads=1),
        "report": lambda progress: None,
    }
    return evaluate(**(arguments | changes))


def test_files_summary_and_progress_agree(tmp_path: Path, sets: dict[str, Path]):
    seen: list[Progress] = []
    summary = run(tmp_path, sets, report=seen.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.json", "completions.parquet"]
    table = pq.read_table(tmp_path / "completions.parquet")
    assert table.schema.equals(EVALUATION)
    assert table.num_rows == summary["completions"] == 3 * 80
    stored = json.loads((tmp_path / "accuracy.json").read_text())
    assert list(stored) == ["copied", "sorted_words"]
    for name, shown in summary["accuracy"].items():
        of_set = table.filter(pa.compute.equal(table["set"], name))
        assert shown.items() <= stored[name].items()
        assert shown["accuracy"] == pytest.approx(np.mean(of_set["reward"].to_pylist()))
        assert shown["low"] < shown["accuracy"] < shown["high"]
    assert stored["copied"]["prompts"] == 10
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[-1].done, seen[-1].total) == (80, 80)


def test_a_stop_between_shards_changes_no_byte(tmp_path: Path, sets: dict[str, Path]):
    run(tmp_path / "whole", sets)

    def stop(progress: Progress) -> None:
        if progress.done >= 10 + 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", sets, report=stop)
    parts = sorted(p.name for p in (tmp_path / "stopped" / ".scratch").rglob("part-*.parquet"))
    assert parts == ["part-00000.parquet", "part-00000.parquet"]
    part = tmp_path / "stopped" / ".scratch" / "copied" / "part-00000.parquet"  # of a set that is complete
    table = pq.read_table(part)
    rewards = pa.array([1 - value for value in table["reward"].to_pylist()], pa.float32())
    place = table.column_names.index("reward")
    pq.write_table(table.set_column(place, table.schema.field("reward"), rewards), part)  # a failing disk
    run(tmp_path / "stopped", sets, runtime=Runtime(device="cpu", threads=1, generation_rows=32))
    for name in ("completions.parquet", "accuracy.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_seed_decides_the_completions(tmp_path: Path, sets: dict[str, Path]):
    one = {"copied": sets["copied"]}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, one, settings=Evaluation(sampling=HOT, seed=seed))
    a, b, c = ((tmp_path / name / "completions.parquet").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_set_in_which_nothing_can_be_graded_is_an_error(tmp_path: Path, sets: dict[str, Path]):
    pool = pq.read_table(sets["copied"]).to_pylist()
    broken = [row | {"verifier": "numeric", "answer": "?"} for row in pool]
    path = tmp_path / "broken.parquet"
    write_prompts(pa.Table.from_pylist(broken, schema=PROMPTS), path)
    with pytest.raises(
        DataError, match=r"set broken: none of 30 completions.*Most often: the answer '\?' is not"
    ):
        run(tmp_path / "out", {"broken": path})
    with pytest.raises(DataError, match="no set to evaluate"):
        run(tmp_path / "out", {})
