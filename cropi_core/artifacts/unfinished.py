"""Find what is neither an artifact nor in use: unfinished work, and artifacts that were set aside as damaged.

A step that failed leaves its complete shards in ``.work/<key>``, from which the same step resumes. Damaged artifacts
are kept in ``.damaged`` for inspection. Both stay until they are removed here.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator

from cropi_core.artifacts.below import directory_below, entries_below
from cropi_core.artifacts.locks import free_lock
from cropi_core.artifacts.store import Store

PLACES = (".work", ".damaged")


def leftovers(store: Store, older_than_s: float, *, delete: bool = False) -> dict[str, int]:
    """Find unfinished work and damaged artifacts on this machine that have not changed for a while.

    Work in progress is not listed: a process holds its claim.

    Args:
        store: Store of the artifacts.
        older_than_s: Seconds since the last change below a directory.
        delete: Remove them. The steps start from the beginning when they run again.

    Returns:
        Bytes by name below the root, such as ``.work/rollouts-v1-0123456789abcdef``.
    """
    before = time.time() - older_than_s
    sizes: dict[str, int] = {}
    for name in _directories(store):
        with _unclaimed(store, name) as free:
            if not free:
                continue
            stats = [entry for _, entry in entries_below(store.root / name)]
            newest = max([(store.root / name).stat().st_mtime, *[entry.st_mtime for entry in stats]])
            if newest > before:
                continue
            sizes[name] = sum(entry.st_size for entry in stats)
            if delete:
                shutil.rmtree(store.root / name, ignore_errors=True)
                if name.startswith(".damaged/"):
                    store.remove(f"{name}.txt")  # the list of its faults
    return sizes


def _directories(store: Store) -> list[str]:
    names = []
    for place in PLACES:
        with (
            contextlib.suppress(FileNotFoundError),
            directory_below(store.root, place) as handle,
            os.scandir(handle) as listing,
        ):
            names += [f"{place}/{entry.name}" for entry in listing if entry.is_dir(follow_symlinks=False)]
    return sorted(names)


@contextlib.contextmanager
def _unclaimed(store: Store, name: str) -> Iterator[bool]:
    """Hold the claim of unfinished work if no process holds it; a damaged artifact has none."""
    if not name.startswith(".work/"):
        yield True
        return
    with free_lock(store.root, f"{name}.lock", create=True) as free:
        yield free
