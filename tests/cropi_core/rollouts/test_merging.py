"""Rollouts in which fresh completions replace stored ones."""

import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts import write_parquet
from cropi_core.errors import DataError
from cropi_core.gradients import group_rollouts
from cropi_core.rollouts.merging import merge_rollouts
from cropi_core.rollouts.table import read_rollouts
from data_schemas import STATUSES, Sampling
from tests.support.rollouts import table_of

TWO = Sampling(samples=2)


def parts(folder, groups: list[dict[str, list[float]]], sampling: Sampling = TWO):
    folder.mkdir()
    for index, rewards in enumerate(groups):
        write_parquet(table_of(rewards, sampling), folder / f"part-{index:05d}.parquet")
    return folder


def test_fresh_completions_replace_those_of_their_prompts_in_the_order_of_the_pool(tmp_path):
    stored = parts(tmp_path / "stored", [{"a": [0, 0], "b": [0, 1]}, {"c": [1, 1]}])
    fresh = parts(tmp_path / "fresh", [{"c": [0, 1, 1]}, {"a": [1, 0, 0]}], Sampling(samples=3))
    summary = merge_rollouts(stored, fresh, tmp_path / "merged", {"a": "x", "b": "x", "c": "y"})
    table = read_rollouts(tmp_path / "merged")
    assert table["prompt_id"].to_pylist() == ["a"] * 3 + ["b"] * 2 + ["c"] * 3
    assert table["reward"].to_pylist() == [1, 0, 0, 0, 1, 0, 1, 1]
    assert summary["completions"] == 8
    assert (summary["sampled_tokens"], summary["prompts_sampled_again"]) == (0, 2)
    files = [pq.read_table(path) for path in sorted((tmp_path / "merged").iterdir())]
    assert [len(file) for file in files] == [5, 3]
    assert files[0].schema.metadata[b"cropi.policy"] == b"several"


def test_prompts_that_were_never_sampled_follow_the_stored_ones_in_the_order_of_the_pool(tmp_path):
    stored = parts(tmp_path / "stored", [{"b": [0, 1]}])
    fresh = parts(tmp_path / "fresh", [{"d": [1, 1], "b": [0, 0], "a": [0, 1]}])
    merge_rollouts(stored, fresh, tmp_path / "merged", dict.fromkeys("abcd", "x"))
    table = read_rollouts(tmp_path / "merged")
    assert table["prompt_id"].to_pylist() == ["b", "b", "a", "a", "d", "d"]
    assert table["reward"].to_pylist() == [0, 0, 0, 1, 1, 1]


def test_stored_completions_that_are_set_aside_have_no_reward_and_their_prompts_no_gradient(tmp_path):
    stored = parts(tmp_path / "stored", [{"a": [0, 1], "b": [0, 1]}, {"c": [1, 1]}])
    fresh = parts(tmp_path / "fresh", [{"c": [0, 1]}])
    sources = dict.fromkeys("abc", "x")
    summary = merge_rollouts(stored, fresh, tmp_path / "merged", sources, keep_stored=False)
    table = read_rollouts(tmp_path / "merged")
    assert table["prompt_id"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert table["reward"].to_pylist() == [None] * 4 + [0, 1]
    assert (summary["prompts"], summary["not_gradable"], summary["prompts_set_aside"]) == (3, 0, 2)
    statuses = {g.prompt_id: STATUSES[g.status] for g in group_rollouts(table, 2)}
    assert statuses == {"a": "too_few_gradable", "b": "too_few_gradable", "c": "ok"}


def test_other_prompts_and_other_distributions_are_refused(tmp_path):
    stored = parts(tmp_path / "stored", [{"a": [0, 0]}])
    with pytest.raises(DataError, match="pool lacks 1 prompts"):
        merge_rollouts(stored, parts(tmp_path / "other", [{"b": [0, 1]}]), tmp_path / "m", {"a": "x"})
    warm = parts(tmp_path / "warm", [{"a": [0, 1]}], Sampling(samples=2, temperature=0.5))
    with pytest.raises(DataError, match="another distribution"):
        merge_rollouts(stored, warm, tmp_path / "m", {"a": "x"})
