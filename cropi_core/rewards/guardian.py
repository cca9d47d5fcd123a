"""A process between cropi and the process that grades, so that nothing a user's function starts outlives it.

A function can start a program in a session of its own; killing the group of the worker does not end that one. On Linux
the worker is therefore split in two before a function is imported. The first process is the subreaper of everything
below it: a process whose parent has ended becomes its child. When the second one ends, or :data:`STOP` arrives, it
kills its children until it has none, and ends as the second one has ended. Landlock keeps signals of functions from it.

Uses only the standard library.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

STOP = signal.SIGTERM
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def split(ended_with_parent: int) -> None:
    """Return in a new process; this one stays as its guardian and never returns. Without effect outside Linux.

    Args:
        ended_with_parent: Parent-death signal of this process, at which it ends what is below it as well.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP, ended_with_parent})  # before there is a child to kill
    child = os.fork()
    if not child:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP, ended_with_parent})
        return
    os.closerange(0, 2)  # the pipes of the worker, and their copies, end with the worker
    os.closerange(3, 1024)
    received = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    for number in (STOP, ended_with_parent):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP, ended_with_parent})
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end_all()
    end_like(-received[0] if received else status)


def end_all() -> None:
    """Kill the children of this process until none is left; those of a killed one become children of this one."""
    while True:
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Return the processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def end_like(status: int) -> None:
    """End this process with an exit code, or by a signal if it is negative."""
    if status < 0:
        with suppress(OSError):  # SIGKILL has no disposition
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
