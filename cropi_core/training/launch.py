"""A training stage over several processes: ``accelerate launch`` on this machine and on others, one process a GPU.

All settings that matter are passed to the launcher, so that no accelerate configuration of the account has an
effect. The output of its processes goes to a log for each machine; the first process sends its progress and its result
as messages. A guard on each machine ends the whole tree of processes when this one ends, for any reason: its standard
input is a pipe that a shell such as ssh or srun forwards.

    python -m cropi_core.training.launch JOB.json        # what each process runs
"""

import contextlib
import dataclasses
import gc
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from cropi_core.errors import ConfigError, CropiError
from cropi_core.policy import pick_device
from cropi_core.progress import Report, silent
from cropi_core.rewards import ALLOWED, COMMANDS, check_command
from cropi_core.system import (
    Channel,
    child_environment,
    follow,
    free_port,
    guarded_command,
    python_command,
    read_messages,
)
from cropi_core.training.files import StageFiles
from cropi_core.training.metrics import TrainingError
from cropi_core.training.ranks import Processes
from data_schemas import Grading, Launch, Objective, Runtime, Training

SECTIONS = {"training": Training, "objective": Objective, "grading": Grading, "runtime": Runtime}
MARK = "cropi:"
"""Begins a message; the other lines are output of the processes."""
SHARDED = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the decoder layers that the model names
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,  # each process reads the checkpoint
}
"""Accelerate's settings of ``runtime.launch.sharded``."""


HERE = "this machine"
WARNING = re.compile(r"(\[rank\d+\]:)?\[W\d")
"""Begins a warning of torch, which is never why a process ended."""
PASSED_ON = ("PYTHONPATH", "PYTHONSAFEPATH", "ACCELERATE_USE_CPU", "HF_HUB_OFFLINE")
"""Variables that another machine's processes get; the others are those of its shell, credentials included."""
RULES = (ALLOWED, COMMANDS)
"""Variables with the operator's rules for code, which apply to every process of a stage."""
LAST_WORDS_S = 3.0
"""Seconds in which a machine that failed together with another one can say why, before it is ended."""
SILENCE_S = 1800
"""Seconds for which a process waits for another one; TRL's default for ``ddp_timeout``."""
ENDING_S = 20.0
"""Seconds after which the shell of another machine is killed, if it does not end with its input."""


@dataclasses.dataclass
class Member:
    """The launcher of one machine, below a guard.

    Attributes:
        name: What the user calls the machine: the command that reaches it.
        child: The guard, or the shell that started it on another machine.
        log: Output of its processes.
        outcome: What its processes sent besides progress.
        fault: Why it ended; empty while it runs, if it succeeded, and if :meth:`end` ended it.
    """

    name: str
    child: subprocess.Popen[str]
    log: Path
    outcome: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: str = ""
    ended: bool = False

    def follow(self, report: Report) -> None:
        """Read the output until the processes have ended."""
        assert self.child.stderr is not None
        with self.log.open("w", encoding="utf-8", buffering=1) as stream:
            self.outcome |= follow(read_messages(self.child.stderr, stream.write, MARK), report)
        status = self.child.wait()
        if not self.ended and (status or "error" in self.outcome):
            self.fault = f"exit {status}: {self.outcome.get('error') or _last(self.log)}"

    def end(self) -> None:
        """End the processes: the guard does it when its input ends."""
        assert self.child.stdin is not None
        self.ended = True
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()


def launched(arguments: dict[str, Any], runtime: Runtime, report: Report, logs: Path) -> dict[str, Any]:
    """Run :func:`cropi_core.training.stage.train` in several processes.

    Args:
        arguments: Its arguments, without ``report``.
        runtime: ``runtime.launch`` has the number of processes, their machines and how weights are distributed.
        report: Called after each optimizer step.
        logs: Directory of ``training.log``, and of ``training-N.log`` for the N-th other machine.

    Returns:
        The summary.

    Raises:
        ConfigError: The launcher's configuration file does not exist, or a machine's command is not allowed or
            does not exist.
        TrainingError: A process failed; the message ends with its error, or with the last line of the log.
    """
    launch = runtime.launch
    assert launch is not None
    logs.mkdir(parents=True, exist_ok=True)
    for machine in launch.machines:
        check_command(shlex.split(machine), "runtime.launch.machines")
    with _job_folder(launch, arguments["files"]) as folder:
        job = folder / "job.json"
        rules = {name: os.environ[name] for name in RULES if name in os.environ}
        plain = _plain(arguments) | {"processes": launch.processes, "rules": rules}
        job.write_text(json.dumps(plain), encoding="utf-8")
        variables = child_environment()
        if pick_device(runtime.device).type == "cpu":
            variables["ACCELERATE_USE_CPU"] = "true"
        commands = command_lines(launch, runtime.device, arguments["dtype"], folder, job)
        return _run(launch, commands, variables, report, logs)


