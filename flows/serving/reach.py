"""Reach the server of a command: the server that the user configured, or one started for the command."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from flows.serving.environment import Served, check_api, prepare, read_served
from flows.serving.ownership import has_database

if TYPE_CHECKING:
    from cropi_core.artifacts import Store
    from flows.serving.server import LocalServer


def home_without_server(store: "Store", note: Callable[[str], None]) -> Path | None:
    """Set Prefect's environment, and the address of the server that runs already, if there is one.

    Args:
        store: Artifact store.
        note: Called with a message that names the server.

    Returns:
        Prefect's home, on which a server must be started; None if the user has configured a server or one serves it.
    """
    store.prepare()
    url = prepare(store.root)
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    if url is not None:
        check_api(url)
        return None
    if (served := read_served(home)) is not None:
        note(f"through the server of `cropi serve`, {served.url}")
        served.enter()
        return None
    return home


def start_server(home: Path, stack: ExitStack, note: Callable[[str], None]) -> "LocalServer":
    """Start a server on a Prefect home for the duration of a command, and set its address; the caller must wait for it.

    Args:
        home: Prefect's home.
        stack: Stops the server.
        note: Called with a message if the database must be created.
    """
    from flows.serving.server import local_server

    if not has_database(home):
        note(f"making Prefect's database under {home}, once")
    server = stack.enter_context(local_server(home))
    Served(server.url, server.password).enter()
    return server


def reach_server(store: "Store", stack: ExitStack, note: Callable[[str], None]) -> "LocalServer | None":
    """Set Prefect's environment and its server address: the user's server, or one started here.

    Args:
        store: Artifact store.
        stack: Stops the server that is started if the user has not configured one.
        note: Called with a message that names the server.

    Returns:
        The server started here, which the caller must wait for; None if the user has configured one.
    """
    home = home_without_server(store, note)
    return None if home is None else start_server(home, stack, note)
