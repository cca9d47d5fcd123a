"""A finished run is logged once, completely, with the real packages of the trackers and without a network."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cropi_core.artifacts import METRICS_FILE, SELECTION_FILE, Store
from cropi_core.cli.app import app
from cropi_core.config import load_config
from cropi_core.errors import ConfigError, CropiError
from cropi_core.runs import load_run, save_run
from cropi_core.trackers import collect, log_run
from cropi_core.trackers.content import metric_name, read_content
from data_schemas import Finding, RunRecord, SlotRecord, StageCheck
from data_schemas.tables import SELECTION
from tests.support.paths import CHECKOUT
from tests.support.stores import publish
from tests.support.tables import table_bytes

RUN = "tiny-12345678"
ACCURACY = {
    "goal": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "prompts": 8, "completions": 16, "not_gradable": 0}
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A root with a finished run of one stage."""
    store = Store(tmp_path / "root")
    pool = publish(store, {"prompts.parquet": "x"}, summary={"by_source": {"a": 8}})
    rows = [
        {
            "prompt_id": f"p{i}",
            "selected": i < 3,
            "rank": 4 - i if i < 3 else None,
            "score": i / 8,
            "status": "ok",
        }
        | {"reason": "a, b"}
        for i in range(8)
    ]
    selection = publish(
        store,
        {SELECTION_FILE: table_bytes(pa.Table.from_pylist(rows, schema=SELECTION))},
        "selection",
        inputs={"prompts": pool},
        summary={"selected": 3, "pool": 8, "sources": {"a: b": {"pool": 8, "selected": 3}}},
        seconds=2.0,
    )
    metrics = pa.table({"step": [1, 2], "reward": [0.25, 0.75], "kl": pa.array([None, 0.125], pa.float64())})
    trained = publish(
        store,
        {METRICS_FILE: table_bytes(metrics), "checkpoint/config.json": "{}"},
        "policy",
        inputs={"selection": selection},
        summary={"steps": 2, "tokens_generated": 10, "tokens_trained": 20},
        step="training",
        seconds=3.0,
    )
    base = publish(store, {"checkpoint/config.json": "{ }"}, "policy")
    slots = {"prompts/pool": pool, "policy@0": base}
    for stage, policy in enumerate((base, trained)):
        accuracy = {"goal": ACCURACY["goal"] | {"accuracy": 0.5 + stage / 4}}
        slots[f"evaluation@{stage}"] = publish(
            store,
            {"accuracy.json": "{}"},
            "evaluation",
            inputs={"policy": policy},
            summary={"accuracy": accuracy, "tokens": 7},
            seconds=1.0,
        )
    slots |= {"selection@1": selection, "policy@1": trained}
    config = load_config("demo", ["stages=1"]).model_dump(mode="json")
    check = StageCheck(
        stage=1, trajectories="own", action="none", findings=[Finding(figure="ess_share", value=0.75)]
    )
    entries = {slot: SlotRecord(ref=ref, origin="computed") for slot, ref in slots.items()}
    moments = {"started": "2026-11-30T10:00:00+00:00", "finished": "2026-11-30T10:01:00+00:00"}
    save_run(
        store, RunRecord(run=RUN, config=config, slots=entries, status="done", checks=[check], **moments)
    )
    return store


# -- what is logged ---------------------------------------------------------------------------------------------------


