"""The token budget of gradient passes: halved where memory runs out, and grown back where it does not."""

from pathlib import Path

import pytest
import torch

from cropi_core.gradients import batches
from cropi_core.gradients.batches import PATIENCE, Budget, project_blocks
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.groups import batch_groups, cut_batch, group_rollouts
from cropi_core.gradients.job import FeatureSettings, Job
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.rollouts.table import read_rollouts
from data_schemas.gradients import Gradients, Projection
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from tests.support.models import random_rollouts, tiny_model

ERROR = torch.OutOfMemoryError("CUDA out of memory")


def test_a_budget_grows_back_after_passes_without_a_failure():
    budget = Budget(1000)
    budget.halve(ERROR)
    assert budget.tokens == 500
    for _ in range(2 * PATIENCE - 1):
        budget.passed()
    assert budget.tokens == 500
    budget.passed()
    assert budget.tokens == 1000
    budget.passed()
    assert budget.tokens == 1000  # never more than configured


def test_a_budget_that_is_too_large_fails_ever_less_often():
    """Of a thousand passes of which those above 600 tokens fail, seven fail."""
    budget, failures = Budget(1000), 0
    for _ in range(1000):
        if budget.tokens > 600:
            budget.halve(ERROR)
            failures += 1
        else:
            budget.passed()
    assert failures <= 7


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    path = random_rollouts(tmp_path_factory.mktemp("rollouts") / "r.parquet", prompts=60, samples=2)
    return group_rollouts(read_rollouts(path), 2)


def test_a_batch_is_cut_in_its_order(groups):
    (batch,) = batch_groups(groups, 1000, 10**6)
    parts = cut_batch(groups, batch, 60)
    assert [i for part in parts for i in part] == batch
    assert all(sum(groups[i].packed for i in part) <= 60 for part in parts)
    assert cut_batch(groups, batch, 1) == [[i] for i in batch]


def test_one_failure_does_not_slow_down_the_rest_and_changes_no_feature(groups, monkeypatch):
    """A large pass fails: no batch that was planned before fails after it, and later passes are large again."""
    model, _ = tiny_model("llama")
    engine = FeatureEngine(model, Projection(k=64, min_side=8))
    settings = FeatureSettings(layout=Gradients(rows_per_shard=1024, block_rows=1024))
    job = Job(Checkpoint(Path(), "float32"), settings, Sampling(samples=2), Runtime())
    plain = {i: row for i, row, _ in project_blocks(engine, groups, job, Budget(80))}
    sizes, failed = [], []
    make_pack = batches.make_pack

    def failing(*arguments):
        pack = make_pack(*arguments)
        sizes.append(len(pack.ids))
        if len(pack.ids) > 40 and not failed:
            failed.append(len(sizes))
            raise ERROR
        return pack

    monkeypatch.setattr(batches, "make_pack", failing)
    rows = {i: row for i, row, _ in project_blocks(engine, groups, job, Budget(80))}
    engine.close()
    after = sizes[failed[0] :]
    assert max(after[: 2 * PATIENCE]) <= 40
    assert max(after[2 * PATIENCE :]) > 40
    assert rows.keys() == plain.keys()
    for i, row in rows.items():
        assert abs(row - plain[i]).max() <= 1e-5 * abs(plain[i]).max()
