"""Every strategy and fusion by itself: a stage trains on the prompts it selected, all of them and no others."""

import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers.models.llama.modeling_llama import LlamaModel

from cropi_core.artifacts.store import Store
from cropi_core.errors import StepError
from cropi_core.gradients import batches as group_features
from cropi_core.runs.records import load_run, run_id
from cropi_core.training import trainer as grpo
from data_schemas.scores import Fusion
from data_schemas.selection import Strategy
from tests.support.tiny import POOL, computed, digests, go, origins, tiny, world

READS = {
    "influence": {"rollouts/pool@1", "rollouts/goal@1", "gradients/pool@1", "gradients/goal@1", "scores@1"},
    "learnability": {"rollouts/pool@1"},
    "pass_rate": {"rollouts/pool@1"},
    "random": set(),
    "full": set(),
    "text_similarity": set(),
}
READS["grad_norm"] = READS["influence"]
READS["auto"] = READS["influence"] | {"rollouts/halves@1"}  # too few prompts for gradients of the halves


@pytest.fixture
def trained_on(monkeypatch):
    """The ids of the prompts that completions were sampled for, step by step."""
    asked = []
    original = grpo.Stage.rollout

    def listened(stage, prompts, trainer):
        completions = original(stage, prompts, trainer)
        asked.append(completions["prompt_id"])
        return completions

    monkeypatch.setattr(grpo.Stage, "rollout", listened)
    return asked


def selection_of(root, record, stage=1):
    path = Store(root).path(record.slots[f"selection@{stage}"].ref) / "selection.parquet"
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_stage_trains_on_exactly_what_its_strategy_selects(own_copy, strategy, trained_on):
    root, reference = own_copy
    Store(root).discard(reference.slots["policy@1"].ref.key)
    size = sum(POOL.values())
    everything = {"ratio": 1.0} if strategy == "full" else {"ratio": 0.2}
    batch = {"steps": 5, "prompts_per_step": 8} if strategy == "full" else {}
    record = go(tiny(stages=1, selection={"strategy": strategy, **everything}, training=batch), root)
    rows = selection_of(root, record)
    selected = {row["prompt_id"] for row in rows if row["selected"]}
    assert len(rows) == size
    assert len(selected) == round(everything["ratio"] * size)
    assert {name for prompts in trained_on for name in prompts} == selected
    prompts = Store(root).path(record.slots["prompts/pool"].ref) / "prompts.parquet"
    assert selected <= set(pq.read_table(prompts)["prompt_id"].to_pylist())
    metrics = Store(root).path(record.slots["policy@1"].ref) / "metrics.parquet"
    assert pq.read_table(metrics)["step"].to_pylist() == list(range(1, len(trained_on) + 1))
    assert all(row["reason"] for row in rows)
    # A strategy computes what it reads and nothing more.
    measured = {s for s in record.slots if s.startswith(("rollouts", "gradients", "scores"))}
    assert measured == READS[strategy]


@pytest.fixture(scope="module")
def two_sets(reference, tmp_path_factory):
    """A run with two validation sets, whose fusions can differ."""
    root = tmp_path_factory.mktemp("two") / "root"
    shutil.copytree(reference[0], root)
    data = {"validation": {"goal": world(reverse=8), "other": world(lucky=8)}}
    go(tiny(stages=1, data=data), root)
    return root, data


@pytest.mark.parametrize("fusion", get_args(Fusion))
def test_every_fusion_scores_selects_and_trains(two_sets, fusion, trained_on):
    root, data = two_sets
    config = tiny(stages=1, data=data, scores={"fusion": fusion}, name=fusion, seed=0)
    record = go(config, root)
    assert computed(record) <= {"scores@1", "selection@1", "policy@1", "evaluation@1"}
    scores = pq.read_table(Store(root).path(record.slots["scores@1"].ref) / "scores.parquet")
    assert {"goal", "other"} < set(scores.column_names)
    selected = {row["prompt_id"] for row in selection_of(root, record) if row["selected"]}
    best = [
        r["prompt_id"] for r in scores.to_pylist() if r["rank"] is not None and r["rank"] <= len(selected)
    ]
    assert set(best) == selected
    if record.slots["policy@1"].origin == "computed":
        assert {name for prompts in trained_on for name in prompts} == selected


# -- refresh ------------------------------------------------------------------------------------------------


def behaviour(root, record, slot):
    """Digest of the policy that sampled the rollouts of a slot."""
    parts = Store(root).path(record.slots[slot].ref) / "parts"
    return pq.read_schema(sorted(parts.iterdir())[0]).metadata[b"cropi.policy"].decode()


@pytest.fixture(scope="module")
def always(reference, tmp_path_factory):
    """A run that samples at every stage, with the root that it shares with the reference run."""
    root = shutil.copytree(reference[0], tmp_path_factory.mktemp("always") / "root")
    return root, go(tiny(rollouts={"refresh": "always"}), root)


def test_always_collects_with_the_current_policy_at_every_stage(always):
    root, record = always
    for stage in (1, 2):
        policy = record.slots[f"policy@{stage - 1}"].ref.digest
        assert behaviour(root, record, f"rollouts/pool@{stage}") == policy
        assert behaviour(root, record, f"rollouts/goal@{stage}") == policy
    assert record.notes == []
    assert origins(record)["rollouts/pool@1"] == "cached"
    summary = Store(root).manifest(record.slots["gradients/pool@2"].ref).summary
    assert summary["median_ess_share"] == pytest.approx(1, abs=1e-4), "on policy every ratio is one"


