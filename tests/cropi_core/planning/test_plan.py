"""The plan: its arithmetic by hand, and its predictions against a tiny run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.gradients.groups import group_rollouts
from cropi_core.planning import estimate as plan
from cropi_core.planning.calibration import Calibration, processes_at_once
from cropi_core.planning.prediction import predict
from cropi_core.planning.rehearsal import counted
from cropi_core.planning.samples import in_passes, lengths, with_sizes
from cropi_core.planning.terms import (
    Assumptions,
    Disk,
    Limits,
    Line,
    Memory,
    Rate,
    Sample,
    Speeds,
    TrainingRate,
    Work,
)
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import build
from data_schemas import Passes, Sampling
from data_schemas.config import Config
from data_schemas.runtime import Runtime
from tests.support import processes, tiny
from tests.support.rollouts import run

ROW = {"slot", "stage", "origin", "tokens_generated", "tokens_passed", "seconds"} | {
    "peak_memory_bytes",
    "disk_bytes",
}
# Two of four prompts have a gradient; completions have 2 and 6 tokens, those of live prompts 4 and 4.
POOL = Sample(4, 10.0, (2, 6, 4, 4), 0.5, 8.0, (4, 4))
SETS = Sample(2, 5.0, (3, 3), 1.0, 5.0, (3, 3))
DISK = Disk(
    rollouts={"pool": Line(1000, 10), "validation": Line(500, 5)},
    evaluation=Line(100, 2),
    features=2000,
    columns=Line(300, 7),
    policy=50_000,
    trained=100_000,
)
ASSUMED = Assumptions({"pool": POOL, "validation": SETS}, DISK)
SPEEDS = Speeds(
    imports_s=3.0,
    step_s=0.5,
    scores_s=0.25,
    sampling={"pool": Rate(2.0, 1.0, 0.01), "validation": Rate(2.0, 1.0, 0.02)},
    gradients={"pool": Rate(4.0, 1.5, 0.1), "validation": Rate(4.0, 1.5, 0.2)},
    training=TrainingRate(6.0, 5.0, 0.25, 2.0),
    memory=Memory(100.0, Line(200.0, 1.0), Line(300.0, 2.0), 900.0),
)
LIMITS = Limits(
    k=100,
    value_bytes=2,
    shard_prompts=8,
    rows_per_shard=8,
    block_rows=4,
    generation_rows=16,
    token_budget=1000,
    save_steps=2,
    moment_bytes=0,
    subprocess=False,
)
COLLECT = Work("rollouts/pool@1", "rollouts", 1, prompts=20, samples=4, max_new_tokens=5)
PASS = Work("gradients/pool@1", "gradients", 1, prompts=20, samples=4, max_new_tokens=5)
TRAIN = Work("policy@1", "training", 1, prompts=3, samples=2, max_new_tokens=9, steps=5, batches=3)


def settings(**changes):
    """Return settings of one stage, with one-token completions on request."""
    return tiny.settings(**{"stages": 1, **changes})


def planned(folder, config, root, calibrated=True):
    folder.mkdir()
    return predict(config, root, folder, calibrated=calibrated)


def by_slot(result):
    return {step["slot"]: step for step in result["steps"]}


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_lengths_are_cut_where_sampling_is():
    assert plan.mean_length((2, 6), 5) == 3.5
    assert plan.mean_length((), 5) == 0.0


def test_tokens_are_counted_by_hand():
    assert plan.tokens(COLLECT, POOL) == (20 * 4 * (2 + 5 + 4 + 4) / 4, 0.0)
    assert plan.tokens(PASS, POOL) == (0.0, 10 * 4 * (8 + 4))
    # Three batches of 6 completions are generated; five steps process 6 completions of 8 + 4 tokens.
    assert plan.tokens(TRAIN, POOL) == (3 * 6 * 4, 5 * 6 * 12)
    assert plan.packed_tokens(PASS, POOL) == 8 + 4 * 4


def test_passes_are_counted_by_the_completions_of_the_sample():
    pool = replace(POOL, samples=2.5, live_samples=3.0)
    assert plan.tokens(COLLECT, pool) == plan.tokens(COLLECT, POOL)
    assert plan.tokens(replace(COLLECT, passes=True), pool) == (20 * 2.5 * 3.75, 0.0)
    assert plan.tokens(replace(PASS, passes=True), pool) == (0.0, 10 * 3.0 * (8 + 4))


def test_a_sample_in_passes_has_the_completions_that_passes_sample(tmp_path):
    """A calibration samples every prompt fully once; what passes leave out is then removed."""
    write_prompts(build({"reverse": 12, "copy": 8}, "pool", 0), tmp_path / "p.parquet")
    sampling, passes = Sampling(samples=4, max_new_tokens=8), Passes(first=2, min_chance=0.0)
    run(tmp_path / "plain", tmp_path / "p.parquet", sampling=sampling)
    run(tmp_path / "passes", tmp_path / "p.parquet", sampling=sampling, passes=passes)
    table, expected = in_passes(tmp_path / "plain", passes), read_rollouts(tmp_path / "passes")
    assert table["completion_ids"].to_pylist() == expected["completion_ids"].to_pylist()
    sample = with_sizes(lengths(table, group_rollouts(table, 2)))
    assert sample.samples == table.num_rows / 20
    live = {r["prompt_id"] for r in table.to_pylist() if r["reward"]} & {
        r["prompt_id"] for r in table.to_pylist() if not r["reward"]
    }
    assert sample.live_samples == sum(name in live for name in table["prompt_id"].to_pylist()) / len(live)


def test_seconds_are_counted_by_hand():
    assert plan.seconds(COLLECT, POOL, SPEEDS, LIMITS) == pytest.approx(1 + 300 * 0.01 + 0.5)
    assert plan.seconds(PASS, POOL, SPEEDS, LIMITS) == pytest.approx(1.5 + 10 * 24 * 0.1 + 0.5)
    # Five steps of 6 completions, a checkpoint after 2, 4 and 5.
    assert plan.seconds(TRAIN, POOL, SPEEDS, LIMITS) == pytest.approx(5 + 30 * 0.25 + 3 * 2 + 0.5)


def test_the_cost_of_scoring_is_its_reads_and_products():
    score = Work("scores@1", "scores", 1, prompts=2_000_000, products=300)
    numbers = 1_000_000 * LIMITS.k  # half of the prompts have a gradient
    expected = (
        0.25 + numbers / plan.SCORED_NUMBERS_PER_S + 300 * numbers / plan.MULTIPLIED_NUMBERS_PER_S + 0.5
    )
    assert plan.seconds(score, POOL, SPEEDS, LIMITS) == pytest.approx(expected)


def test_a_prompt_is_compared_with_every_validation_prompt_or_with_two_halves():
    sources = {"pool": {"sort": 100}, "goal": {"sort": 12}, "far": {"sort": 3}}
    for target, products in (("nearest", 15), ("mean", 4)):
        world = {"kind": "world", "families": {"sort": 1}}
        config = Config.model_validate(
            {
                "data": {"pool": world, "validation": {"goal": world, "far": world}},
                "scores": {"target": target},
            }
        )
        work = counted(Work("scores@2", "scores"), "computed", config, sources)
        assert (work.products, work.stage) == (products, 2)


def test_sources_with_a_number_of_completions_of_their_own_are_counted_with_it():
    world = {"kind": "world", "families": {"sort": 1}}
    config = Config.model_validate(
        {
            "data": {"pool": world, "validation": {"goal": world}},
            "rollouts": {"pool": {"samples": 4}, "samples_by_source": {"sort": 16}},
            "evaluation": {"sampling": {"samples": 2}, "samples_by_source": {"copy": 8}},
        }
    )
    sources = {"pool": {"sort": 10, "copy": 30}, "goal": {"sort": 3, "copy": 1}}

    def samples(slot: str, step: Any) -> float:
        return counted(Work(slot, step), "computed", config, sources).samples

    assert samples("rollouts/pool@1", "rollouts") == samples("gradients/pool@1", "gradients") == 7
    assert samples("rollouts/goal@1", "rollouts") == config.rollouts.validation.samples
    assert samples("evaluation@0", "evaluation") == 3.5


def test_disk_is_counted_by_hand():
    assert plan.disk(COLLECT, ASSUMED, LIMITS) == 3 * 1000 + 80 * 10 + plan.MANIFEST.at(3)
    store = 300 + 20 * 7 + 10 * 2000
    assert plan.disk(PASS, ASSUMED, LIMITS) == store + plan.MANIFEST.at(2 * plan.STORE_ARRAYS + 3)


def test_memory_is_that_of_the_largest_pass():
    assert plan.memory(COLLECT, POOL, SPEEDS.memory, LIMITS) == 200 + 16
    assert plan.memory(PASS, POOL, SPEEDS.memory, LIMITS) == 300 + 2 * (4 * 0.5 * 24)
    small = Limits(**{**vars(LIMITS), "token_budget": 30})
    assert plan.memory(PASS, POOL, SPEEDS.memory, small) == 300 + 2 * 30


def test_what_a_process_pays_once_is_paid_once():
    again = Work(**{**vars(PASS), "slot": "gradients/pool@2", "stage": 2})
    first, second = plan.estimate([PASS, again], ASSUMED, SPEEDS, LIMITS)
    assert first.seconds == pytest.approx(26.0 + 3.0 + 4.0)
    assert second.seconds == pytest.approx(26.0)
    apart = Limits(**{**vars(LIMITS), "subprocess": True})
    assert {e.seconds for e in plan.estimate([PASS, again], ASSUMED, SPEEDS, apart)} == {33.0}


def test_peak_memory_is_the_largest_so_far_unless_steps_have_processes():
    works = [COLLECT, TRAIN, PASS]
    here = plan.estimate(works, ASSUMED, SPEEDS, LIMITS)
    assert [e.peak_memory_bytes for e in here] == [216, 900, 900]
    apart = plan.estimate(works, ASSUMED, SPEEDS, Limits(**{**vars(LIMITS), "subprocess": True}))
    assert [e.peak_memory_bytes for e in apart] == [216, 900, 396]


def test_existing_artifacts_cost_nothing_and_sums_add_up():
    cached = Work(**{**vars(COLLECT), "origin": "cached"})
    steps = plan.estimate([cached, PASS, TRAIN], ASSUMED, SPEEDS, LIMITS)
    assert (steps[0].seconds, steps[0].tokens_generated, steps[0].disk_bytes) == (0.0, 0.0, 0.0)
    total = plan.total(steps)
    assert total.tokens_passed == 480 + 360
    assert total.peak_memory_bytes == 900
    assert total.seconds == pytest.approx(sum(e.seconds or 0 for e in steps))
    assert plan.by_stage(steps)[0].disk_bytes == total.disk_bytes


def test_without_speeds_there_are_tokens_and_disk_alone():
    (step,) = plan.estimate([PASS], ASSUMED, None, LIMITS)
    assert (step.seconds, step.peak_memory_bytes) == (None, None)
    assert step.tokens_passed == 480
    assert step.disk_bytes > 0


# -- against a real run ----------------------------------------------------------------------------------------------


def test_tokens_of_known_lengths_are_those_of_the_run(tmp_path):
    """With completions of one token and prompts of equal length, nothing remains to be estimated."""
    one = {"max_new_tokens": 1}
    config = tiny.Config.model_validate(
        settings(
            data={"pool": tiny.world(add3=24), "validation": {"goal": tiny.world(reverse=8)}, "test": {}},
            rollouts={"pool": {"samples": 4, **one}, "validation": {"samples": 4, **one}},
            selection={"strategy": "random", "ratio": 0.2},
            training={"sampling": {"samples": 4, **one}},
            evaluation={"sampling": {"samples": 2, **one}, "samples_by_source": {"reverse": 3}},
        )
    )
    results = [planned(tmp_path / str(c), config, tmp_path / "root", c) for c in (True, False)]
    record = tiny.go(config, tmp_path / "root")
    store = Store(tmp_path / "root")
    path = store.path(record.slots["policy@1"].ref)
    lengths = pq.read_table(path / "metrics.parquet")["completion_length"].to_pylist()
    for result in results:
        steps = by_slot(result)
        assert list(steps) == list(record.slots)
        evaluated = store.manifest(record.slots["evaluation@1"].ref).summary["tokens"]
        assert steps["evaluation@1"]["tokens_generated"] == evaluated == 24
        assert steps["policy@1"]["tokens_generated"] == sum(lengths) * 16 == 48
        assert steps["policy@1"]["tokens_passed"] == 48 * (len("add:123+456=") + 1) + 48 * extra(config)


def extra(config):
    """Return the number of tokens that the tokenizer adds around a prompt."""
    from cropi_core.policy.loading import load_policy, render
    from cropi_core.world import base_checkpoint

    _, tokenizer = load_policy(base_checkpoint(), "float32", "cpu")
    text = "add:123+456="
    return len(render(tokenizer, [{"role": "user", "content": text}])) - len(text)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a plan, the run, and the plan after it, of a curriculum with gradients."""
    folder = tmp_path_factory.mktemp("plan")
    config = tiny.Config.model_validate(settings())
    before = planned(folder / "before", config, folder / "root")
    assert not (folder / "root").exists()
    record = tiny.go(config, folder / "root")
    files = tiny.files(folder / "root")
    after = planned(folder / "after", config, folder / "root")
    assert tiny.files(folder / "root") == files
    return before, record, Store(folder / "root"), after


