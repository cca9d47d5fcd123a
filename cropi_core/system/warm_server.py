"""The warm process: imports once, then forks one process per request (:mod:`cropi_core.system.warm`).

    python -P -m cropi_core.system.warm_server SOCKET MODULE,MODULE... ROOM

It has a single thread. A forked process returns from :func:`serve` and runs its module at the end of :func:`main`. It
ends as an interpreter does: it waits for threads, runs exit handlers, and an uncaught Ctrl-C ends it by that signal.
Only the objects of the imported modules are left to the kernel; destroying them takes 0.4 s.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from cropi_core.system import warm
from cropi_core.system.warm import FAILED, NUMBER, REFUSED, TITLE_ROOM

MOST_FILES = 64
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


@dataclass
class Child:
    """A forked process: its id, a pidfd, the pipe for its status, and whether it exits when its owner does."""

    pid: int
    pidfd: int
    status: int
    ends_itself: bool


@dataclass
class State:
    """Connections by descriptor, and the processes that each of them started."""

    owners: dict[int, socket.socket] = field(default_factory=dict)
    children: dict[int, dict[int, Child]] = field(default_factory=dict)


@dataclass
class Request:
    """The module that a forked process runs, its open files, and its connection to the warm process."""

    message: dict[str, Any]
    files: list[int]
    connection: socket.socket


def main() -> None:
    """Import, serve requests, and in a forked process run the requested module."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides what Ctrl-C ends
    title = Title()
    title.set("cropi: warm process")
    before = dict(os.environ)
    preload(sys.argv[2].split(","))
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}
    request = serve(connection, unsafe())
    become(request, imported, title)
    message = request.message
    sys.argv = [message["module"], *message["arguments"]]
    del request
    run(message["module"])


def run(module: str) -> NoReturn:
    """Run a module as ``__main__`` and end the process as the interpreter would."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        code = exit_code(ending)
    except KeyboardInterrupt as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for opened in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            opened.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def exit_code(ending: SystemExit) -> int:
    """Return the exit code passed to ``sys.exit``; print a text and return 1 for it."""
    if ending.code is None or isinstance(ending.code, int):
        return (ending.code or 0) & 0xFF
    print(ending.code, file=sys.stderr)
    return 1


def preload(modules: list[str]) -> None:
    """Import modules; the process that needs a missing or broken module reports the error."""
    gc.disable()  # collections while PyTorch and transformers are imported find nothing, and take a fifth of the time
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    gc.enable()
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page it visits


def unsafe() -> str:
    """Return the reason why a fork would not be safe; empty if it is safe."""
    if (probe := os.fork()) == 0:
        os._exit(0)
    os.waitpid(probe, 0)  # OpenBLAS ends its threads at a fork and restarts them on demand
    names = []
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
    if names:
        return f"importing {', '.join(warm.PRELOAD)} started threads ({', '.join(names)})"
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    torch = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or "/dev/nvidia-uvm" in links:
        return "an import has initialised CUDA, which a forked process cannot use"
    return ""


def serve(first: socket.socket, refusal: str) -> Request:
    """Serve until the last owner has disconnected. Returns only in forked processes."""
    state = State({first.fileno(): first}, {first.fileno(): {}})
    poll = select.poll()
    poll.register(first, select.POLLIN)
    while state.owners:
        for fd, _ in poll.poll():
            if fd in state.owners:
                request = receive(state.owners[fd])
                if request is None:
                    poll.unregister(fd)
                    lose(state, fd)
                elif refusal:
                    answer(request[1].pop(0), REFUSED, refusal)
                    close(request[1])
                elif (forked := fork(state, fd, *request, poll)) is not None:
                    return forked
            else:
                poll.unregister(fd)
                ended(state, fd)
    os._exit(0)


def receive(owner: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive a request and its files; return None if the owner has disconnected."""
    try:
        header, files, _, _ = socket.recv_fds(owner, NUMBER.size, MOST_FILES)
        if len(header) < NUMBER.size:
            return None
        body = bytearray()
        (size,) = NUMBER.unpack(header)
        while len(body) < size:
            if not (part := owner.recv(size - len(body))):
                close(files)
                return None
            body += part
    except ConnectionResetError:
        return None
    return json.loads(body), files


