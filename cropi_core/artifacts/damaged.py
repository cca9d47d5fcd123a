"""Damaged artifacts: they are moved below ``<root>/.damaged`` with a list of their faults, and never deleted."""

import os
import time
from pathlib import Path

from cropi_core.artifacts.below import directory_below, make_below, write_below

DAMAGED = ".damaged"


def move_aside(root: Path, source: Path, faults: list[str]) -> Path:
    """Move an artifact's directory below ``.damaged``, list its faults next to it, and return its new place."""
    target = root / DAMAGED / f"{source.name}-{time.time_ns()}"
    with (
        directory_below(root, source.parent.name) as source_fd,
        directory_below(root, DAMAGED, create=True) as target_fd,
    ):
        os.rename(source.name, target.name, src_dir_fd=source_fd, dst_dir_fd=target_fd)
    write_below(root, f"{DAMAGED}/{target.name}.txt", "\n".join(faults) + "\n")
    return target


def note_aside(root: Path, address: str, faults: list[str]) -> None:
    """Note below the local ``.damaged`` that a shared artifact was moved to ``address``."""
    note = make_below(root, f"{DAMAGED}/{address.rpartition('/')[2]}")
    write_below(root, f"{DAMAGED}/{note.name}.txt", "\n".join([*faults, address]) + "\n")


def moved_aside(root: Path) -> list[Path]:
    """List the artifacts that were moved aside."""
    return sorted(path for path in (root / DAMAGED).glob("*") if path.is_dir())
