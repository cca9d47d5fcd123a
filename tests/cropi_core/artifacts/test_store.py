"""The store: keys follow content, nothing is overwritten, damage is reported, claims end with their process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.artifacts.layout import MANIFEST
from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import publish_import
from cropi_core.errors import ArtifactError
from data_schemas.records import ArtifactRef
from data_schemas.steps import artifact_key, canonical_json
from tests.support import processes
from tests.support.stores import edit, publish

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(st.text(min_size=1, max_size=3), JSON, max_size=4)
DIGESTS = st.text("0123456789abcdef", min_size=8, max_size=8)


def ref(digest, kind="prompts", key=None):
    return ArtifactRef(kind=kind, key=key or f"{kind}-v1-{'0' * 16}", digest=digest)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


# -- keys --------------------------------------------------------------------------------------------------


@given(SETTINGS, SETTINGS, st.dictionaries(st.text(max_size=3), DIGESTS, max_size=2), DIGESTS)
def test_a_key_changes_with_any_setting_and_any_input_digest(one, other, inputs, digest):
    refs = {name: ref(d) for name, d in inputs.items()}
    assert (artifact_key("scores", 1, one, refs) == artifact_key("scores", 1, other, refs)) == (
        canonical_json(one) == canonical_json(other)
    )
    moved = refs | {"x": ref(digest)}
    same = inputs.get("x") == digest
    assert (artifact_key("scores", 1, one, refs) == artifact_key("scores", 1, one, moved)) == same
    assert artifact_key("scores", 1, one, refs) != artifact_key("scores", 2, one, refs)
    assert artifact_key("scores", 1, one, refs) != artifact_key("selection", 1, one, refs)


@given(SETTINGS, st.dictionaries(st.text(min_size=1, max_size=3), DIGESTS, max_size=3))
def test_a_key_depends_on_nothing_else(settings, inputs):
    """The order of settings and the key of an equal input have no effect."""
    refs = {name: ref(d) for name, d in inputs.items()}
    turned = {name: ref(refs[name].digest, "policy", f"policy-v9-{'f' * 16}") for name in reversed(refs)}
    backwards = dict(reversed(settings.items()))
    assert artifact_key("scores", 1, settings, refs) == artifact_key("scores", 1, backwards, turned)


def test_settings_that_are_no_numbers_have_no_key():
    with pytest.raises(ValueError, match="JSON"):
        artifact_key("scores", 1, {"a": float("nan")}, {})


def test_an_invalid_key_names_no_path(store):
    for name in ("../etc", "prompts/../..", "nothing-v1-00", "prompts-v1-0/../x", ""):
        with pytest.raises(ArtifactError, match="not an artifact key"):
            store.path(name)


# -- publishing --------------------------------------------------------------------------------------------


def test_an_artifact_is_found_again_by_its_key(store):
    made = publish(store)
    assert store.find(made.key) == made
    assert Store(store.root).require(made) == store.path(made)
    assert store.keys() == [made.key]
    assert not (store.root / ".work" / made.key).exists()


def test_publishing_never_overwrites(store):
    made = publish(store)
    before = (store.path(made) / "b.txt").read_bytes()
    with pytest.raises(ArtifactError, match="never overwritten"):
        publish(store, {"b.txt": "other"})
    assert (store.path(made) / "b.txt").read_bytes() == before


def test_equal_content_has_an_equal_digest_at_any_path(store, tmp_path):
    one, other = publish(store, settings={"a": 1}), publish(Store(tmp_path / "b"), settings={"a": 2})
    assert one.digest == other.digest
    assert one.key != other.key


def test_symbolic_links_do_not_enter(store, tmp_path):
    (tmp_path / "secret").write_text("s")
    work = store.workspace(artifact_key("prompts", 1, {}, {}))
    (work / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="symbolic link"):
        publish(store)


def test_a_killed_publisher_leaves_no_half_artifact(store):
    """After a kill at a random moment, an artifact is complete or absent, and the next attempt succeeds."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from cropi_core.curriculum.execution import publish_import
        from cropi_core.artifacts.store import Store
        store = Store(sys.argv[1])
        print("ready", flush=True)
        for n in range(100000):
            publish_import(store, "prompts", {}, {}, lambda out: (out / "a").write_bytes(b"%d" % n * 20000))
        """
    )
    whole = 0
    for delay in (0.0, 0.03, 0.07, 0.15):
        child = processes.start([sys.executable, "-c", script, str(store.root)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        directories = list((store.root / "prompts").glob("*")) if (store.root / "prompts").exists() else []
        assert sorted(d.name for d in directories) == sorted(store.keys())
        assert all(store.faults(key) == [] for key in store.keys())  # noqa: SIM118 - a Store is not a mapping
        whole = len(directories)
    again = publish_import(
        store, "prompts", {}, {}, lambda out: (out / "a").write_bytes(b"%d" % 10**6 * 20000)
    )
    assert store.is_complete(again.key)
    assert len(store.keys()) == whole + 1


def test_importing_the_same_content_twice_is_one_artifact(store):
    made = [
        publish_import(store, "prompts", {}, {}, lambda out: (out / "a").write_text("x")) for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len(store.keys()) == 1


def test_an_import_killed_before_its_last_rename_does_not_block_the_next(store):
    made = publish_import(store, "prompts", {}, {}, lambda out: (out / "a").write_text("x"))
    store.path(made).rename(store.workspace(made.key))
    assert store.find(made.key) is None
    assert publish_import(store, "prompts", {}, {}, lambda out: (out / "a").write_text("x")) == made


# -- damage ------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "deleted": (lambda d: (d / "b.txt").unlink(), "b.txt is missing"),
    "changed": (lambda d: flip(d / "b.txt"), "b.txt does not match its sha256"),
    "truncated": (lambda d: os.truncate(d / "data/a.txt", 1), "data/a.txt has 1 bytes"),
    "foreign": (lambda d: (d / "data/new").write_text(""), "data/new is not in the manifest"),
    "linked": (
        lambda d: ((d / "b.txt").unlink(), (d / "b.txt").symlink_to("data/a.txt")),
        "b.txt is missing",
    ),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "no artifact"),
    "half a manifest": (lambda d: os.truncate(d / MANIFEST, 40), "is not JSON"),
    "another manifest": (lambda d: edit(d / MANIFEST, key=f"prompts-v1-{'a' * 16}"), "names prompts-v1-aaaa"),
    "another digest": (lambda d: edit(d / MANIFEST, digest="0" * 64), "digest"),
    "a way out": (lambda d: escape(d), "outside the artifact"),
}


def escape(directory):
    files = json.loads((directory / MANIFEST).read_text())["files"]
    edit(directory / MANIFEST, files=[*files, {"path": "../../tags.json", "size": 1, "sha256": "0"}])


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_set_aside(store, what):
    spoil, words = DAMAGE[what]
    made = publish(store)
    assert store.faults(made.key) == []
    spoil(store.path(made))
    assert any(words in fault for fault in store.faults(made.key)), store.faults(made.key)
    with pytest.raises(ArtifactError, match="cannot be used"):
        store.require(made)
    assert store.find(made.key) is None
    assert not store.path(made).exists()
    (aside,) = store.damaged()
    assert words in (aside.parent / f"{aside.name}.txt").read_text()
    assert publish(store) == made
    assert store.require(made)


def test_another_schema_version_is_an_error_and_is_not_changed(store):
    made = publish(store)
    edit(store.path(made) / MANIFEST, schema_version=99)
    with pytest.raises(ArtifactError, match="schema version 99"):
        store.find(made.key)
    assert store.path(made).exists()


def test_a_reference_to_other_content_is_refused(store):
    made = publish(store)
    with pytest.raises(ArtifactError, match="was requested"):
        store.require(made.model_copy(update={"digest": "f" * 64}))


# -- claims ------------------------------------------------------------------------------------------------

CLAIM = """
import sys, time
from cropi_core.artifacts.store import Store
with Store(sys.argv[1]).claim("prompts-v1-0"):
    print("held", time.time(), flush=True)
    time.sleep(float(sys.argv[2]))
    print("freed", time.time(), flush=True)
