"""Gradient shards on a Ray cluster of two workers: the bytes of one process, and what a killed or failing shard costs.

Each test starts a cluster on this machine and stops it; Ray, Prefect, models and processes are real.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.logging import get_run_logger

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import publish_import, run_step
from cropi_core.errors import ConfigError, StepError
from cropi_core.gradients.store import GradientStore
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.records import ArtifactRef
from data_schemas.steps import StepSpec
from tasks.execution import Executor, watched_by
from tests.support.decoys import decoys, imported
from tests.support.models import random_rollouts, save_tiny

pytestmark = pytest.mark.extended

ON_RAY = {"device": "cpu", "threads": 1, "ray": {"workers": 2}}
PROMPTS = 11


@flow
def only(spec: StepSpec, root: str) -> ArtifactRef:
    return Executor(root, get_run_logger())(spec).ref


class Screen:
    """A watcher that cannot be sent to another process, as a terminal's display cannot."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), []

    def started(self, slot): ...

    def moved(self, slot, progress):
        with self.lock:
            self.seen.append(progress.done)

    def finished(self, slot, result): ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with a policy, rollouts and the gradients that one process made of them, and their step."""
    directory = tmp_path_factory.mktemp("whole")
    store = Store(directory / "root")
    save_tiny(directory / "policy")
    location = {"path": str(directory / "policy")}
    policy = run_step(
        StepSpec(step="policy", slot="policy@0", settings={"sha256": "0"}, location=location), store
    ).ref

    def fill(staging: Path) -> None:
        random_rollouts(staging / "parts" / "part-00000.parquet", prompts=PROMPTS)

    settings = {
        "dtype": "float32",
        "objective": Objective().model_dump(),
        "projection": Projection(k=64, density=0.5).model_dump(),
        "layout": Gradients(rows_per_shard=2, block_rows=2).model_dump(),
        "max_new_tokens": 12,
    }
    spec = StepSpec(
        step="gradients",
        slot="gradients/pool@1",
        settings=settings,
        inputs={"policy": policy, "rollouts": publish_import(store, "rollouts", {}, {}, fill)},
        runtime={"device": "cpu", "threads": 1},
    )
    run_step(spec, store)
    return store, spec


@pytest.fixture
def fresh(whole, tmp_path):
    """The same store without the gradients, and the step with Ray."""
    store, spec = whole
    shutil.copytree(store.root, tmp_path / "root")
    copy = Store(tmp_path / "root")
    copy.discard(spec.key)
    return copy, spec.model_copy(update={"runtime": ON_RAY})


def begin(whole, copy: Store) -> GradientStore:
    """Create the store of the gradients in the workspace of the step, as a process that stopped at once leaves it."""
    store, spec = whole
    there = GradientStore.open(store.path(spec.key) / "gradients.zarr")
    return GradientStore.create(
        copy.workspace(spec.key) / "gradients.zarr",
        list(there.column("prompt_id")),
        k=there.k,
        dtype=there.dtype,
        rows_per_shard=there.rows_per_shard,
        attributes=there.attributes,
    )


def workers() -> list[int]:
    """Processes of Ray that compute a shard now and have loaded PyTorch."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::gradients shard") and (
                "libtorch_cpu" in (process / "maps").read_text()
            ):
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


def kill_one(killed: list[int], stop: threading.Event) -> None:
    while not killed and not stop.is_set():
        for pid in workers()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.05)


@pytest.fixture
def killed():
    """Kills one worker with a shard in its hands; the list then holds its process id."""
    found, stop = [], threading.Event()
    killer = threading.Thread(target=kill_one, args=(found, stop))
    killer.start()
    yield found
    stop.set()
    killer.join()


@pytest.mark.slow
def test_a_killed_and_a_failing_shard_cost_themselves_and_the_bytes_are_those_of_one_process(
    whole, fresh, killed, caplog, tmp_path, monkeypatch
):
    (store, spec), (copy, on_ray) = whole, fresh
    markers = decoys(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    begun, screen = begin(whole, copy), Screen()
    obstacle = begun.path / "features" / "c" / "3" / "0" / "in the way"
    obstacle.mkdir(parents=True)
    with pytest.raises(StepError, match=r"1 of 6 shards failed \(shard 3: \w+Error.*; the others are kept"):
        only(on_ray, str(copy.root))
    assert killed
    assert "its process died" in caplog.text
    assert "it is computed again" in caplog.text
    assert [begun.done(shard) for shard in range(6)] == [shard != 3 for shard in range(6)]
    written = {s: (begun.path / "features" / "c" / str(s) / "0").stat().st_mtime_ns for s in (0, 1, 2, 4, 5)}

    shutil.rmtree(obstacle.parent)
    with watched_by(screen):
        made = only(on_ray, str(copy.root))
    assert screen.seen == [9, 11]
    assert made.digest == store.manifest(spec.key).digest
    files = copy.path(made) / "gradients.zarr" / "features" / "c"
    assert {s: (files / str(s) / "0").stat().st_mtime_ns for s in written} == written
    assert not workers()
    assert not imported(markers), "modules of the working directory were imported"


def test_a_call_without_prefect_says_so(fresh):
    copy, on_ray = fresh
    with pytest.raises(ConfigError, match=r"runtime\.ray distributes shards through Prefect"):
        run_step(on_ray, copy)


@pytest.mark.slow
def test_missing_resources_of_a_cluster_are_reported_without_waiting(fresh):
    copy, on_ray = fresh
    runtime = {**ON_RAY, "ray": {"workers": 1, "gpus_per_worker": 64}}
    with pytest.raises(StepError, match=r"a worker asks for 64 GPU \(runtime\.ray\.gpus_per_worker\)"):
        only(on_ray.model_copy(update={"runtime": runtime}), str(copy.root))
    runtime["ray"] = {"address": "ray://gpu-box.example:10001"}
    with pytest.raises(ConfigError, match="which other machines cannot reach"):
        only(on_ray.model_copy(update={"runtime": runtime}), str(copy.root))