def test_everything_measured_is_collected_in_order(store: Store, tmp_path: Path):
    out = tmp_path / "content"
    content = collect(store, RUN, out)
    assert read_content(out) == content
    assert [(row.axis, row.at) for row in content.rows] == [
        ("stage", 0),
        ("step", 1),
        ("step", 2),
        ("stage", 1),
    ]
    assert content.rows[1].values == {"training/reward": 0.25}
    assert content.rows[2].values == {"training/reward": 0.75, "training/kl": 0.125}
    last = content.rows[3].values
    assert last["accuracy/goal"] == 0.75
    assert last["reliability/ess_share"] == 0.75
    assert last["selection/selected"] == 3
    assert last[f"selection/source/{metric_name('a: b')}"] == 3
    assert last["seconds/training"] == 3.0
    assert last["cost/training/generated"] == 10
    assert content.parameters["selection.strategy"] == "influence"
    assert not any(name.startswith("runtime") for name in content.parameters)
    lineage = json.loads((out / "files" / "lineage.json").read_text())
    assert {one["key"] for one in lineage} == {slot.ref.key for slot in load_run(store, RUN).slots.values()}
    table = list(csv.reader((out / "files" / "selection" / "stage-1.csv").read_text().splitlines()))
    assert table[0] == ["rank", "prompt_id", "score", "status", "reason"]
    assert [row[1] for row in table[1:]] == ["p2", "p1", "p0"]
    assert collect(store, RUN, tmp_path / "again").digest == content.digest


@pytest.mark.parametrize("text", ["pass@4", "source: ∂x", "a/../b", "level: 3"])
def test_names_of_metrics_are_accepted_everywhere_and_stay_distinct(text: str):
    assert re.fullmatch(r"[A-Za-z0-9_\-./ ]+", metric_name(text))
    assert metric_name(text) != metric_name(text.replace(":", ";") + "?")
    assert metric_name("plain_name") == "plain_name"


def test_a_run_that_is_not_finished_and_an_unknown_tracker_are_refused(store: Store, tmp_path: Path):
    save_run(store, load_run(store, RUN).model_copy(update={"status": "failed"}))
    with pytest.raises(ConfigError, match="is failed, and only a finished run is logged"):
        collect(store, RUN, tmp_path / "content")
    with pytest.raises(ConfigError, match="'neptune' is none of mlflow, wandb, trackio"):
        log_run(store, RUN, "neptune")  # type: ignore[arg-type]


# -- the trackers -----------------------------------------------------------------------------------------------------


def needs(tracker: str):
    return pytest.mark.skipif(find_spec(tracker) is None, reason=f"needs the extra `{tracker}`")


