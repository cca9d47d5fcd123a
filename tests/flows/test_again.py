"""Steps again, through a server: cancelled in the UI, failed and retried, gone on with from a rescore."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import load_run, run_id
from data_schemas.config import Config
from tests.support import processes
from tests.support.commands import (
    CROPI,
    PREFECT,
    Served,
    command_of,
    descendants,
    free_port,
    person,
    tiny_config,
    written,
)
from tests.support.paths import CHECKOUT

SUBPROCESSES = {"device": "cpu", "threads": 1, "mode": "subprocess", "save_steps": 5}


class Desk:
    """A person with a terminal and the UI, beside `cropi serve`."""

    def __init__(self, served: Served) -> None:
        self.served, self.store = served, Store(served.root)

    def start(self, config: Config) -> str:
        known = {run["id"] for run in self.served.answer("flow_runs/filter", {})}
        done = self.served.ask(config)
        assert done.returncode == 0, done.stdout + done.stderr
        (new,) = [r for r in self.served.answer("flow_runs/filter", {}) if r["id"] not in known]
        return new["id"]

    def until(self, flow_run: str, state: str, seconds: float = 500) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.served.answer(f"flow_runs/{flow_run}")["state"])["name"] != state:
            assert time.monotonic() < deadline, (found, self.served.out.read_text()[-3000:])
            time.sleep(0.3)

    def prefect(self, *arguments: str) -> str:
        done = processes.run(
            [PREFECT, *arguments],
            env=person(
                PREFECT_API_URL=self.served.url,
                PREFECT_API_AUTH_STRING=self.served.password,
                PREFECT_HOME=str(self.served.root / ".prefect"),
            ),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def work_of(self, pattern: str, seconds: float = 500) -> Path:
        """Wait for a file of work in progress."""
        deadline = time.monotonic() + seconds
        while not (found := sorted((self.served.root / ".work").glob(pattern))):
            assert time.monotonic() < deadline, self.served.out.read_text()[-3000:]
            time.sleep(0.1)
        return found[0]

    def manifest(self, config: Config, slot: str):
        return self.store.manifest(load_run(self.store, run_id(config)).slots[slot].ref)

    def descendants(self) -> set[int]:
        return descendants(self.served.process.pid)

    def steps(self) -> list[int]:
        """Processes of a step: a run's child."""
        return [pid for pid in self.descendants() if b"\0step\0" in command_of(pid)]


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, known: Path) -> Iterator[Desk]:
    place = tmp_path_factory.mktemp("again")
    served = Served(shutil.copytree(known, place / "root"), free_port(), place / "out")
    try:
        yield Desk(served)
    finally:
        served.process.send_signal(signal.SIGTERM)
        try:
            served.process.wait(500)
        finally:
            if served.process.poll() is None:
                os.killpg(served.process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_resumes_from_a_rescore(desk: Desk, tmp_path: Path):
    config = tiny_config(name="rescored")
    flow_run = desk.start(config)
    desk.until(flow_run, "Completed")
    before = load_run(desk.store, run_id(config))
    known = set(desk.store.keys("scores"))
    desk.prefect(
        "deployment", "run", "cropi-scores/local", "-p", f"run={before.run}", "-p", "metric=dot", "--watch"
    )
    (key,) = set(desk.store.keys("scores")) - known
    assert load_run(desk.store, before.run) == before  # only looked at, so far
    command = [*CROPI, "run", str(written(tmp_path / "tiny.yaml", name="rescored")), "--no-report"]
    command += ["--root", str(desk.served.root), "-o", f"pin.scores@1={key}"]
    done = processes.run(command, env=person(), cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    went_on = config.model_copy(update={"pin": {"scores@1": key}})
    after = load_run(desk.store, run_id(went_on))
    assert after.slots["scores@1"].origin == "pinned"
    assert after.slots["gradients/pool@1"].origin == "cached"
    assert after.slots["selection@1"].ref.key != before.slots["selection@1"].ref.key
    assert desk.store.manifest(after.slots["selection@1"].ref).inputs["scores"].key == key


@pytest.mark.slow
def test_a_run_cancelled_in_the_ui_leaves_no_process_and_resumes_when_retried(desk: Desk):
    training = tiny_config().training.model_dump() | {"steps": 120}
    config = tiny_config(name="cancelled", training=training, runtime=SUBPROCESSES)
    idle = desk.descendants()
    flow_run = desk.start(config)
    desk.work_of("policy-*/.scratch/**/checkpoint-*")
    working = desk.descendants() - idle
    said = {command_of(pid) for pid in working}
    assert any(b"\0step\0" in command for command in said)  # the run's child
    assert any(b"rewards.worker" in command for command in said)  # and its
    state = {"state": {"type": "CANCELLING"}}
    assert desk.served.answer(f"flow_runs/{flow_run}/set_state", state)["status"] == "ACCEPT"
    desk.until(flow_run, "Cancelled")
    assert load_run(desk.store, run_id(config)).status == "cancelled"
    deadline = time.monotonic() + 500
    while (left := {pid for pid in working if alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.2)
    # Python's tracker of what multiprocessing shares is the command's own, from its first run on.
    assert {command_of(pid) for pid in left if b"resource_tracker" not in command_of(pid)} == set()
    desk.prefect("flow-run", "retry", flow_run)
    desk.until(flow_run, "Completed")
    assert desk.manifest(config, "policy@1").resumed


@pytest.mark.slow
@pytest.mark.extended
def test_a_failed_run_that_is_retried_resumes_inside_the_failed_step(desk: Desk):
    rollouts = tiny_config().rollouts.model_dump() | {"shard_prompts": 1}
    config = tiny_config(name="failed", seed=7, rollouts=rollouts, runtime=SUBPROCESSES)
    flow_run = desk.start(config)
    first = desk.work_of("rollouts-*/**/part-00000.parquet")
    mark = (first.stat().st_ino, first.stat().st_mtime_ns)
    for pid in desk.steps():
        os.kill(pid, signal.SIGKILL)
    desk.until(flow_run, "Failed")
    assert first.exists()
    desk.prefect("flow-run", "retry", flow_run)
    desk.until(flow_run, "Completed")
    pool = desk.manifest(config, "rollouts/pool@1")
    assert pool.resumed
    kept = desk.store.path(pool.key) / "parts" / first.name
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == mark