@pytest.mark.slow
def test_the_steps_are_those_of_the_run(both):
    before, record, _, _ = both
    assert list(by_slot(before)) == list(record.slots)
    assert {step["origin"] for step in before["steps"]} == {"computed"}


def test_disk_is_within_a_quarter(both):
    before, record, store, _ = both
    actual = sum(
        p.stat().st_size
        for entry in record.slots.values()
        for p in store.path(entry.ref).rglob("*")
        if p.is_file()
    )
    assert before["totals"]["disk_bytes"] == pytest.approx(actual, rel=0.25)


def test_tokens_are_near_those_of_the_run(both):
    before, record, store, _ = both
    steps = by_slot(before)
    for slot in ("rollouts/pool@1", "rollouts/goal@1", "evaluation@0"):
        actual = store.manifest(record.slots[slot].ref).summary["tokens"]
        assert steps[slot]["tokens_generated"] == pytest.approx(actual, rel=0.25)


def test_existing_artifacts_are_listed_as_cached(both):
    _, _, _, after = both
    assert {step["origin"] for step in after["steps"]} == {"cached"}
    assert after["calibration"] is None
    assert after["totals"]["disk_bytes"] == 0
    count = len(after["steps"])
    assert after["notes"] == [f"{count} of {count} artifacts exist already and cost nothing"]


