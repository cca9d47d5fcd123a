import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import prefect.context
import pytest
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from flows.serving.database import make_database
from flows.serving.ownership import record_home
from flows.serving.server import drain
from tests.support import processes
from tests.support.commands import PREFECT, Desk, free_port, tiny_config, wait_for_server
from tests.support.decoys import decoys, imported
from tests.support.paths import CHECKOUT

SERVER = """
import os, sys, uvicorn
from pathlib import Path
from flows.serving.database import make_database
make_database(Path(os.environ["PREFECT_HOME"]))
options = {"host": "127.0.0.1", "port": int(sys.argv[1]), "log_level": "error", "lifespan": "on"}
uvicorn.run("prefect.server.api.server:create_app", factory=True, **options)
"""


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start one server with an empty database for all tests of flows.

    As `prefect.testing.utilities.prefect_test_harness`, but the server is forked, and its tables are copied.
    """
    home, port = tmp_path_factory.mktemp("prefect-server"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    kind = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    with (home / "server.log").open("w") as log:
        server = processes.start(
            [sys.executable, "-c", SERVER, str(port)],
            env=os.environ | {"PREFECT_HOME": str(home)} | kind,
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_server(server, url, home / "server.log", 500)
        with (
            temporary_settings({PREFECT_API_URL: url}),
            prefect.context._temporary_global_settings_context(prefect.context.get_settings_context()),
        ):
            yield
            drain()
    finally:
        server.terminate()
        server.wait(500)


def copy_database(home: Path) -> None:
    """Put an empty database of Prefect into a new home; creating its tables takes longer than a tiny run."""
    home.mkdir(exist_ok=True)
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home}/prefect.db"}):
        make_database(home)
    assert (home / "prefect.db").is_file()


@pytest.fixture
def address() -> str:
    """Return the API address of that server, for commands in tests that are not about their own server."""
    return PREFECT_API_URL.value()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """Run the tiny configuration once; tests that change the result copy it first."""
    from flows.curriculum import curriculum

    root = tmp_path_factory.mktemp("finished") / "root"
    return root, curriculum(config=tiny_config(), root=str(root))


@pytest.fixture(scope="session")
def known(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root that contains the artifacts of every step of the tiny configuration, and no run; to be copied.

    Most tests of commands are about one step and reuse the steps before it. The root also has an empty database of
    Prefect.
    """
    root, _ = finished
    target = tmp_path_factory.mktemp("known") / "root"
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(".*", "runs"))
    copy_database(target / ".prefect")
    record_home(target / ".prefect")
    return target


@pytest.fixture
def own_copy(finished, tmp_path: Path):
    """Copy a finished run, with Prefect's records, to a directory that a test may damage."""
    root, summary = finished
    target = tmp_path / uuid.uuid4().hex[:6]
    shutil.copytree(root, target)
    return target, summary


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    copy_database(home)
    url = f"http://127.0.0.1:{port}/api"
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
    }
    # The harness of the other tests has put its own server into this process's environment.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment = {
        **kept,
        **settings,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "server.log").open("w") as log:
        server = processes.start(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for_server(server, url, home / "server.log", 500)
        root = tmp_path_factory.mktemp("artifacts") / "root"
        desk = Desk(environment | {"CROPI_ROOT": str(root)}, url, root)
        # Prefect imports flows from a pool's working directory first; the deployments must not use it.
        markers, pool = decoys(home / "elsewhere"), ProcessWorker.get_default_base_job_template()
        pool["variables"]["properties"]["working_dir"]["default"] = str(home / "elsewhere")
        (home / "pool.json").write_text(json.dumps(pool))
        create = ["work-pool", "create", "cropi", "--type", "process"]
        desk.run(*create, "--base-job-template", str(home / "pool.json"))
        desk.run("--no-prompt", "deploy", "--all")
        yield desk
        assert not imported(markers), "modules of the pool's working directory were imported"
    finally:
        server.terminate()
        server.wait(500)
