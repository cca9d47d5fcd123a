"""A root on S3: an artifact exists once its manifest does, even if a process was killed; damage is reported.

Every test uses a real server (moto's) in a separate process. A second machine is a second cache.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cropi_core.artifacts.layout import MANIFEST
from cropi_core.artifacts.object_storage import Objects
from cropi_core.artifacts.store import Store
from cropi_core.cli.doctor import examine
from cropi_core.curriculum.execution import publish_import
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.runs.records import list_runs, load_run, new_run, save_run
from tests.support import processes
from tests.support.bucket import Server, new_bucket, objects, s3
from tests.support.tiny import tiny

pytestmark = pytest.mark.slow

FILES = {f"parts/part-{n:05d}": f"{n}" * 2000 for n in range(8)} | {"b.txt": "two"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Open an address like a separate machine, with its own cache."""

    def opened(url, name="one"):
        monkeypatch.setenv("CROPI_CACHE", str(tmp_path / name))
        return Store(url)

    return opened


@pytest.fixture
def url(s3_server):
    return new_bucket()


def publish(store, files=None):
    """Publish prompts; other content has another key."""

    def fill(out):
        for name, text in (FILES if files is None else files).items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)

    return publish_import(store, "prompts", {}, {}, fill)


def contents(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_text()
        for p in directory.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }


def spoil(url, name, data):
    """Change an object without the store's knowledge."""
    (path,) = [n for n in objects(url) if n.endswith(name)]
    s3().pipe_file(f"{url}/{path}".partition("://")[2], data)


def fetched(server, before):
    """Return the artifact files requested since."""
    asked = server.asked()[before:]
    return [line for line in asked if line.startswith("GET") and "/files/" in line and "?" not in line]


# -- round trip --------------------------------------------------------------------------------------------


def test_what_one_machine_publishes_another_finds_and_reads(url, machine):
    one = machine(url)
    one.prepare()
    made = publish(one)
    other = machine(url, "other")
    other.prepare()
    assert other.find(made.key) == made
    assert not other.path(made).exists(), "finding fetches no file"
    assert contents(other.require(made)) == FILES == contents(one.path(made))
    assert other.is_complete(made.key)
    assert other.faults(made.key) == []
    assert other.keys() == [made.key]
    assert other.manifest(made) == one.manifest(made)


def test_what_is_in_the_cache_is_not_fetched_again(url, machine, s3_server):
    made = publish(machine(url))
    other = machine(url, "other")
    other.require(made)
    before = len(s3_server.asked())
    other.require(made)
    asked = s3_server.asked()[before:]
    assert len(asked) == 1, asked
    assert asked[0].endswith(f"manifests/{made.key}.json")


def test_a_damaged_copy_in_the_cache_is_fetched_again(url, machine):
    made = publish(machine(url))
    other = machine(url, "other")
    (other.require(made) / "b.txt").write_text("owt")
    assert contents(other.require(made)) == FILES
    (aside,) = other.damaged()
    assert (aside / "b.txt").read_text() == "owt"


# -- stops -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from cropi_core.artifacts.object_storage import Objects
from cropi_core.curriculum.execution import publish_import
from cropi_core.artifacts.store import Store

event, count = sys.argv[2], int(sys.argv[3])
real, seen = getattr(Objects, event), 0

def watched(self, *given):
    global seen
    if event == "send" or given[0].startswith("manifests/"):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *given)

setattr(Objects, event, watched)

def fill(out):
    (out / "parts").mkdir()
    for n in range(8):
        (out / f"parts/part-{n:05d}").write_text(f"{n}" * 2000)
    (out / "b.txt").write_text("two")

publish_import(Store(sys.argv[1]), "prompts", {}, {}, fill)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("event", "count"), [("send", 1), ("send", 5), ("create", 1)])
def test_a_killed_upload_is_no_artifact_and_is_completed_by_the_next(
    url, machine, s3_server, event, count, tmp_path
):
    one = machine(url)
    child = processes.run([sys.executable, "-c", KILLED, url, event, str(count)], check=False)
    assert child.returncode == -signal.SIGKILL
    there = [name for name in objects(url) if name.startswith("files/")]
    assert len(there) == (9 if event == "create" else len(there))
    assert machine(url, "other").keys() == []
    (local,) = [p.parent for p in (one.root / "prompts").glob(f"*/{MANIFEST}")]
    assert machine(url, "other").find(local.name) is None

    before = len(s3_server.asked())
    made = publish(machine(url))
    sent = [line for line in s3_server.asked()[before:] if line.startswith("PUT") and "/files/" in line]
    assert len(sent) == 9 - len(there), sent
    assert contents(machine(url, "third").require(made)) == FILES


