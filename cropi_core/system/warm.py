"""Start processes quickly: fork them from a warm process that has already imported the modules of the steps.

Importing torch, transformers and TRL takes 8 s of one core for each process that is started cold. :func:`start_module`
replaces ``subprocess.Popen`` for ``python -P -m MODULE``: the module, its arguments, its open files, its environment,
its directory, its exit status and its signals are the same. The process is forked from a warm process
(:mod:`cropi_core.system.warm_server`), which the first call starts. In order:

1. The owner starts the warm process with its own environment and one end of a socket pair. It imports :data:`PRELOAD`
   and refuses to fork if an import left a thread or initialised CUDA, since neither survives a fork.
2. A request is one message: JSON and the open files of the new process. The warm process forks; the new process takes
   its files, environment and directory, gets its own connection to the warm process, and runs the module as
   ``__main__``.
3. The warm process writes the id of the new process, and later its exit status, to a pipe that came with the request.
4. When an owner ends, for any reason, the kernel closes its socket. The warm process then kills the processes that this
   owner started, except those that end by themselves, and exits with its last owner. The kernel kills the forked
   processes if the warm process is killed.

Linux only (``pidfd``, ``prctl``). On other systems, and for another interpreter (``runtime.python``), processes start
cold.
"""

# WarmProcess replaces methods of Popen that its type stubs do not list.
# pyright: reportAttributeAccessIssue=false

import atexit
import contextlib
import inspect
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from cropi_core.system.children import PACKAGES, child_environment, python_command

PRELOAD = (
    "cropi_core.cli.app",
    "cropi_core.curriculum.steps",
    "cropi_core.gradients.extract",
    "cropi_core.rollouts.collect",
    "cropi_core.evaluation.accuracy",
    "cropi_core.diagnostics.spot_check",
    "cropi_core.selection.strategies",
    "cropi_core.training.stage",
    "transformers.models.qwen2.modeling_qwen2",
)
"""Modules that steps import. If one cannot be imported, the process that needs it reports the error."""