@contextlib.contextmanager
def _job_folder(launch: Launch, files: StageFiles) -> Iterator[Path]:
    """Make the directory of the job: with other machines in the stage's own, which they reach as well."""
    if not launch.machines:
        with tempfile.TemporaryDirectory(prefix="cropi-launch-") as folder:
            yield Path(folder)
    else:
        folder = files.scratch.absolute() / "launch"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _run(
    launch: Launch, commands: Sequence[list[str]], variables: dict[str, str], report: Report, logs: Path
) -> dict[str, Any]:
    """Run the launchers of all machines to their end; a machine that fails ends the others.

    Raises:
        TrainingError: A process failed.
    """
    members: list[Member] = []
    try:
        for number, command in enumerate(commands):
            words = remote_command(launch.machines[number - 1], command, variables) if number else command
            log = logs / (f"training-{number}.log" if number else "training.log")
            members.append(_started(launch.machines[number - 1] if number else HERE, words, variables, log))
        own, others = members[0], members[1:]
        threads = [threading.Thread(target=_follow_other, args=(one, own), daemon=True) for one in others]
        for thread in threads:
            thread.start()
        own.follow(report)
        for one in others if own.fault else []:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.child.wait(LAST_WORDS_S)
    finally:
        _end(members)
    for thread in threads:
        thread.join(ENDING_S)
    faults = [f"{one.name} with {one.fault}" for one in (*others, own) if one.fault]
    if faults or "result" not in own.outcome:
        raise TrainingError(
            f"{launch.processes} training processes ended, "
            f"{'; '.join(faults) or 'without a result'}. See {', '.join(str(one.log) for one in members)}"
        )
    return own.outcome["result"]


def _started(name: str, command: list[str], variables: dict[str, str], log: Path) -> Member:
    """Start the launcher of a machine.

    Raises:
        ConfigError: The command that reaches it does not exist.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=variables,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C reaches this process only, which then ends the others
        )
    except OSError as error:
        raise ConfigError(f"runtime.launch.machines: {name!r} cannot be started: {error}") from error
    return Member(name, child, log)


def _follow_other(member: Member, own: Member) -> None:
    """Follow another machine's launcher; its failure ends the processes here, which would wait for it."""
    member.follow(silent)
    if member.fault:
        with contextlib.suppress(subprocess.TimeoutExpired):
            own.child.wait(LAST_WORDS_S)
        own.end()


def _end(members: Sequence[Member]) -> None:
    """End what runs, and wait for it; a shell whose connection is lost is killed."""
    for member in members:
        member.end()
    for member in members:
        try:
            member.child.wait(None if member.name == HERE else ENDING_S)
        except subprocess.TimeoutExpired:
            member.child.kill()
            member.child.wait()


