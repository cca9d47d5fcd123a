"""A run is followed from another process: artifacts, training steps, its end; the run is not touched."""

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts import Store
from cropi_core.cli.app import app
from cropi_core.cli.following import EXITS, screen
from cropi_core.errors import ArtifactError
from cropi_core.progress import Progress
from cropi_core.runs import (
    Follower,
    follow,
    kept_progress,
    load_run,
    new_run,
    run_id,
    run_lock,
    save_run,
    write_current,
)
from cropi_core.runs import live as live_files
from cropi_core.runs.following import QUIET_S
from cropi_core.runs.live import MOST_ROWS, read_progress
from data_schemas import SlotRecord
from tests.support.bucket import new_bucket
from tests.support.stores import publish
from tests.support.tiny import go, tiny

KEY = "policy-v1-0123456789abcdef"


@pytest.fixture
def at_once(monkeypatch):
    """Write progress at every report."""
    monkeypatch.setattr(live_files, "EVERY_S", 0.0)
    monkeypatch.setattr(live_files, "EVERY_REMOTE_S", 0.0)


def recorded(root: Path, status: str, **changes):
    store, record = Store(root), new_run(tiny())
    record = record.model_copy(update={"status": status, **changes})
    save_run(store, record)
    return store, record


@pytest.mark.slow
def test_a_run_is_followed_to_its_end(tmp_path: Path, at_once):
    config = tiny(stages=1, training={"steps": 5}, selection={"strategy": "random"})
    store = Store(tmp_path)
    store.make_root()
    begun = threading.Event()
    errors = []

    def execute():
        try:
            go(config, tmp_path, lambda progress: begun.set())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    assert begun.wait(300), errors
    seen, screens = [], []
    for follower, events in follow(store, run_id(config), sleep=lambda _: thread.join(0.05)):
        seen += events
        screens += [screen(follower)] if events else []
    thread.join()
    assert not errors
    artifacts = [event.data["slot"] for event in seen if event.what == "artifact"]
    assert artifacts == list(load_run(store, run_id(config)).slots)
    rows = [event.data for event in seen if event.what == "metrics"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 3  # the end of the stage removes the file
    assert all({"loss", "reward", "completion_length", "grad_norm"} <= row.keys() for row in rows)
    assert seen[-1].text == "Completed"
    assert not list(tmp_path.glob("runs/*.now"))
    assert not list(tmp_path.glob("progress/*"))


@pytest.mark.parametrize(
    ("status", "state"), [("done", "Completed"), ("failed", "Failed"), ("cancelled", "Cancelled")]
)
def test_the_exit_code_tells_the_state(tmp_path: Path, status: str, state: str):
    store, record = recorded(tmp_path, status, error=None if status == "done" else "OSError: \x1b[2Jred\nWhy")
    ref = publish(store, {"a.txt": "x"}, kind="scores")
    record.slots["scores@1"] = SlotRecord(ref=ref, origin="computed", seconds=2.0)
    save_run(store, record)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = CliRunner().invoke(app, ["runs", "follow", record.run, "--root", str(tmp_path)])
    assert done.exit_code == EXITS[state], done.output
    assert f"computed in 2.0 s, {ref.key}" in done.stdout
    assert "\x1b" not in done.stdout
    lines = CliRunner().invoke(app, ["runs", "follow", record.run, "--root", str(tmp_path), "--json"]).stdout
    events = [json.loads(line) for line in lines.splitlines()]
    assert [event["what"] for event in events] == ["artifact", "state"]
    assert events[-1]["data"]["state"] == state
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_run_whose_process_is_gone_has_crashed_and_a_suspended_one_is_waited_for(tmp_path: Path):
    store, record = recorded(tmp_path, "running")
    with run_lock(store, record.run):
        pass
    assert CliRunner().invoke(app, ["runs", "follow", record.run, "--root", str(tmp_path)]).exit_code == 4
    save_run(store, record.model_copy(update={"status": "waiting"}))
    again = iter(["waiting", "done"])
    events = [
        event
        for _, found in follow(
            store,
            record.run,
            sleep=lambda _: save_run(store, record.model_copy(update={"status": next(again)})),
        )
        for event in found
    ]
    assert [event.data["state"] for event in events] == ["Suspended", "Completed"]
    assert CliRunner().invoke(app, ["runs", "follow", "none", "--root", str(tmp_path)]).exit_code == 1


def test_the_steps_of_a_training_are_told_once_each(tmp_path: Path, at_once):
    """What other processes see of a training, at each look; no step is told twice and a bad number is left out."""
    store, record = recorded(tmp_path, "running")
    with run_lock(store, record.run):
        follower = Follower(store, record.run)
        assert follower.look() == []
        write_current(store, record.run, "policy@1", KEY)
        reports = []
        with kept_progress(store, KEY, reports.append) as report:
            report(Progress(1, 400, "step", "reward 0.50", {"loss": 0.25, "reward": 0.5, "kl": float("nan")}))
            told = [event.text for event in follower.look()]
            assert told == ["policy@1: in progress", "policy@1: step 1 of 400  loss 0.25, reward 0.5"]
            assert follower.look() == []
            for step in range(2, MOST_ROWS + 3):
                report(Progress(step, 400, "step", "", {"loss": 1.0 / step}))
            told = [event.data["step"] for event in follower.look()]
            assert told == list(range(3, MOST_ROWS + 3))
        assert len(reports) == MOST_ROWS + 2
        assert read_progress(store, KEY) is None
        record.slots["policy@1"] = SlotRecord(
            ref=publish(store, {"a.txt": "x"}, kind="policy"), origin="computed"
        )
        save_run(store, record)
        assert [event.what for event in follower.look()] == ["artifact"]
        assert follower.current is None


def test_files_of_progress_that_cannot_be_written_or_read_end_nothing(tmp_path: Path, at_once, caplog):
    store, record = recorded(tmp_path, "running")
    (tmp_path / "progress").write_text("not a directory")
    reports = []
    with kept_progress(store, KEY, reports.append) as report:
        report(Progress(1, 4, "shards"))
        report(Progress(2, 4, "shards"))
    assert [one.done for one in reports] == [1, 2]
    assert (
        sum("no other process sees the progress" in line for line in caplog.messages) == 2
    )  # written, removed
    (tmp_path / "runs" / f"{record.run}.now").write_text('{"slot": 1e999}')
    with run_lock(store, record.run):
        assert Follower(store, record.run).look() == []


def test_a_long_silence_and_a_root_that_cannot_be_read_are_told(tmp_path: Path):
    store, record = recorded(tmp_path, "running")
    path = tmp_path / "runs" / f"{record.run}.json"
    text, now, looks = path.read_text(), [0.0], [0]

    def sleep(_: float) -> None:
        now[0] += 60
        looks[0] += 1
        path.write_text("{" if looks[0] == 2 or looks[0] > 20 else text)  # torn once, and then for good

    events = []
    told = (events.extend(found) for _, found in follow(store, record.run, sleep=sleep, clock=lambda: now[0]))
    with run_lock(store, record.run), pytest.raises(ArtifactError, match="not valid JSON"):
        list(told)
    assert [event.what for event in events] == ["quiet"]
    assert now[0] > QUIET_S


def test_a_run_at_an_address_is_followed(s3_server, tmp_path: Path, monkeypatch, at_once):
    monkeypatch.setenv("CROPI_CACHE", str(tmp_path))
    bucket = new_bucket()
    store, record = Store(bucket), new_run(tiny())
    save_run(store, record)
    write_current(store, record.run, "policy@1", KEY)
    with kept_progress(store, KEY, lambda progress: None) as report:
        report(Progress(1, 3, "step", "", {"loss": 0.5}))
        told = [event.text for event in Follower(Store(bucket), record.run).look()]
    assert told[-1] == "policy@1: step 1 of 3  loss 0.5"
    save_run(store, record.model_copy(update={"status": "done"}))
    assert [event.text for _, found in follow(Store(bucket), record.run) for event in found] == ["Completed"]
