"""What a second run computes: what changed and what follows from it, what was damaged, and nothing else."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.curriculum import repeat_finished, slot_names
from cropi_core.errors import ArtifactError, ConfigError, SelectionError
from cropi_core.importing.artifacts import import_artifact
from cropi_core.runs.records import load_run, run_id
from tests.support.tiny import artifact_files, computed, digests, go, origins, tiny, world


def test_a_second_run_computes_nothing_and_touches_no_file(own_copy):
    root, record = own_copy
    before = artifact_files(root)
    again = go(tiny(), root)
    assert set(origins(again)) == set(slot_names(tiny()))
    assert set(origins(again).values()) == {"cached"}
    assert digests(again) == digests(record)
    assert artifact_files(root) == before


def test_a_finished_run_is_repeated_only_if_every_byte_is_there(own_copy):
    root, record = own_copy
    seen = []
    again = repeat_finished(tiny(), Store(root), lambda slot, result: seen.append(slot))
    assert again is not None
    assert digests(again) == digests(record)
    assert set(seen) == set(slot_names(tiny()))
    assert repeat_finished(tiny(seed=1), Store(root), lambda slot, result: None) is None  # never ran
    path = Store(root).path(record.slots["scores@1"].ref.key) / "scores.parquet"
    flip(path, path.stat().st_size // 2)
    assert repeat_finished(tiny(), Store(root), lambda slot, result: None) is None
    # The damaged artifact is left for the run that repairs it, which reports the damage; until then it is unfinished.
    assert Store(root).damaged() == []
    assert load_run(Store(root), record.run).status == "failed"
    (note,) = go(tiny(), root).notes
    assert "scores@1 was damaged" in note


# -- changed settings ---------------------------------------------------------------------------------------

AFTER_SELECTION = {"policy@1", "evaluation@1"}
AFTER_SCORES = {"selection@1"} | AFTER_SELECTION
AFTER_GRADIENTS = {"scores@1"} | AFTER_SCORES
AFTER_ROLLOUTS = {"gradients/pool@1", "gradients/goal@1"} | AFTER_GRADIENTS
CHANGES = {
    "metric": ({"scores": {"metric": "dot"}}, {"scores@1"} | AFTER_SCORES),
    "fusion": ({"scores": {"fusion": "max"}}, {"scores@1"} | AFTER_SCORES),
    "ratio": ({"selection": {"ratio": 0.3}}, {"selection@1"} | AFTER_SELECTION),
    "learning rate": ({"training": {"learning_rate": 1e-3}}, AFTER_SELECTION),
    "test set": (
        {"data": {"test": {"other": world(reverse=4)}}},
        {"prompts/other", "evaluation@0", "evaluation@1"},
    ),
    "projection": ({"projection": {"k": 128}}, AFTER_ROLLOUTS),
    "seed": ({"seed": 1}, {"rollouts/pool@1", "rollouts/goal@1"} | AFTER_ROLLOUTS),
    "runtime": (
        {
            "runtime": {
                "device": "auto",
                "threads": 2,
                "mode": "subprocess",
                "generation_rows": 7,
                "token_budget": 99,
                "workers": 2,
                "train_micro_batch": 4,
            }
        },
        set(),
    ),
    "name": ({"name": "another"}, set()),
    "a stage less": ({}, set()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_setting_computes_its_step_and_what_follows_and_nothing_before(own_copy, what):
    root, record = own_copy
    changes, expected = CHANGES[what]
    before = artifact_files(root)
    again = go(tiny(**{**changes, "stages": 1}), root)
    # Another score may choose the same subset: equal content stops there, and the policy is evaluated already.
    assert expected - {"evaluation@1"} <= computed(again) <= expected
    kept = set(origins(again)) - computed(again)
    assert {slot: digests(again)[slot] for slot in kept} == {slot: digests(record)[slot] for slot in kept}
    after = artifact_files(root)
    assert {name: after[name] for name in before} == before, "what an earlier run made is never touched"


# -- damage -------------------------------------------------------------------------------------------------

FILES = [
    ("prompts/pool", "prompts.parquet"),
    ("policy@0", "checkpoint/model.safetensors"),
    ("policy@0", "checkpoint/config.json"),
    ("policy@1", "checkpoint/tokenizer.json"),
    ("policy@1", "metrics.parquet"),
    ("rollouts/pool@1", "parts/part-00002.parquet"),
    ("gradients/pool@1", "gradients.zarr/features/c/1/0"),
    ("gradients/pool@1", "gradients.zarr/status/c/0"),
    ("gradients/goal@1", "gradients.zarr/zarr.json"),
    ("scores@1", "scores.parquet"),
    ("selection@1", "selection.parquet"),
    ("evaluation@1", "completions.parquet"),
    ("evaluation@1", "accuracy.json"),
    ("rollouts/goal@1", "manifest.json"),
]


def flip(path, at):
    """Flip one bit of a file and keep its times, as a failing disk does."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("harm", ["deleted", "flipped"])
