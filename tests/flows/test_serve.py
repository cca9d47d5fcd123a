"""`cropi serve` as a person uses it: started, asked for a run, stopped; the processes are looked up in /proc."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from tests.support import processes
from tests.support.commands import (
    CROPI,
    DEPLOYMENTS,
    Served,
    answer,
    command_of,
    free_port,
    person,
    servers_of,
    start,
    tiny_config,
    written,
)
from tests.support.decoys import decoys, imported
from tests.support.paths import CHECKOUT


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("served")
    markers = decoys(place / "elsewhere")
    served = Served(place / "root", free_port(), place / "out", cwd=place / "elsewhere")
    yield served
    assert not imported(markers), "modules of the working directory were imported"
    if served.process.poll() is None:
        os.killpg(served.process.pid, signal.SIGKILL)


def listening(pids: list[int]) -> set[str]:
    """Addresses on which these processes listen, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(link.readlink()))
            except OSError:
                continue
    tables = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    return {row[1] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


@pytest.mark.slow
def test_a_deployment_runs_and_everything_is_under_the_root(served: Served):
    done = served.ask(tiny_config(), "--watch", "--watch-interval", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = list_runs(Store(served.root))
    assert load_run(Store(served.root), run).status == "done"
    assert served.runs() == {run: "Completed"}
    shown = httpx.get(
        served.url.removesuffix("/api") + f"/reports/{run}/content", auth=tuple(served.password.split(":", 1))
    )
    assert shown.text == (served.root / "runs" / f"{run}.html").read_text()
    assert "<title>" in shown.text
    home, port = served.root / ".prefect", served.url.removesuffix("/api").rpartition(":")[2]
    assert {"prefect.db", f"server-{port}.log", "ui"} <= {path.name for path in home.iterdir()}
    # On a busy machine SQLite is locked for Prefect's consumers of events, which then take the message again (3.8.8,
    # prefect/server/utilities/messaging/memory.py); nothing else may be an error.
    log = (home / f"server-{port}.log").read_text()
    errors = [line for line in log.splitlines() if "| ERROR" in line]
    assert not [line for line in errors if not line.endswith("Failed in consume_loop")], log
    assert len(errors) == 0 or "database is locked" in log, log


@pytest.mark.slow
def test_the_ui_asks_this_server_and_nothing_listens_beyond_this_machine(served: Served):
    assert answer(served.url.removesuffix("/api") + "/ui-settings")["api_url"] == served.url
    settings = served.answer("admin/settings")
    assert settings["server"]["analytics_enabled"] is False
    addresses = listening(servers_of(served.root))
    assert addresses
    assert all(address.startswith("0100007F:") for address in addresses), addresses


@pytest.mark.slow
def test_served_deployments_have_names_of_their_own(served: Served):
    flows = {flow["id"]: flow["name"] for flow in served.answer("flows/filter", {})}
    names = {f"{flows[d['flow_id']]}/{d['name']}" for d in served.answer("deployments/filter", {})}
    assert len(names) == 8
    assert not names & DEPLOYMENTS


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_cropi_run_goes_through_the_running_server(served: Served, tmp_path: Path, named: bool):
    """By its address, or because it serves the same root: two servers on one database wait for one another."""
    before = len(served.answer("flow_runs/filter", {}))
    config = written(tmp_path / "tiny.yaml", name="direct")
    command = [*CROPI, "run", str(config), "--root", str(served.root), "--no-report", "--json"]
    environment = person(PREFECT_API_URL=served.url) if named else person()
    done = processes.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert len(served.answer("flow_runs/filter", {})) == before + 1
    assert served.runs()[json.loads(done.stdout)["run"]] == "Completed"


@pytest.mark.slow
def test_a_second_server_is_refused_with_advice(served: Served, tmp_path: Path):
    def fails(*arguments: str, **environment: str) -> str:
        command = [*CROPI, "serve", *arguments]
        done = processes.run(
            command, env=person(**environment), cwd=CHECKOUT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    port = served.url.removesuffix("/api").rpartition(":")[2]
    told = fails("--root", str(tmp_path), "--port", port)
    assert f"export PREFECT_API_URL={served.url}" in told
    assert "--port" in told
    told = fails("--root", str(served.root), "--port", str(free_port()))
    assert "is served already" in told
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        told = fails("--root", str(tmp_path), "--port", str(other.getsockname()[1]))
    assert "cannot be used (Address already in use): stop it, or take another port" in told
    told = fails("--root", str(tmp_path), "--port", str(free_port()), PREFECT_API_URL="http://a/api")
    assert "unset PREFECT_API_URL" in told


def test_a_configured_server_that_does_not_answer_is_named(tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}/api"
    command = [*CROPI, "run", "demo", "--root", str(tmp_path)]
    environment = person(PREFECT_API_URL=url)
    done = processes.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2
    assert f"no Prefect server answers at {url}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("SIGTERM", marks=pytest.mark.extended)])
def test_a_stop_inside_a_step_leaves_no_process_and_the_run_resumes(tmp_path: Path, known: Path, how: str):
    root = shutil.copytree(known, tmp_path / "root")
    served = Served(root, free_port(), tmp_path / "out")
    try:
        training = tiny_config().training.model_dump() | {"steps": 4000}
        runtime = {"device": "cpu", "threads": 1, "mode": "subprocess", "save_steps": 5}
        long = tiny_config(training=training, runtime=runtime)
        assert served.ask(long).returncode == 0
        served.trains()
        limit = time.monotonic() + 500
        while len(servers_of(root)) < 5:  # the command, the server, the run, its warm process, its step
            assert time.monotonic() < limit, served.out.read_text()
            time.sleep(0.2)
        if how == "Ctrl-C":
            os.killpg(served.process.pid, signal.SIGINT)  # what a terminal does
        else:
            served.process.terminate()
        assert served.process.wait(500) == (130 if how == "Ctrl-C" else 0)
        deadline = time.monotonic() + 500  # a step's own process ends after what watched it
        while servers_of(root) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert servers_of(root) == []
        assert not (root / ".prefect" / "served.env").exists()
    finally:
        if served.process.poll() is None:
            os.killpg(served.process.pid, signal.SIGKILL)
    if how == "Ctrl-C":  # the run resumes as after SIGTERM
        return
    again = start(written(tmp_path / "long.yaml", training=training, runtime=runtime), root, "--no-report")
    assert again.stderr is not None
    assert [again.stderr.readline().split()[1] for _ in range(4)] == ["cached"] * 4
    os.killpg(again.pid, signal.SIGINT)
    again.communicate(timeout=500)


@pytest.mark.slow
@pytest.mark.extended
def test_a_server_that_dies_ends_the_command_and_the_run(tmp_path: Path, known: Path):
    served = Served(shutil.copytree(known, tmp_path / "root"), free_port(), tmp_path / "out")
    try:
        runtime = {"device": "cpu", "threads": 1, "mode": "subprocess"}
        training = tiny_config().training.model_dump() | {"steps": 4000}
        assert served.ask(tiny_config(training=training, runtime=runtime)).returncode == 0
        served.trains()
        (server,) = (pid for pid in servers_of(served.root) if b"flows.serving.server" in command_of(pid))
        os.kill(server, signal.SIGKILL)
        assert served.process.wait(500) == 1
        assert "error: Prefect's server ended (exit -9): see" in served.out.read_text()
        limit = time.monotonic() + 500  # a child sees that its parent is gone a moment later
        while servers_of(served.root) and time.monotonic() < limit:
            time.sleep(0.2)
        assert servers_of(served.root) == []
    finally:
        if served.process.poll() is None:
            os.killpg(served.process.pid, signal.SIGKILL)
