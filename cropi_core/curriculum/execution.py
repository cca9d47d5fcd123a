"""Execute one step: find its artifact by key, or compute it in this process or in a subprocess.

The result is the same in both cases. The computation and the file formats are in the packages of the steps.
"""

import contextlib
import datetime
import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi_core.artifacts import Store, content_digest, file_entries, is_full
from cropi_core.curriculum.work import Work
from cropi_core.errors import CropiError, StepError
from cropi_core.progress import Report, silent
from cropi_core.runs import kept_progress
from cropi_core.system import PACKAGES as PACKAGE_PARENT
from cropi_core.system import (
    child_environment,
    follow,
    peak_resident,
    python_command,
    read_messages,
    start_module,
)
from data_schemas import ArtifactRef, Kind, Manifest, Runtime, StepName, StepSpec, artifact_key

if TYPE_CHECKING:
    from cropi_core.curriculum.steps import StepFunction
    from cropi_core.gradients import Spread  # imports torch

ON_DEVICE = ("rollouts", "gradients", "training", "evaluation")
"""Steps that load a policy."""
PACKAGES = ("cropi", "torch", "transformers", "trl", "zarr", "numcodecs", "pyarrow", "math-verify")


@dataclass(frozen=True)
class StepResult:
    """The artifact of a step, whether it was found in the store, and the seconds it took."""

    ref: ArtifactRef
    cached: bool
    seconds: float


def run_step(
    spec: StepSpec,
    store: Store,
    *,
    report: Report = silent,
    refresh: bool = False,
    claimed: bool = False,
    spread: "Spread | None" = None,
) -> StepResult:
    """Find or compute the artifact of a step.

    Args:
        spec: The step; ``spec.runtime`` specifies where and how it runs.
        store: Store of the artifacts.
        report: Called with progress.
        refresh: Compute it again even if it exists.
        claimed: The caller already holds the claim: the step runs in a process started by the holder.
        spread: Dispatches gradient shards to other processes, as ``runtime.ray`` requests.

    Raises:
        CropiError: The step failed; complete shards are kept, and the same call resumes from them.
    """
    key = spec.key
    with contextlib.nullcontext(-1) if claimed else store.claim(key) as claim:
        if refresh:
            store.discard(key)
        store.finish(key)  # left by a process that was killed between its manifest and the rename
        if (ref := store.find(key)) is not None:
            return StepResult(ref, cached=True, seconds=0.0)
        start = time.monotonic()
        runtime = Runtime.model_validate(spec.runtime)
        # With `claimed`, the process that holds the claim keeps the progress.
        with contextlib.nullcontext(report) if claimed else kept_progress(store, key, report) as kept:
            if runtime.mode == "subprocess":
                _run_subprocess(spec, store, runtime, kept, claim)
            else:
                _run_in_process(spec, store, runtime, kept, spread)
        return StepResult(store.manifest(key).ref, cached=False, seconds=time.monotonic() - start)


def _run_in_process(
    spec: StepSpec, store: Store, runtime: Runtime, report: Report, spread: "Spread | None"
) -> None:
    key, start = spec.key, time.monotonic()
    store.sweep(key)
    out = store.workspace(key)
    resumed = any(out.iterdir())
    inputs = {name: store.require(ref) for name, ref in spec.inputs.items()}
    try:
        with _device_of(spec, runtime), store.in_use(spec.inputs.values()):
            summary = _function(spec.step)(Work(spec, inputs, out, store.logs(key), runtime, report, spread))
        entries = file_entries(out)
        manifest = Manifest(
            kind=spec.kind,
            key=key,
            digest=content_digest(entries),
            step=spec.step,
            inputs=spec.inputs,
            settings=spec.settings,
            files=entries,
            summary=summary,
            seconds=round(time.monotonic() - start, 3),
            resumed=resumed,
            device=device_name(runtime.device),
            **provenance(),
        )
        store.publish(manifest)
    except Exception as error:
        # PyTorch's writer reports only that it failed; check whether the disk is full.
        if not isinstance(error, CropiError) and (
            is_full(error) or shutil.disk_usage(store.root).free < 1 << 16
        ):
            raise store.no_space(spec.slot) from error
        raise


@contextlib.contextmanager
def _device_of(spec: StepSpec, runtime: Runtime) -> Iterator[None]:
    """Set the GPU up for a step that loads a policy, and free its memory when the step has ended, also by an error."""
    if spec.step not in ON_DEVICE:
        yield
        return
    from cropi_core.policy import prepare_device, release_device  # imports torch

    prepare_device(runtime)
    try:
        yield
    except Exception as error:
        release_device(runtime.device, error)
        raise
    release_device(runtime.device)