@pytest.mark.parametrize(("slot", "name"), FILES)
def test_damage_is_noticed_named_set_aside_and_repaired(own_copy, slot, name, harm):
    root, record = own_copy
    key = record.slots[slot].ref.key
    path = root / key.partition("-")[0] / key / name
    if harm == "deleted":
        path.unlink()
    else:
        flip(path, path.stat().st_size // 2)
    faults = Store(root).faults(key)
    assert any(str(path) in fault or "no artifact" in fault for fault in faults)
    again = go(tiny(), root)
    assert computed(again) == {slot}
    assert digests(again) == digests(record)
    assert Store(root).faults(key) == []
    (aside,) = Store(root).damaged()
    assert aside.name.startswith(key)
    (note,) = again.notes
    assert slot in note
    assert str(aside) in note
    assert faults[0] in note
    assert (aside.parent / f"{aside.name}.txt").read_text().splitlines() == faults


def noticed(store, key):
    try:
        return bool(store.faults(key))
    except ArtifactError as error:  # it could be another program's: that is told and left alone
        return "schema version" in str(error)


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed(own_copy):
    root, record = own_copy
    key = record.slots["selection@1"].ref.key
    path = root / "selection" / key / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flip(path, at)
        assert noticed(Store(root), key), f"byte {at}: {path.read_bytes()[max(0, at - 40) : at + 20]}"
        path.write_bytes(whole)
    assert Store(root).faults(key) == []


def test_what_followed_from_a_damaged_input_is_found_by_equal_content(own_copy):
    root, record = own_copy
    for slot in ("prompts/pool", "rollouts/pool@1", "scores@1"):
        shutil.rmtree(Store(root).path(record.slots[slot].ref))
    again = go(tiny(), root)
    assert computed(again) == {"prompts/pool", "rollouts/pool@1", "scores@1"}
    assert digests(again) == digests(record)


# -- the same in other ways ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_a_step_gives_the_same_bytes(own_copy):
    root, record = own_copy
    again = {
        "rollouts/pool@1",
        "gradients/pool@1",
        "scores@1",
        "selection@1",
        "policy@1",
        "evaluation@1",
    }
    for slot in again:
        Store(root).discard(record.slots[slot].ref.key)
    other = go(tiny(stages=1, runtime={"mode": "subprocess"}), root)
    assert computed(other) == again
    assert digests(other) == {slot: digests(record)[slot] for slot in digests(other)}


# -- pins ---------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(own_copy, tmp_path):
    """The pool's rollouts with one reward changed, imported as somebody's own file."""
    root, record = own_copy
    parts = Store(root).path(record.slots["rollouts/pool@1"].ref) / "parts"
    table = pq.read_table(parts)
    rewards = table["reward"].to_pylist()
    rewards[0] = 1.0 - rewards[0]
    at = table.schema.get_field_index("reward")
    changed = table.set_column(at, table.schema.field(at), pa.array(rewards, pa.float32()))
    pq.write_table(changed, tmp_path / "mine.parquet")
    return import_artifact(Store(root), "rollouts", tmp_path / "mine.parquet")


def test_pinned_rollouts_move_the_keys_after_them_and_no_others(own_copy, imported):
    root, record = own_copy
    Store(root).tag("mine", imported.key)
    for name in (imported.key, imported.key[:-3], "mine"):
        pinned = go(tiny(stages=1, pin={"rollouts": name}), root)
        assert pinned.slots["rollouts/pool@1"].ref == imported
        assert pinned.slots["rollouts/pool@1"].origin == "pinned"
    moved = {slot for slot, entry in pinned.slots.items() if entry.ref.key != record.slots[slot].ref.key}
    assert moved >= {"rollouts/pool@1", "gradients/pool@1", "scores@1", "selection@1", "policy@1"}
    assert moved <= {"rollouts/pool@1", "gradients/pool@1"} | AFTER_GRADIENTS
    assert pinned.slots["rollouts/goal@1"].origin == "cached"


BAD_PINS = {
    "unknown slot": ({"rolouts": "{rollouts/pool@1}"}, ConfigError, ["'rolouts'", "rollouts/pool@1"]),
    "slot of a stage that is not": ({"scores@3": "{scores@1}"}, ConfigError, ["'scores@3'", "scores@2"]),
    "wrong kind": (
        {"scores@2": "{selection@1}"},
        ConfigError,
        ["scores@2", "of kind selection", "the slot needs scores"],
    ),
    "missing key": (
        {"rollouts": "rollouts-v1-0123456789abcdef"},
        ArtifactError,
        ["rollouts-v1-0123456789abcdef", "no artifact or tag", "cropi artifacts ls"],
    ),
    "ambiguous": ({"rollouts": "rollouts-v1-"}, ArtifactError, ["'rollouts-v1-'", "2 artifacts begin so"]),
}


@pytest.mark.parametrize("what", BAD_PINS)
def test_an_impossible_pin_is_reported_before_anything_runs(own_copy, what):
    root, record = own_copy
    pins, kind, words = BAD_PINS[what]
    keys = {f"{{{slot}}}": entry.ref.key for slot, entry in record.slots.items()}
    config = tiny(pin={slot: keys.get(key, key) for slot, key in pins.items()}, name="pinned")
    with pytest.raises(kind) as error:
        go(config, root)
    assert all(word in str(error.value) for word in words), error.value
    told = load_run(Store(root), run_id(config))
    assert (told.status, told.slots) == ("failed", {})
    assert str(error.value) in told.error


def test_a_damaged_pin_is_an_error_that_names_it_and_is_left_where_it_is(own_copy, imported):
    root, _ = own_copy
    path = Store(root).path(imported) / "parts" / "part-00000.parquet"
    flip(path, 100)
    with pytest.raises(ArtifactError, match=f"{imported.key}.*{path.name} does not match its sha256"):
        go(tiny(stages=1, pin={"rollouts": imported.key}), root)
    assert path.exists()
    assert Store(root).damaged() == []


def test_pinned_rollouts_of_other_prompts_are_refused(own_copy):
    root, record = own_copy
    key = record.slots["rollouts/goal@1"].ref.key
    with pytest.raises(SelectionError, match="pool"):
        go(tiny(stages=1, pin={"rollouts/pool": key}), root)


def test_a_pinned_policy_is_the_base_and_a_pinned_stage_is_not_trained(own_copy):
    root, record = own_copy
    trained = record.slots["policy@2"].ref
    base = go(tiny(stages=1, pin={"policy": record.slots["policy@0"].ref.key}), root)
    assert origins(base).pop("policy@0") == "pinned"
    assert computed(base) == set()
    skipped = go(tiny(stages=1, pin={"policy@1": trained.key}), root)
    assert skipped.slots["policy@1"].ref == trained
    assert skipped.slots["evaluation@1"].ref == record.slots["evaluation@2"].ref
