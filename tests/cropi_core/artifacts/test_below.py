"""A root written by another user: links in it must not lead a reader or a writer outside."""

import json
import os

import pytest

from cropi_core.artifacts.below import descriptor, directory_below, read_below, size_below, write_below
from cropi_core.artifacts.keys import content_digest, manifest_checksum
from cropi_core.artifacts.layout import MANIFEST
from cropi_core.artifacts.remote_store import Remote
from cropi_core.artifacts.store import Store
from cropi_core.config.loading import load_config
from cropi_core.errors import ArtifactError
from cropi_core.importing.artifacts import export_artifact
from cropi_core.runs.records import load_run, new_run, save_run
from data_schemas.records import FileEntry
from tests.support.stores import edit, publish


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def outside(tmp_path):
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "a.txt").write_text("secret")
    return directory


@pytest.mark.parametrize(
    "name", ["../outside/a.txt", "/etc/hostname", "link/a.txt", "a.txt", "pipe", "x/../../a", "", "n\0l"]
)
def test_names_and_links_out_of_a_root_are_refused(tmp_path, outside, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "a.txt").symlink_to(outside / "a.txt")
    os.mkfifo(root / "pipe")
    with pytest.raises(ArtifactError):
        read_below(root, name, 100)
    assert size_below(root, name) is None
    with pytest.raises(ArtifactError), descriptor(root, name, os.O_RDWR | os.O_CREAT, create=True):
        pass
    assert (outside / "a.txt").read_text() == "secret"


def test_a_write_replaces_a_link_and_leaves_its_target(tmp_path, outside):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.txt").symlink_to(outside / "a.txt")
    assert write_below(tmp_path / "root", "a.txt", "new").read_text() == "new"
    assert (outside / "a.txt").read_text() == "secret"
    (tmp_path / "root/dir").symlink_to(outside)
    with pytest.raises(ArtifactError, match="symbolic link"):
        write_below(tmp_path / "root", "dir/b.txt", "new")
    with (
        pytest.raises(ArtifactError, match="symbolic link"),
        directory_below(tmp_path / "root", "dir/x", create=True),
    ):
        pass
    assert [path.name for path in outside.iterdir()] == ["a.txt"]


def test_an_artifact_with_a_link_to_the_outside_is_damaged_and_not_exported(store, outside, tmp_path):
    made = publish(store, {"data/a.txt": "secret"})
    data = store.path(made) / "data"
    (data / "a.txt").unlink()
    data.rmdir()
    data.symlink_to(outside)  # the same bytes, so name, size and checksum match the manifest
    assert any("data/a.txt is missing" in fault for fault in store.faults(made.key))
    with pytest.raises(ArtifactError, match="damaged"):
        export_artifact(store, made.key, tmp_path / "out")
    assert not (tmp_path / "out/data/a.txt").exists()


def test_a_link_to_a_directory_among_the_files_is_a_fault(store, outside):
    made = publish(store)
    (store.path(made) / "more").symlink_to(outside)
    assert [fault for fault in store.faults(made.key) if "more is not in the manifest" in fault]


def test_artifacts_below_a_linked_directory_are_not_read_or_moved(store, tmp_path):
    other = Store(tmp_path / "other")
    made = publish(other)
    store.prepare()
    (store.root / "prompts").symlink_to(other.root / "prompts")
    with pytest.raises(ArtifactError, match="symbolic link"):
        store.manifest(made)
    with pytest.raises(ArtifactError, match="symbolic link"):
        store.find(made.key)
    with pytest.raises(ArtifactError):
        store.discard(made.key)
    assert other.faults(made.key) == []


def test_a_lock_that_is_a_link_does_not_empty_its_target(store, outside):
    store.prepare()
    (store.root / ".work/prompts-v1-0123456789abcdef.lock").symlink_to(outside / "a.txt")
    with pytest.raises(ArtifactError, match="symbolic link"), store.claim("prompts-v1-0123456789abcdef"):
        pass
    assert (outside / "a.txt").read_text() == "secret"


