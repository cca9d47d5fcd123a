"""A whole curriculum on an S3 root: the digests of a local run, and nothing to compute on another machine."""

import json
import os
import signal
import sys

import pytest
import yaml

from cropi_core.analysis import read_chosen
from cropi_core.artifacts.object_storage import Objects
from cropi_core.artifacts.store import Store
from cropi_core.report import write_report
from cropi_core.runs.records import load_run
from tests.support import processes
from tests.support.bucket import new_bucket, objects
from tests.support.tiny import computed, digests, go, settings, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(s3_server):
    return new_bucket()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A directory of caches for each machine; its environment."""
    folder = tmp_path_factory.mktemp("machines")
    return lambda name: {"CROPI_CACHE": str(folder / name)}


@pytest.fixture(scope="module")
def first(url, machines):
    """The record of a run on the first machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROPI_CACHE", machines("first")["CROPI_CACHE"])
        return go(tiny(), url)


def test_a_run_on_s3_ends_with_the_digests_of_a_local_run(first, reference):
    assert digests(first) == digests(reference[1])
    assert computed(first) == computed(reference[1])


def test_every_artifact_is_complete_at_the_address(first, url, machines, monkeypatch):
    monkeypatch.setenv("CROPI_CACHE", machines("reader")["CROPI_CACHE"])
    store = Store(url)
    keys = {entry.ref.key for entry in first.slots.values()}
    assert set(store.keys()) >= keys
    assert [store.audit(key) for key in sorted(keys)] == [([], None)] * len(keys)
    assert load_run(store, first.run) == first


def test_another_machine_finds_everything_and_fetches_little(first, url, machines, monkeypatch):
    monkeypatch.setenv("CROPI_CACHE", machines("second")["CROPI_CACHE"])
    record = go(tiny(), url)
    assert computed(record) == set()
    assert digests(record) == digests(first)
    held = {
        path.name
        for kind in ("rollouts", "gradients", "policy")
        for path in (Store(url).root / kind).glob("*")
    }
    assert held == set(), "only prompts are read when everything is there"


def test_a_report_elsewhere_fetches_no_gradients_and_says_so(first, url, machines, monkeypatch):
    """They are the largest artifacts; the command that asks for them fetches them."""
    monkeypatch.setenv("CROPI_CACHE", machines("reporter")["CROPI_CACHE"])
    store = Store(url)
    page = write_report(store, first.run).read_text(encoding="utf-8")
    assert list((store.root / "gradients").glob("*")) == []
    assert "gradients/pool@1 is not on this machine" in page
    assert "pass rate" in page
    assert "entropy" in read_chosen(store, first.run).stages[0].figures
    assert len(list((store.root / "gradients").glob("*"))) == 2


def test_another_machine_continues_with_another_selection(first, url, machines, monkeypatch):
    """What changes is computed, from inputs that are fetched; what does not is found."""
    monkeypatch.setenv("CROPI_CACHE", machines("third")["CROPI_CACHE"])
    record = go(tiny(selection={"ratio": 0.4}, stages=1), url)
    assert computed(record) == {"selection@1", "policy@1", "evaluation@1"}
    assert {path.name for path in (Store(url).root / "gradients").glob("*")} == set()
    assert Store(url).find(record.slots["policy@1"].ref.key) is not None


@pytest.mark.extended
def test_a_step_in_a_process_of_its_own_gives_the_same(first, machines, monkeypatch):
    monkeypatch.setenv("CROPI_CACHE", machines("subprocess")["CROPI_CACHE"])
    runtime = {"mode": "subprocess"}
    other = new_bucket()
    record = go(tiny(runtime=runtime, stages=1), other)
    shared = {slot: digest for slot, digest in digests(first).items() if not slot.endswith("@2")}
    assert digests(record) == shared
    assert sum(name.startswith("manifests/") for name in objects(other)) == len(set(shared.values()))