def _run_subprocess(spec: StepSpec, store: Store, runtime: Runtime, report: Report, claim: int) -> None:
    """Run a step as ``python -m cropi_core step``: JSON on stdin, progress and errors as messages on stdout.

    The child inherits the open file of the claim, so that the key stays claimed until both processes have ended: if
    only this process is killed, no other process can write to the workspace that the child still uses.
    """
    inner = spec.model_copy(update={"runtime": {**spec.runtime, "mode": "in_process"}})
    child = _start_step(runtime.python.get(spec.step, sys.executable), store.url, claim)
    assert child.stdin is not None
    assert child.stdout is not None
    deadline = None if runtime.deadline_s is None else time.monotonic() + runtime.deadline_s
    overdue = False
    try:
        child.stdin.write(inner.model_dump_json())
        child.stdin.close()
        watchdog = _kill_at(child, deadline)
        outcome = follow(read_messages(child.stdout), report)
        code = child.wait()
        overdue = watchdog() if watchdog else False
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if overdue:
        raise StepError(f"{spec.slot} was stopped after runtime.deadline_s={runtime.deadline_s} s")
    if code != 0:
        failure = outcome.get("error") or "see its output above"
        raise StepError(f"{spec.slot} failed in its process (exit {code}): {failure}")


def _start_step(python: str, root: str, claim: int) -> subprocess.Popen[str]:
    """Start the process of a step in this process's group, so that a signal to the group also ends it."""
    arguments = ["step", "--claimed", "--root", root]
    options: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": child_environment(python),
        "pass_fds": [claim] if claim >= 0 else [],
    }
    if python == sys.executable:
        return start_module("cropi_core", arguments, **options)
    return subprocess.Popen(python_command("cropi_core", *arguments, python=python), **options)


def _kill_at(child: subprocess.Popen, deadline: float | None) -> Callable[[], bool] | None:
    if deadline is None:
        return None
    import threading

    fired = threading.Event()

    def kill() -> None:
        fired.set()
        child.kill()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill)
    timer.daemon = True
    timer.start()

    def stop() -> bool:
        timer.cancel()
        return fired.is_set()

    return stop


def _function(step: StepName) -> "StepFunction":
    from cropi_core.curriculum.steps import STEPS  # imported late: imports torch

    return STEPS[step]


def device_name(device: str) -> str:
    """Return the name of the device that a step computed on, for the manifest."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Collect the fields of a manifest that record where, when and with which versions it was computed."""
    return {
        "versions": dict(_versions()),
        "git_revision": git_revision(PACKAGE_PARENT),
        "host": socket.gethostname(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peak_memory_bytes": int(peak_resident()),
    }


@functools.cache  # reading them takes 50 ms, and a run has dozens of steps
def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_revision(directory: Path) -> str | None:
    """Return the commit of the checkout with top directory ``directory``.

    None if the directory is not the top of a checkout: the repository around a virtual environment does not identify
    the code that ran.
    """
    if not (directory / ".git").exists():
        return None
    # A git hook sets GIT_DIR, which would select another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        git = subprocess.run(
            ["git", "-C", str(directory), "rev-parse", "--verify", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return git.stdout.strip() or None if git.returncode == 0 else None


def publish_import(
    store: Store, kind: Kind, settings: dict[str, Any], summary: dict[str, Any], fill: Callable[[Path], None]
) -> ArtifactRef:
    """Publish an artifact made elsewhere: ``fill`` writes its checked files, and its key hashes their content."""
    staging = store.workspace(f"import-{os.getpid()}-{time.time_ns()}")
    try:
        fill(staging)
        entries = file_entries(staging)
        digest = content_digest(entries)
        key = artifact_key(kind, 1, {"import": digest, **settings}, {})
        with store.claim(key):
            if (ref := store.find(key)) is not None:
                return ref
            work = store.workspace(key)
            shutil.rmtree(work)  # of an import that was killed; the claim excludes other processes
            staging.rename(work)
            manifest = Manifest(
                kind=kind,
                key=key,
                digest=digest,
                step="import",
                inputs={},
                settings=settings,
                files=entries,
                summary=summary,
                seconds=0.0,
                device="",
                **provenance(),
            )
            return store.publish(manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
