"""Selections exported from a store: order, evidence, the card, and the same prompts when imported again."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.curriculum.continuation import selection_only
from cropi_core.errors import ArtifactError, ConfigError, DataError
from cropi_core.exporting.selection import export_prompts, import_exported
from cropi_core.importing.artifacts import import_artifact
from cropi_core.prompts.formats import LAYOUTS, read_format
from cropi_core.prompts.loading import read_prompts
from data_schemas.config import Config
from data_schemas.tables import SELECTION
from tests.support.tiny import go, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that only selects, and its store."""
    root = tmp_path_factory.mktemp("run")
    config = Config.model_validate(settings(data={"decontaminate": {"action": "report"}}))
    return go(selection_only(config), root), Store(root)


def ranked(store, record):
    """The selected ids of stage 1, in the order of their rank."""
    table = pq.read_table(store.path(record.slots["selection@1"].ref) / "selection.parquet")
    chosen = [row for row in table.to_pylist() if row["selected"]]
    return [row["prompt_id"] for row in sorted(chosen, key=lambda row: row["rank"])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_selection_comes_back_from_every_format_with_its_ids_in_the_order_of_the_rank(
    finished, tmp_path, layout
):
    record, store = finished
    export_prompts(store, f"{record.run}:selection@1", tmp_path / "out", layout)
    ids = ranked(store, record)
    assert len(ids) == 8
    ref = import_exported(store, tmp_path / "out", layout)
    back = read_prompts(store.path(ref) / "prompts.parquet")
    assert back["prompt_id"].to_pylist() == ids
    pool = read_prompts(store.path(record.slots["prompts/pool"].ref) / "prompts.parquet").to_pylist()
    assert back.to_pylist() == [row for one in ids for row in pool if row["prompt_id"] == one]
    assert store.manifest(ref).summary["prompts"] == 8


def test_tables_have_rank_score_and_the_pass_rate_that_the_selection_saw(finished, tmp_path):
    record, store = finished
    export_prompts(store, f"{record.run}:selection@1", tmp_path / "out", "trl")
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert [row["rank"] for row in rows] == list(range(1, 9))
    scores = pq.read_table(store.path(record.slots["scores@1"].ref) / "scores.parquet").to_pylist()
    rates = {row["prompt_id"]: row["mean_reward"] for row in scores}
    assert [row["pass_rate"] for row in rows] == [rates[row["prompt_id"]] for row in rows]
    assert [row["score"] for row in rows] == sorted([row["score"] for row in rows], reverse=True)


def test_the_card_says_what_was_selected_by_which_sets_and_from_what(finished, tmp_path):
    record, store = finished
    files = export_prompts(store, f"{record.run}:selection@1", tmp_path / "out", "hf")
    assert [path.name for path in files] == ["README.md", "train-00000-of-00001.parquet"]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    config = yaml.safe_load(front)["configs"][0]
    assert config == {
        "config_name": "default",
        "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
    }
    assert "8 prompts of 40, selected by the strategy `influence`" in text
    assert "| goal | 8 |" in text
    for slot in ("selection@1", "scores@1", "gradients/goal@1", "policy@0", "prompts/pool"):
        ref = record.slots[slot].ref
        assert f"`{ref.key}` | `{ref.digest}`" in text, slot
    assert "shared 13 words in a row with another set; action: `report`" in text
    assert "Pass rates" in text


def test_a_whole_set_is_exported_too_and_nothing_else(finished, tmp_path):
    record, store = finished
    export_prompts(store, f"{record.run}:prompts/pool", tmp_path / "pool", "hf")
    assert len(read_format(tmp_path / "pool", "hf")) == 40
    assert "40 prompts, a whole set" in (tmp_path / "pool/README.md").read_text()
    with pytest.raises(ConfigError, match="of kind scores; only a selection or a set of prompts"):
        export_prompts(store, f"{record.run}:scores@1", tmp_path / "scores", "trl")
    with pytest.raises(ConfigError, match="is a set of prompts; remove --prompts"):
        export_prompts(store, f"{record.run}:prompts/pool", tmp_path / "x", "trl", prompts="y")


def test_an_imported_selection_needs_its_pool(finished, tmp_path):
    record, store = finished
    row = {"rank": None, "score": None, "status": "ok", "reason": "mine"}
    ids = ranked(store, record)[:3]
    table = [{"prompt_id": one, "selected": one != ids[1], **row} for one in ids]
    pq.write_table(pa.Table.from_pylist(table, schema=SELECTION), tmp_path / "mine.parquet")
    mine = import_artifact(store, "selection", tmp_path / "mine.parquet")
    with pytest.raises(ConfigError, match="does not name its pool; give --prompts"):
        export_prompts(store, mine.key, tmp_path / "out", "openrlhf")
    pool = f"{record.run}:prompts/pool"
    export_prompts(store, mine.key, tmp_path / "out", "openrlhf", prompts=pool)
    assert [row["prompt_id"] for row in read_format(tmp_path / "out", "openrlhf")] == [ids[0], ids[2]]
    with pytest.raises(DataError, match=r"selects 2 prompts that .* lacks"):
        export_prompts(store, mine.key, tmp_path / "other", "trl", prompts=f"{record.run}:prompts/goal")
    assert not (tmp_path / "other").exists()


def test_a_damaged_artifact_is_not_exported(finished, tmp_path):
    import shutil

    record, store = finished
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    file = copy.path(record.slots["selection@1"].ref) / "selection.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="is not exported, it is damaged"):
        export_prompts(copy, f"{record.run}:selection@1", tmp_path / "out", "verl")
    assert not (tmp_path / "out").exists()


def test_the_commands_export_and_import(finished, tmp_path):
    record, store = finished
    run, root = CliRunner(), ["--root", str(store.root)]
    out = tmp_path / "chosen"
    done = run.invoke(
        app, ["artifacts", "export", f"{record.run}:selection@1", str(out), "--format", "verl", *root]
    )
    assert done.exit_code == 0, done.output
    assert done.output == f"1 files in {out}\n"
    arguments = [
        "artifacts",
        "import",
        "prompts",
        str(out),
        "--format",
        "verl",
        "--tag",
        "chosen",
        "--json",
        *root,
    ]
    done = run.invoke(app, arguments)
    assert json.loads(done.stdout)["summary"]["prompts"] == 8
    done = run.invoke(app, ["artifacts", "import", "scores", str(out), "--format", "verl", *root])
    assert isinstance(done.exception, ConfigError)
    done = run.invoke(
        app, ["artifacts", "export", "chosen", str(tmp_path / "x"), "--prompts", "chosen", *root]
    )
    assert isinstance(done.exception, ConfigError)
