"""Shards over processes: every shard is computed, a dead process costs only its shard, and none outlives its parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cropi_core.errors import PolicyError, StepError
from cropi_core.gradients.shard_pool import compute_shards
from tests.support.paths import CHECKOUT

pytestmark = pytest.mark.slow


def writer(directory):
    """Write a shard's content to a file; some contents cause a failure."""

    def work(shard, content):
        (directory / f"{shard}.tries").open("a").write("x")
        if content == "raise":
            raise ValueError("no such number")
        tries = len((directory / f"{shard}.tries").read_text())
        if content == "die" or (content == "die once" and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        (directory / str(shard)).write_text(content)

    return work


def refusing(directory):
    """Fail before the first shard."""
    raise PolicyError(f"{directory} has no weights")


def written(directory):
    return {int(p.name): p.read_text() for p in directory.iterdir() if not p.suffix}


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_shard_is_computed_once(tmp_path, workers):
    shards = {shard: f"content {shard}" for shard in (0, 3, 4, 7)}
    assert sorted(compute_shards(shards, [{}] * workers, writer, (tmp_path,))) == sorted(shards)
    assert written(tmp_path) == shards
    assert all(p.read_text() == "x" for p in tmp_path.glob("*.tries"))


def test_the_shard_of_a_killed_process_is_computed_again(tmp_path, caplog):
    shards = {0: "a", 1: "die once", 2: "c", 3: "d"}
    assert sorted(compute_shards(shards, [{}, {}], writer, (tmp_path,))) == [0, 1, 2, 3]
    assert written(tmp_path) == shards
    assert {p.stem: len(p.read_text()) for p in tmp_path.glob("*.tries")} == {"0": 1, "1": 2, "2": 1, "3": 1}
    assert "shard 1: its process died (exit -9" in caplog.text


def test_a_shard_that_always_fails_is_named_and_the_others_are_kept(tmp_path):
    shards = {0: "a", 1: "die", 2: "raise", 3: "d", 4: "e"}
    done = []
    with pytest.raises(StepError) as caught:
        done.extend(compute_shards(shards, [{}, {}], writer, (tmp_path,)))
    assert "2 of 5 shards failed (shard 1: its process died (exit -9" in str(caught.value)
    assert "shard 2: ValueError: no such number" in str(caught.value)
    assert set(written(tmp_path)) == {0, 3, 4}


def test_what_fails_in_every_process_is_the_error_itself(tmp_path):
    with pytest.raises(PolicyError, match="has no weights"):
        list(compute_shards({0: "", 1: ""}, [{}, {}], refusing, (tmp_path,)))


SLEEPER = """
import os, time

def sleeper(directory):
    def work(shard, content):
        (directory / str(shard)).write_text(str(os.getpid()))
        time.sleep(600)
    return work
"""
PARENT = """
import sys
from pathlib import Path
from cropi_core.gradients.shard_pool import compute_shards
from sleeping import sleeper

list(compute_shards({0: "", 1: ""}, [{}, {}], sleeper, (Path(sys.argv[1]),)))
"""


def test_processes_end_with_their_parent_however_it_ends(tmp_path):
    (tmp_path / "sleeping.py").write_text(SLEEPER)
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    files = [tmp_path / name for name in "01"]
    try:
        while not all(file.exists() and file.read_text() for file in files):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(file.read_text()) for file in files]
    while any(_alive(pid) for pid in pids):  # as long as a test may take
        time.sleep(0.05)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def naming(directory):
    """Write the GPUs that a process sees."""
    seen = os.environ["CUDA_VISIBLE_DEVICES"]

    def work(shard, content):
        died = directory / "died"
        if content == "die once":
            with contextlib.suppress(FileExistsError), died.open("x") as file:
                file.write(seen)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        with (directory / f"gpu-{seen}").open("a") as file:
            file.write(f"{shard} ")
        # The process of the other GPU leaves a shard to the successor.
        while died.exists() and not (directory / f"gpu-{died.read_text()}").exists():
            time.sleep(0.01)

    return work


def test_each_process_and_its_successor_use_the_same_gpu(tmp_path):
    environments = [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7")]
    shards = {0: "die once", 1: "die once", 2: "", 3: ""}
    assert sorted(compute_shards(shards, environments, naming, (tmp_path,))) == [0, 1, 2, 3]
    assert (tmp_path / f"gpu-{(tmp_path / 'died').read_text()}").exists()
    assert {path.name for path in tmp_path.glob("gpu-*")} <= {"gpu-4", "gpu-7"}
