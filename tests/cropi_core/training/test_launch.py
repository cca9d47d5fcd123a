"""Training with several processes gives the result of one process, and no process outlives its parent."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="training needs the extra `train`")

from cropi_core.errors import ConfigError
from cropi_core.progress import Progress
from cropi_core.training.launch import _join, command_lines, launched, main, remote_command
from cropi_core.training.metrics import TrainingError
from cropi_core.training.ranks import Processes
from data_schemas.runtime import Launch
from data_schemas.training import Training
from data_schemas.trl import TrlRuntime
from tests.support import processes
from tests.support.servers import gone, left_of
from tests.support.training import CPU, SMALL, arguments_of, digest, rows_of, write_policy, write_tables
from tests.support.training import run as run_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)
    return tmp_path


def run(workspace: Path, name: str, launch: Launch, *, training=SMALL, report=lambda progress: None):
    logs, runtime = workspace / name / "logs", CPU.model_copy(update={"launch": launch})
    arguments = arguments_of(workspace, name) | {"training": training, "runtime": runtime}
    arguments |= {"files": replace(arguments["files"], logs=logs), "name": name}
    return launched(arguments, runtime, report, logs), workspace / name


def close(one: Path, two: Path):
    a, b = (load_file(p / "checkpoint" / "model.safetensors") for p in (one, two))
    assert sorted(a) == sorted(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace for tests that only add to it."""
    directory = tmp_path_factory.mktemp("shared")
    write_policy(directory / "policy", seed=0)
    write_tables(directory)
    return directory