def test_a_find_completes_what_was_not_sent(url, machine):
    """A step killed after the artifact was complete on this machine is not computed again: the artifact is sent."""
    made = publish(machine(url))
    Objects(url).remove(f"manifests/{made.key}.json")
    assert machine(url, "other").find(made.key) is None
    assert machine(url).find(made.key) == made
    assert machine(url, "other").find(made.key) == made


def test_an_interrupted_fetch_resumes(url, machine, s3_server):
    made = publish(machine(url))
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from cropi_core.artifacts.store import Store
        real, seen = Path.replace, []
        def watched(self, target):
            if self.suffix == ".partial" and ".fetch" in self.parts:
                seen.append(self)
                if len(seen) == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)
        Path.replace = watched
        Store(sys.argv[1]).directory(sys.argv[2])
        """
    )
    other = machine(url, "other")
    child = processes.run([sys.executable, "-c", script, url, made.key], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not other.path(made).exists()
    left = [p for p in (other.root / ".fetch").rglob("*") if p.is_file() and p.suffix != ".lock"]
    whole = [p for p in left if p.suffix != ".partial"]
    assert 0 < len(whole) < len(left)
    before = len(s3_server.asked())
    assert contents(other.require(made)) == FILES
    got = fetched(s3_server, before)
    assert len(got) == 9 - len(whole)


# -- concurrent publishing ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_that_publish_one_key_leave_one_whole_artifact(url, machine, tmp_path):
    """Equal settings and a different last digit: the first manifest wins, and both machines continue with it."""
    script = textwrap.dedent(
        """
        import sys
        from cropi_core.artifacts.keys import content_digest, file_entries
        from cropi_core.curriculum.execution import provenance
        from cropi_core.artifacts.store import Store
        from data_schemas.records import Manifest
        store, key = Store(sys.argv[1]), "scores-v1-" + "0" * 16
        work = store.workspace(key)
        for n in range(20):
            (work / str(n)).write_text(sys.argv[2] * 50_000)
        entries = file_entries(work)
        print("ready", flush=True)
        sys.stdin.readline()
        ref = store.publish(Manifest(
            kind="scores", key=key, digest=content_digest(entries), step="scores", inputs={}, settings={},
            files=entries, summary={}, seconds=0, device="", **provenance()))
        print(ref.digest, store.require(ref).joinpath("7").read_text()[:1])
        """
    )
    for _ in range(3):
        address = new_bucket()
        children = []
        for letter in "ab":
            environment = {**os.environ, "CROPI_CACHE": str(tmp_path / f"{letter}{address[-20:-13]}")}
            children.append(
                processes.start(
                    [sys.executable, "-c", script, address, letter],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        ends = [child.communicate(timeout=500)[0].split() for child in children]
        assert ends[0] == ends[1], "both use what is there"
        third = machine(address, f"third{address[-20:-13]}")
        (key,) = third.keys()
        assert third.audit(key) == ([], None)
        assert third.manifest(key).digest == ends[0][0]
        (place,) = third.remote.remnants(-60)  # the other machine's files, which no manifest names
        assert third.manifest(key).digest[:16] not in place


def test_threads_that_fetch_one_artifact_fetch_it_once(url, machine, s3_server):
    made = publish(machine(url))
    other = machine(url, "other")
    before = len(s3_server.asked())
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: other.directory(made), range(4)))
    assert len(set(paths)) == 1
    got = fetched(s3_server, before)
    assert len(got) == len(FILES)


# -- damage ------------------------------------------------------------------------------------------------


def test_a_changed_object_is_refused_and_reported(url, machine):
    """Its size is right, so a lookup cannot detect it; reading it and verifying it do."""
    made = publish(machine(url))
    spoil(url, "b.txt", b"owt")
    other = machine(url, "other")
    assert other.find(made.key) == made
    with pytest.raises(ArtifactError, match=r"b\.txt does not match its sha256.*verify.*--repair"):
        other.require(made)
    assert not other.path(made).exists()
    faults, moved = other.audit(made.key)
    assert moved is None
    assert ["b.txt does not match its sha256" in fault for fault in faults] == [True]
    _, moved = other.audit(made.key, repair=True)
    assert moved.startswith(f"{url}/damaged/{made.key}")
    assert other.find(made.key) is None
    names = objects(url)
    assert sum(name.startswith("damaged/") for name in names) == len(FILES) + 2, "nothing is deleted"
    assert not [name for name in names if name.startswith(("files/", "manifests/"))]
    assert machine(url).find(made.key) == made, "who has it whole sends it again"
    assert contents(machine(url, "third").require(made)) == FILES


DAMAGE = {
    "missing": (
        lambda u, k: Objects(u).remove(next(n for n in objects(u) if n.endswith("b.txt"))),
        "is missing",
    ),
    "truncated": (lambda u, k: spoil(u, "b.txt", b"t"), "has 1 bytes"),
    "half a manifest": (lambda u, k: spoil(u, f"manifests/{k}.json", b'{"kind'), "is not JSON"),
    "another manifest": (lambda u, k: edit(u, k, key=f"prompts-v1-{'a' * 16}"), "names prompts-v1-aaaa"),
    "another digest": (lambda u, k: edit(u, k, digest="0" * 64), "digest"),
    "another summary": (lambda u, k: edit(u, k, summary={"prompts": 9}), "checksum"),
    "a way out": (
        lambda u, k: edit(u, k, files=[{"path": "../../../tags.json", "size": 1, "sha256": "0"}]),
        "outside the artifact",
    ),
}


def edit(url, name, **changes):
    path = f"{url}/manifests/{name}.json".partition("://")[2]
    s3().pipe_file(path, json.dumps(json.loads(s3().cat_file(path)) | changes).encode())


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_that_names_and_sizes_show_is_found_and_set_aside(url, machine, what):
    spoiled, words = DAMAGE[what]
    made = publish(machine(url))
    spoiled(url, made.key)
    other = machine(url, "other")
    if what != "missing":
        with pytest.raises(ArtifactError):
            other.directory(made)
    assert other.find(made.key) is None
    (note,) = other.damaged()
    assert words in note.with_name(f"{note.name}.txt").read_text()
    assert publish(other) == made
    assert contents(machine(url, "third").require(made)) == FILES


def test_an_object_of_another_size_is_not_fetched(url, machine, s3_server):
    """It could have any size and fill the disk before its checksum is known."""
    made = publish(machine(url))
    spoil(url, "b.txt", b"x" * 100_000)
    before = len(s3_server.asked())
    with pytest.raises(ArtifactError, match=r"b\.txt has 100000 bytes, its manifest says 3.*--repair"):
        machine(url, "other").directory(made)
    assert fetched(s3_server, before) == []


def test_a_manifest_that_was_renewed_meanwhile_is_not_set_aside(url, machine):
    """One machine finds files missing because another one is just making the artifact again."""
    one, other = machine(url), machine(url, "other")
    made = publish(one)
    other.remote.pull(made.key)
    old = other.remote.mirror(made.key).read_bytes()
    one.discard(made.key)
    assert publish(one).key == made.key
    edit(url, made.key, seconds=9.0)
    other.remote.mirror(made.key).write_bytes(old)
    other.remote.set_aside(made.key, ["b.txt is missing"])
    assert f"manifests/{made.key}.json" in objects(url)
    assert len([name for name in objects(url) if name.startswith("files/")]) == len(FILES)


def test_another_schema_version_is_an_error_and_is_not_changed(url, machine):
    made = publish(machine(url))
    edit(url, made.key, schema_version=99)
    with pytest.raises(ArtifactError, match="schema version 99"):
        machine(url, "other").find(made.key)
    assert f"manifests/{made.key}.json" in objects(url)


def test_a_manifest_cannot_write_outside_of_the_cache(url, machine, tmp_path):
    made = publish(machine(url))
    edit(url, made.key, files=[{"path": "../../../evil", "size": 3, "sha256": "0"}])
    with pytest.raises(ArtifactError, match="outside the artifact"):
        machine(url, "other").directory(made)
    assert not list(tmp_path.rglob("evil"))


# -- other content under the same name ---------------------------------------------------------------------


def test_a_refresh_elsewhere_is_seen_and_the_old_copy_dropped(url, machine):
    one = machine(url)
    made = publish(one)
    other = machine(url, "other")
    other.require(made)
    (one.path(made) / "b.txt").write_text("2")
    entries = one.manifest(made)
    one.discard(made.key)
    work = one.workspace(made.key)
    (work / "new").write_text("n")
    from cropi_core.artifacts.keys import content_digest, file_entries

    files = file_entries(work)
    renewed = one.publish(entries.model_copy(update={"files": files, "digest": content_digest(files)}))
    assert other.find(made.key) == renewed != made
    assert contents(other.require(renewed)) == {"new": "n"}
    with pytest.raises(ArtifactError, match="was requested"):
        other.require(made)


# -- names -------------------------------------------------------------------------------------------------


def test_tags_records_and_beginnings_of_keys_are_shared(url, machine):
    one = machine(url)
    made = publish(one)
    one.tag("best", made.key)
    record = new_run(tiny())
    save_run(one, record)
    other = machine(url, "other")
    assert other.tags() == {"best": made.key}
    assert other.resolve("best") == other.resolve(made.key[:14]) == made.key
    assert list_runs(other) == [record.run]
    assert load_run(other, record.run) == record
    save_run(other, record.model_copy(update={"status": "done"}))
    assert load_run(one, record.run).status == "done"
    Objects(url).put("runs/some/thing.json", b"{}")
    assert list_runs(one) == [record.run]
    with pytest.raises(ArtifactError, match=r"no run '\.\./tags'"):
        load_run(other, "../tags")
    with pytest.raises(ArtifactError, match="no artifact or tag"):
        other.resolve("scores")


@pytest.mark.slow
def test_a_listing_costs_one_request_when_the_manifests_are_known(url, machine, s3_server):
    made = [publish(machine(url), {"a": str(n)}).key for n in range(60)]
    other = machine(url, "other")
    assert sorted(other.keys()) == sorted(made)
    before = len(s3_server.asked())
    for key in other.keys():  # noqa: SIM118 - a Store is not a mapping
        other.manifest(key)
    assert len(s3_server.asked()) - before == 1
    other.discard(made[0])
    assert made[0] not in machine(url).keys()  # noqa: SIM118
    assert [name for name in objects(url) if made[0] in name] == []


# -- invalid addresses and settings ------------------------------------------------------------------------


def test_an_address_is_checked(machine):
    for address, words in {
        "s3://key:secret@bucket/x": "credentials come from the environment",
        "file:///data/x": "give its path: /data/x",
        "memory://x": "end with its process",
        "s3:///x": "names no bucket",
    }.items():
        with pytest.raises(ConfigError, match=words) as raised:
            machine(address)
        assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="give an address as text"):
        Store(Path("s3://bucket/x"))
    with pytest.raises(ConfigError, match="not installed"):
        machine("nonsense://bucket/x").keys()


def test_a_missing_bucket_is_reported(s3_server, machine):
    for call in (lambda s: s.prepare(), lambda s: s.keys(), lambda s: list_runs(s)):
        with pytest.raises(ArtifactError, match=r"s3://no-such-bucket/x failed.*Make the bucket first"):
            call(machine("s3://no-such-bucket/x"))


def test_missing_credentials_are_reported(s3_server, machine, tmp_path):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    command = [sys.executable, "-m", "cropi_core", "artifacts", "ls", "--root", new_bucket()]
    done = processes.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Set AWS_ACCESS_KEY_ID" in done.stderr
    assert "Traceback" not in done.stderr


def test_invalid_keys_are_reported(tmp_path, machine, monkeypatch):
    """A server that requires authentication after its first few requests."""
    server = Server(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="5")
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3().clear_instance_cache()
        store = machine(new_bucket())
        with pytest.raises(ArtifactError, match=r"Access Key Id.*must be valid, and allowed to list"):
            [store.keys() for _ in range(9)]
    finally:
        server.stop()
        s3().clear_instance_cache()


@pytest.mark.slow
def test_a_lost_server_is_reported_and_the_work_is_kept(tmp_path, machine, monkeypatch):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3().clear_instance_cache()
    try:
        address = new_bucket()
        store = machine(address)
        store.prepare()
        server.stop()
        with pytest.raises(
            ArtifactError, match=r"Could not connect.*Check that the server answers there.*to resume"
        ):
            publish(store)
        server = Server(folder, port=server.address.rpartition(":")[2])
        s3().mkdir(address.split("/")[2])
        made = publish(store)
        assert contents(machine(address, "other").require(made)) == FILES
    finally:
        server.stop()
        s3().clear_instance_cache()


def test_doctor_looks_at_an_address(url, machine):
    publish(machine(url))
    found = {check.name: check for check in examine(url)}
    assert found["s3fs"].state == found["root"].state == "ok"
    assert "1 artifacts" in found["root"].message
    found = {check.name: check for check in examine("s3://no-such-bucket/x")}
    assert (found["root"].state, "Make the bucket first" in found["root"].message) == ("broken", True)


@pytest.mark.slow
def test_a_large_file_is_sent_in_parts_and_received_completely(url, machine):
    block = os.urandom(1 << 20)

    def fill(out):
        with (out / "large").open("wb") as stream:
            for _ in range(110):
                stream.write(block)

    made = publish_import(machine(url), "prompts", {}, {}, fill)
    directory = machine(url, "other").require(made)
    assert (directory / "large").read_bytes() == block * 110


def test_a_cache_of_another_store_is_refused(url, machine):
    store = machine(url)
    store.prepare()
    store.prepare()
    Objects(url).remove("cropi.json")
    with pytest.raises(ArtifactError, match="not the store"):
        store.prepare()
    with pytest.raises(ArtifactError, match="not the store"):
        store.prepare()


# -- collecting --------------------------------------------------------------------------------------------


def gc(url, *arguments):
    command = [sys.executable, "-m", "cropi_core", "artifacts", "gc", "--json", "--root", url, *arguments]
    return json.loads(processes.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_gc_removes_unused_objects_and_interrupted_uploads(url, machine):
    store = machine(url)
    kept, loose, cut = [publish(store, {"a": name * 1000}) for name in ("kept", "loose", "cut")]
    store.tag("best", kept.key)
    Objects(url).remove(f"manifests/{cut.key}.json")
    before = objects(url)
    assert gc(url, "--yes")["artifacts"] == [], (
        "for a day an upload may be under way, and a run may not be written"
    )
    assert objects(url) == before
    listed = gc(url, "--age", "0")
    assert {row["key"] for row in listed["artifacts"]} == {loose.key, f"files/{cut.key}/{cut.digest[:16]}"}
    gc(url, "--age", "0", "--yes")
    assert {name.split("/")[1] for name in objects(url) if name.startswith("files/")} == {kept.key}
    assert machine(url, "other").audit(kept.key) == ([], None)
    assert machine(url, "other").keys() == [kept.key]


@pytest.mark.slow
def test_the_cache_gives_up_what_was_used_longest_ago_and_never_what_others_lack(url, machine):
    store = machine(url)
    made = [publish(store, {"a": f"{n}" * 1000}) for n in range(5)]
    Objects(url).remove(f"manifests/{made[0].key}.json")
    for ref, age in zip(made, (9000, 8000, 7000, 6000, 60), strict=True):
        os.utime(store.path(ref), (0, store.path(ref).stat().st_mtime - age))
    with store.in_use([made[1]]):
        assert gc(url, "--cache")["bytes"] == 2000
        gone = gc(url, "--cache", "--keep-gb", "0.000004", "--yes")
        assert [row["key"] for row in gone["copies"]] == [made[2].key]
        assert [store.path(ref).exists() for ref in made] == [True, True, False, True, True]
    gone = gc(url, "--cache", "--yes")
    assert {row["key"] for row in gone["copies"]} == {made[1].key, made[3].key}
    assert contents(store.require(made[2])) == {"a": "2" * 1000}
    assert store.find(made[0].key) == made[0]
    assert contents(machine(url, "other").require(made[0])) == {"a": "0" * 1000}


def test_a_used_copy_is_evicted_last(url, machine):
    store = machine(url)
    made = [publish(store, {"a": str(n)}) for n in range(2)]
    for ref in made:
        os.utime(store.path(ref), (0, 0))
    store.require(made[0])
    assert [row["key"] for row in gc(url, "--cache")["copies"]] == [made[1].key]


def test_a_directory_has_no_cache(tmp_path):
    command = [sys.executable, "-m", "cropi_core", "artifacts", "gc", "--cache", "--root", str(tmp_path)]
    done = processes.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "is a directory and has no cache" in done.stderr) == (2, True)