"""


def claimant(store, seconds):
    return processes.start(
        [sys.executable, "-c", CLAIM, str(store.root), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_a_second_process_waits_for_a_claim(store):
    first = claimant(store, 0.5)
    assert first.stdout.readline().startswith("held")
    second = claimant(store, 0)
    held = float(second.communicate()[0].split()[1])
    freed = float(first.communicate()[0].split()[1])
    assert held >= freed


def test_the_claim_of_a_killed_owner_is_free(store):
    first = claimant(store, 60)
    assert first.stdout.readline().startswith("held")
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    second = claimant(store, 0)
    assert "freed" in second.communicate(timeout=500)[0]


def test_a_child_that_inherits_a_claim_keeps_it_when_its_parent_goes(store):
    with store.claim("prompts-v1-0") as lock:
        child = subprocess.Popen(["sleep", "0.6"], pass_fds=[lock])
    waiting = claimant(store, 0)
    time.sleep(0.2)
    assert child.poll() is None
    assert waiting.poll() is None
    assert "held" in waiting.communicate(timeout=500)[0]
    assert child.wait() == 0


# -- names -------------------------------------------------------------------------------------------------


def test_tags_and_beginnings_of_keys_resolve(store):
    one, other = publish(store, settings={"a": 1}), publish(store, settings={"a": 2})
    store.tag("best", one.key)
    assert store.resolve("best") == one.key
    assert store.resolve(other.key) == other.key
    length = next(n for n in range(40) if one.key[:n] != other.key[:n])
    assert store.resolve(one.key[:length]) == one.key
    with pytest.raises(ArtifactError, match="2 artifacts begin so"):
        store.resolve("prompts-v1")
    with pytest.raises(ArtifactError, match="no artifact or tag"):
        store.resolve("scores")
    store.tag("best", other.key)
    assert store.resolve("best") == other.key


def test_a_moved_root_is_the_same_store(store, tmp_path):
    made = publish(store)
    shutil.move(store.root, tmp_path / "moved")
    assert Store(tmp_path / "moved").require(made).is_relative_to(tmp_path / "moved")


def test_a_fault_is_one_line_for_any_message_of_pydantic(tmp_path):
    store = Store(tmp_path)
    key = publish(store).key
    path = store.path(key) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setuings": {}, "seconds": "never"}))
    (fault,) = store.faults(key)
    assert "\n" not in fault
    assert "https" not in fault
    assert all(words in fault for words in (str(path), "setuings: Extra inputs", "seconds: Input should be"))


def test_runs_can_be_listed_while_their_records_are_written(store):
    """A record is first written under a temporary name, which disappears a moment later."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            store.write("runs/one.json", "{}")

    writer = threading.Thread(target=write)
    store.write("runs/one.json", "{}")
    writer.start()
    try:
        assert all(store.names("runs") == ["one.json"] for _ in range(300))
    finally:
        stop.set()
        writer.join()
