"""What a worker's end, and a worker's environment without a package, leave in the run's state and log."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import load_run, run_id, state_name
from tests.support import processes
from tests.support.commands import PREFECT, Desk, answer, command_of, descendants, tiny_config
from tests.support.paths import CHECKOUT

pytestmark = [pytest.mark.slow, pytest.mark.extended]

BLOCK = """
import os, sys
for name in os.environ.get("MISSING", "").split():
    sys.modules[name] = None
"""


def scheduled(desk: Desk, *parameters: str) -> str:
    """Start a run of the curriculum; return the flow run's id."""
    known = {run["id"] for run in answer(f"{desk.url}/flow_runs/filter", {})}
    desk.run("deployment", "run", "cropi/curriculum", *parameters)
    (new,) = [r for r in answer(f"{desk.url}/flow_runs/filter", {}) if r["id"] not in known]
    return new["id"]


def logged(desk: Desk, flow_run: str) -> str:
    chosen = {"logs": {"flow_run_id": {"any_": [flow_run]}}}
    return "\n".join(line["message"] for line in answer(f"{desk.url}/logs/filter", chosen))


def worker(desk: Desk, log: Path, *more: str, **environment: str):
    with log.open("w") as out:
        return processes.start(
            [PREFECT, "worker", "start", "--pool", "cropi", "--limit", "1", *more],
            env=desk.environment | environment,
            cwd=CHECKOUT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def until(holds, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


def test_a_worker_in_which_cropi_cannot_be_imported_says_so_in_the_state_and_the_log(
    desk: Desk, tmp_path: Path
):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    flow_run = scheduled(desk)
    started = worker(
        desk, tmp_path / "log", "--run-once", PYTHONPATH=str(tmp_path), MISSING="zarr cropi_core.runs"
    )
    started.wait(300)
    state = answer(f"{desk.url}/flow_runs/{flow_run}")["state"]
    assert state["type"] == "FAILED", (tmp_path / "log").read_text()
    for text in (state["message"], logged(desk, flow_run)):
        assert "cannot be imported in the worker's environment" in text
        assert "cropi_core.runs" in text
        assert "pip install" in text


@pytest.mark.parametrize("whole", [False, True], ids=["the worker alone", "the worker and its run"])
def test_a_run_of_a_killed_worker_is_crashed_leaves_no_process_and_resumes(
    desk: Desk, tmp_path: Path, whole: bool
):
    """Alone: Prefect records it. With its run: the root shows it; the server is told by an automation."""
    store, config = Store(tmp_path / "root"), tiny_config(name="whole" if whole else "alone")
    text = json.dumps(config.model_dump(mode="json"))
    asked = ["-p", f"config={text}", "-p", f"root={store.root}"]
    flow_run = scheduled(desk, *asked)
    started = worker(desk, tmp_path / "log")
    until(lambda: store.keys("evaluation"))
    below = descendants(started.pid)
    for pid in below if whole else {started.pid}:
        os.kill(pid, signal.SIGKILL)
    started.wait(60)
    until(lambda: not any(b"prefect.engine" in command_of(pid) for pid in below), 120)
    until(lambda: state_name(store, load_run(store, run_id(config))) == "Crashed", 60)
    state = answer(f"{desk.url}/flow_runs/{flow_run}")["state"]
    assert state["name"] == ("Running" if whole else "Crashed"), state
    keys = store.keys()
    before = {key: store.manifest(key).created for key in keys}
    again = scheduled(desk, *asked)
    worker(desk, tmp_path / "log2", "--run-once").wait(500)
    assert answer(f"{desk.url}/flow_runs/{again}")["state"]["name"] == "Completed", (
        tmp_path / "log2"
    ).read_text()
    assert load_run(store, run_id(config)).status == "done"
    assert {key: store.manifest(key).created for key in before} == before
