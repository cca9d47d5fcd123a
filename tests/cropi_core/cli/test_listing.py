"""What `cropi artifacts ls` says of an artifact: who uses it, where, how large and how old it is."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts import Store
from cropi_core.cli.app import app
from cropi_core.formatting import age
from cropi_core.runs import list_runs, save_run
from data_schemas import RunRecord, SlotRecord
from tests.support.stores import publish


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86400 * 12 + 5, "12 d")],
)
def test_an_age_is_shown_in_its_largest_unit(seconds: float, text: str):
    assert age(seconds) == text


def listed(root: Path, *more: str) -> list[dict]:
    done = CliRunner().invoke(app, ["artifacts", "ls", "--root", str(root), "--json", *more])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_use_of_an_artifact_is_named(tmp_path: Path):
    root = tmp_path / "root"
    store = Store(root)
    shared = publish(store, {"a.txt": "x"}, kind="rollouts")
    alone = publish(store, {"a.txt": "y"}, kind="scores")
    for run, slots in {
        "one-1": {"rollouts/goal@1": shared},
        "two-2": {"rollouts/pool@2": shared, "scores@1": alone},
    }.items():
        started = datetime.now(UTC) - timedelta(hours=1)
        entries = {slot: SlotRecord(ref=ref, origin="computed") for slot, ref in slots.items()}
        save_run(store, RunRecord(run=run, config={}, started=started.isoformat(), slots=entries))
    rows = {row["key"]: row for row in listed(root)}
    assert rows[shared.key]["uses"] == [
        {"run": "one-1", "slot": "rollouts/goal@1", "set": "goal"},
        {"run": "two-2", "slot": "rollouts/pool@2", "set": "pool"},
    ]
    assert [row["key"] for row in listed(root, "--run", "one-1")] == [shared.key]
    assert list_runs(store) == ["one-1", "two-2"]
    told = CliRunner().invoke(app, ["artifacts", "ls", "--root", str(root)], env={"COLUMNS": "240"}).stdout
    line = next(line for line in told.splitlines() if line.startswith(shared.key))
    assert "rollouts/pool@2" in line
    assert "two-2 and 1 more" in line
    wrong = CliRunner().invoke(app, ["artifacts", "ls", "--root", str(root), "--run", "none"])
    assert wrong.exit_code != 0
