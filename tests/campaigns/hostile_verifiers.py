"""Functions of a user's file that hang, fork, eat memory, write, connect, forge replies and attack their parent.

Imported by the process that grades (``grading.functions``), never by the campaign's own. ``answer`` is JSON with
what a function attacks. A function that does what it tries returns a reward, which the campaign
counts as a fault.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

LONG = 600.0


def told(answer: str) -> dict:
    """Return what to attack."""
    return json.loads(answer)


def sleeps(completion: str, answer: str) -> float:
    time.sleep(LONG)
    return 1.0


def spins(completion: str, answer: str) -> float:
    while True:
        pass


def computes_in_c(completion: str, answer: str) -> float:
    return float(9 ** (9**9))


def stops_itself(completion: str, answer: str) -> float:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LONG)
    return 1.0


def ignores_signals(completion: str, answer: str) -> float:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(LONG)
    return 1.0


def leaves_a_thread(completion: str, answer: str) -> float:
    threading.Thread(target=sleeps, args=("", ""), daemon=False).start()
    sys.exit(3)


def leaves_a_child(completion: str, answer: str) -> float:
    if not os.fork():
        time.sleep(LONG)
        os._exit(0)
    os._exit(5)


def leaves_a_daemon(completion: str, answer: str) -> float:
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(LONG)
        os._exit(0)
    time.sleep(LONG if told(answer)["draw"] % 2 else 0.2)
    os._exit(5)


def leaves_a_program(completion: str, answer: str) -> float:
    subprocess.Popen(["sleep", str(LONG)], start_new_session=True, env={})
    time.sleep(LONG)
    return 1.0


def forks_much(completion: str, answer: str) -> float:
    for _ in range(30):  # a bound, for the machine's sake
        if not os.fork():
            time.sleep(LONG)
            os._exit(0)
    time.sleep(LONG)
    return 1.0


def eats_memory(completion: str, answer: str) -> float:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 24))


def maps_memory(completion: str, answer: str) -> float:
    return float(len([mmap.mmap(-1, 1 << 26) for _ in range(1000)]))


def recurses(completion: str, answer: str) -> float:
    sys.setrecursionlimit(1 << 30)
    return recurses(completion, answer) + 1


def crashes_in_c(completion: str, answer: str) -> float:
    return float(ctypes.string_at(1)[0])


def writes_outside(completion: str, answer: str) -> float:
    place = Path(told(answer)["place"])
    for action in (
        lambda: (place / "new").write_text("x"),
        lambda: (place / "own").write_text("x"),
        lambda: (place / "own").unlink(),
        lambda: (place / "own").rename(place / "moved"),
        lambda: os.truncate(place / "own", 0),
        lambda: (place / "directory").mkdir(),
        lambda: os.link(place / "own", Path(os.environ["TMPDIR"]) / "hard"),
        lambda: written_through_a_link(place),
    ):
        with contextlib.suppress(OSError):
            action()
    raise PermissionError("tried")


def written_through_a_link(place: Path) -> None:
    """Write through a link in the directory where writing is allowed."""
    link = Path(os.environ["TMPDIR"]) / "link"
    link.symlink_to(place / "own")
    link.write_text("x")


def fills_the_disk(completion: str, answer: str) -> float:
    with Path(os.environ["TMPDIR"], "large").open("wb") as file:
        file.seek((1 << 30) + 1)
        file.write(b"x")
    return 1.0


def writes_to_shared_memory(completion: str, answer: str) -> float:
    Path("/dev/shm", told(answer)["name"]).write_bytes(b"x")
    return 1.0


def connects(completion: str, answer: str) -> float:
    socket.create_connection(("127.0.0.1", told(answer)["port"]), timeout=5).sendall(b"x")
    return 1.0


def sends_a_datagram(completion: str, answer: str) -> float:
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", told(answer)["port"]))
    return 1.0


def asks_over_http(completion: str, answer: str) -> float:
    urllib.request.urlopen(f"http://127.0.0.1:{told(answer)['port']}/", timeout=5)
    return 1.0


def connects_in_a_program(completion: str, answer: str) -> float:
    code = f"import socket; socket.create_connection(('127.0.0.1', {told(answer)['port']}), timeout=5)"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return 1.0


def kills_its_parent(completion: str, answer: str) -> float:
    for pid in (os.getppid(), told(answer)["parent"]):
        with contextlib.suppress(PermissionError):
            os.kill(pid, signal.SIGKILL)
            return 1.0
    raise PermissionError("both refused")


def kills_its_parents_group(completion: str, answer: str) -> float:
    os.killpg(told(answer)["parent"], signal.SIGKILL)
    return 1.0


def kills_by_descriptor(completion: str, answer: str) -> float:
    signal.pidfd_send_signal(os.pidfd_open(told(answer)["parent"]), signal.SIGKILL)
    return 1.0


def limits_its_parent(completion: str, answer: str) -> float:
    resource.prlimit(told(answer)["parent"], resource.RLIMIT_CPU, (0, 0))
    return 1.0


def writes_into_its_parent(completion: str, answer: str) -> float:
    with Path(f"/proc/{told(answer)['parent']}/mem").open("r+b") as memory:
        memory.read(1)
    return 1.0


def forges_a_reply(completion: str, answer: str) -> float:
    for descriptor in range(3, 30):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'[1.0, "", false, 0]\n' * (1 + told(answer)["draw"] % 3))
    raise ValueError("forged")


def writes_garbage_into_replies(completion: str, answer: str) -> float:
    for descriptor in range(3, 30):
        with contextlib.suppress(OSError):
            os.write(descriptor, os.urandom(100 + told(answer)["draw"] % 100_000).replace(b"\n", b"") + b"\n")
    raise ValueError("garbage")


def floods_replies(completion: str, answer: str) -> float:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for descriptor in range(3, 10):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"[" * (1 << 16))
    return 1.0


def closes_everything(completion: str, answer: str) -> float:
    os.closerange(0, 100)
    return 1.0


def returns_what_is_no_reward(completion: str, answer: str) -> object:
    odd = [float("nan"), None, "1", 1e300, [1.0], {}, object, 10**400, complex(1, 1)]
    return odd[told(answer)["draw"] % len(odd)]


def raises_a_long_message(completion: str, answer: str) -> float:
    raise ValueError("\x1b[2J<script>\ud800" * 500_000)


def changes_the_interpreter(completion: str, answer: str) -> float:
    json.dumps = json.loads = None
    time.monotonic = None
    raise ValueError("changed")


KINDS = (
    sleeps, spins, computes_in_c, stops_itself, ignores_signals, leaves_a_thread,
    leaves_a_child, leaves_a_daemon, leaves_a_program, forks_much,
    eats_memory, maps_memory, recurses, crashes_in_c,
    writes_outside, fills_the_disk, writes_to_shared_memory,
    connects, sends_a_datagram, asks_over_http, connects_in_a_program,
    kills_its_parent, kills_its_parents_group, kills_by_descriptor, limits_its_parent, writes_into_its_parent,
    forges_a_reply, writes_garbage_into_replies, floods_replies, closes_everything,
    returns_what_is_no_reward,
    raises_a_long_message, changes_the_interpreter,
)  # fmt: skip