@needs("mlflow")
def test_mlflow_has_the_run_once_and_completes_an_interrupted_one(store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/never")
    where = tmp_path / "ml"
    first = log_run(store, RUN, "mlflow", to=str(where), project="mine")
    assert first.new
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{where}/mlflow.db")

    def reward() -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(first.id, "training/reward"))

    def check() -> None:
        run = client.get_run(first.id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["cropi.complete"] == "true"
        assert run.data.metrics["accuracy/goal"] == 0.75
        assert run.data.params["selection.strategy"] == "influence"
        assert reward() == [(1, 0.25), (2, 0.75)]
        names = {one.path for one in client.list_artifacts(first.id)}
        assert {"record.json", "configuration.yaml", "lineage.json", "selection", "report.html"} == names

    check()
    again = log_run(store, RUN, "mlflow", to=str(where), project="mine")
    assert (again.new, again.id) == (False, first.id)
    client.delete_tag(first.id, "cropi.complete")  # an interruption before the last request
    assert log_run(store, RUN, "mlflow", to=str(where), project="mine").id == first.id
    check()
    experiment = client.get_experiment_by_name("mine")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@needs("mlflow")
def test_mlflow_gets_only_what_an_interruption_left_out(store: Store, tmp_path: Path):
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    where = tmp_path / "ml"
    where.mkdir()
    client = MlflowClient(f"sqlite:///{where}/mlflow.db")
    experiment = client.create_experiment("cropi", artifact_location=(where / "artifacts").as_uri())
    tags = {"cropi.run": RUN, "cropi.digest": collect(store, RUN, tmp_path / "content").digest}
    begun = client.create_run(experiment, tags=tags).info.run_id
    client.log_batch(
        begun, metrics=[Metric("training/reward", 0.25, 0, 1), Metric("accuracy/goal", 0.5, 0, 0)]
    )
    assert log_run(store, RUN, "mlflow", to=str(where)).id == begun
    for name, expected in {
        "training/reward": [(1, 0.25), (2, 0.75)],
        "accuracy/goal": [(0, 0.5), (1, 0.75)],
    }.items():
        assert sorted((m.step, m.value) for m in client.get_metric_history(begun, name)) == expected


@needs("mlflow")
def test_a_run_with_other_values_is_refused(store: Store, tmp_path: Path):
    log_run(store, RUN, "mlflow", to=str(tmp_path / "ml"))
    record = load_run(store, RUN)
    checks = [record.checks[0].model_copy(update={"findings": [Finding(figure="ess_share", value=0.5)]})]
    save_run(store, record.model_copy(update={"checks": checks}))
    with pytest.raises(ConfigError, match=f"has a run {RUN} with other values"):
        log_run(store, RUN, "mlflow", to=str(tmp_path / "ml"))


@needs("wandb")
def test_wandb_gets_one_offline_run(store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    where = tmp_path / "wb"
    unfinished = where / "wandb" / f"offline-run-20200101_000000-{RUN}"
    unfinished.mkdir(parents=True)
    first = log_run(store, RUN, "wandb", to=str(where))
    assert not log_run(store, RUN, "wandb", to=str(where)).new
    (directory,) = where.glob("wandb/offline-run-*")
    assert directory != unfinished
    assert first.show == f"wandb sync {directory}"
    (data,) = directory.glob("*.wandb")
    logged = history(data)
    assert [row["training/reward"] for row in logged if "training/reward" in row] == [0.25, 0.75]
    assert [(row["axis/stage"], row["accuracy/goal"]) for row in logged if "accuracy/goal" in row] == [
        (0, 0.5),
        (1, 0.75),
    ]
    assert list(directory.glob("files/media/table/selection/*.json"))


def history(path: Path) -> list[dict]:
    """Read the rows of an offline run: protocol buffers in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, position, record, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = messages.Record()
            message.ParseFromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


@needs("trackio")
def test_trackio_has_the_run_once(store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    where = tmp_path / "tio"
    assert log_run(store, RUN, "trackio", to=str(where), project="mine").new
    assert not log_run(store, RUN, "trackio", to=str(where), project="mine").new
    (where / "cropi" / "mine" / f"{RUN}.json").unlink()  # as an interruption leaves it
    assert log_run(store, RUN, "trackio", to=str(where), project="mine").new
    script = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage as s\n"
        "runs = s.get_run_records('mine')\n"
        "print(json.dumps([[r['name'] for r in runs], s.get_logs('mine', runs[0]['name'])]))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(where), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    names, rows = json.loads(done.stdout.splitlines()[-1])
    assert names == [RUN]
    assert [row["training/reward"] for row in rows if "training/reward" in row] == [0.25, 0.75]
    assert [row["accuracy/goal"] for row in rows if "accuracy/goal" in row] == [0.5, 0.75]


def test_a_tracker_that_fails_is_one_error(store: Store, tmp_path: Path, monkeypatch):
    broken = tmp_path / "packages" / "wandb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('no space left')\n")
    monkeypatch.syspath_prepend(str(broken.parent))
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    with pytest.raises(CropiError, match=r"wandb failed \(exit 1\)[\s\S]*no space left"):
        log_run(store, RUN, "wandb", to=str(tmp_path / "wb"))


@needs("mlflow")
def test_the_commands_of_the_page_log_a_run(store: Store, tmp_path: Path, monkeypatch):
    page = (CHECKOUT / "docs/guides/trackers.md").read_text(encoding="utf-8")
    commands = [line for line in re.findall(r"^cropi runs log .*$", page, re.MULTILINE) if "http" not in line]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROPI_ROOT", str(store.root))
    for command in commands:
        words = command.split("#")[0].replace("RUN", RUN).split()[1:]
        if find_spec(words[words.index("--tracker") + 1]) is None:
            continue
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert f"{RUN}: logged" in done.output