@pytest.mark.parametrize("place", [".work", ".damaged", "runs"])
def test_nothing_is_written_through_a_linked_directory(store, outside, place):
    store.root.mkdir()
    made = publish(store) if place != ".work" else None
    target = store.root / place
    target.symlink_to(outside)
    before = sorted(path.name for path in outside.iterdir())
    write = {
        ".work": lambda: publish(store),
        ".damaged": lambda: store.set_aside(made.key, ["fault"]),
        "runs": lambda: save_run(store, new_run(load_config("demo"))),
    }[place]
    with pytest.raises(ArtifactError, match="symbolic link"):
        write()
    assert sorted(path.name for path in outside.iterdir()) == before


def test_a_record_names_its_own_file_only(store, tmp_path):
    record = new_run(load_config("demo"))
    save_run(store, record)
    path = store.root / "runs" / f"{record.run}.json"
    edit(path, run="../../x")
    with pytest.raises(ArtifactError, match="record of another run"):
        load_run(store, record.run)
    with pytest.raises(ArtifactError, match="not the name of a file below the root"):
        store.write("runs/../../x.html", "page")
    assert not (tmp_path / "x.html").exists()


def test_setting_aside_moves_only_the_files_of_the_key_that_is_damaged(store, monkeypatch, tmp_path):
    one, other = publish(store), publish(store, {"c.txt": "three"}, settings={"n": 2})
    text = json.loads((store.path(other) / MANIFEST).read_text())
    moved, removed = [], []

    class Objects:
        def put(self, name, data): ...
        def move(self, place, target):
            moved.append(place)

        def remove(self, name):
            removed.append(name)

        def fetch(self, name, path):
            return True

    monkeypatch.setenv("CROPI_CACHE", str(tmp_path / "cache"))
    remote = Remote("s3://bucket/x")
    remote.objects = Objects()
    mirror = remote.mirror(one.key)
    mirror.parent.mkdir(parents=True)
    for changes in ({}, {"digest": "../../../.."}, {"key": one.key, "digest": "../../../.."}):
        mirror.write_text(json.dumps(text | changes))
        remote.set_aside(one.key, ["fault"])
    assert moved == []
    assert removed == [f"manifests/{one.key}.json"] * 3
    mirror.write_text(json.dumps(text | {"key": one.key}))
    remote.set_aside(one.key, ["fault"])
    assert moved == [f"files/{one.key}/{other.digest[:16]}"]


def test_a_manifest_may_not_name_a_way_out_even_when_its_sums_agree(store):
    made = publish(store)
    path = store.path(made) / MANIFEST
    entry = {"path": "../../tags.json", "size": 2, "sha256": "0" * 64}
    raw = json.loads(path.read_text())
    raw["files"].append(entry)
    raw["digest"] = content_digest([FileEntry(**one) for one in raw["files"]])
    path.write_text(json.dumps(raw | {"checksum": manifest_checksum(raw)}))
    assert any("a file outside the artifact" in fault for fault in store.faults(made.key))


def test_links_in_a_workspace_are_gone_before_a_step_writes(store, outside):
    key = "prompts-v1-" + "0" * 16
    work = store.workspace(key)
    (work / "sub").mkdir()
    (work / "sub/.x.parquet.tmp").symlink_to(outside / "a.txt")
    (work / "whole.txt").write_text("kept")
    logs = store.root / ".logs" / key
    logs.mkdir(parents=True)
    (logs / "server.log").symlink_to(outside / "a.txt")
    store.sweep(key)
    assert sorted(path.name for path in work.rglob("*")) == ["sub", "whole.txt"]
    assert list(store.logs(key).iterdir()) == []
    assert list(store.folder("studies/x").iterdir()) == []
    assert (outside / "a.txt").read_text() == "secret"
