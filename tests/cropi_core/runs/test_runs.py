"""Run records and lineage: artifacts of a run, their inputs and descendants, and which can be collected."""

import pytest

from cropi_core.artifacts.keys import content_digest, file_entries
from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import provenance
from cropi_core.errors import ArtifactError
from cropi_core.runs.records import (
    ancestors,
    descendants,
    list_runs,
    load_run,
    new_run,
    run_id,
    save_run,
    slot_ref,
    unnamed,
)
from data_schemas.config import Config
from data_schemas.records import Manifest, SlotRecord
from data_schemas.steps import artifact_key

WORLD = {"kind": "world", "families": {"sort": 4}}


def config(**changes):
    return Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}}, **changes})


def make(store, kind, name, **inputs):
    key = artifact_key(kind, 1, {"name": name}, inputs)
    work = store.workspace(key)
    (work / "a.txt").write_text(name)
    entries = file_entries(work)
    step = "training" if kind == "policy" else kind
    return store.publish(
        Manifest(
            kind=kind,
            key=key,
            digest=content_digest(entries),
            step=step,
            inputs=inputs,
            settings={"name": name},
            files=entries,
            summary={},
            seconds=0,
            device="",
            **provenance(),
        )
    )


@pytest.fixture
def chain(tmp_path):
    """Return two sets of prompts, rollouts of one, gradients, scores; and an unused set."""
    store = Store(tmp_path)
    made = {"pool": make(store, "prompts", "pool"), "stray": make(store, "prompts", "stray")}
    made["policy"] = make(store, "policy", "base")
    made["rollouts"] = make(store, "rollouts", "r", prompts=made["pool"], policy=made["policy"])
    made["gradients"] = make(store, "gradients", "g", rollouts=made["rollouts"], policy=made["policy"])
    made["scores"] = make(store, "scores", "s", train=made["gradients"])
    return store, made


def keys(manifests):
    return {m.key for m in manifests}


def test_lineage_is_walked_both_ways_each_artifact_once(chain):
    store, made = chain
    up = ancestors(store, made["scores"].key)
    assert up[0].key == made["scores"].key
    assert keys(up) == {made[n].key for n in ("scores", "gradients", "rollouts", "policy", "pool")}
    assert len(up) == 5
    down = descendants(store, made["pool"].key)
    assert down[0].key == made["pool"].key
    assert keys(down) == {made[n].key for n in ("pool", "rollouts", "gradients", "scores")}
    assert len(down) == 4
    for one in made.values():
        for other in made.values():
            above = other.key in keys(ancestors(store, one.key))
            assert above == (one.key in keys(descendants(store, other.key)))


def test_artifacts_of_a_run_or_a_tag_are_kept_with_their_inputs(chain):
    store, made = chain
    assert set(unnamed(store)) == {ref.key for ref in made.values()}
    store.tag("mine", made["rollouts"].key)
    assert set(unnamed(store)) == {made[n].key for n in ("stray", "gradients", "scores")}
    record = new_run(config())
    record.slots["scores@1"] = SlotRecord(ref=made["scores"], origin="computed")
    save_run(store, record)
    assert unnamed(store) == [made["stray"].key]


def test_a_run_that_names_a_lost_artifact_still_keeps_the_others(chain):
    store, made = chain
    record = new_run(config())
    record.slots.update({name: SlotRecord(ref=ref, origin="computed") for name, ref in made.items()})
    save_run(store, record)
    store.discard(made["stray"].key)
    assert unnamed(store) == []


def test_a_lost_input_does_not_stop_collecting(chain):
    """An artifact with a missing input is still referenced, and the rest of its lineage is kept."""
    store, made = chain
    store.tag("mine", made["scores"].key)
    store.set_aside(made["rollouts"].key, ["damaged"])
    assert set(unnamed(store)) == {made["stray"].key, made["pool"].key}


def test_a_record_is_read_as_it_was_written(chain):
    store, made = chain
    record = new_run(config(name="mine"))
    record.slots["prompts/pool"] = SlotRecord(ref=made["pool"], origin="pinned")
    save_run(store, record)
    assert load_run(store, record.run) == record
    assert list_runs(store) == [record.run]
    assert slot_ref(record, "prompts/pool") == made["pool"]
    with pytest.raises(ArtifactError, match="prompts/pool"):
        slot_ref(record, "scores@1")


def test_the_same_configuration_is_the_same_run_whatever_it_runs_on():
    assert run_id(config()) == run_id(config(runtime={"device": "cpu", "workers": 4}))
    assert run_id(config()) != run_id(config(seed=1))
    assert run_id(config(name="mine")).startswith("mine-")


@pytest.mark.parametrize("name", ["none", "../tags", "/etc/passwd", ""])
def test_a_missing_run_lists_the_existing_ones(chain, name):
    store, _ = chain
    save_run(store, new_run(config(name="mine")))
    with pytest.raises(ArtifactError, match="there are: mine-"):
        load_run(store, name)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "not a run record"),
        ('{"sche', "not valid JSON"),
    ],
)
def test_a_record_that_cannot_be_read_says_why(chain, text, word):
    store, _ = chain
    record = new_run(config())
    save_run(store, record)
    (store.root / "runs" / f"{record.run}.json").write_text(text)
    with pytest.raises(ArtifactError, match=word):
        load_run(store, record.run)