@pytest.fixture(scope="module")
def alone(shared: Path):
    return run(shared, "alone", Launch(processes=1))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(shared: Path, alone):
    """The same completions and rewards at every step; weights up to the order in which gradients are added."""
    told: list[Progress] = []
    summary, two = run(shared, "two", Launch(processes=2), report=told.append)
    assert [p.done for p in told] == list(range(1, SMALL.steps + 1))
    for a, b in zip(rows_of(alone[1]), rows_of(two), strict=True):
        assert (a["reward"], a["completion_length"]) == (b["reward"], b["completion_length"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert close(alone[1], two) < 1e-4
    same = {name: value for name, value in summary.items() if name != "seconds_per_step"}
    assert same == {name: alone[0][name] for name in same}


@pytest.mark.slow
def test_one_launched_process_is_one_in_process(shared: Path, alone):
    _, target = run_here(shared, "here")
    assert digest(target / "checkpoint") == digest(alone[1] / "checkpoint")


@pytest.mark.extended
def test_weights_in_shards_give_what_whole_ones_give(shared: Path, alone):
    _, target = run(shared, "fsdp", Launch(processes=2, sharded=True))
    for a, b in zip(rows_of(alone[1]), rows_of(target), strict=True):
        assert a["reward"] == b["reward"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert close(alone[1], target) < 1e-4


@pytest.mark.slow
def test_an_adapter_over_two_machines(workspace: Path):
    """One launched process is one in this process, as a test above shows."""
    lora = Training.model_validate(SMALL.model_dump() | {"lora": {"r": 4}})
    _, one = run_here(workspace, "one", training=lora)
    # Each a machine of its own: a launcher here, and one that a command starts.
    machines = Launch(processes=2, machines=("env MACHINE=2",), address="127.0.0.1")
    _, two = run(workspace, "two", machines, training=lora)
    assert (workspace / "two" / "logs" / "training-1.log").is_file()
    assert close(one, two) < 1e-4
    assert (two / "checkpoint" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.extended
def test_two_killed_processes_resume_from_their_checkpoint_and_leave_no_process(workspace: Path):
    # More steps than can finish while the launcher is being stopped.
    longer = SMALL.model_copy(update={"steps": 60})
    _, whole = run(workspace, "whole", Launch(processes=2), training=longer)
    mark = f"CROPI_TEST={workspace}"
    code = f"""
import sys; sys.path[:0] = {[p for p in sys.path if p]!r}
from pathlib import Path
from tests.cropi_core.training.test_launch import SMALL, Launch, run
run(Path({str(workspace)!r}), "killed", Launch(processes=2), training=SMALL.model_copy(update={{"steps": 60}}))
"""
    scratch = workspace / "killed" / ".scratch"
    environment = {**os.environ, "CROPI_TEST": str(workspace)}
    child = processes.start([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 600
    while not list(scratch.glob("checkpoint-*/whole.json")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    assert len(left_of(mark)) > 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert gone(mark)
    summary, killed = run(workspace, "killed", Launch(processes=2), training=longer)
    assert summary["resumed_from_step"]
    assert digest(whole / "checkpoint") == digest(killed / "checkpoint")


def test_the_output_of_a_process_is_shown_and_kept(workspace: Path):
    (workspace / "policy" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        TrainingError,
        match=r"2 training processes ended, this machine with exit 1: .*model\.safetensors|loaded",
    ) as told:
        run(workspace, "broken", Launch(processes=2))
    log = workspace / "broken" / "logs" / "training.log"
    assert str(log) in str(told.value)
    assert log.is_file()


def test_the_accounts_configuration_is_not_used(tmp_path: Path):
    job = tmp_path / "job.json"
    (command,) = command_lines(Launch(processes=2), "cpu", "bfloat16", tmp_path, job)
    assert command[command.index("--config_file") + 1] == str(tmp_path / "accelerate.yaml")
    assert command[command.index("--mixed_precision") + 1] == "bf16"
    assert command[-3:] == ["-m", "cropi_core.training.launch", str(job)]
    with pytest.raises(ConfigError, match="is not a file"):
        command_lines(Launch(processes=2, config="nowhere.yaml"), "cpu", "float32", tmp_path, job)


def test_a_machine_that_fails_ends_the_others_and_says_why(workspace: Path):
    launch = Launch(processes=2, machines=("ls --no-such-option",), address="127.0.0.1")
    with pytest.raises(
        TrainingError, match=r"'?ls --no-such-option'? with exit \d: .*ls --help.*training-1\.log"
    ):
        run(workspace, "broken", launch)
    with pytest.raises(ConfigError, match=r"'no-such-program b' cannot be started"):
        run(workspace, "broken", launch.model_copy(update={"machines": ("no-such-program b",)}))


def test_the_command_of_another_machine_has_no_word_that_a_shell_changes():
    command = remote_command(
        "ssh node2", ["python", "-I", "/a/job.json"], {"PYTHONSAFEPATH": "1", "KEY": "k"}
    )
    assert command == ["ssh", "node2", "env", "PYTHONSAFEPATH=1", "python", "-I", "/a/job.json"]
    with pytest.raises(ConfigError, match=r"'/a root/job\.json' has a character"):
        remote_command("ssh node2", ["python", "/a root/job.json"], {})


def test_too_few_processes_and_a_root_that_a_machine_does_not_reach_are_errors(
    tmp_path: Path, capsys, monkeypatch
):
    # accelerate's launcher for MULTI_CPU starts one process, whatever the number
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "job.json").write_text(json.dumps({"rules": {}, "processes": 2}))
    assert main(tmp_path / "job.json") == 1
    assert "the launcher started 1 processes, and runtime.launch asks for 2" in capsys.readouterr().err
    assert main(tmp_path / "elsewhere" / "job.json") == 1
    assert "training on several machines needs a root" in capsys.readouterr().err


def test_a_process_trains_its_part_of_a_batch():
    parts = [Processes(3, rank).share(list(range(6))) for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5]]


def test_processes_on_the_cpu_wait_for_one_another_as_long_as_they_are_told(monkeypatch):
    """transformers passes ``ddp_timeout`` on for GPUs only, and a cable that is cut would be waited for without end."""
    joined = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: joined.append((backend, timeout))
    )
    _join(CPU.model_copy(update={"trl": TrlRuntime(ddp_timeout=7)}), 2)
    _join(CPU, 2)
    _join(CPU, 1)
    assert [(backend, timeout.total_seconds()) for backend, timeout in joined] == [
        ("gloo", 7),
        ("gloo", 1800),
    ]
