"""Sampling in passes: which prompts are sampled again, and that completions are those of a plain collection."""

import shutil

import numpy as np
import pytest

from cropi_core.errors import ConfigError, DataError
from cropi_core.progress import Progress
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts import collect
from cropi_core.rollouts.passes import open_prompts, pass_counts, pass_sizes
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import build
from data_schemas import Passes
from data_schemas.rollouts import Sampling
from tests.support.rollouts import run

FULL = Sampling(samples=6, max_new_tokens=8)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    write_prompts(build({"reverse": 10, "copy": 6, "add3": 6}, "pool", 0), path)
    return path


@pytest.fixture(scope="module")
def in_passes(prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("passes") / "r"
    return out, run(out, prompts, sampling=FULL, passes=Passes(first=2, min_chance=0.0))


def test_sizes_double_up_to_the_most():
    assert pass_sizes(Passes(first=2), 8) == [2, 4, 8]
    assert pass_sizes(Passes(first=3), 8) == [3, 6, 8]


def test_prompts_with_both_rewards_are_finished_and_hopeless_ones_too():
    rewards = [[1, 0]] * 40 + [[0, 0]] * 40 + [[1, 1]] * 40 + [[None, None]]
    assert open_prompts(rewards, 2, 0.0) == list(range(40, 121))
    # In a pool without a single mixed group, pass rates are believed to be near 0 or 1.
    assert open_prompts([[0.0, 0.0]] * 300 + [[1.0, 1.0]] * 300, 2, 0.1) == []


def test_the_chance_is_that_of_the_pools_pass_rates():
    """Brute force: draw pass rates and rewards; of prompts that failed twice, count those that then succeed."""
    random = np.random.default_rng(0)
    rates = random.choice([0.02, 0.5, 0.97], size=20_000)
    rewards = (random.random((20_000, 4)) < rates[:, None]).astype(float)
    failed = rewards[:, :2].sum(1) == 0
    share = float((rewards[failed][:, 2:].sum(1) > 0).mean())
    groups = rewards[:, :2].tolist()
    for least, is_open in ((share - 0.05, True), (share + 0.05, False)):
        still = set(open_prompts(groups, 2, least))
        assert bool(still & set(np.flatnonzero(failed))) is is_open


def test_partial_credit_is_sampled_again_and_other_rewards_are_refused():
    assert 0 in open_prompts([[0.5, 0.5], [0.0, 0.0]], 2, 0.9)
    with pytest.raises(DataError, match="passes needs rewards between 0 and 1"):
        open_prompts([[2.0, 0.0]], 2, 0.1)


def test_completions_are_the_first_of_a_plain_collection(prompts, in_passes, tmp_path):
    """A pass numbers samples on from the one before: what is sampled does not depend on the passes."""
    out, summary = in_passes
    run(tmp_path / "plain", prompts, sampling=FULL)
    plain = {(r["prompt_id"], r["sample"]): r for r in read_rollouts(tmp_path / "plain").to_pylist()}
    rows = read_rollouts(out).to_pylist()
    for row in rows:
        other = plain[row["prompt_id"], row["sample"]]
        assert row.pop("behavior_logprobs") == pytest.approx(other.pop("behavior_logprobs"), abs=1e-4)
        assert row == other  # log-probabilities differ in the last digits with the batch
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row["reward"])
    full: dict[str, list[float]] = {}
    for (name, _), row in plain.items():
        full.setdefault(name, []).append(row["reward"])
    assert list(groups) == list(full)  # the order of the prompts table
    assert [len(group) for group in groups.values()] == pass_counts(
        list(full.values()), Passes(min_chance=0.0)
    )
    assert {len(group) for group in groups.values()} == {2, 4, 6}
    assert all(len(set(group)) > 1 or len(group) == 6 for group in groups.values())
    assert summary["completions"] == len(rows) < len(plain)
    assert summary["passes"] == {"first": 2, "min_chance": 0.0}
    assert not out.with_name("r.passes").exists()


def test_an_interruption_loses_at_most_one_part_and_changes_no_byte(
    prompts, in_passes, tmp_path, monkeypatch
):
    """Stop after every part in turn, those of the later passes included."""
    out, _ = in_passes
    written = collect.write_parquet
    stops = 0
    while True:
        parts = iter([True])

        def stopping(table, path, parts=parts, **options):
            if next(parts, None) is None:
                raise KeyboardInterrupt
            written(table, path, **options)

        monkeypatch.setattr(collect, "write_parquet", stopping)
        try:
            run(tmp_path / "r", prompts, sampling=FULL, passes=Passes(first=2, min_chance=0.0))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 6
    for path in out.iterdir():
        assert (tmp_path / "r" / path.name).read_bytes() == path.read_bytes()


def test_parts_of_other_passes_are_refused(prompts, in_passes, tmp_path):
    shutil.copytree(in_passes[0], tmp_path / "r")
    with pytest.raises(ConfigError, match="sampled in passes"):
        run(tmp_path / "r", prompts, sampling=FULL)
    with pytest.raises(ConfigError, match="its passes is"):
        run(tmp_path / "r", prompts, sampling=FULL, passes=Passes(first=3))


def test_progress_counts_the_prompts_of_each_pass(prompts, tmp_path):
    reports: list[Progress] = []
    passes = Passes(first=2, min_chance=0.0)
    run(tmp_path / "r", prompts, sampling=FULL, passes=passes, report=reports.append)
    assert [r.note for r in reports if r.done == 0] == ["pass 1 of 3", "pass 2 of 3", "pass 3 of 3"]
    assert all(r.done <= r.total for r in reports)
    assert reports[-1] == Progress(22, 22, "prompt")
