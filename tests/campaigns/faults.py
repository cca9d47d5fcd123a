"""Faults of the machine: disk full, quota, read-only root, no file handles, clock jumps.

A run meets a fault in one of its steps, in a process of its own. It must end with one error that says what to do,
without a traceback, and reach the digests of an undisturbed run when it is started again without the fault.

    python -m tests.campaigns.faults --count 40 --root /data/faults
"""

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import CONTEXT, executed, finished, reference


def file_size(place: Path, draw: random.Random) -> None:
    """Limit the size of a file, as a quota does; the write fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = draw.choice([0, 512, 4096, 30_000, 200_000, 2_000_000])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def no_handles(place: Path, draw: random.Random) -> None:
    """Limit open files to some more than are open now."""
    most = len(list(Path("/proc/self/fd").iterdir())) + draw.randint(1, 12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def disk_full(place: Path, draw: random.Random) -> None:
    """Mount a file system of some megabytes, in a mount namespace of this process alone."""
    _unshare()
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    saved = place.with_name("saved")
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(place, saved) if place.exists() else saved.mkdir()
    place.mkdir(exist_ok=True)
    size = (
        sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
        + draw.choice([1, 60, 700, 4000, 9000]) * 1024
    )
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 1024 + 300}k", "tmpfs", str(place)], check=True
    )
    shutil.copytree(saved, place, dirs_exist_ok=True)


def _unshare() -> None:
    """Enter a mount namespace of its own: Python 3.11 has no os.unshare."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):
        raise OSError(ctypes.get_errno(), "unshare")


def read_only(place: Path, draw: random.Random) -> None:
    """Mount the root read-only, in a mount namespace of this process alone."""
    place.mkdir(exist_ok=True)
    _unshare()
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)


def clock_jumps(place: Path, draw: random.Random) -> None:
    """Let the wall clock jump by up to a year in both directions at each reading."""
    real = time.time
    time.time = lambda: real() + draw.uniform(-3e7, 3e7)


FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "quota": file_size,
    "handles": no_handles,
    "full": disk_full,
    "read-only": read_only,
    "clock": clock_jumps,
}


def disturbed(place: Path, name: str, number: int, sender: Any) -> None:
    """Run the curriculum under a fault."""
    FAULTS[name](place, random.Random(f"{name}-{number}"))
    sender.send(executed(place))


def fault(root: Path, name: str, number: int) -> dict[str, Any]:
    """Run under a fault, then without it."""
    place = root / "round"
    shutil.rmtree(place, ignore_errors=True)
    source, draw = finished(root), random.Random(f"steps-{name}-{number}")
    kinds = ["prompts", "policy", "evaluation", "rollouts", "gradients", "scores", "selection"]
    place.mkdir()
    for kind in kinds[: draw.randrange(len(kinds))]:  # the fault is met by different steps
        shutil.copytree(source / kind, place / kind)
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=disturbed, args=(place, name, number, sender))
    process.start()
    sender.close()
    try:
        met = receiver.recv() if receiver.poll(600) else {"error": "it did not end", "traceback": "hang"}
    except EOFError:
        met = {"error": "the process died without an answer", "traceback": "died"}
    process.join(30)
    process.kill()
    after = executed(place)
    expected = reference(root)
    whole = "digests" in after and all(expected[slot] == d for slot, d in after["digests"].items())
    ended = "error" in met
    told = {
        "error": met.get("error", "")[:500],
        "traceback": met.get("traceback") or "",
        "after": after.get("error", ""),
    }
    kind = "ended with one error" if ended and not met["traceback"] else "traceback" if ended else "not met"
    return {"ok": whole and kind != "traceback", "found": kind, **told}


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases, each fault in turn."""
    for number in range(count):
        name = list(FAULTS)[number % len(FAULTS)]
        yield f"{name}:{number}", lambda n=number, k=name: fault(root, k, n)


if __name__ == "__main__":
    sys.exit(main("faults of the machine", 40, campaign))
