"""Roots of the tiny curriculum for campaigns: a finished one, and one that was killed in a step, each made once.

A root is copied for a case. Steps run in processes forked from one that has imported everything.
"""

import contextlib
import json
import multiprocessing
import shutil
import signal
import traceback
from pathlib import Path
from typing import Any

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import StepResult, run_step
from cropi_core.errors import CropiError, outer_error
from cropi_core.runs.records import load_run, run_id
from data_schemas import StepSpec
from tests.support.killed import Stop, run_until
from tests.support.tiny import digests, tiny

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.campaigns.warm"])
STAGES = 1
INTERRUPTIONS = {
    "rollouts": Stop("rollouts/pool@1", "written", "part-*.parquet", 4),
    "complete rollouts": Stop("rollouts/pool@1", "report", count=6),  # all parts, and no manifest yet
    "gradients": Stop("gradients/pool@1", "written", "*.npz", 4),
    "training": Stop("policy@1", "report", count=2),
    "evaluation": Stop("evaluation@1", "written", "completions.parquet"),
}
"""Where a run is killed; what it has made of the step by then is used when it resumes."""


class FilledError(Exception):
    """The last slot of a case is filled."""


def finished(root: Path) -> Path:
    """Return a finished run of the tiny curriculum; its digests are those that every case must reach."""
    target = root / "finished"
    if not (target / "whole").exists():
        shutil.rmtree(target, ignore_errors=True)
        result = executed(target / "root")
        assert "digests" in result, result
        (target / "whole").write_text(json.dumps(result["digests"]), encoding="utf-8")
    return target / "root"


def reference(root: Path) -> dict[str, str]:
    """Return the digests of the finished run by slot."""
    finished(root)
    return json.loads((root / "finished" / "whole").read_text(encoding="utf-8"))


def interrupted(root: Path, name: str) -> Path:
    """Return a root whose run was killed inside a step, with what it keeps to resume."""
    target = root / f"interrupted-{name}"
    if not (target / "whole").exists():
        shutil.rmtree(target, ignore_errors=True)
        child = CONTEXT.Process(target=run_until, args=(INTERRUPTIONS[name], target / "root", STAGES))
        child.start()
        child.join(600)
        assert child.exitcode == -signal.SIGKILL, f"{name}: the instant never came"
        (target / "whole").touch()
    return target / "root"


def executed(root: Path | str, until: str | None = None) -> dict[str, Any]:
    """Run the tiny curriculum; return its digests and notes, or its error, with a traceback if it is not cropi's.

    Args:
        root: The root.
        until: The last slot that is filled; None runs to the end.
    """
    config, store = tiny(stages=STAGES), Store(root)

    def step(spec: StepSpec) -> StepResult:
        if until in load_run(store, run_id(config)).slots:
            raise FilledError
        return run_step(spec, store)

    try:
        with contextlib.suppress(FilledError):
            run_curriculum(config, store, step)
        record = load_run(store, run_id(config))
        return {"digests": digests(record), "notes": record.notes}
    except CropiError as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": False}
    except Exception as error:
        line = outer_error(error)  # what the command line says; None for a fault of cropi
        text = traceback.format_exc() if line is None else False
        return {"error": line or f"{type(error).__name__}: {error}", "traceback": text}
