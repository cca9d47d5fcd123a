"""Verifiers that hang, fork, eat memory, write, connect, forge replies and attack their parent.

A case grades a list in which some items, at random places, are graded by one hostile function
(:mod:`tests.campaigns.hostile_verifiers`), the others by a harmless function of the same process and by a built-in
verifier. It is executed in a process of its own, which must live to the end. Every other item must have its reward, the
hostile ones none. Afterwards no process, no directory and no changed file may be left, and nothing may have reached a
listening port. Needs seccomp and Landlock 6 (Linux 6.12).

    python -m tests.campaigns.verifiers --count 320 --root /data/verifiers
"""

import inspect
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cropi_core.rewards.cache import GradeCache
from cropi_core.rewards.verifier import Verifier
from tests.campaigns import hostile_verifiers
from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import CONTEXT

KINDS = [function.__name__ for function in hostile_verifiers.KINDS]
SOURCE = inspect.getsourcefile(hostile_verifiers)
HARMLESS = "def plain(completion: str, answer: str) -> float:\n    return float(completion == answer)\n"
ITEMS = 30
TIMEOUT = 1.0
MEMORY_MB = 256


def graded(kind: str, number: int, place: Path, pipe: Connection) -> None:
    """Grade the items of a case, as the leader of a group of its own; send the grades."""
    os.setpgid(0, 0)
    os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
    functions = {kind: f"{SOURCE}:{kind}", "plain": f"{place / 'plain.py'}:plain"}
    items, _ = items_of(kind, number, place)
    with Verifier(timeout=TIMEOUT, memory_mb=MEMORY_MB, functions=functions, cache=GradeCache()) as verifier:
        first = verifier.grade_many(items)
        second = verifier.grade_many([("plain", f"{i} again", f"{i % 2} again") for i in range(8)])
    pipe.send([(grade.reward, grade.reason) for grade in (*first, *second)])


def items_of(kind: str, number: int, place: Path) -> tuple[list[tuple[str, str, str]], list[int]]:
    """Return the items, and the places of the hostile ones."""
    draw = random.Random(f"{kind}-{number}")
    port = json.loads((place / "port").read_text())
    told = {"place": str(place / "outside"), "port": port, "name": place.name, "parent": os.getpid()}
    hostile = sorted(draw.sample(range(ITEMS), draw.choice([1, 1, 2, 3])))
    items = [(draw.choice(["plain", "plain", "exact"]), f"{i}", f"{i // 2 * 2}") for i in range(ITEMS)]
    for at in hostile:
        items[at] = (kind, f"completion {at}", json.dumps(told | {"draw": draw.randrange(1000)}))
    return items, hostile


def verifier_case(root: Path, kind: str, number: int) -> dict[str, Any]:
    """Grade with a hostile function, and look at what is left."""
    place = Path(tempfile.mkdtemp(prefix="case-", dir=root))
    try:
        return judged(place, kind, number)
    finally:
        shutil.rmtree(place)
        Path("/dev/shm", place.name).unlink(missing_ok=True)


def judged(place: Path, kind: str, number: int) -> dict[str, Any]:
    """Execute one case in its directory."""
    for name in ("outside", "tmp"):
        (place / name).mkdir()
    (place / "outside" / "own").write_text("mine")
    (place / "plain.py").write_text(HARMLESS)
    here, there = CONTEXT.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        port = stream.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        (place / "port").write_text(str(port))
        process = CONTEXT.Process(target=graded, args=(kind, number, place, there))
        process.start()
        there.close()
        process.join(200)
        lived = process.exitcode == 0 and here.poll()
        if process.is_alive():
            process.kill()
            process.join()
        reached = [name for name, one in (("TCP", stream), ("UDP", datagrams)) if waiting(one)]
    faults = [f"the parent ended with {process.exitcode}"] if not lived else []
    faults += [f"{name} reached its port" for name in reached]
    faults += [f"{pid} is left" for pid in left_below(place)]
    faults += [f"{path} is left" for path in (place / "tmp").iterdir()]
    faults += [] if (place / "outside" / "own").read_text() == "mine" else ["a file was changed"]
    faults += [f"{p.name} was made" for p in (place / "outside").iterdir() if p.name != "own"]
    faults += ["shared memory was written"] if Path("/dev/shm", place.name).exists() else []
    _, hostile = items_of(kind, number, place)
    grades = here.recv() if lived else []
    for at, (reward, reason) in enumerate(grades):
        right = float(at % 2 == 0) if at < ITEMS else float(at - ITEMS in (0, 1))
        if at in hostile and (reward is not None or len(reason) > 500):
            faults.append(f"hostile item {at} has {reward} {reason[:100]}")
        elif at not in hostile and reward != right:
            faults.append(f"item {at} has {reward} {reason[:100]}")
    reasons = sorted({grades[at][1][:80] for at in hostile}) if grades else []
    return {
        "ok": not faults,
        "found": "its own item only" if not faults else "more",
        "faults": faults[:8],
        "reasons": reasons,
    }


def waiting(one: socket.socket) -> bool:
    """Return whether something has arrived."""
    one.settimeout(0.01)
    try:
        one.accept() if one.type == socket.SOCK_STREAM else one.recv(1)
    except TimeoutError:
        return False
    return True


def left_below(place: Path, seconds: float = 3) -> list[int]:
    """Return processes of this campaign that outlive the verifier, and kill them: with its TMPDIR, or its program."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = str(place).encode() in (path / "environ").read_bytes()
                asleep = (path / "cmdline").read_bytes() == b"sleep\x00600.0\x00"
            except OSError:
                continue
            if mine or asleep:
                found.append(int(path.name))
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases, the kinds in turn."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        yield f"{kind}:{number}", lambda n=number, k=kind: verifier_case(root, k, n)


if __name__ == "__main__":
    sys.exit(main("hostile verifiers", 320, campaign))