def fork(
    state: State, owner: int, message: dict[str, Any], files: list[int], poll: "select.poll"
) -> Request | None:
    """Fork a process; return its request in the child and None in the parent."""
    status = files.pop(0)
    parent_end, child_end = socket.socketpair()
    try:
        pid = os.fork()
    except OSError as error:
        answer(status, FAILED, f"no process could be forked for {message['module']}: {error.strerror}")
        close(files)
        parent_end.close()
        child_end.close()
        return None
    if pid == 0:
        leave(state, [status], parent_end)
        return Request(message, files, child_end)
    child_end.close()
    close(files)
    child = Child(pid, os.pidfd_open(pid), status, message["ends_itself"])
    state.owners[parent_end.fileno()], state.children[parent_end.fileno()] = parent_end, {}
    state.children[owner][child.pidfd] = child
    poll.register(parent_end, select.POLLIN)
    poll.register(child.pidfd, select.POLLIN)
    try:
        os.write(status, NUMBER.pack(pid))
    except BrokenPipeError:  # the owner was interrupted while it waited
        os.kill(pid, signal.SIGKILL)
    return None


def answer(status: int, number: int, text: str) -> None:
    """Answer a request that did not start a process."""
    with contextlib.suppress(BrokenPipeError):
        os.write(status, NUMBER.pack(number) + text.encode())
    os.close(status)


def close(files: list[int]) -> None:
    """Close file descriptors."""
    for fd in files:
        os.close(fd)


def lose(state: State, owner: int) -> None:
    """Kill the processes of an owner that has disconnected, except those that exit by themselves."""
    state.owners.pop(owner).close()
    children = state.children.pop(owner)
    for child in children.values():
        if not child.ends_itself:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    state.children.setdefault(-1, {}).update(children)


def ended(state: State, pidfd: int) -> None:
    """Report the status of a process that has ended."""
    for children in state.children.values():
        if (child := children.pop(pidfd, None)) is not None:
            _, status = os.waitpid(child.pid, 0)
            with contextlib.suppress(BrokenPipeError):
                os.write(child.status, NUMBER.pack(status))
            close([child.status, child.pidfd])
            return


def leave(state: State, files: list[int], connection: socket.socket) -> None:
    """Close the descriptors of the warm process in a newly forked process."""
    close(files)
    connection.close()
    for owner in state.owners.values():
        owner.close()
    for children in state.children.values():
        for child in children.values():
            close([child.status, child.pidfd])


def become(request: Request, imported: dict[str, str], title: "Title") -> None:
    """Set the signals, session, files, environment, directory and streams of a forked process.

    Args:
        request: The request that started it.
        imported: Variables that imports have set, as in a process that starts cold.
        title: Shows its command line.
    """
    message = request.message
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_NAME, b"python")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if message["session"]:
        os.setsid()
    elif message["group"] >= 0:
        os.setpgid(0, message["group"])
    if message["umask"] >= 0:
        os.umask(message["umask"])
    place(dict(zip(message["targets"], request.files, strict=True)), request.connection)
    os.environ.clear()
    os.environ.update(imported | message["environment"])
    time.tzset()
    os.chdir(message["directory"])
    sys.stdin = sys.__stdin__ = stream(0, "r", sys.stdin)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = stream(1, "w", sys.stdout, lines=os.isatty(1))  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = stream(2, "w", sys.stderr, lines=True)  # type: ignore[misc]
    random.seed()
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()
    warm.SERVER.sockets[warm.SERVER.relevant(os.environ)] = request.connection
    title.set(message["title"])


def stream(fd: int, mode: str, like: TextIO, *, lines: bool = False) -> TextIO:
    """Reopen a standard stream, with the encoding that the interpreter chose for it."""
    buffering = 1 if lines else -1
    return cast(
        TextIO,
        open(fd, mode, buffering, encoding=like.encoding, errors=like.errors, closefd=False),
    )


def place(files: dict[int, int], connection: socket.socket) -> None:
    """Move open files to their target descriptors, and the connection to a descriptor outside of these."""
    above = max(files) + 1
    moved = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for target, fd in files.items()}
    if connection.fileno() < above:
        free_fd = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
        connection.close()
        connection.__init__(fileno=free_fd)
    for fd in files.values():
        if fd not in moved.values():
            with contextlib.suppress(OSError):
                os.close(fd)
    for target, fd in moved.items():
        os.dup2(fd, target, inheritable=True)
        os.close(fd)


class Title:
    """The command line that ``ps`` shows: the memory in which the kernel stored the arguments of this process."""

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        self.start, self.size = int(fields[45]), int(fields[46]) - int(fields[45])

    def set(self, text: str) -> None:
        """Show another command line, cut to the available space."""
        if self.size > TITLE_ROOM:
            words = text.replace(" ", "\0").encode()[: self.size - 1]
            ctypes.memmove(self.start, words.ljust(self.size, b"\0"), self.size)


if __name__ == "__main__":
    main()