def command_lines(launch: Launch, device: str, dtype: str, folder: Path, job: Path) -> list[list[str]]:
    """Return the guarded launcher commands of this machine and of each of ``launch.machines``.

    Args:
        launch: Number of processes, their machines, and a file of ``accelerate config``.
        device: ``runtime.device``.
        dtype: ``policy.dtype``.
        folder: Directory for the generated accelerate configuration.
        job: What :func:`main` reads.

    Raises:
        ConfigError: The file does not exist.
    """
    on_cpu = pick_device(device).type == "cpu"
    config = Path(launch.config).expanduser().absolute() if launch.config else folder / "accelerate.yaml"
    if launch.config and not config.is_file():
        raise ConfigError(
            f"runtime.launch.config={launch.config!r} is not a file; `accelerate config` writes one"
        )
    if not launch.config:
        # Also on the CPU: the launcher of MULTI_CPU, and of --cpu, starts one process and leaves the others to mpirun.
        kind = "NO" if launch.processes == 1 else "MULTI_GPU"
        settings: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind}
        if launch.sharded:
            settings |= {"distributed_type": "FSDP", "fsdp_config": SHARDED}
        config.write_text(yaml.safe_dump(settings))
    address, port = launch.address or "127.0.0.1", free_port()
    return [
        guarded_command(
            [  # the launcher starts its ranks with `-m` alone: PYTHONSAFEPATH of the environment holds for them
                *python_command("accelerate.commands.launch", "--config_file", str(config)),
                *("--num_processes", str(launch.processes)),
                *("--num_machines", str(1 + len(launch.machines)), "--machine_rank", str(rank)),
                *("--main_process_ip", address, "--main_process_port", str(port)),
                *("--mixed_precision", "bf16" if dtype == "bfloat16" else "no", "--dynamo_backend", "no"),
                *(["--cpu"] if on_cpu and launch.processes == 1 else []),
                *("-m", "cropi_core.training.launch", str(job)),
            ]
        )
        for rank in range(1 + len(launch.machines))
    ]


def remote_command(machine: str, command: Sequence[str], variables: dict[str, str]) -> list[str]:
    """Return the command that runs ``command`` on another machine.

    Args:
        machine: Command that runs its arguments there, such as ``ssh node2``.
        command: Command, with paths that both machines have.
        variables: Environment here, of which :data:`PASSED_ON` is passed on.

    Raises:
        ConfigError: A word has a character that the shell of ssh would interpret.
    """
    passed = [f"{name}={variables[name]}" for name in PASSED_ON if name in variables]
    words = ["env", *passed, *command]
    if odd := [word for word in words if shlex.quote(word) != word]:
        raise ConfigError(
            f"runtime.launch.machines: {odd[0]!r} has a character that a shell interprets, and ssh hands it to one. "
            "Use a root, an installation and a directory of functions without such characters"
        )
    return [*shlex.split(machine), *words]


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments of a stage to JSON values."""
    files = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(arguments["files"]).items()
    }
    sections = {name: arguments[name].model_dump(mode="json") for name in SECTIONS}
    return arguments | {"files": files} | sections


def _files(plain: dict[str, Any]) -> StageFiles:
    """Read the files of a stage from JSON values."""
    values: dict[str, Any] = {
        name: Path(value) if isinstance(value, str) else value for name, value in plain.items()
    }
    return StageFiles(**values)


def _last(log: Path) -> str:
    text = log.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not WARNING.match(line)]
    return lines[-1][:400] if lines else "nothing was printed"


def _join(runtime: Runtime, count: int) -> None:
    """Connect the processes on the CPU, where transformers (5.23) does not apply ``runtime.trl.ddp_timeout``."""
    if count > 1 and pick_device(runtime.device).type == "cpu":
        from torch.distributed import init_process_group

        seconds = runtime.trl.ddp_timeout or SILENCE_S
        init_process_group("gloo", timeout=timedelta(seconds=seconds))


def main(job: Path) -> int:
    """Train as one of several processes."""
    channel = Channel(sys.stderr, MARK)
    if not job.is_file():
        channel.send(
            {
                "error": f"{job} does not exist on {os.uname().nodename}: training on several machines needs a root "
                "(for an address: its cache, CROPI_CACHE) in a directory that all of them have under one path"
            }
        )
        return 1
    arguments = json.loads(job.read_text(encoding="utf-8"))
    os.environ |= arguments.pop("rules")
    if (count := Processes.launched().count) != (wanted := arguments.pop("processes")):
        channel.send(
            {"error": f"the launcher started {count} processes, and runtime.launch asks for {wanted}"}
        )
        return 1
    gc.disable()  # collections during these imports find nothing, and take a fifth of the time
    from cropi_core.training.stage import train

    gc.enable()
    arguments["files"] = _files(arguments["files"])
    arguments |= {name: section.model_validate(arguments[name]) for name, section in SECTIONS.items()}
    try:
        _join(arguments["runtime"], count)
        summary = train(**arguments, report=channel.send_progress)
    except CropiError as error:
        channel.send({"error": str(error)})
        return 1
    except Exception as error:  # reported to the parent; the traceback is in the log
        channel.send({"error": f"{type(error).__name__}: {error}"})
        raise
    if summary:
        channel.send({"result": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
