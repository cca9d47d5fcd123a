"""Single-byte damage in everything that a selection is made of.

One byte of one file changes, the file keeps its size and its times, as on a failing disk. Two kinds of cases:

* ``artifact``: a file of a finished run. The store must name it; in one of 40 cases the run is executed again, and
  must reach the digests of the undamaged run.
* ``work``: a file that an interrupted step keeps to resume from. The resumed step must reach the digest of the
  undamaged run, or end with an error that names the file.

    python -m tests.campaigns.damage --count 600 --root /data/damage
"""

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi_core.artifacts.store import Store
from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import INTERRUPTIONS, executed, finished, interrupted, reference

EVERY = 40
"""Of the damaged artifacts, one in so many is found by a whole run, the others by the store alone."""
KINDS = ("prompts", "policy", "rollouts", "gradients", "scores", "selection", "evaluation")


def flip(path: Path, at: int, mask: int) -> None:
    """Change one byte of a file, and keep its times."""
    times = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        (old,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([old ^ mask]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spot(draw: random.Random, files: list[Path]) -> tuple[Path, int, int]:
    """Draw a file, a position in it and a mask; small files are as likely as large ones."""
    path = draw.choice([file for file in files if file.stat().st_size])
    return path, draw.randrange(path.stat().st_size), draw.randrange(1, 256)


def in_artifact(root: Path, number: int) -> dict[str, Any]:
    """Damage a finished run, and restore it afterwards."""
    draw, source = random.Random(f"artifact-{number}"), finished(root)
    kind = KINDS[number % len(KINDS)]
    path, at, mask = spot(draw, sorted(p for p in (source / kind).rglob("*") if p.is_file()))
    key = path.relative_to(source).parts[1]
    told = {"file": str(path.relative_to(source)), "at": at}
    if number % EVERY == 1:
        copy = root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        flip(copy / path.relative_to(source), at, mask)
        return told | resumed(root, copy, path.name)
    flip(path, at, mask)
    try:
        faults = Store(source).faults(key)
    finally:
        flip(path, at, mask)
    return told | {
        "ok": any(path.name in fault for fault in faults),
        "found": "named by the store",
        "faults": faults[:2],
    }


def resumed(root: Path, copy: Path, name: str, until: str | None = None) -> dict[str, Any]:
    """Run a damaged root to its end or until a slot is filled, and compare it with the undamaged run."""
    result = executed(copy, until)
    if "error" in result:
        named = name in result["error"] and not result["traceback"]
        return {
            "ok": named,
            "found": "an error names it" if named else "another error",
            "error": result["error"][:400],
        }
    expected = reference(root)
    wrong = sorted(slot for slot in result["digests"] if result["digests"][slot] != expected[slot])
    assert (until or "evaluation@1") in result["digests"]
    told = any(name in note for note in result["notes"])
    return {
        "ok": not wrong,
        "found": "SILENT" if wrong else "noted and computed again" if told else "computed again, or not used",
        "slots": wrong,
    }


def in_work(root: Path, number: int) -> dict[str, Any]:
    """Damage what an interrupted step keeps, and resume it."""
    draw = random.Random(f"work-{number}")
    name = list(INTERRUPTIONS)[number % len(INTERRUPTIONS)]
    source, copy = interrupted(root, name), root / "copy"
    files = [p for p in (source / ".work").rglob("*") if p.is_file() and p.suffix not in (".lock", ".tmp")]
    path, at, mask = spot(draw, sorted(files))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    flip(copy / path.relative_to(source), at, mask)
    told = {"step": name, "file": str(path.relative_to(source)), "at": at}
    return told | resumed(root, copy, path.name, INTERRUPTIONS[name].slot)


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases: one in seven damages work in progress, the others finished artifacts."""
    for number in range(count):
        if number % 7:
            yield f"artifact:{number}", lambda n=number: in_artifact(root, n)
        else:
            yield f"work:{number}", lambda n=number // 7: in_work(root, n)


if __name__ == "__main__":
    sys.exit(main("single-byte damage", 600, campaign))