# -- memory -------------------------------------------------------------------------------------------------


def standard(values):
    return (values - np.nanmean(values)) / np.nanstd(values)


def goal_column(root, ref):
    return pq.read_table(Store(root).path(ref) / "scores.parquet")["goal"].to_numpy().astype(float)


def test_memory_begins_at_the_second_stage_with_the_scores_of_the_first(own_copy):
    root, plain = own_copy
    record = go(tiny(scores={"memory": 0.5}), root)
    assert record.slots["scores@1"].origin == "cached", "nothing to remember: the same artifact as without"
    second = record.slots["scores@2"]
    assert second.origin == "computed"
    assert Store(root).manifest(second.ref).inputs["previous"] == record.slots["scores@1"].ref
    one, two = (goal_column(root, plain.slots[f"scores@{stage}"].ref) for stage in (1, 2))
    expected = standard(two) + 0.5 * np.nan_to_num(standard(one))
    np.testing.assert_allclose(goal_column(root, second.ref), expected, atol=1e-5)
    chosen = [row for row in selection_of(root, record, 2) if row["selected"]]
    assert chosen
    assert all("rrf: goal #" in row["reason"] for row in chosen)
    again = go(tiny(scores={"memory": 0.5}), root)
    assert computed(again) == set()


# -- nothing twice, nothing skipped -------------------------------------------------------------------------


def statuses(root, record, stage):
    scores = Store(root).path(record.slots[f"scores@{stage}"].ref) / "scores.parquet"
    return {row["prompt_id"]: row["status"] for row in pq.read_table(scores).to_pylist()}


def test_a_prompt_without_a_gradient_can_return_when_the_policy_has_changed(always):
    root, record = always
    first, second = statuses(root, record, 1), statuses(root, record, 2)
    assert first.keys() == second.keys()
    assert any(first[name] == "zero_variance" and second[name] == "ok" for name in first)


def test_later_stages_read_the_stored_behaviour_in_one_forward_a_batch(own_copy, monkeypatch):
    root, record = own_copy
    manifests = {slot: Store(root).manifest(entry.ref) for slot, entry in record.slots.items()}
    assert manifests["gradients/pool@2"].inputs["rollouts"] == record.slots["rollouts/pool@1"].ref
    assert manifests["gradients/pool@2"].inputs["policy"] == record.slots["policy@1"].ref
    assert "reference" not in manifests["policy@1"].inputs, "no KL term, no reference policy"
    passes, made = [], []
    forward, make, project = LlamaModel.forward, group_features.make_pack, group_features.project_groups

    def counted(*a):
        # The engine reads a few sequences of its own before it begins; what counts is what the groups cost.
        with monkeypatch.context() as patch:
            patch.setattr(LlamaModel, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
            return project(*a)

    monkeypatch.setattr(group_features, "project_groups", counted)
    monkeypatch.setattr(group_features, "make_pack", lambda *a: made.append(1) or make(*a))
    Store(root).discard(record.slots["gradients/pool@2"].ref.key)
    assert computed(go(tiny(), root)) == {"gradients/pool@2"}
    assert len(passes) == len(made) > 0


def kill_workers(times, stop):
    """Kill worker processes as they appear, one after another."""
    killed = set()
    while not stop.wait(0.02) and len(killed) < times:
        for pid in shard_workers():
            if pid not in killed:
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break


def shard_workers():
    """Return the shard workers that this process started: children of its warm process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"gradients.shard_worker" in (path / "cmdline").read_bytes():
                warm = parent_of(path)
                found += [int(path.name)] if parent_of(Path("/proc") / str(warm)) == os.getpid() else []
        except OSError:
            continue  # it has ended
    return found


def parent_of(path):
    return int((path / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 1000])
def test_a_dead_worker_is_replaced_once_and_then_an_error(own_copy, times, caplog):
    root, record = own_copy
    Store(root).discard(record.slots["gradients/pool@1"].ref.key)
    config = tiny(stages=1, runtime={"workers": 2})
    stop = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(times, stop))
    killer.start()
    try:
        if times == 1:
            told = go(config, root)
        else:
            with pytest.raises(
                StepError, match=r"shards failed .*shard \d+: its process died .*the others are kept"
            ):
                go(config, root)
            told = load_run(Store(root), run_id(config))
            assert told.status == "failed"
            assert "scores@1" not in told.slots
    finally:
        stop.set()
        killer.join()
    assert "it is computed again" in caplog.text
    assert digests(go(config, root))["gradients/pool@1"] == digests(record)["gradients/pool@1"]


def test_later_stages_read_the_gradients_in_the_metric_of_the_stage_before(own_copy):
    """The base has no moments: stage 1 is as without, and a run with `adam` shares it."""
    root, _ = own_copy
    training = {"second_moments": True}
    plain = go(tiny(training=training), root)
    record = go(tiny(training=training, projection={"preconditioner": "adam"}), root)
    same = {slot for slot, digest in digests(plain).items() if digests(record).get(slot) == digest}
    assert {"gradients/pool@1", "scores@1", "policy@1"} <= same
    changed = {"gradients/pool@2", "gradients/goal@2", "scores@2"}
    assert changed <= computed(record)
    used = [Store(root).manifest(record.slots[f"gradients/pool@{m}"].ref).settings for m in (1, 2)]
    assert [s["projection"]["preconditioner"] for s in used] == ["none", "adam"]
