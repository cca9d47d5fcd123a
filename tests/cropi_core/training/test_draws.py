"""Draws of a stage: exactly resumed, recorded as sampled, and begun with what is known of every prompt."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("trl", reason="training needs the extra `train`")

from cropi_core.errors import DataError
from cropi_core.progress import Progress
from cropi_core.training import stage
from cropi_core.training.draws import Draws
from data_schemas import GROUPS, Draw, StageEnd, Training
from tests.support.training import SMALL, digest, rows_of, run, write_policy, write_tables


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)
    return tmp_path


DRAWS = [("belief", 1.0, None), ("thompson", 2.0, None), ("uniform", 3.0, None), ("belief", 3.0, 3)]
"""Method, oversampling, and completions that are sampled first."""


def drawn(
    method: str, oversampling: float = 1.0, first_samples: int | None = None, **changes: Any
) -> Training:
    draw = Draw.model_validate(
        {"method": method, "oversampling": oversampling, "first_samples": first_samples}
    )
    return SMALL.model_copy(update={"draw": draw, "prompts_per_step": 3, **changes})


@pytest.mark.parametrize(("method", "oversampling", "first_samples"), DRAWS)
def test_a_stopped_stage_draws_what_an_uninterrupted_one_draws(
    workspace: Path, method, oversampling, first_samples
):
    settings = drawn(method, oversampling, first_samples)
    if method == "belief" and not first_samples:
        settings = drawn(method, oversampling, iterations=2, steps=8)
    summary, target = run(workspace, "whole", training=settings)

    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(workspace, "stopped", training=settings, report=stop)
    resumed, again = run(workspace, "stopped", training=settings)
    assert resumed["resumed_from_step"] == 4
    assert digest(again) == digest(target)
    timed = ("resumed_from_step", "seconds_per_step")
    assert {k: v for k, v in resumed.items() if k not in timed} == {
        k: v for k, v in summary.items() if k not in timed
    }


@pytest.mark.parametrize(("method", "oversampling", "first_samples"), DRAWS)
def test_the_groups_of_a_stage_are_those_that_were_sampled_and_trained_on(
    workspace: Path, method, oversampling, first_samples
):
    summary, target = run(workspace, training=drawn(method, oversampling, first_samples))
    groups = pq.read_table(target / "groups.parquet")
    assert groups.schema.equals(GROUPS)
    rows = groups.to_pylist()
    trained = [row for row in rows if row["trained"]]
    batches = [[row["prompt_id"] for row in trained if row["batch"] == number] for number in range(6)]
    assert [len(set(batch)) for batch in batches] == [3] * 6
    for number, metrics in enumerate(rows_of(target)):
        kept = [row for row in trained if row["batch"] == number]
        assert metrics["reward"] == pytest.approx(sum(row["passed"] for row in kept) / 24)
        assert metrics["frac_reward_zero_std"] == pytest.approx(sum(not row["mixed"] for row in kept) / 3)
    assert summary["groups_sampled"] == len(rows)
    assert summary["groups_dropped"] == len(rows) - 18
    assert (summary["groups_dropped"] > 0) == (oversampling > 1)
    assert not any(row["mixed"] for row in rows if not row["trained"])
    assert all(len([row for row in rows if row["batch"] == n]) <= 3 * oversampling for n in range(6))
    assert all(row["graded"] == (8 if row["trained"] else first_samples or 8) for row in rows)
    lengths = sum(row["completion_length"] for row in rows_of(target)) * 24
    assert summary["tokens_generated"] == round(lengths) + summary["tokens_dropped"]


def test_a_draw_in_turn_has_as_many_prompts_in_the_last_batch_as_in_the_first():
    training = drawn("uniform", 3.0, steps=20, prompts_per_step=16)
    draws = Draws([{"prompt_id": f"p{i}"} for i in range(60)], training, seed=0)
    for number in range(20):
        taken: set[int] = set()
        while more := draws.more(number, taken, 16):
            assert len(more) == 16
            assert not taken & set(more)
            taken |= set(more)
        assert len(taken) == 48


def test_a_stage_begins_with_what_rollouts_and_the_stage_before_say(workspace: Path):
    def rewards(solved: set[int]) -> pa.Table:
        rows = [
            {"prompt_id": f"p{i:02d}", "reward": float(i in solved)} for i in range(12) for _ in range(16)
        ]
        return pa.Table.from_pylist(rows)

    even = {0, 2, 4, 6, 8, 10}  # the selected prompts
    pq.write_table(rewards(even - {4}), workspace / "rollouts.parquet")
    once = drawn("thompson", steps=1, prompts_per_step=1)
    _, first = run(workspace, "first", training=once, rollouts=workspace / "rollouts.parquet")
    mean = {r["prompt_id"]: r["pass_rate"] for r in pq.read_table(first / "belief.parquet").to_pylist()}
    assert mean["p02"] > 0.7
    assert mean["p04"] < 0.3  # all the others were solved
    assert len(mean) == 12
    _, second = run(workspace, "second", training=once, belief=first / "belief.parquet")
    after = {r["prompt_id"]: r["pass_rate"] for r in pq.read_table(second / "belief.parquet").to_pylist()}
    trained = {r["prompt_id"] for r in pq.read_table(second / "groups.parquet").to_pylist()}
    assert all(abs(after[name] - mean[name]) < 0.03 for name in mean.keys() - trained)


def test_rewards_outside_0_and_1_are_refused_by_a_belief(workspace: Path):
    rows = [{"prompt_id": "p00", "reward": 2.0}]
    pq.write_table(pa.Table.from_pylist(rows), workspace / "rollouts.parquet")
    with pytest.raises(DataError, match=r"between 0 and 1.*drop training.draw"):
        run(workspace, training=drawn("belief"), rollouts=workspace / "rollouts.parquet")


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stage_ends_when_too_few_groups_are_mixed_and_says_so(workspace: Path, iterations):
    end = StageEnd(mixed_below=1.0, window=2, min_steps=4)
    settings = SMALL.model_copy(update={"steps": 8, "end": end, "iterations": iterations})
    summary, target = run(workspace, training=settings)
    assert summary["steps"] == len(rows_of(target)) == 4
    assert "training.end.mixed_below=1" in summary["ended"]
    assert summary["completions"] == 4 // iterations * 4 * 8

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "save_trained", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, "stopped", training=settings)
    again, other = run(workspace, "stopped", training=settings)
    assert again["resumed_from_step"] == 4
    assert digest(other) == digest(target)
    never, _ = run(
        workspace, "never", training=settings.model_copy(update={"end": StageEnd(mixed_below=0.01, window=2)})
    )
    assert never["steps"] == 8
    assert "ended" not in never
