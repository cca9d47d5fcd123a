"""SIGKILL at random instants of a curriculum.

Each kill hits a run of a real curriculum at a random time: the process of the run alone, or its whole group, as the
kernel's memory killer and a node's end do. The same root goes through all kills until a run reaches its end;
then the digests must be those of an undisturbed run. No process may be left, and a shard may have been computed once
more at most for each kill. Processes are forked from one that has imported everything.

``command`` cases run the whole command ``cropi run`` with its Prefect server, and kill the command, its group, its
server, or one of its workers (verifier, step process).

    python -m tests.campaigns.kills --kills 200 --root /data/kills
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.runs.records import load_run, run_id
from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import CONTEXT, STAGES, finished, reference
from tests.support.commands import command_of, descendants, servers_of, start, written
from tests.support.tiny import digests, tiny

SHARE = 10
"""One in so many kills is of the whole command with its Prefect server."""
SECONDS = 6.0
"""A run is killed within so many seconds; it takes about four, so that the next run uses what it kept."""


def stamp(root: Path) -> dict[str, int]:
    """Return the inode of each finished shard, in workspaces and in artifacts."""
    found = {}
    for path in root.rglob("*"):
        if path.name.startswith("part-") or (path.name == "0" and "features" in path.parts):
            parts = path.relative_to(root).parts
            with contextlib.suppress(OSError):
                found["/".join(parts[1:])] = path.stat().st_ino
    return found


def child(root: Path) -> None:
    """Run the curriculum as the leader of a group."""
    os.setpgid(0, 0)
    store = Store(root)
    run_curriculum(tiny(stages=STAGES), store, lambda spec: run_step(spec, store))


def step_kill(root: Path, number: int) -> dict[str, Any]:
    """Kill a run at a random instant; runs that end before are compared, and followed by a new round."""
    draw, place = random.Random(f"kill-{number}"), root / "round"
    how, ends = draw.choice(["command", "group"]), 0
    while True:
        before = stamp(place)
        process = CONTEXT.Process(target=child, args=(place,))
        process.start()
        process.join(draw.uniform(0, SECONDS))
        below = descendants(process.pid) if process.is_alive() else set()
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if how == "group" else os.kill(
                    process.pid, signal.SIGKILL
                )
        process.join()
        told: dict[str, Any] = {"how": how, "ends": ends}
        if process.exitcode == -signal.SIGKILL:
            left, after = ended(below), stamp(place)
            again = [name for name, inode in before.items() if name in after and after[name] != inode]
            return told | {
                "found": "killed",
                "ok": not left and len(again) <= 1,
                "left": left,
                "again": again,
            }
        wrong = different(root, place)
        if process.exitcode or wrong:
            return told | {"found": f"ended with {process.exitcode}", "ok": False, "slots": wrong}
        shutil.rmtree(place, ignore_errors=True)
        ends += 1


def ended(pids: set[int], seconds: float = 20) -> list[str]:
    """Wait until processes have ended; return the commands of those that have not."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if command_of(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [command_of(pid).decode(errors="replace")[:200] for pid in left]


def different(root: Path, place: Path) -> list[str]:
    """Return the slots whose digests are not those of the undisturbed run."""
    found = digests(load_run(Store(place), run_id(tiny(stages=STAGES))))
    return sorted(slot for slot, digest in reference(root).items() if found.get(slot) != digest)


def command_kill(root: Path, number: int) -> dict[str, Any]:
    """Kill a part of the command `cropi run`, and run it to its end afterwards."""
    draw, place = random.Random(f"command-{number}"), root / "command" / "root"
    config = root / "command" / "tiny.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not config.exists():
        written(config)
    shutil.rmtree(place, ignore_errors=True)
    if (home := root / "command" / "home").exists():  # the tables of Prefect's database, made once
        shutil.copytree(home, place / ".prefect")
    how = draw.choice(["command", "group", "server", "worker"])
    process = start(config, place)
    deadline, wait = time.monotonic() + 300, draw.uniform(0, 8)
    while process.poll() is None and not list(place.glob(".work/*-v*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(wait)
    below = set(servers_of(place)) | descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        match how:
            case "group":
                os.killpg(process.pid, signal.SIGKILL)
            case "command":
                os.kill(process.pid, signal.SIGKILL)
            case _:
                words = b"uvicorn" if how == "server" else b"cropi"
                chosen = [
                    p
                    for p in sorted(below - {process.pid})
                    if words in command_of(p) or b"prefect" in command_of(p)
                ]
                os.kill(draw.choice(chosen or [process.pid]), signal.SIGKILL)
    if how in ("server", "worker"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=300)
        process.kill()
    process.communicate()
    left = ended(below, 60)
    again = start(config, place)
    out, err = again.communicate(timeout=600)
    told = {"how": how, "left": left, "code": again.returncode, "wait": round(wait, 2)}
    expected = root / "command" / "digests.json"
    found = sorted((key, Store(place).manifest(key).digest) for key in Store(place).keys())  # noqa: SIM118
    if again.returncode == 0 and not expected.exists():
        expected.write_text(repr(found), encoding="utf-8")
    same = again.returncode == 0 and expected.read_text(encoding="utf-8") == repr(found)
    text = "" if same else (out + err)[-1500:]
    return told | {"ok": same and not left, "found": "killed, then completed", "output": text}


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases."""
    finished(root)
    for number in range(count):
        if number % SHARE == SHARE - 1:
            yield f"command:{number}", lambda n=number: command_kill(root, n)
        else:
            yield f"run:{number}", lambda n=number: step_kill(root, n)


if __name__ == "__main__":
    sys.exit(main("SIGKILL at random instants", 200, campaign))
