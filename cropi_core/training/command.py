"""A training stage by another trainer: a command that gets policy, prompts and seed, and leaves a checkpoint.

The command is code of the configuration, as a reward function is: the operator of a machine says which commands may
run (docs/guides/security.md). It runs under a guard that ends it and all its children when this process ends, for any
reason. Its working files are kept until the stage is published: a command that was stopped is started again with the
same directories, and resumes from its own checkpoints if it has any.

A line ``cropi-progress {"step": 3, "steps": 20, "reward": 0.4}`` in its output reports progress; further fields are
columns of :data:`cropi_core.training.metrics.METRICS`, and ``"rewards": {"format": 0.9, ...}`` are the means of several
rewards.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.errors import ConfigError, PolicyError
from cropi_core.policy import checkpoint_files, copy_checkpoint
from cropi_core.progress import Progress, Report
from cropi_core.prompts import write_format
from cropi_core.rewards import check_command
from cropi_core.selection import ranked_prompts
from cropi_core.system import guarded_command
from cropi_core.training.files import StageFiles
from cropi_core.training.metrics import METRICS, TERM, TrainingError, reward_summary
from data_schemas import Training, TrainingCommand

MARK = "cropi-progress "
"""Stands before the JSON of a line of progress."""
LONGEST_LINE = 65536
"""Characters of an output line that are read at once."""
MOST_TERMS = 100
"""Number of rewards in a line that are kept."""
WEIGHTS = (".safetensors", ".safetensors.index.json")


def run_command(
    files: StageFiles, training: Training, seed: int, report: Report, name: str = "stage"
) -> dict[str, Any]:
    """Run the command of a stage, and check and copy the checkpoint that it leaves.

    Args:
        files: What the stage reads and writes.
        training: Settings of the stage; ``training.command`` is the command.
        seed: Seed that is handed to the command.
        report: Receives what the command reports.
        name: Slot of the policy, for messages and the environment.

    Returns:
        Summary: the steps that the command reported, its prompts, its text and version.

    Raises:
        ConfigError: The program does not exist, or the operator of this machine does not allow it.
        TrainingError: The command failed, or left no checkpoint that can be used.
    """
    command = training.command
    assert command is not None
    check_command(command.run)
    rows = ranked_prompts(files.prompts, files.selection)
    places = _places(files, command, rows, training, seed, name)
    arguments = filled(command.run, places)
    log = (files.logs or files.scratch) / "command.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    history = _run(arguments, environment(places), log, report)
    _take_checkpoint(Path(places["out"]), files, log)
    table = metrics(history)
    write_parquet(table, files.metrics)
    if not files.keep_scratch:
        shutil.rmtree(files.scratch)
    return {
        "engine": "command",
        "command": list(command.run),
        "version": command.version,
        "steps": history[-1]["step"] if history else training.steps,
        "prompts": len(rows),
        "completions": 0,
        **reward_summary(table),
    }


def _places(
    files: StageFiles,
    command: TrainingCommand,
    rows: list[dict[str, Any]],
    training: Training,
    seed: int,
    name: str,
) -> dict[str, str]:
    """Prepare the directories of a command; return the values of its placeholders."""
    base = files.scratch.absolute() / "command"
    prompts = base / "prompts"
    shutil.rmtree(
        prompts, ignore_errors=True
    )  # written again: an earlier attempt may have been another selection's
    written = write_format(rows, prompts, command.format)
    main = next(path for path in written if path.suffix in (".parquet", ".jsonl"))
    for place in ("out", "work"):
        (base / place).mkdir(parents=True, exist_ok=True)
    return {
        "policy": str(files.policy.absolute()),
        "prompts": str(main),
        "prompts_directory": str(prompts),
        "out": str(base / "out"),
        "work": str(base / "work"),
        "seed": str(seed),
        "steps": str(training.steps),
        "name": name,
    }


def filled(run: tuple[str, ...], places: Mapping[str, str]) -> list[str]:
    """Replace ``{policy}`` and the other names in the arguments; other braces stay as they are.

    Raises:
        ConfigError: The program does not exist.
    """
    arguments = []
    for argument in run:
        for name, value in places.items():
            argument = argument.replace("{" + name + "}", value)
        arguments.append(argument)
    program = shutil.which(arguments[0])
    if program is None:
        raise ConfigError(
            f"training.command.run: {arguments[0]!r} is not a program here; relative paths are taken from {Path.cwd()}"
        )
    return [program, *arguments[1:]]


def environment(places: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the command: this one without Prefect's settings, and ``CROPI_OUT`` and the like."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PREFECT_") and name != "PYTHONSAFEPATH"
    }
    return kept | {f"CROPI_{name.upper()}": value for name, value in places.items()}


def _run(arguments: list[str], variables: dict[str, str], log: Path, report: Report) -> list[dict[str, Any]]:
    """Run a command under the guard; return what it reported.

    Raises:
        TrainingError: It ended with another status than 0.
    """
    child = subprocess.Popen(
        guarded_command(arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C reaches this process, which ends the command
    )
    assert child.stdin is not None
    assert child.stderr is not None
    history: list[dict[str, Any]] = []
    try:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"$ {' '.join(arguments)}\n")
            while line := child.stderr.readline(LONGEST_LINE):
                stream.write(line)
                stream.flush()
                if (reported := progress_of(line)) is not None:
                    history.append(reported)
                    report(_shown(reported))
        status = child.wait()
    finally:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.wait()
    if status:
        raise TrainingError(
            f"training.command ended with exit {status}: {_last(log)}. Its output is in {log}; run the same command "
            "again to start it again with the same directories"
        )
    return history


def progress_of(line: str) -> dict[str, Any] | None:
    """Parse a line of progress; None for any other line, and for one that is not what it should be.

    A progress bar does not end its line, so the mark may stand behind one, and a bar behind the JSON.
    """
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        message, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("step"), int) or message["step"] < 1:
        return None
    rewards = message.get("rewards")
    terms = list(rewards.items())[:MOST_TERMS] if isinstance(rewards, dict) else []
    named = message | {TERM + name: value for name, value in terms}
    columns = [*METRICS.names, *(TERM + name for name, _ in terms)]
    numbers = {name: named[name] for name in columns if isinstance(named.get(name), int | float)}
    kept = {name: value for name, value in numbers.items() if math.isfinite(value)}
    steps = message.get("steps")
    return kept | {"steps": steps if isinstance(steps, int) else message["step"]}


def _shown(reported: Mapping[str, Any]) -> Progress:
    note = f"reward {reported['reward']:.3f}" if "reward" in reported else ""
    metrics = {name: value for name, value in reported.items() if name not in ("step", "steps")}
    return Progress(reported["step"], max(reported["steps"], reported["step"]), "steps", note, metrics)


def metrics(history: list[dict[str, Any]]) -> pa.Table:
    """Build the table of metrics from what a command reported; the last report of a step counts."""
    terms = sorted({name for entry in history for name in entry if name.startswith(TERM)})
    schema = pa.schema([*METRICS, *(pa.field(name, pa.float64()) for name in terms)])
    rows = {entry["step"]: {name: entry.get(name) for name in schema.names} for entry in history}
    return pa.Table.from_pylist([rows[step] for step in sorted(rows)], schema=schema)


def _take_checkpoint(left: Path, files: StageFiles, log: Path) -> None:
    """Check the checkpoint that a command left, and copy it; tokenizer files that it lacks are those of the start.

    Raises:
        TrainingError: There is none, or it cannot be used.
    """
    if not any(left.iterdir()):
        raise TrainingError(
            f"training.command ended with exit 0 and left nothing in {left}. It must save the trained model there as "
            f"a Hugging Face checkpoint with safetensors ({{out}}, CROPI_OUT); its output is in {log}"
        )
    _complete(left, files.policy)
    shutil.rmtree(files.out, ignore_errors=True)
    try:
        copy_checkpoint(left, files.out)
    except PolicyError as error:
        shutil.rmtree(files.out, ignore_errors=True)
        raise TrainingError(
            f"training.command ended with exit 0, and what it left cannot be used: {error}. Its output is in {log}"
        ) from error


def _complete(left: Path, start: Path) -> None:
    """Give a checkpoint without a tokenizer that of the policy that the stage started from."""
    present = {path.name for path in left.iterdir()}
    has_tokenizer = any(
        name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in present
    )
    if has_tokenizer or "config.json" not in present:
        return
    for path in checkpoint_files(start):
        if path.name not in (*present, "config.json") and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, left / path.name)


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return lines[-1][:400] if lines else "nothing was printed"
