"""Halves of the completions of some prompts, as prompts of their own."""

from cropi_core.artifacts import write_parquet
from cropi_core.rollouts.halving import deal, halve_rollouts
from cropi_core.rollouts.table import read_rollouts, sampling_of
from data_schemas import Sampling
from tests.support.rollouts import table_of


def test_both_halves_have_both_rewards_where_that_is_possible():
    assert deal([1, 1, 0, 0]) == ([0, 2], [1, 3])
    assert deal([0, 1, 0, 1, 1, 0]) is not None
    assert deal([1, 0, 0, 0]) is None
    assert deal([None, 1, 0, 0, None, 1]) == ([1, 2], [3, 5])
    assert deal([]) is None


def test_halves_are_rollouts_of_twice_as_many_prompts(tmp_path):
    sampling = Sampling(samples=4)
    rewards = {"a": [0, 0, 0, 0], "b": [0, 1, 0, 1], "c": [1, 0, 0, 0], "d": [1, 1, 0, 0]}
    write_parquet(table_of(rewards, sampling), tmp_path / "all.parquet")
    summary = halve_rollouts(tmp_path / "all.parquet", tmp_path / "halves", prompts=9, seed=0)
    table = read_rollouts(tmp_path / "halves")
    assert sorted(set(table["prompt_id"].to_pylist())) == ["b#1", "b#2", "d#1", "d#2"]
    assert table["sample"].to_pylist() == [0, 1] * 4
    assert sampling_of(table) == sampling
    assert (summary["prompts"], summary["sampled_tokens"]) == (2, 0)
    one = halve_rollouts(tmp_path / "all.parquet", tmp_path / "one", prompts=1, seed=0)
    assert one["prompts"] == 1


def test_a_pool_without_such_prompts_has_no_halves(tmp_path):
    write_parquet(table_of({"a": [0, 1], "b": [1, 1]}, Sampling(samples=2)), tmp_path / "all.parquet")
    assert halve_rollouts(tmp_path / "all.parquet", tmp_path / "halves", prompts=9, seed=0)["prompts"] == 0
    assert not list((tmp_path / "halves").iterdir())