KILLED = """
import os, signal, sys
from cropi_core.artifacts.object_storage import Objects
from tests.support.tiny import go, tiny

send = Objects.send

def watched(self, path, name):
    if name.startswith("files/gradients-"):
        watched.count += 1
        if watched.count == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    send(self, path, name)

watched.count = 0
Objects.send = watched
go(tiny(stages=1), sys.argv[1])
"""


def test_a_run_killed_during_an_upload_resumes_and_computes_nothing_again(first, machines):
    url, env = new_bucket(), {**os.environ, **machines("killed")}
    child = processes.run([sys.executable, "-c", KILLED, url], env=env, check=False)
    assert child.returncode == -signal.SIGKILL
    before = {
        name.split("/")[1].removesuffix(".json") for name in objects(url) if name.startswith("manifests/")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROPI_CACHE", env["CROPI_CACHE"])
        record = go(tiny(stages=1), url)
    assert digests(record) == {k: v for k, v in digests(first).items() if not k.endswith("@2")}
    found = {entry.ref.key for entry in record.slots.values() if entry.origin == "cached"}
    sent = record.slots["gradients/pool@1"]
    assert (sent.origin, sent.ref.key in before) == ("cached", False), (
        "whole on this machine, it is only sent"
    )
    assert before < found


def test_an_object_that_was_lost_is_computed_again_and_the_run_says_so(first, url, machines, monkeypatch):
    monkeypatch.setenv("CROPI_CACHE", machines("fourth")["CROPI_CACHE"])
    key = first.slots["scores@2"].ref.key
    (lost,) = [name for name in objects(url) if name.startswith(f"files/{key}/")]
    Objects(url).remove(lost)
    record = go(tiny(), url)
    assert computed(record) == {"scores@2"}
    assert digests(record) == digests(first)
    (note,) = record.notes
    assert f"{url}/{lost} is missing" in note
    assert Store(url).audit(key) == ([], None)


def cropi(*arguments, env, code=0):
    done = processes.run(
        [sys.executable, "-m", "flows.command.app", *map(str, arguments)],
        env={**os.environ, **env, "PREFECT_API_URL": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.extended
def test_the_command_line_on_s3(first, url, machines, tmp_path):
    """`cropi run` through Prefect, and the commands that look at a root, on a machine that has nothing."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings()))
    env = machines("terminal") | {"HOME": str(tmp_path)}
    outcome = json.loads(cropi("run", tmp_path / "tiny.yaml", "--root", url, "--json", env=env))
    assert {row["origin"] for row in outcome["slots"].values()} == {"cached"}, outcome
    assert outcome["run"] == first.run
    assert f"runs/{first.run}.html" in objects(url)
    rows = json.loads(cropi("runs", "--root", url, "--json", env=env))
    assert (first.run, "done") in [(row["run"], row["status"]) for row in rows]
    rows = json.loads(cropi("artifacts", "ls", "--root", url, "--json", env=env))
    assert {row["key"] for row in rows} >= {entry.ref.key for entry in first.slots.values()}
    key = first.slots["scores@1"].ref.key
    cropi("artifacts", "tag", "mine", key, "--root", url, env=env)
    shown = json.loads(cropi("artifacts", "show", "mine", "--root", url, "--json", env=env))
    assert shown["key"] == key
    cropi("artifacts", "export", "mine", tmp_path / "out", "--root", url, env=env)
    assert (tmp_path / "out/scores.parquet").exists()
    assert "whole" in cropi("artifacts", "verify", "--root", url, env=env)
    assert "0 artifacts" in cropi("artifacts", "gc", "--root", url, env=env)
    assert first.run in cropi("report", "--root", url, env=machines("reporter") | {"HOME": str(tmp_path)})
    plan = json.loads(cropi("plan", tmp_path / "tiny.yaml", "--root", url, "--json", env=machines("planner")))
    assert {step["origin"] for step in plan["steps"]} == {"cached"}