VARIABLE = ("PREFECT_", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")
"""Prefixes of environment variables that no preloaded module reads while it is imported: CUDA's at its first use."""

NUMBER = struct.Struct("q")
REFUSED, FAILED = 0, -1
"""Sent in place of a process id, with a text: this warm process never forks; this process could not be forked."""

IMPORT_ENV = {
    # Without it PyTorch counts GPUs through the CUDA runtime, and processes forked after that cannot use CUDA.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Arrow's allocator starts a thread when it is imported, but not in a forked process.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Set while the warm process imports; forked processes get the environment they were started with."""

END_S = 2.0

TITLE_ROOM = 400
"""Maximum length of the command line that ``ps`` shows for a forked process."""

log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The warm process cannot fork safely; the message gives the reason."""


class Server:
    """Connections to warm processes, one per environment; the first request for an environment starts its process.

    Args:
        preload: Modules to import before the first fork.
        variable: Prefixes of variables in which the environment of a forked process may differ from that of the warm
            process. Any other difference starts a new warm process, since modules read variables while they are
            imported.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD, variable: Sequence[str] = VARIABLE) -> None:
        self.preload, self.variable = tuple(preload), tuple(variable)
        self.sockets: dict[tuple[tuple[str, str], ...], socket.socket] = {}
        self.processes: list[subprocess.Popen] = []
        self._lock = threading.Lock()

    def relevant(self, environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Return the variables that preloaded modules may have read."""
        kept = {name: value for name, value in environment.items() if not name.startswith(self.variable)}
        path = dict.fromkeys(
            kept.pop("PYTHONPATH", "").split(os.pathsep)
        )  # a child's environment may name the checkout again
        kept["PYTHONPATH"] = os.pathsep.join(name for name in path if name not in ("", str(PACKAGES)))
        return tuple(sorted(kept.items()))

    def request(
        self, message: Mapping[str, Any], files: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        """Send a request. Replace a warm process that has died since the last one.

        Raises:
            OSError: The replacement ended too.
        """
        body = json.dumps(message).encode()
        with self._lock:
            for fresh in (False, True):
                try:
                    connection = self._connection(environment)
                    socket.send_fds(connection, [NUMBER.pack(len(body))], files)
                    connection.sendall(body)
                    return
                except (BrokenPipeError, ConnectionResetError):
                    self.sockets.pop(self.relevant(environment)).close()
                    if fresh:
                        raise

    def _connection(self, environment: Mapping[str, str]) -> socket.socket:
        """Return the connection for an environment. A new warm process imports in the background."""
        key = self.relevant(environment)
        if key not in self.sockets:
            parent_end, child_end = socket.socketpair()
            with child_end:
                arguments = [str(child_end.fileno()), ",".join(self.preload), "." * TITLE_ROOM]
                # Without variables that each request sets: passwords and marks of one child are not for the next.
                lasting = {
                    name: value
                    for name, value in environment.items()
                    if name == "PYTHONPATH" or not name.startswith(self.variable)
                }
                process = subprocess.Popen(
                    python_command("cropi_core.system.warm_server", *arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    env={**lasting, **IMPORT_ENV},
                    pass_fds=[child_end.fileno()],
                )
            if not self.processes:
                atexit.register(self.end)
            self.processes = [process, *(each for each in self.processes if each.poll() is None)]
            self.sockets[key] = parent_end
        return self.sockets[key]

    def close(self) -> None:
        """Close the connections: the warm processes kill what was started through them, and exit."""
        for connection in self.sockets.values():
            connection.close()
        self.sockets = {}

    def end(self) -> None:
        """Close the connections and wait briefly for the warm processes to exit, so that none survives the command."""
        self.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


SERVER = Server()
"""Connections of this process. In a process forked from a warm process: the connection to that process."""


def available() -> bool:
    """Return whether this system can fork processes from a warm process."""
    return sys.platform == "linux"


def start_module(
    module: str, arguments: Sequence[str] = (), *, ends_itself: bool = False, **options: Any
) -> subprocess.Popen:
    """Start ``python -P -m MODULE ARGUMENTS`` with this interpreter, from a warm process where the system supports it.

    Args:
        module: The module to run as ``__main__``.
        arguments: Its command-line arguments.
        ends_itself: The process exits by itself when its owner does, for example because its standard input ends; it is
            not killed then.
        options: Options of ``subprocess.Popen``. The default environment is that of :func:`child_environment`.
    """
    command = python_command(module, *arguments)
    options.setdefault("env", child_environment())
    if available():
        try:
            return WarmProcess(command, server=SERVER, ends_itself=ends_itself, **options)
        except RefusedError as error:
            log.warning("%s starts cold, which takes some ten seconds: %s", module, error)
    return subprocess.Popen(command, **options)


class WarmProcess(subprocess.Popen):
    """``subprocess.Popen`` for ``[python, -P, -m, MODULE, ...]``, forked from a warm process.

    Pipes, text mode, ``communicate`` and timeouts are those of the base class; starting, waiting and signals are
    replaced. The process is a child of the warm process, so its status arrives through a pipe and signals are sent
    through a pidfd.
    """

    def __init__(
        self,
        args: Sequence[Any],
        *,
        server: Server,
        ends_itself: bool = False,
        title: str | None = None,
        **options: Any,
    ) -> None:
        words = [os.fspath(word) for word in args]
        at = words.index("-m")
        if set(words[1:at]) - {"-P"}:
            raise ValueError(f"a warm process cannot be given these interpreter options: {words[1:at]}")
        if unsupported := options.keys() & {"preexec_fn", "user", "group", "extra_groups", "shell"}:
            raise ValueError(f"a warm process cannot be given {', '.join(sorted(unsupported))}")
        self._request = {
            "module": words[at + 1],
            "arguments": words[at + 2 :],
            "title": title or " ".join(words),
            "ends_itself": ends_itself,
        }
        self._server = server
        self._status = self._pidfd = -1
        super().__init__(words, **options)

    def _execute_child(self, *given: Any) -> None:
        """Ask the warm process to fork, where the base class forks and executes a program."""
        options = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments
        ends = {n: options[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")}
        standard = enumerate((ends["p2cread"], ends["c2pwrite"], ends["errwrite"]))
        files = {target: source if source >= 0 else target for target, source in standard}
        files |= {fd: fd for fd in options["pass_fds"]}
        environment = dict(os.environ if options["env"] is None else options["env"])
        self._request |= {
            "environment": environment,
            "directory": os.path.abspath(os.fspath(options["cwd"] or ".")),  # noqa: PTH100 - str or bytes or a path
            "session": bool(options["start_new_session"]),
            "group": options["process_group"],
            "umask": options["umask"],
            "targets": list(files),
        }
        status, reply = os.pipe()
        try:
            try:
                self._server.request(self._request, [reply, *files.values()], environment)
            finally:
                os.close(reply)
                self._close_pipe_fds(**ends)
            self.pid = self._forked(status)
        except BaseException:
            os.close(status)
            raise
        self._status = status
        self._child_created = True
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def _forked(self, status: int) -> int:
        """Return the id of the forked process."""
        pid = _read_number(status)
        if pid is None:
            raise OSError(
                f"the warm process ended before it started {self._request['module']}: see its output above"
            )
        if pid > 0:
            return pid
        reason = b"".join(iter(lambda: os.read(status, 4096), b"")).decode()
        raise RefusedError(reason) if pid == REFUSED else OSError(reason)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Return the id and status of this process, or zeros while it is running."""
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = _read_number(self._status)
        if status is None:  # the warm process was killed; the kernel then kills this process
            self._signal(signal.SIGKILL)
            if self._pidfd >= 0:
                select.select([self._pidfd], [], [])
            status = int(signal.SIGKILL)
        for fd in {self._status, self._pidfd} - {-1}:
            os.close(fd)
        self._status = self._pidfd = -1
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        """Return the exit code, or None while the process is running."""
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None and self._status >= 0:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process unless it has ended."""
        if self.poll() is None:
            self._signal(sig)

    def _signal(self, sig: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, sig)


def _read_number(fd: int) -> int | None:
    """Read a number from a pipe; return None at its end."""
    data = b""
    while len(data) < NUMBER.size:
        if not (more := os.read(fd, NUMBER.size - len(data))):
            return None
        data += more
    return NUMBER.unpack(data)[0]
