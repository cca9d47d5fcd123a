"""Power loss after a stop: what was not yet on the disk is lost, in any combination.

A finished root and roots that were killed inside a step get the state that a file system may show after power returns:
the newest files have their full length and zeros, or are cut, empty, missing or old temporary files; a rename is there
and the content is not, or the other way round; the record of the run is cut or zeroed. The run is then started again.
It must reach the digests of the undisturbed run, or end with an error that names the file.

With ``--count``, four of five cases are on a directory, the fifth on an S3 server, whose objects are lost, cut or
zeroed.

    python -m tests.campaigns.power --count 300 --root /data/power
"""

import atexit
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import INTERRUPTIONS, executed, finished, interrupted, reference

MOST = 4
"""Files of a case that are disturbed, at most."""


def cut(path: Path, draw: random.Random) -> None:
    """Keep the beginning of a file."""
    os.truncate(path, draw.randrange(path.stat().st_size or 1))


def zeroed(path: Path, draw: random.Random) -> None:
    """Keep the length of a file, and zeros from some position on, as after a lost write-back."""
    size = path.stat().st_size
    start = draw.choice([0, draw.randrange(size or 1)])
    os.truncate(path, start)
    os.truncate(path, size)


def emptied(path: Path, draw: random.Random) -> None:
    """Keep the name alone."""
    path.write_bytes(b"")


def lost(path: Path, draw: random.Random) -> None:
    """Lose the rename and the file."""
    path.unlink()


def unrenamed(path: Path, draw: random.Random) -> None:
    """Lose the rename: the file has its temporary name."""
    path.rename(path.with_name(f".{path.name}.tmp"))


def swapped(path: Path, draw: random.Random) -> None:
    """Renames in another order: the name has the content of a neighbour."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    if others:
        shutil.copyfile(draw.choice(sorted(others)), path)
    else:
        lost(path, draw)


HARMS: tuple[Callable[[Path, random.Random], None], ...] = (cut, zeroed, emptied, lost, unrenamed, swapped)


def disturbed(copy: Path, draw: random.Random, newest: bool) -> list[str]:
    """Disturb some files of a root; return what was done to which."""
    files = [p for p in copy.rglob("*") if p.is_file() and p.suffix != ".lock"]
    files.sort(key=lambda p: (-p.stat().st_mtime_ns, str(p)))
    chosen = files[: max(8, len(files) // 4)] if newest else files
    told = []
    for path in draw.sample(chosen, min(draw.randint(1, MOST), len(chosen))):
        harm = draw.choice(HARMS)
        if path.exists():
            harm(path, draw)
            told.append(f"{harm.__name__} {path.relative_to(copy)}")
    return told


def compared(root: Path, place: Path | str, until: str | None, told: list[str]) -> dict[str, Any]:
    """Run a disturbed root, and compare it with the undisturbed run."""
    result = executed(place, until)
    if "error" in result:
        names = [Path(text.partition(" ")[2]).name for text in told]
        ok = not result["traceback"] and any(name in result["error"] for name in names)
        return {"ok": ok, "found": "an error names it" if ok else "another error", "harm": told} | result
    expected = reference(root)
    wrong = sorted(slot for slot, digest in result["digests"].items() if digest != expected[slot])
    noted = "noted and " if result["notes"] else ""
    return {
        "ok": not wrong,
        "found": "SILENT" if wrong else f"{noted}computed again",
        "harm": told,
        "slots": wrong,
    }


def on_a_directory(root: Path, number: int) -> dict[str, Any]:
    """Disturb a finished or an interrupted root."""
    draw, names = random.Random(f"directory-{number}"), [None, *INTERRUPTIONS]
    name = names[number % len(names)]
    source, copy = finished(root) if name is None else interrupted(root, name), root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    told = disturbed(copy, draw, newest=name is not None)
    return compared(root, copy, None if name is None else INTERRUPTIONS[name].slot, told)


def on_s3(root: Path, number: int) -> dict[str, Any]:
    """Disturb the objects of a finished run at an address, read by a machine with an empty cache."""
    from tests.support.bucket import new_bucket, objects, s3

    server(root)
    draw, url = random.Random(f"s3-{number}"), new_bucket()
    place = url.partition("://")[2]
    source = finished(root)
    cache = root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["CROPI_CACHE"] = os.environ["XDG_CACHE_HOME"] = str(cache)
    store = s3()
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and not name.startswith("."):
            store.pipe_file(f"{place}/{name}", path.read_bytes())
    told = []
    for name in draw.sample(sorted(objects(url)), draw.randint(1, MOST)):
        data = store.cat_file(f"{place}/{name}")
        harm = draw.choice(["cut", "zeroed", "lost"])
        if harm == "lost":
            store.rm_file(f"{place}/{name}")
        else:
            at = draw.randrange(len(data) or 1)
            store.pipe_file(f"{place}/{name}", data[:at] + (b"" if harm == "cut" else bytes(len(data) - at)))
        told.append(f"{harm} {name}")
    return compared(root, url, None, told)


def server(root: Path) -> None:
    """Start the S3 server of the campaign, once."""
    from tests.support.bucket import Server

    if "AWS_ENDPOINT_URL" not in os.environ:
        folder = root / "s3"
        folder.mkdir(parents=True, exist_ok=True)
        started = Server(folder)
        atexit.register(started.stop)
        os.environ.update(started.environment)


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases."""
    for number in range(count):
        if number % 5 == 4:
            yield f"s3:{number}", lambda n=number: on_s3(root, n)
        else:
            yield f"directory:{number}", lambda n=number: on_a_directory(root, n)


if __name__ == "__main__":
    sys.exit(main("power loss", 300, campaign))
