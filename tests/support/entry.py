"""Entry point of processes that :mod:`tests.support.processes` forks: sets the `sys.path` of the original command."""

import ctypes
import os
import runpy
import sys
from pathlib import Path

from cropi_core.system import warm
from tests.support import processes

MARKS = ("CROPI_", "PREFECT_HOME")
"""Prefixes of the variables by which tests find processes in `/proc`."""


def main() -> None:
    """Run a module, code or a file as ``__main__``."""
    how, what, *arguments = sys.argv[1:]
    show_environment()
    (connection,) = warm.SERVER.sockets.values()
    warm.SERVER.sockets.clear()  # cropi's own warm process is another one
    if what in processes.CHILDREN:
        connection.close()
    else:
        processes.fork_children(connection)
    for entry in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(0, entry)
    if how.startswith("any"):
        sys.path.insert(0, str(Path.cwd()) if how.endswith("-m") else "")
    if how.endswith("-m") or how == "script":
        sys.argv = [what, *arguments]
        if how == "script" and what == "prefect.cli":
            script()
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif how.endswith("-c"):
        sys.argv = ["-c", *arguments]
        namespace = vars(sys.modules["__main__"])
        namespace.pop("__spec__", None)
        namespace["__spec__"] = None
        exec(compile(what, "<string>", "exec"), namespace)
    else:
        sys.argv = [what, *arguments]
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


def show_environment() -> None:
    """Show the marks of this process in `/proc/PID/environ`, where the kernel shows the warm process's environment.

    Raises:
        ValueError: The kernel's room for the environment is too small.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, room = int(fields[47]), int(fields[48]) - int(fields[47])
    marks = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(MARKS)]
    text = "\0".join(marks).encode()
    if len(text) >= room:
        raise ValueError(f"{marks} have {len(text)} bytes; the environment of the warm process has {room}")
    ctypes.memmove(start, text.ljust(room, b"\0"), room)


def script() -> None:
    """Run the console script `prefect`."""
    from prefect.cli import app

    sys.argv[0] = str(Path(sys.executable).parent / "prefect")
    app()


if __name__ == "__main__":
    main()