def test_only_what_changes_is_computed(both, tmp_path):
    _, _, store, _ = both
    config = tiny.Config.model_validate(settings(selection={"ratio": 0.4}))
    origins = {
        slot: step["origin"]
        for slot, step in by_slot(planned(tmp_path / "p", config, store.root, False)).items()
    }
    assert origins["scores@1"] == "cached"
    assert origins["selection@1"] == origins["policy@1"] == "computed"


@pytest.mark.slow
def test_a_pool_without_gradients_is_reported(tmp_path):
    data = {"pool": tiny.world(noise=24), "validation": {"goal": tiny.world(reverse=8)}, "test": {}}
    config = tiny.Config.model_validate(settings(data=data))
    result = planned(tmp_path / "p", config, tmp_path / "root")
    assert any("prompts sampled of the pool has a gradient" in note for note in result["notes"])
    assert by_slot(result)["gradients/pool@1"]["tokens_passed"] == 0


# -- the command -----------------------------------------------------------------------------------------------------


def cropi(*args, code=0, **env):
    done = processes.run(
        [sys.executable, "-m", "cropi_core", "plan", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_the_command_writes_json_and_leaves_nothing(tmp_path):
    file, scratch = tmp_path / "c.yaml", tmp_path / "scratch"
    file.write_text(json.dumps(settings()))
    scratch.mkdir()
    cropi(file, "--help", TMPDIR=str(scratch))  # starts the warm process, which keeps its first environment
    done = cropi(file, "--json", "--root", tmp_path / "root", TMPDIR=str(scratch), CROPI_MARK=str(tmp_path))
    result = json.loads(done.stdout)
    assert result.keys() == {"run", "calibration", "steps", "stages", "totals", "device_memory", "notes"}
    assert all(row.keys() == ROW for row in [*result["steps"], *result["stages"], result["totals"]])
    assert result["totals"]["seconds"] > 0
    assert result["totals"]["peak_memory_bytes"] > 1e8
    assert not (tmp_path / "root").exists()
    assert not list(scratch.iterdir())
    assert not processes_with(f"CROPI_MARK={tmp_path}")


def processes_with(setting):
    """Return the processes with a setting in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path] if setting.encode() in path.read_bytes() else []
        except OSError:
            continue  # owned by another user, or ended
    return found


def test_a_wrong_configuration_is_one_error_and_exit_2(tmp_path):
    done = cropi(
        "demo", "-o", "stagess=1", "-o", "selection.ratio=7", code=2, CROPI_ROOT=str(tmp_path / "root")
    )
    assert done.stderr.startswith("error: ")
    assert "selection.ratio" in done.stderr
    assert "did you mean stages?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_says_what_it_assumes(tmp_path):
    done = cropi("demo", "--no-calibration", "--root", tmp_path / "root")
    assert "upper bounds" in done.stdout
    assert "gradients/pool@2" in done.stdout
    assert "later stages" in done.stdout


def test_a_childs_peak_is_its_own(tmp_path):
    """A child's ``ru_maxrss`` starts at the value of the process that started it."""
    code = (
        "import subprocess, sys; x = bytearray(400 << 20); "
        "print(subprocess.run([sys.executable, '-c', 'from cropi_core.system.memory import peak_resident; "
        "print(peak_resident())'], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200 << 20


def test_processes_with_a_gpu_of_their_own_share_the_time_of_a_step():
    """On the CPU the measured process has used all processors, so more processes there are not faster."""
    several = Runtime.model_validate({"workers": 4, "launch": {"processes": 8}})
    assert processes_at_once(several, on_gpu=True) == (4, 8)
    assert processes_at_once(several, on_gpu=False) == (1, 1)
    assert processes_at_once(Runtime.model_validate({"ray": {"workers": 8}}), on_gpu=True) == (8, 1)
    elsewhere = Runtime.model_validate({"ray": {"workers": 16, "address": "ray://head:10001"}})
    assert processes_at_once(elsewhere, on_gpu=False) == (16, 1)


def test_a_run_on_a_cluster_is_measured_in_this_process(tmp_path):
    """Neither Ray nor `accelerate launch` takes part in a calibration."""
    config = tiny.tiny(runtime={"ray": {"workers": 2}, "launch": {"processes": 2}})
    pool = tmp_path / "pool.parquet"
    write_prompts(build({"reverse": 4}, "pool", 0), pool)
    measured = Calibration(config, tmp_path, {"pool": pool, "goal": pool}, tmp_path).runtime
    assert measured.ray is None
    assert measured.launch is None
