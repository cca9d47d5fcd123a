"""A tiny real curriculum on the embedded world, and what the tests of whole runs ask about it."""

import time
from pathlib import Path

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.progress import silent
from data_schemas.config import Config

POOL = {"reverse": 16, "copy": 8, "noise": 8, "lucky": 8}


def world(**families):
    return {"kind": "world", "families": families}


def settings(**changes):
    """Give the settings of the run; ``section={...}`` updates a section, anything else replaces."""
    base = {
        "name": "tiny",
        "seed": 0,
        "stages": 2,
        "data": {
            "pool": world(**POOL),
            "validation": {"goal": world(reverse=8)},
            "test": {"held_out": world(reverse=8)},
        },
        "rollouts": {"pool": {"samples": 4}, "validation": {"samples": 4}, "shard_prompts": 8},
        "projection": {"k": 256},
        "gradients": {"rows_per_shard": 8, "block_rows": 4},
        "selection": {"ratio": 0.2},
        "training": {"steps": 3, "prompts_per_step": 4, "sampling": {"samples": 4}},
        "evaluation": {"sampling": {"samples": 2}},
        "runtime": {"device": "cpu", "threads": 1, "save_steps": 1},
    }
    for name, value in changes.items():
        old = base.get(name)
        base[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return base


def tiny(**changes):
    return Config.model_validate(settings(**changes))


def go(config, root, report=silent):
    """Run a curriculum without an orchestrator, in this process."""
    store = Store(root)
    return run_curriculum(config, store, lambda spec: run_step(spec, store, report=report))


def digests(record):
    return {slot: entry.ref.digest for slot, entry in record.slots.items()}


def origins(record):
    return {slot: entry.origin for slot, entry in record.slots.items()}


def computed(record):
    return {slot for slot, entry in record.slots.items() if entry.origin == "computed"}


def files(directory):
    """Every file below a directory with what changes when it is written again."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[path.relative_to(directory).as_posix()] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def artifact_files(root):
    """The files of finished artifacts: not of work in progress, records or what was set aside."""
    return {
        name: mark
        for name, mark in files(root).items()
        if not name.startswith((".work/", ".damaged/", "runs/", "progress/"))
    }


def timed(function, *arguments):
    start = time.monotonic()
    return function(*arguments), time.monotonic() - start
