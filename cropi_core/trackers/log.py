"""Log a finished run to a tracker once, in files of this machine or, for MLflow, at an address that is named.

The writer is a process of its own (:mod:`cropi_core.trackers.writer`): trackers start threads, read their settings from
the environment when they are imported, and print. Its environment has none of their settings, so that nothing is sent
anywhere but to ``to``.
"""

import importlib.util
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cropi_core.artifacts import Store
from cropi_core.errors import ConfigError, CropiError
from cropi_core.system import child_environment, python_command
from cropi_core.trackers.content import collect

Tracker = Literal["mlflow", "wandb", "trackio"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
SETTINGS = ("MLFLOW_", "WANDB_", "TRACKIO_", "DATABRICKS_")
"""Beginnings of the environment variables that trackers read."""
SERVER_SETTINGS = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT", "WANDB_", "TRACKIO_")
"""The same, if MLflow's server is named: its other variables may hold the account."""
OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
}
LAST_LINES = 8
"""Number of lines of a failed writer's output in the error."""


@dataclass(frozen=True)
class Logged:
    """The outcome of logging a run.

    Attributes:
        tracker: Name of the tracker.
        where: Directory or address of its data.
        id: The tracker's id of the run.
        new: False if the tracker had this run already, completely; nothing was written then.
        show: Command that shows or sends it.
        notes: What was omitted.
    """

    tracker: str
    where: str
    id: str
    new: bool
    show: str
    notes: list[str]


def log_run(
    store: Store, run: str, tracker: Tracker, *, to: str | None = None, project: str = "cropi"
) -> Logged:
    """Log a finished run to a tracker. A second call writes nothing; an interrupted one is completed by the next.

    Args:
        store: Store with the record and the artifacts of the run; it is only read.
        run: Id of the run.
        tracker: ``mlflow``, ``wandb`` or ``trackio``.
        to: Directory of the tracker's data, by default ``trackers/<tracker>``; for MLflow also an ``http(s)://`` or
            ``sqlite://`` address.
        project: Project, or experiment of MLflow.

    Raises:
        ArtifactError: The run does not exist, or an artifact of it can no longer be read.
        ConfigError: The tracker is unknown or not installed, the run is not finished, or the tracker has a run of this
            name with other values.
    """
    if tracker not in TRACKERS:
        raise ConfigError(f"the tracker {tracker!r} is none of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(tracker) is None:
        raise ConfigError(f'{tracker} is not installed: pip install "cropi[{tracker}]"')
    where = to or f"trackers/{tracker}"
    if "://" not in where:
        directory = Path(where).expanduser().absolute()
        directory.mkdir(parents=True, exist_ok=True)
        where = str(directory)
    elif tracker != "mlflow":
        raise ConfigError(
            f"{tracker} is logged to a directory, not to {where}; its own command sends the directory"
        )
    with tempfile.TemporaryDirectory(prefix="cropi-tracker-") as folder:
        content = collect(store, run, Path(folder))
        answer = _write(Path(folder), tracker, where, project)
    return Logged(tracker=tracker, where=where, notes=content.notes, **answer)


def _write(folder: Path, tracker: str, where: str, project: str) -> dict[str, Any]:
    """Run the writer; return its answer."""
    dropped = SETTINGS if "://" not in where else SERVER_SETTINGS
    environment = {name: value for name, value in child_environment().items() if not name.startswith(dropped)}
    environment |= OFFLINE | {"TRACKIO_DIR": where}
    done = subprocess.run(
        python_command("cropi_core.trackers.writer", str(folder), tracker, where, project),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode == ConfigError.exit_code and lines:
        raise ConfigError(json.loads(lines[-1])["error"])
    last = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
    raise CropiError(
        f"{tracker} failed (exit {done.returncode}), and the run is not logged completely. The same command completes "
        f"it. The last output was:\n{last}"
    )
