"""A server that several people share: PostgreSQL behind it, a password in front, two workers, one artifact root."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from tests.support import processes
from tests.support.commands import PREFECT, free_port, tiny_config
from tests.support.paths import CHECKOUT

AUTH = "team:only-for-this-test"
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))

pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL: apt-get install postgresql"),
]


def ask(url: str, auth: str | None) -> urllib.request.Request:
    headers = {"content-type": "application/json"}
    if auth:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    return urllib.request.Request(url, data=b"{}", headers=headers)


def online(url: str) -> list[str]:
    """The workers of the pool that the server has heard of."""
    with urllib.request.urlopen(ask(f"{url}/work_pools/cropi/workers/filter", AUTH), timeout=10) as response:
        return [worker["name"] for worker in json.loads(response.read()) if worker["status"] == "ONLINE"]


def health(url: str, auth: str | None) -> int:
    """The status of an authenticated page; 0 when nobody answers."""
    request = ask(f"{url}/flow_runs/filter", auth)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL of our own on a free port of the loopback, with pg_trgm; it refuses to run as root."""
    port, bin_ = free_port(), POSTGRES[-1].parent
    # Not below pytest's directories, which are closed to the other user.
    with tempfile.TemporaryDirectory(prefix="cropi-postgres-") as folder:
        as_user = []
        if os.geteuid() == 0:
            as_user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")
        data, log = f"{folder}/data", f"{folder}/log"

        def call(program: str, *arguments: str) -> None:
            processes.run([*as_user, bin_ / program, *arguments], check=True, stdout=-3, cwd="/")

        call("initdb", "-D", data, "-U", "prefect", "--auth=trust", "--no-sync")
        call("pg_ctl", "-D", data, "-l", log, "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "-w", "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "cropi")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/cropi"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="module")
def team(
    database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, str], str, Path]]:
    """The environment of a member, the server's address, and the artifact root."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    root, url = tmp_path_factory.mktemp("artifacts") / "root", f"http://127.0.0.1:{port}/api"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    common = {
        **kept,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "CROPI_ROOT": str(root),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "NO_COLOR": "1",
    }
    server_only = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    }
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "server.log").open("w") as log:
        server = processes.start(command, env=common | server_only, stdout=log, stderr=log)
    member = common | {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": AUTH}
    try:
        deadline = time.monotonic() + 500
        while health(url, AUTH) != 200:
            assert server.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, (home / "server.log").read_text()
            time.sleep(0.5)
        run(member, "work-pool", "create", "cropi", "--type", "process")
        run(member, "--no-prompt", "deploy", "--all")
        yield member, url, root
    finally:
        server.terminate()
        server.wait(500)


def run(environment: dict[str, str], *arguments: str) -> str:
    done = processes.run(
        [PREFECT, *arguments], env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_request_is_answered_without_the_password(team: tuple[dict[str, str], str, Path]):
    _, url, _ = team
    assert [health(url, auth) for auth in (None, "team:wrong", AUTH)] == [401, 401, 200]


def test_two_workers_run_two_curricula_at_once_and_compute_no_key_twice(
    team: tuple[dict[str, str], str, Path], tmp_path: Path
):
    """They share prompts, rollouts and gradients, and differ in what is chosen: whoever comes first computes a key."""
    member, _, root = team
    start = [PREFECT, "worker", "start", "--pool", "cropi", "--limit", "1"]
    workers = [
        processes.start([*start, "--name", name], env=member, cwd=CHECKOUT, stdout=-3, stderr=-3)
        for name in "ab"
    ]
    try:
        deadline = time.monotonic() + 500
        while len(online(team[1])) < 2:
            assert time.monotonic() < deadline, "two workers are not online"
            time.sleep(0.5)
        watching = []
        for strategy in ("influence", "grad_norm"):
            training = tiny_config().training.model_dump() | {"steps": 20}  # long enough to be at once
            chosen = {"ratio": 0.25, "strategy": strategy}
            config = tiny_config(name=strategy, selection=chosen, training=training)
            text = json.dumps(config.model_dump(mode="json"))
            command = [PREFECT, "deployment", "run", "cropi/curriculum", "-p", f"config={text}"]
            watching.append(
                processes.start(
                    [*command, "--watch", "--watch-interval", "1"],
                    env=member,
                    cwd=CHECKOUT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for process in watching:
            out, _ = process.communicate(timeout=500)
            assert process.returncode == 0, out
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait(500)
    store = Store(root)
    records = [load_run(store, name) for name in list_runs(store)]
    assert [record.status for record in records] == ["done", "done"]
    began = sorted(record.started for record in records)
    ended = sorted(record.finished for record in records)
    assert began[1] < ended[0], "they did not run at once"
    computed = [{e.ref.key for e in r.slots.values() if e.origin == "computed"} for r in records]
    used = [{e.ref.key for e in r.slots.values()} for r in records]
    assert not computed[0] & computed[1]
    assert used[0] & used[1] <= computed[0] | computed[1]
    assert any(key.startswith("gradients") for key in used[0] & used[1])
    assert all(computed), "one of them found everything"
