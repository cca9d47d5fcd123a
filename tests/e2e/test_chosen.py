"""What the stages of a real run selected, read from its artifacts and counted again from its tables."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

pytest.importorskip("wordllama", reason="sentence embeddings need the extra `analysis`")

from cropi_core.analysis import read_chosen
from cropi_core.analysis.selection_diff import selection_diff
from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.curriculum.execution import publish_import
from cropi_core.gradients.store import GradientStore
from cropi_core.runs.artifacts import Artifacts
from cropi_core.runs.records import load_run, save_run


def rows(store, record, slot, file):
    path = store.path(record.slots[slot].ref) / file
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    return pa.concat_tables([pq.read_table(part) for part in parts]).to_pylist()


def mean(values):
    return pytest.approx(float(np.mean(list(values))), rel=1e-5)


@pytest.fixture(scope="module")
def found(reference):
    return read_chosen(Store(reference[0]), reference[1].run)


def test_every_figure_is_what_the_tables_say(reference, found):
    root, record = reference
    store = Store(root)
    prompts = {row["prompt_id"]: row for row in rows(store, record, "prompts/pool", "prompts.parquet")}
    said = {}
    for row in rows(store, record, "rollouts/pool@1", "parts"):
        said.setdefault(row["prompt_id"], []).append(row)
    rate = {name: float(np.mean([row["reward"] for row in group])) for name, group in said.items()}
    tokens = {
        name: float(np.mean([len(row["completion_ids"]) for row in group])) for name, group in said.items()
    }
    assert [one.stage for one in found.stages] == [1, 2]
    for one in found.stages:
        selection = rows(store, record, f"selection@{one.stage}", "selection.parquet")
        taken = {row["prompt_id"] for row in selection if row["selected"]}
        assert (one.pool, one.selected) == (len(prompts), len(taken))
        gradients = GradientStore.open(
            store.path(record.slots[f"gradients/pool@{one.stage}"].ref) / "gradients.zarr"
        )
        live = gradients.column("status") == 0
        entropy = dict(
            zip(gradients.column("prompt_id")[live], gradients.column("entropy")[live], strict=True)
        )
        level = {name: float(row["level"]) for name, row in prompts.items() if row["level"]}
        hard = {name: 1 - value for name, value in rate.items()}
        for name, values in (
            ("entropy", entropy),
            ("pass_rate", rate),
            ("difficulty", hard),
            ("length", tokens),
            ("level", level),
        ):
            figure = one.figures[name]
            assert figure.pool_count == len(values), name
            assert figure.selected_count == len(taken & values.keys()), name
            assert figure.pool_mean == mean(values.values()), name
            assert figure.selected_mean == mean(values[p] for p in taken if p in values), name
        features = gradients.rows(0, gradients.n)
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
        ours = unit[live & np.isin(gradients.column("prompt_id"), list(taken))]
        pairs = ours @ ours.T
        assert one.figures["alike"].selected_mean == mean(pairs[~np.eye(len(ours), dtype=bool)])
        np.fill_diagonal(pairs, -2)
        assert one.figures["alike_nearest"].selected_mean == mean(pairs.max(axis=1))
        assert one.figures["similarity"] == one.figures["similarity:goal"]
    assert found.notes == []


def test_the_movement_is_that_of_the_two_selections(reference, found):
    root, record = reference
    first, second = found.stages
    assert first.moved is None
    diff = selection_diff(Store(root), f"{record.run}:selection@1", f"{record.run}:selection@2")
    assert second.moved == diff
    hard = second.harder["difficulty"]
    assert (hard.before, hard.after) == (
        first.figures["difficulty"].selected_mean,
        second.figures["difficulty"].selected_mean,
    )
    assert [verdict.finding for verdict in found.verdicts] == [
        "selected prompts have lower entropy than the pool",
        "they are closer to the validation sets",
        "later stages are harder",
    ]


def test_the_command_says_the_same(reference, found):
    root, record = reference
    arguments = ["chosen", record.run, "--root", str(root)]
    told = CliRunner().invoke(app, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == json.loads(json.dumps(found.as_json(), allow_nan=False))
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(verdict.sentence in shown.stdout for verdict in found.verdicts)
    assert shown.stdout.count("similarity:goal") == 2


def test_another_embedding_takes_the_place_of_the_default(reference):
    root, record = reference
    found = read_chosen(Store(root), record.run, embed=lambda texts: np.ones((len(texts), 2)))
    figure = found.stages[0].figures["similarity"]
    assert (figure.pool_mean, figure.selected_mean, figure.side) == (
        pytest.approx(1),
        pytest.approx(1),
        "like chance",
    )


def test_texts_in_batches_are_as_near_as_all_at_once(reference, found, monkeypatch):
    monkeypatch.setattr("cropi_core.analysis.columns.BATCH", 3)
    again = read_chosen(Store(reference[0]), reference[1].run)
    for one, other in zip(found.stages, again.stages, strict=True):
        for name in ("similarity:goal", "nearest:goal"):
            assert vars(other.figures[name]) == pytest.approx(vars(one.figures[name]), abs=1e-6)


def test_a_stage_that_selected_certain_prompts_has_lower_entropy(own_copy):
    root, record = own_copy
    store = Store(root)
    gradients = GradientStore.open(store.path(record.slots["gradients/pool@1"].ref) / "gradients.zarr")
    entropy = np.where(gradients.column("status") == 0, gradients.column("entropy"), np.inf)
    surest = set(gradients.column("prompt_id")[np.argsort(entropy)[:6]])
    old = record.slots["selection@1"]
    table = pq.read_table(store.path(old.ref) / "selection.parquet")
    chosen = [{**row, "selected": row["prompt_id"] in surest} for row in table.to_pylist()]

    def fill(directory):
        pq.write_table(pa.Table.from_pylist(chosen, schema=table.schema), directory / "selection.parquet")

    slot = old.model_copy(update={"ref": publish_import(store, "selection", {}, {}, fill)})
    save_run(
        store, record.model_copy(update={"run": "surest", "slots": record.slots | {"selection@1": slot}})
    )
    one = read_chosen(store, "surest").stages[0]
    assert one.selected == 6
    assert one.figures["entropy"].side == "lower"


def test_what_is_missing_is_a_note_and_no_error(own_copy, monkeypatch):
    root, record = own_copy
    store = Store(root)
    for slot in ("gradients/pool@2", "rollouts/pool@1"):
        store.discard(record.slots[slot].ref.key)
    monkeypatch.setattr("cropi_core.analysis.sentences.PACKAGE", "not_there_at_all")
    found = read_chosen(store, record.run)
    assert set(found.stages[0].figures) == {"entropy", "level", "alike", "alike_nearest"}
    assert set(found.stages[1].figures) == {"level"}
    assert any('pip install "cropi[analysis]"' in note for note in found.notes)
    assert any(note.startswith("gradients/pool@2") for note in found.notes)
    assert any("no artifact rollouts-" in note for note in found.notes)
    before = record.model_copy(update={"run": "begun", "slots": {}})
    save_run(store, before)
    assert read_chosen(store, "begun").stages == []
    assert Artifacts(store, load_run(store, "begun")).problems == []


def test_damaged_gradients_are_a_problem_and_the_rest_is_there(own_copy):
    """Sizes and names are as they were, so that only reading finds it."""
    root, record = own_copy
    store = Store(root)
    shards = store.path(record.slots["gradients/pool@1"].ref) / "gradients.zarr" / "features" / "c"
    for file in (path for path in shards.rglob("0") if path.is_file()):
        file.write_bytes(bytes(b ^ 0x55 for b in file.read_bytes()))
    found = read_chosen(store, record.run)
    assert any(note.startswith("gradients/pool@1: ") and "is damaged" in note for note in found.notes)
    assert "alike" not in found.stages[0].figures
    assert "pass_rate" in found.stages[0].figures
    assert "alike" in found.stages[1].figures
