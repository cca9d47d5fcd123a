import json
import logging
import re

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.runs.accuracy import accuracy_grid
from cropi_core.runs.records import load_run
from cropi_core.runs.summary import shares, summarise
from flows.command.summary import as_markdown, selection_grid
from tasks import Executor
from tests.support.paths import CHECKOUT
from tests.support.prefect_records import spec


@pytest.fixture(scope="module")
def summary(finished):
    root, result = finished
    store = Store(root)
    return summarise(load_run(store, result["run"]), store.manifest)


def test_accuracy_is_given_before_and_after_every_stage_for_every_set(summary):
    header, rows = accuracy_grid(summary.accuracy)
    assert header == ["set", "use", "base", "stage 1"]
    assert [row[:2] for row in rows] == [["goal", "validation"], ["held_out", "test"]]
    for row in summary.accuracy:
        assert 0 <= row.low <= row.accuracy <= row.high <= 1


def test_the_shares_of_a_stage_add_up_to_its_subset(summary):
    assert sum(summary.selected[1].values()) == 10
    header, rows = selection_grid(summary)
    assert header == ["source", "pool", "stage 1"]
    assert {row[0] for row in rows} == {"reverse", "copy", "sort"}
    assert sum(shares(summary.selected[1]).values()) == pytest.approx(1)


def test_the_result_of_the_flow_is_json_and_names_every_artifact(finished):
    root, result = finished
    json.dumps(result, allow_nan=False)
    assert result["status"] == "done"
    record = load_run(Store(root), result["run"])
    assert {slot: entry["key"] for slot, entry in result["slots"].items()} == {
        slot: entry.ref.key for slot, entry in record.slots.items()
    }


def test_the_markdown_has_no_markup_of_anybody_else(finished):
    root, result = finished
    store = Store(root)
    record = load_run(store, result["run"]).model_copy(update={"error": "<script>|x`", "status": "failed"})
    text = as_markdown(summarise(record, store.manifest), str(root))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_step_is_one_line_of_the_log(tmp_path, caplog):
    execute = Executor(str(tmp_path), logging.getLogger("test.run"))
    with caplog.at_level(logging.INFO, logger="test.run"):
        made = execute(spec())
        execute(spec())
    first, second = [record.message for record in caplog.records if record.name == "test.run"]
    assert first.startswith("prompts/pool: ")
    assert " prompts; computed in " in first
    assert first.endswith(made.ref.key)
    assert second == f"{first.partition(';')[0]}; found, {made.ref.key}"


def test_the_script_of_the_page_on_accuracy_reads_a_run(finished, capsys):
    root, result = finished
    page = (CHECKOUT / "docs/guides/accuracy.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(script.replace("RUN", result["run"]).replace(".cropi", str(root)), {})
    printed = capsys.readouterr().out
    assert "1 held_out test" in printed
    done = CliRunner().invoke(
        app, ["runs", "accuracy", result["run"], "--parts", "--json", "--root", str(root)]
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert {row["set"] for row in shown["accuracy"]} == {"goal", "held_out"}
    assert len(shown["details"]) == printed.count("source: ") + printed.count("level: ")
