"""A training stage over several processes of this machine: ``accelerate launch``, one process a GPU.

All settings that matter are passed to the launcher, so that no accelerate configuration of the account has an
effect. The output of its processes goes to a log; the first one sends its progress and its result as messages. A
guard ends the whole tree of processes when this one ends, for any reason.

    python -m cropi_core.training.launch JOB.json        # what each process runs
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cropi_core.errors import ConfigError, CropiError
from cropi_core.policy import pick_device
from cropi_core.progress import Report
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


def launched(arguments: dict[str, Any], runtime: Runtime, report: Report, logs: Path) -> dict[str, Any]:
    """Run :func:`cropi_core.training.stage.train` in several processes.

    Args:
        arguments: Its arguments, without ``report``.
        runtime: ``runtime.launch`` has the number of processes and how weights are distributed.
        report: Called after each optimizer step.
        logs: Directory of ``training.log``.

    Returns:
        The summary.

    Raises:
        ConfigError: The launcher's configuration file does not exist.
        TrainingError: A process failed; the message ends with its error, or with the last line of the log.
    """
    assert runtime.launch is not None
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "training.log"
    with tempfile.TemporaryDirectory(prefix="cropi-launch-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(_plain(arguments)), encoding="utf-8")
        command = command_line(runtime.launch, runtime.device, arguments["dtype"], Path(folder), job)
        child = subprocess.Popen(
            guarded_command(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment(),
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C reaches this process only, which then ends the others
        )
        assert child.stdin is not None
        assert child.stderr is not None
        try:
            with log.open("w", encoding="utf-8", buffering=1) as stream:
                outcome = follow(read_messages(child.stderr, stream.write, MARK), report)
            status = child.wait()
        finally:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            child.wait()
    if status or "result" not in outcome:
        failure = outcome.get("error") or _last(log)
        raise TrainingError(
            f"{runtime.launch.processes} training processes ended with exit {status}: {failure}. See {log}"
        )
    return outcome["result"]


def command_line(launch: Launch, device: str, dtype: str, folder: Path, job: Path) -> list[str]:
    """Return the launcher's command.

    Args:
        launch: Number of processes, and a file of ``accelerate config``.
        device: ``runtime.device``.
        dtype: ``policy.dtype``.
        folder: Directory for the generated accelerate configuration.
        job: What :func:`main` reads.

    Raises:
        ConfigError: The file does not exist.
    """
    on_cpu = pick_device(device).type == "cpu"
    config = Path(launch.config).expanduser() if launch.config else folder / "accelerate.yaml"
    if launch.config and not config.is_file():
        raise ConfigError(
            f"runtime.launch.config={launch.config!r} is not a file; `accelerate config` writes one"
        )
    if not launch.config:
        kind = "NO" if launch.processes == 1 else "MULTI_CPU" if on_cpu else "MULTI_GPU"
        settings: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind}
        if launch.sharded:
            settings |= {"distributed_type": "FSDP", "fsdp_config": SHARDED}
        config.write_text(yaml.safe_dump(settings))
    return [  # the launcher starts its ranks with `-m` alone: PYTHONSAFEPATH of the environment holds for them
        *python_command("accelerate.commands.launch", "--config_file", str(config)),
        *("--num_processes", str(launch.processes), "--num_machines", "1", "--machine_rank", "0"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())),
        *("--mixed_precision", "bf16" if dtype == "bfloat16" else "no", "--dynamo_backend", "no"),
        *(["--cpu"] if on_cpu else []),
        *("-m", "cropi_core.training.launch", str(job)),
    ]


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
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "nothing was printed"


def main(job: Path) -> int:
    """Train as one of several processes."""
    from cropi_core.training.stage import train

    channel = Channel(sys.stderr, MARK)
    arguments = json.loads(job.read_text(encoding="utf-8"))
    arguments["files"] = _files(arguments["files"])
    arguments |= {name: section.model_validate(arguments[name]) for name, section in SECTIONS.items()}
    try:
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
