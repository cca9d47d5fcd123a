"""The process that writes a run to a tracker: ``python -m cropi_core.trackers.writer FOLDER TRACKER WHERE PROJECT``.

It reads what :func:`cropi_core.trackers.content.collect` wrote to FOLDER and prints one line of JSON at the end.
"""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from cropi_core.artifacts import write_atomic
from cropi_core.errors import ConfigError
from cropi_core.system import Channel
from cropi_core.trackers.content import FILES, Content, read_content

RUN_TAG, DIGEST_TAG, COMPLETE_TAG = "cropi.run", "cropi.digest", "cropi.complete"
MARKS = "cropi"
"""Directory, among those of a tracker, of the files that name the runs that were logged completely."""
MOST_METRICS, MOST_PARAMETERS, LONGEST_PARAMETER = 1000, 100, 6000
"""Limits of one request to MLflow, and of the text of a parameter."""
MOST_ROWS = 10_000
"""Rows of a selection in a table of W&B; the file has all of them."""


def main() -> None:
    """Write the run that the arguments name."""
    folder, tracker, where, project = sys.argv[1:5]
    channel = Channel.of_stdout()
    write = {"mlflow": write_mlflow, "wandb": write_wandb, "trackio": write_trackio}[tracker]
    content = read_content(Path(folder))
    try:
        channel.send(write(content, Path(folder) / FILES, where, project))
    except ConfigError as error:
        channel.send({"error": str(error)})
        sys.exit(error.exit_code)


def _refuse_other(content: Content, stored: str | None, where: str) -> None:
    """Refuse a tracker that has a run of this name with other values.

    Raises:
        ConfigError: It has one.
    """
    if stored is not None and stored != content.digest:
        raise ConfigError(
            f"{where} has a run {content.run} with other values, from before artifacts of it were computed again. "
            "Delete it there, or log to another project"
        )


# -- MLflow -----------------------------------------------------------------------------------------------------------


def write_mlflow(content: Content, files: Path, where: str, project: str) -> dict[str, Any]:
    """Write to MLflow: a database and files in a directory, or a server; what is there already is not repeated."""
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric, Param, RunTag  # pyright: ignore[reportMissingImports]

    local = "://" not in where
    client = MlflowClient(tracking_uri=f"sqlite:///{where}/mlflow.db" if local else where)
    experiment = client.get_experiment_by_name(project)
    location = (Path(where) / "artifacts").as_uri() if local else None
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(project, artifact_location=location)
    )
    found = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{content.run}'")
    if found:
        _refuse_other(content, found[0].data.tags.get(DIGEST_TAG), where)
    show = f"mlflow ui --backend-store-uri sqlite:///{where}/mlflow.db" if local else where
    if found and COMPLETE_TAG in found[0].data.tags:
        return {"id": found[0].info.run_id, "new": False, "show": show}
    started, finished = (_milliseconds(moment) for moment in (content.started, content.finished))
    tags = content.tags | {RUN_TAG: content.run, DIGEST_TAG: content.digest}
    run = (
        found[0]
        if found
        else client.create_run(experiment_id, start_time=started, tags=tags, run_name=content.run)
    )
    run_id = run.info.run_id
    parameters = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in content.parameters.items()]
    for part in _parts(parameters, MOST_PARAMETERS):
        client.log_batch(run_id, params=part)
    written: dict[str, set[int]] = {}
    if found:
        written = {
            name: {one.step for one in client.get_metric_history(run_id, name)} for name in run.data.metrics
        }
    metrics = [
        Metric(name, value, finished, row.at)
        for row in content.rows
        for name, value in row.values.items()
        if row.at not in written.get(name, ())
    ]
    for part in _parts(metrics, MOST_METRICS):
        client.log_batch(run_id, metrics=part)
    client.log_artifacts(run_id, str(files))
    client.log_batch(run_id, tags=[RunTag(COMPLETE_TAG, "true")])
    client.set_terminated(run_id, end_time=finished)
    return {"id": run_id, "new": True, "show": show}


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


# -- trackers in a directory ------------------------------------------------------------------------------------------


def _mark(where: str, project: str, run: str) -> Path:
    """Return the file that says that a run was logged completely."""
    return Path(where) / MARKS / project / f"{run}.json"


def _marked(content: Content, where: str, project: str) -> dict[str, Any] | None:
    """Return the answer of the call that logged this run; None if none was completed."""
    path = _mark(where, project, content.run)
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    _refuse_other(content, stored["digest"], where)
    return stored["answer"] | {"new": False}


def _complete(content: Content, where: str, project: str, answer: dict[str, Any]) -> dict[str, Any]:
    path = _mark(where, project, content.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"digest": content.digest, "answer": answer}))
    return answer


def write_wandb(content: Content, files: Path, where: str, project: str) -> dict[str, Any]:
    """Write an offline run of W&B; an incomplete one of an earlier call is removed first."""
    import wandb  # pyright: ignore[reportMissingImports]

    if (answer := _marked(content, where, project)) is not None:
        return answer
    for unfinished in Path(where).glob(f"wandb/offline-run-*-{content.run}"):
        shutil.rmtree(unfinished)
    settings = wandb.Settings(
        console="off",
        silent=True,
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        disable_code=True,
    )
    run = wandb.init(
        project=project,
        id=content.run,
        name=content.run,
        dir=where,
        mode="offline",
        config=content.parameters,
        tags=[f"{name}: {value}"[:64] for name, value in content.tags.items()],
        settings=settings,
    )
    for axis in ("stage", "step"):
        run.define_metric(f"axis/{axis}", hidden=True)
    for name, axis in {name: row.axis for row in content.rows for name in row.values}.items():
        run.define_metric(name, step_metric=f"axis/{axis}")
    for row in content.rows:
        run.log({f"axis/{row.axis}": row.at, **row.values})
    for path in sorted((files / "selection").glob("stage-*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        run.log({f"selection/{path.stem}": wandb.Table(columns=header, data=rows[:MOST_ROWS])})
    artifact = wandb.Artifact(f"cropi-{content.run}", type="run", metadata={DIGEST_TAG: content.digest})
    artifact.add_dir(str(files))
    run.log_artifact(artifact)
    directory = Path(run.dir).parent
    run.finish()
    answer = {"id": content.run, "new": True, "show": f"wandb sync {directory}"}
    return _complete(content, where, project, answer)


def write_trackio(content: Content, files: Path, where: str, project: str) -> dict[str, Any]:
    """Write to Trackio's database in a directory; an incomplete run of an earlier call is removed first."""
    import trackio  # pyright: ignore[reportMissingImports]

    if (answer := _marked(content, where, project)) is not None:
        return answer
    try:
        earlier = list(trackio.Api().runs(project))
    except ValueError:  # there is no such project yet
        earlier = []
    for run in earlier:
        if run.name == content.run:
            run.delete()
    trackio.init(
        project,
        name=content.run,
        config=content.parameters | content.tags,
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for position, row in enumerate(content.rows):
        trackio.log({row.axis: row.at, **row.values}, step=position)
    artifact = trackio.Artifact(f"cropi-{content.run}", type="run")
    artifact.add_dir(files)
    trackio.log_artifact(artifact)
    trackio.finish()
    show = f"TRACKIO_DIR={where} trackio show --project {project}"
    return _complete(content, where, project, {"id": content.run, "new": True, "show": show})


if __name__ == "__main__":
    main()
