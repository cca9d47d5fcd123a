"""The command `cropi serve`: a Prefect server with its UI, and the flows served from it, until Ctrl-C.

    cropi serve --root .cropi --port 4200

The server listens on loopback only and keeps its data below the root. The flows are served as deployments named
`local`. The deployments of `prefect.yaml` have other names, because serving a flow under a deployed name removes the
deployment's pull step. Runs execute one at a time, each in its own process.
"""

import asyncio
import multiprocessing
import os
import shlex
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from cropi_core.artifacts import Store
from cropi_core.errors import ConfigError, CropiError
from cropi_core.rewards import ALLOWED
from flows.serving.environment import (
    LOCAL,
    SERVED,
    Served,
    configured_api,
    prepare,
    read_served,
    take_home,
    write_served,
)
from flows.serving.ownership import has_database
from flows.serving.protection import entrance_link
from flows.serving.server import LocalServer, answers, local_server

DEPLOYMENT = LOCAL
GRACE_S = 10.0


def serve_flows(root: str, port: int) -> None:
    """Start the server and execute requested runs; return when the command is stopped.

    Args:
        root: Directory or address of the artifacts; the server stores its data in `.prefect` below the directory, or
            below the address's cache.
        port: Port on 127.0.0.1.

    Raises:
        ConfigError: The port is in use, another server is configured, or this root is already being served.
        CropiError: The server did not start, or ended unexpectedly.
    """
    url = f"http://127.0.0.1:{port}/api"
    refuse_if_taken(url, port)
    if (other := configured_api()) is not None and other.rstrip("/") != url:
        raise ConfigError(
            f"PREFECT_API_URL is {other}, and `cropi serve` starts its own server at {url}; unset "
            "PREFECT_API_URL (or leave that profile), or use that server: prefect --no-prompt deploy --all"
        )
    store = Store(root)
    store.prepare()
    home = take_home(store.root)
    # Print the start and end of runs on the terminal.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    os.environ.setdefault("PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT", "false")
    # The second UI asks its vendor's host for settings in spite of the analytics setting (docs/guides/prefect-ui.md).
    os.environ.setdefault("PREFECT_SERVER_UI_V2_ENABLED", "false")
    if (running := read_served(home)) is not None:
        raise ConfigError(
            f"{store.url} is served already, at {running.url}; use that: . {home / SERVED}, or stop it"
        )
    prepare(store.root)
    # The operator, not the run, decides which code a run through the server may execute (docs/guides/security.md).
    os.environ.setdefault(ALLOWED, "")
    if not has_database(home):
        print(f"making Prefect's database under {home}, once", flush=True)
    with local_server(home, port, store.url) as server:
        server.wait()
        served = Served(server.url, server.password)
        served.enter()
        marker = write_served(home, served)
        try:
            asyncio.run(_work(server, store.url, marker))
        finally:
            marker.unlink(missing_ok=True)


def refuse_if_taken(url: str, port: int) -> None:
    """Refuse a port on which a process listens.

    Raises:
        ConfigError: The port is in use, or may not be used; the message says if the listener is Prefect.
    """
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server itself does; connections that have ended do not matter
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError as error:
            reason = error.strerror
    advice = f"stop it, or take another port: cropi serve --port {port + 1 if port < 65535 else 4201}"
    if answers(url):
        advice = f"a Prefect server listens there. Use it: export PREFECT_API_URL={url}; or {advice}"
    raise ConfigError(f"port {port} of 127.0.0.1 cannot be used ({reason}): {advice}")


async def _work(server: LocalServer, root: str, marker: Path) -> None:
    """Serve the flows until SIGTERM, or until this task is cancelled, which Ctrl-C does.

    Raises:
        CropiError: The server ended.
    """
    from prefect.runner import Runner
    from prefect.types.entrypoint import EntrypointType

    from flows import single_steps as single
    from flows.curriculum import curriculum
    from flows.select import select
    from flows.serving.automations import install

    # Keep schedules active: a user enabled them in the UI, and nothing would enable them again.
    runner = Runner(name="cropi-serve", limit=1, query_seconds=2, pause_on_shutdown=False)
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(*_: Any, **__: Any) -> None:
        loop.call_soon_threadsafe(stopping.set)

    # Prefect's own handler blocks inside the signal, waiting for the event loop that the signal interrupted.
    runner.handle_sigterm = stop
    flows = (
        curriculum,
        select,
        single.rollouts,
        single.gradients,
        single.scores,
        single.selection,
        single.training,
        single.evaluation,
    )
    for flow in flows:
        await runner.aadd_flow(
            flow,
            name=DEPLOYMENT,
            parameters={"root": root},
            tags=["cropi", "served"],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    # After `kill -9` of this command its run would never end; this automation ends it after the server's next start.
    await asyncio.to_thread(install, None, renew=False)
    print(_greeting(server, root, marker, [f"{flow.name}/{DEPLOYMENT}" for flow in flows]), flush=True)
    working = asyncio.create_task(runner.start())
    try:
        while not (stopping.is_set() or working.done()):
            if server.process.poll() is not None:
                raise CropiError(
                    f"Prefect's server ended (exit {server.process.returncode}): {server.tail()}; start "
                    "`cropi serve` again to resume the runs"
                )
            await asyncio.wait([working], timeout=1)
    finally:
        # Ctrl-C in a terminal also reaches the runs; a signal to this process alone does not. Without a server nothing
        # can be cancelled, and Prefect would wait for the runs to end by themselves.
        if runner.started and server.process.poll() is None:
            await runner.cancel_all()
        for run in multiprocessing.active_children():
            run.terminate()  # also ends its step; the run would otherwise retry the stopped server for minutes
            run.join(GRACE_S)
            run.kill()
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


def _greeting(server: LocalServer, root: str, marker: Path, names: list[str]) -> str:
    return f"""\
UI           {entrance_link(server.url, server.password)}
deployments  {", ".join(names)}
artifacts    {root}
log          {server.log}
In another terminal:
  . {shlex.quote(str(marker))}
  prefect deployment run {names[0]} --watch -p preset=demo -p stages=1
Ctrl-C stops the server and its runs; a run that is started again resumes."""
