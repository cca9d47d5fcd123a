"""The space of runs, their removal, and the states that `cropi runs` names."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.runs.records import (
    in_progress,
    list_runs,
    new_run,
    resolve_key,
    run_lock,
    save_run,
    state_name,
    unnamed,
)
from cropi_core.runs.space import expired, run_spaces
from data_schemas.config import Config
from data_schemas.records import SlotRecord
from tests.support.stores import publish

WORLD = {"kind": "world", "families": {"sort": 4}}
NOON = datetime(2026, 1, 10, 12, tzinfo=UTC)


def saved(store, name, status="done", days_ago=0.0, **slots):
    """Save the record of a run that ended some days before noon."""
    config = Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}}, "name": name})
    end = (NOON - timedelta(days=days_ago)).isoformat(timespec="seconds")
    record = new_run(config).model_copy(
        update={
            "status": status,
            "finished": None if status == "running" else end,
            "slots": {
                slot.replace("_", "@"): SlotRecord(ref=r, origin="computed") for slot, r in slots.items()
            },
        }
    )
    save_run(store, record)
    return record


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def shared(store):
    """Return two runs: both refer to a set of prompts of 1000 bytes, one failed and has scores of 500 bytes alone."""
    pool = publish(store, {"a.txt": "x" * 1000})
    scores = publish(store, {"a.txt": "y" * 500}, kind="scores", inputs={"train": pool})
    return saved(store, "good", pool=pool), saved(store, "bad", "failed", scores_1=scores), pool, scores


def cropi(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout


def test_the_space_of_a_run_covers_its_lineage_and_its_exclusive_part(store, shared):
    good, bad, _, scores = shared
    spaces = {space.run: space for space in run_spaces(store)}
    assert (spaces[good.run].kinds, spaces[good.run].alone) == ({"prompts": 1000}, 0)
    assert (spaces[bad.run].kinds, spaces[bad.run].alone) == ({"prompts": 1000, "scores": 500}, 500)
    store.tag("mine", scores.key)
    assert {space.alone for space in run_spaces(store)} == {0}
    store.untag("mine")
    store.discard(scores.key)
    assert {space.run: space.total for space in run_spaces(store)} == {good.run: 1000, bad.run: 0}


def test_a_rule_of_age_and_count_removes_the_oldest_ends(store):
    records = [saved(store, f"r{days}", days_ago=days) for days in (0, 1, 5, 40, 90)]
    names = [record.run for record in records]
    assert expired(records) == names[::-1]
    assert expired(records, keep=2) == [names[4], names[3], names[2]]
    assert expired(records, ended_before=NOON - timedelta(days=30)) == [names[4], names[3]]
    assert expired(records, ended_before=NOON - timedelta(days=30), keep=4) == [names[4]]
    assert expired(records, keep=9) == []


def test_a_run_is_removed_by_name_after_a_dry_run(store, shared):
    good, bad, _, scores = shared
    store.write(f"runs/{bad.run}.html", "report")
    root = ("--root", store.url)
    told = json.loads(cropi("runs", "rm", bad.run, "--json", *root))
    assert told == {"removed": False, "runs": [bad.run], "artifacts": [scores.key], "bytes": 500}
    assert "nothing was removed" in cropi("runs", "rm", bad.run, *root)
    assert list_runs(store) == [good.run, bad.run]
    cropi("runs", "rm", bad.run, "--yes", *root)
    assert (list_runs(store), store.names("runs")) == ([good.run], [f"{good.run}.json"])
    assert unnamed(store) == [scores.key]


def test_rules_choose_ended_runs_only(store, shared):
    _, bad, *_ = shared
    saved(store, "waits", "waiting")
    alive, lost = saved(store, "alive", "running"), saved(store, "lost", "running")
    with run_lock(store, lost.run):
        pass
    root = ("--json", "--root", store.url)
    with run_lock(store, alive.run):
        chosen = json.loads(cropi("runs", "rm", "--failed", *root))["runs"]
        assert sorted(chosen) == sorted([bad.run, lost.run])
        assert alive.run not in json.loads(cropi("runs", "rm", "--keep", "0", *root))["runs"]
        refused = CliRunner().invoke(app, ["runs", "rm", alive.run, "--yes", *root])
    assert "in progress" in str(refused.exception)
    assert len(json.loads(cropi("runs", "rm", "--older-than", "1", "--failed", *root))["runs"]) == 1


@pytest.mark.parametrize("arguments", [[], ["x", "--keep", "1"], ["x", "--failed"]])
def test_a_removal_names_runs_or_gives_a_rule(store, arguments):
    refused = CliRunner().invoke(app, ["runs", "rm", *arguments, "--root", store.url])
    assert isinstance(refused.exception, ConfigError)


def test_options_before_a_subcommand_are_refused_not_ignored(store):
    refused = CliRunner().invoke(app, ["runs", "--root", store.url, "rm", "--keep", "0", "--yes"])
    assert "cropi runs rm ... --root DIR" in str(refused.exception)


def test_collecting_can_ignore_failed_runs(store, shared):
    _, _, _, scores = shared
    root = ("--json", "--root", store.url)
    assert json.loads(cropi("artifacts", "gc", *root))["artifacts"] == []
    listed = json.loads(cropi("artifacts", "gc", "--failed", *root))["artifacts"]
    assert [row["key"] for row in listed] == [scores.key]
    cropi("artifacts", "gc", "--failed", "--yes", *root)
    assert not store.has(scores)


def test_a_tag_is_removed(store, shared):
    _, _, pool, _ = shared
    store.tag("mine", pool.key)
    assert pool.key in cropi("artifacts", "untag", "mine", "--root", store.url)
    assert store.tags() == {}
    with pytest.raises(ArtifactError, match=r"no tag 'mine'.*none"):
        store.untag("mine")


def test_sizes_are_listed_by_kind(store, shared):
    _, bad, *_ = shared
    rows = json.loads(cropi("runs", "--sizes", "--json", "--root", store.url))
    (row,) = [row for row in rows if row["run"] == bad.run]
    assert row == {"run": bad.run, "bytes": 1500, "alone": 500, "kinds": {"scores": 500, "prompts": 1000}}
    assert "1.5 kB" in cropi("runs", "--sizes", "--root", store.url)


@pytest.mark.parametrize(
    ("status", "state"),
    [("done", "Completed"), ("failed", "Failed"), ("cancelled", "Cancelled"), ("waiting", "Suspended")],
)
def test_states_are_words_of_prefect(store, status, state):
    assert state_name(store, saved(store, "one", status)) == state
    assert state in cropi("runs", "--root", store.url)


def test_a_run_without_its_process_is_crashed(store):
    record = saved(store, "one", "running")
    assert (in_progress(store, record.run), state_name(store, record)) == (None, "Running")
    with run_lock(store, record.run):
        assert (in_progress(store, record.run), state_name(store, record)) == (True, "Running")
    assert (in_progress(store, record.run), state_name(store, record)) == (False, "Crashed")


def test_an_artifact_is_named_by_run_and_slot(store, shared):
    good, bad, pool, scores = shared
    assert resolve_key(store, f"{bad.run}:scores@1") == scores.key
    assert resolve_key(store, pool.key[:-2]) == pool.key
    shown = json.loads(cropi("artifacts", "show", f"{good.run}:pool", "--json", "--root", store.url))
    assert shown["key"] == pool.key
    with pytest.raises(ArtifactError, match=f"run {bad.run} has no 'nothing'; it has: scores@1"):
        resolve_key(store, f"{bad.run}:nothing")


def test_unfinished_work_is_collected_unless_a_process_holds_its_claim(store):
    idle, held_key = "scores-v1-0000000000000000", "scores-v1-1111111111111111"
    for key in (idle, held_key):
        (store.workspace(key) / "part").write_text("x" * 700)
    damaged = publish(store, {"a.txt": "y" * 300})
    aside = store.set_aside(damaged.key, ["a fault"])
    root = ("--json", "--root", store.url)
    collect = ("artifacts", "gc", "--unfinished", "--age", "0", *root)
    assert json.loads(cropi("artifacts", "gc", "--unfinished", *root))["artifacts"] == []  # too new
    assert json.loads(cropi("artifacts", "gc", "--age", "0", *root))["artifacts"] == []  # not asked for
    with store.claim(held_key):
        listed = json.loads(cropi(*collect))["artifacts"]
        assert {row["key"]: row["bytes"] > 0 for row in listed} == {
            f".damaged/{aside.name}": True,
            f".work/{idle}": True,
        }
        cropi(*collect, "--yes")
        assert (store.root / ".work" / held_key / "part").exists()
    assert not (store.root / ".work" / idle).exists()
    assert list((store.root / ".damaged").iterdir()) == []
    (store.root / ".work" / "scores-v1-2222222222222222").symlink_to(store.root / ".work" / held_key)
    cropi(*collect, "--yes")
    assert not (store.root / ".work" / held_key).exists()
