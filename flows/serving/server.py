"""A Prefect server for the duration of one command, on a loopback port: for a run, or for `cropi serve`.

Prefect's own temporary server does the same with more waiting: the client imports the whole server before it starts
one, and continues only after that. Here the server process starts first, while the command imports its modules. It is
the same application on the same database (``PREFECT_HOME``): for a run with the services of an ephemeral server, for
`cropi serve` complete with its UI and scheduler.

The process ends when its standard input closes, so it cannot outlive the command, however the command ends.

    python -m flows.serving.server PORT [whole [ROOT]]
"""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from cropi_core.errors import CropiError
from cropi_core.system import child_environment, free_port, python_command
from flows.serving.database import make_database
from flows.serving.ownership import has_database, record_home
from flows.serving.protection import CLIENT_PASSWORD, PASSWORD, own_origins, protected, server_password

if TYPE_CHECKING:
    import uvicorn

STARTUP_S = 180.0
"""Startup limit in seconds; the first start creates the database's tables, 20 s on two busy cores."""
SHUTDOWN_S = 15.0
KEPT_LOGS = 10
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LocalServer:
    """A server that is starting; call :meth:`wait` before use.

    Args:
        home: Prefect's home, with the database, the log and the UI's files.
        port: Port to listen on; None uses a free port, without UI and scheduler.
        root: Root whose reports are shown at `/reports/RUN`; None shows none.

    Attributes:
        password: Password required by every request to its API. Child processes receive it through their environment,
            which other users of the machine cannot read, and never through their command line, which they can.
    """

    def __init__(self, home: Path, port: int | None = None, root: str | None = None) -> None:
        shared = _is_shared(home)
        home.mkdir(mode=0o777 if shared else 0o700, parents=True, exist_ok=True)
        if not has_database(home):
            record_home(home)  # before the server makes the database
        self.port = port or free_port()
        # One log per server: concurrent or consecutive commands on one root must not write into each other's log.
        self.log = home / f"server-{self.port}.log"
        bypass_proxies()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.password = server_password()
        environment = {k: v for k, v in child_environment().items() if k != "PREFECT_API_URL"}
        environment |= {PASSWORD: self.password, CLIENT_PASSWORD: self.password}
        environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(own_origins(self.port))
        if port is not None:
            # The pages use port 4200 unless configured; their files are otherwise written into site-packages.
            environment["PREFECT_SERVER_UI_API_URL"] = self.url
            environment.setdefault("PREFECT_UI_URL", self.url.removesuffix("/api"))  # for links in messages
            environment["PREFECT_SERVER_UI_STATIC_DIRECTORY"] = str(home / "ui")
            # Always rewritten: existing files may come from another user's root, and their scripts would get the
            # password.
            _remove(home / "ui")
        mode = (["whole", root] if root else ["whole"]) if port else []
        for old in sorted(home.glob("server-*.log"), key=_modification_time)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
        # If the log were a link, its target would be overwritten.
        self.log.unlink(missing_ok=True)
        with open(
            self.log, "w", encoding="utf-8", opener=partial(os.open, mode=0o666 if shared else 0o600)
        ) as log:
            self.process = subprocess.Popen(
                python_command("flows.serving.server", str(self.port), *mode),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C is for the command; the server must still receive the news that the run was stopped.
                start_new_session=True,
                umask=-1 if shared else 0o077,
            )

    def wait(self) -> None:
        """Block until the server answers.

        Raises:
            CropiError: It ended, or did not answer in time; the message names its log.
        """
        deadline = time.monotonic() + STARTUP_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise CropiError(
                    f"Prefect's server ended at its start (exit {self.process.returncode}): {self.tail()}"
                )
            if answers(self.url):
                return
            time.sleep(0.05)
        raise CropiError(
            f"Prefect's server did not answer at {self.url} within {STARTUP_S:.0f} s: {self.tail()}"
        )

    def release(self) -> None:
        """Tell the server to finish its work and exit; :meth:`stop` waits for that."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def stop(self) -> None:
        """Stop the server."""
        self.release()
        try:
            self.process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        """Return the path and the last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"see {self.log}" + (f"; it ends with {lines[-1].strip()!r}" if lines else "")


def _is_shared(home: Path) -> bool:
    """Return whether other users can write to the parent directory of Prefect's home, and so own files in it."""
    try:
        return bool(home.parent.stat().st_mode & 0o022)
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _modification_time(path: Path) -> float:
    """Return a file's modification time; a missing file counts as the oldest."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def bypass_proxies() -> None:
    """Bypass proxies for this machine's own addresses, in this process and its children."""
    for name in ("NO_PROXY", "no_proxy"):
        given = [one.strip() for one in os.environ.get(name, "").split(",") if one.strip()]
        os.environ[name] = ",".join([*given, *(one for one in LOOPBACK if one not in given)])


def _run_alone(home: Path, server: "uvicorn.Server", begin: threading.Event) -> None:
    """Make or migrate the database below ``home`` under a lock, held until ``server`` is up.

    Otherwise two first runs on a new root would both create the tables, and one of them would fail.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "migration.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            make_database(home)
        finally:
            begin.set()
        while not (server.started or server.should_exit):
            time.sleep(0.02)


@contextmanager
def local_server(home: Path, port: int | None = None, root: str | None = None) -> Iterator[LocalServer]:
    """Start a server on the database below ``home`` and stop it at the end; does not wait until it answers."""
    server = LocalServer(home, port, root)
    try:
        yield server
    finally:
        server.stop()


def answers(url: str) -> bool:
    """Return whether a Prefect server on this machine answers at this API address."""
    try:
        # Without proxies: the address is local, and a configured proxy cannot reach it.
        with DIRECT.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False


def drain(timeout: float = 10.0) -> None:
    """Send the logs and events that Prefect still buffers in this process."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=timeout)
    EventsWorker.drain_all(timeout=timeout, at_exit=False)


def settle(timeout: float = 10.0) -> None:
    """Send buffered data, and wait until all task runs of the newest flow run are recorded.

    Task runs reach the database as events, in order. A server stopped right after the flow loses the last of them, and
    the UI would show steps that never ended.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

    from tasks.ui import SHOW_RUN

    drain(timeout)
    deadline = time.monotonic() + timeout
    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in newest]))
        while newest and time.monotonic() < deadline:
            last = client.read_task_runs(
                flow_run_filter=chosen, sort=TaskRunSort.EXPECTED_START_TIME_DESC, limit=1
            )
            if last and last[0].name == SHOW_RUN and last[0].state and last[0].state.is_final():
                return
            time.sleep(0.1)


def _reader(root: str) -> Callable[[str], str | None]:
    """Return the function that reads the report of a run below ``root``."""
    from cropi_core.artifacts import Store

    store = Store(root)
    return lambda run: store.read(f"runs/{run}.html")


def serve(port: int, root: str | None = None, *, whole: bool) -> None:
    """Serve until standard input closes; show the reports of the runs below ``root``."""
    gc.disable()  # collections during these imports find nothing, and take a sixth of the time
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=not whole, final=True)
    gc.freeze()
    gc.enable()
    reports = None if root is None else _reader(root)
    server = uvicorn.Server(
        uvicorn.Config(
            protected(app, port, reports), host="127.0.0.1", port=port, log_level="error", lifespan="on"
        )
    )

    def end_with_the_command() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        time.sleep(SHUTDOWN_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_the_command, daemon=True).start()
    home, begin = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser(), threading.Event()
    threading.Thread(target=_run_alone, args=(home, server, begin), daemon=True).start()
    begin.wait()
    server.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[3:4], whole="whole" in sys.argv[2:3])
