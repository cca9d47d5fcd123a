"""Python processes for the tests, forked from one warm process unless a test is about a cold start.

:func:`run` and :class:`Popen` replace those of `subprocess` for ``[sys.executable, ...]`` (``-m MODULE``, ``-c CODE``
or a script) and for console scripts of the environment; other programs start as usual. On two cores, importing PyTorch,
TRL and Prefect's packages takes 8 to 13 s per process; a fork takes 10 ms.

Commands that are forked fork in turn the Prefect server and the warm process that they start (:func:`fork_children`).
Both stay processes of their own, with the life of those that start cold. Processes that pytest itself starts with
`subprocess` start cold: `cropi_core/system/test_warm.py` and `flows/test_database.py` have both kinds.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from cropi_core.system import warm
from cropi_core.system.children import python_command

BESIDE_PREFECT = (
    "amplitude",
    "asgi_lifespan",
    "asyncpg",
    "beartype",
    "coolname",
    "cryptography.hazmat.primitives.serialization",
    "cryptography.x509",
    "cyclopts",
    "docket",
    "fastapi",
    "griffe",
    "httpcore",
    "httpx",
    "humanize",
    "jsonschema",
    "opentelemetry.trace",
    "pathspec",
    "pendulum",
    "prometheus_client",
    "pydantic_settings",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "typer",
    "uvicorn",
    "websockets.asyncio.client",
    "websockets.legacy.client",
)
"""Packages that Prefect imports. Prefect itself is not preloaded: it reads its settings on import, from variables that
`cropi` sets first.
"""
VARIABLE = (
    *warm.VARIABLE,
    "PYTEST_",
    "PYTHON",
    "CROPI_",
    "AWS_",
    "FSSPEC",
    "HOME",
    "PATH",
    "TERM",
    "COLUMNS",
    "NO_COLOR",
    "XDG_",
    "NO_PROXY",
    "no_proxy",
    *warm.IMPORT_ENV,
)
"""Environment variables that tests and commands set. No preloaded module reads them on import, except those that every
warm process sets, and those of caches that no test uses."""
SERVER = warm.Server(
    preload=(*warm.PRELOAD, "matplotlib.figure", "jinja2", *BESIDE_PREFECT), variable=VARIABLE
)
CHILDREN = ("flows.serving.server", "cropi_core.system.warm_server")
"""Modules that commands start with `subprocess`, and that are forked too."""
CHILD_COMMANDS = {tuple(python_command(module)) for module in CHILDREN}
SCRIPTS = {"cropi": "flows.command.app", "prefect": "prefect.cli"}


def module_command(args: Any) -> list[str] | None:
    """Return the same command through :mod:`tests.support.entry`; None if it does not run this interpreter."""
    words = [os.fspath(word) for word in args]
    name, place = Path(words[0]).name, Path(words[0]).parent
    entry = [sys.executable, "-m", "tests.support.entry"]
    if name in SCRIPTS and place in (Path(), Path(sys.executable).parent):
        return [*entry, "script", SCRIPTS[name], *words[1:]]
    if words[0] != sys.executable:
        return None
    safe = "safe" if words[1] == "-P" else "any"
    words = words[2:] if safe == "safe" else words[1:]
    if words[0] in ("-m", "-c"):
        return [*entry, safe + words[0], *words[1:]]
    return None if words[0].startswith("-") else [*entry, "file", *words]


class Popen(warm.WarmProcess):
    """`subprocess.Popen`, forked from the tests' warm process."""

    def __init__(self, args: Any, **options: Any) -> None:
        command = module_command(args)
        assert command is not None, f"only commands of {sys.executable} are forked: {args}"
        super().__init__(command, server=SERVER, title=" ".join(map(os.fspath, args)), **options)
        self.args = args


def start(args: Any, **options: Any) -> subprocess.Popen:
    """Start a process, warm if it runs this interpreter."""
    if not warm.available() or module_command(args) is None:
        return subprocess.Popen(args, **options)
    return Popen(args, **options)


def fork_children(connection: socket.socket) -> None:
    """Fork the :data:`CHILDREN` that this process starts; called once in a process that was forked.

    Args:
        connection: The connection of this process to the tests' warm process.
    """
    SERVER.sockets[SERVER.relevant(os.environ)] = connection
    cold, process = subprocess.Popen, os.getpid()

    class ForkedOrCold(cold):
        """`subprocess.Popen`, which forks the children."""

        def __new__(cls, args: Any, **options: Any) -> Any:
            if os.getpid() == process and tuple(args[:4]) in CHILD_COMMANDS:
                return Popen(args, ends_itself=True, **options)
            return super().__new__(cls)

    subprocess.Popen = ForkedOrCold


def run(
    args: Any,
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Run a process to completion, like `subprocess.run`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with start(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
