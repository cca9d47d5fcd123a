"""`cropi select`: the selection of a stage through Prefect, without training."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.errors import ConfigError
from cropi_core.prompts.formats import read_format
from cropi_core.runs.records import load_run
from flows.command.app import app
from flows.select import select
from tests.support.commands import tiny_config, written


def test_the_flow_selects_what_the_curriculum_selects_and_then_the_next_stage(finished, known, tmp_path):
    _, curriculum = finished
    root = tmp_path / "root"
    shutil.copytree(known, root)
    first = select(config=tiny_config(stages=3), root=str(root))
    assert isinstance(first, dict)
    assert {slot["origin"] for slot in first["slots"].values()} == {"cached"}
    assert first["slots"]["selection@1"]["key"] == curriculum["slots"]["selection@1"]["key"]
    assert not {"policy@1", "evaluation@0"} & set(first["slots"])
    trained = curriculum["slots"]["policy@1"]["key"]
    second = select(config=tiny_config(), root=str(root), after=first["run"], policy=trained)
    assert isinstance(second, dict)
    assert second["slots"]["policy@1"] == {**second["slots"]["policy@1"], "key": trained, "origin": "pinned"}
    assert second["slots"]["selection@2"]["origin"] == "computed"
    assert load_run(Store(root), second["run"]).status == "done"


@pytest.mark.slow
@pytest.mark.extended
def test_the_command_writes_the_prompts_and_overwrites_nothing(known, tmp_path, prefect_server):
    root, config = tmp_path / "root", written(tmp_path / "tiny.yaml")
    shutil.copytree(known, root)
    arguments = ["select", str(config), "--root", str(root), "--out", str(tmp_path / "chosen"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--format", "openrlhf"])
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    assert told["selection"] == f"{told['run']}:selection@1"
    assert told["files"] == [str(tmp_path / "chosen/train.jsonl")]
    assert len(read_format(tmp_path / "chosen", "openrlhf")) == 10
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(app, ["select", str(config), "--root", str(root), "--policy", "embedded"])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.parametrize("given", [{"after": "x"}, {"policy": "embedded"}, {"rollouts": "x"}])
def test_half_of_what_continues_a_run_is_refused(given, root):
    with pytest.raises(ConfigError, match="belong together"):
        select(config=tiny_config(), root=str(root), **given)


def test_a_selection_takes_overrides(known, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(known, root)
    made = select(config=tiny_config(), root=str(root), overrides=["selection.ratio=0.5"])
    assert isinstance(made, dict)
    assert Store(root).manifest(made["slots"]["selection@1"]["key"]).settings["selection"]["ratio"] == 0.5
