"""Comparison of two selections: as sets, as rankings, and by name through the command."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cropi_core.analysis.selection_diff import compare_selections, selection_diff
from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.curriculum.execution import run_step
from cropi_core.errors import ArtifactError, SelectionError
from cropi_core.importing.artifacts import import_artifact
from cropi_core.runs.records import new_run, save_run
from data_schemas.config import Config
from data_schemas.records import SlotRecord
from data_schemas.steps import StepSpec
from data_schemas.tables import SELECTION

WORLD = {"kind": "world", "families": {"reverse": 6, "sort": 6}}


def table(scores: dict[str, float | None], taken: int) -> pa.Table:
    """Return a selection of the ``taken`` best scores."""
    order = sorted((n for n, s in scores.items() if s is not None), key=lambda n: (-float(scores[n] or 0), n))
    rank = {name: place for place, name in enumerate(order, 1)}
    rows = [
        {
            "prompt_id": name,
            "selected": rank.get(name, taken + 1) <= taken,
            "rank": rank.get(name),
            "score": score,
            "status": "ok" if score is not None else "zero_variance",
            "reason": "",
        }
        for name, score in scores.items()
    ]
    return pa.Table.from_pylist(rows, schema=SELECTION)


def taken(selection: pa.Table) -> set[str]:
    return {row["prompt_id"] for row in selection.to_pylist() if row["selected"]}


ids = st.sampled_from([f"p{i:02d}" for i in range(24)])
scores = st.none() | st.integers(-8, 8).map(lambda n: n / 8)
selections = st.builds(table, st.dictionaries(ids, scores, min_size=1, max_size=24), st.integers(0, 24))


@given(selections, selections)
def test_the_sets_are_those_of_the_tables(a, b):
    if not set(a["prompt_id"].to_pylist()) & set(b["prompt_id"].to_pylist()):
        with pytest.raises(SelectionError, match="different pools"):
            compare_selections(a, b)
        return
    diff = compare_selections(a, b)
    one, other = taken(a), taken(b)
    assert {m.prompt_id for m in diff.added} == other - one
    assert {m.prompt_id for m in diff.removed} == one - other
    assert diff.both + len(diff.removed) == diff.selected[0] == len(one)
    assert diff.both + len(diff.added) == diff.selected[1] == len(other)
    assert diff.jaccard == (len(one & other) / len(one | other) if one | other else None)
    assert [m.after for m in diff.added] == sorted(m.after for m in diff.added)
    json.dumps(diff.as_json(), allow_nan=False)


@given(selections, selections, st.randoms())
def test_rows_may_stand_in_any_order_and_swapping_swaps(a, b, random):
    if not set(a["prompt_id"].to_pylist()) & set(b["prompt_id"].to_pylist()):
        return
    mixed = list(range(a.num_rows))
    random.shuffle(mixed)
    diff, back = compare_selections(a.take(mixed), b), compare_selections(b, a)
    assert diff == compare_selections(a, b)
    assert (diff.jaccard, diff.both, diff.scored) == (back.jaccard, back.both, back.scored)
    assert diff.spearman == pytest.approx(back.spearman)
    assert [m.prompt_id for m in diff.added] == [m.prompt_id for m in back.removed]


@given(selections)
def test_a_selection_compared_with_itself_moves_no_prompt(a):
    diff = compare_selections(a, a)
    assert diff.added == diff.removed == []
    assert diff.jaccard in (1.0, None)
    assert diff.spearman is None or diff.spearman == pytest.approx(1)


@given(st.lists(st.integers(-99, 99), min_size=3, max_size=20, unique=True))
def test_only_the_order_of_scores_counts(values):
    names = [f"p{i}" for i in range(len(values))]
    one = table(dict(zip(names, values, strict=True)), 2)
    grown = table({n: 3 * v + 7 for n, v in zip(names, values, strict=True)}, 2)
    turned = table({n: -v for n, v in zip(names, values, strict=True)}, 2)
    assert compare_selections(one, grown).spearman == pytest.approx(1)
    assert compare_selections(one, turned).spearman == pytest.approx(-1)


def test_ties_share_their_rank_and_what_has_no_order_has_no_correlation():
    a = table({"a": 1.0, "b": 1.0, "c": 0.0, "d": None}, 1)
    b = table({"a": 2.0, "b": 1.0, "c": 0.0, "d": 5.0}, 1)
    diff = compare_selections(a, b)
    assert diff.scored == 3
    assert diff.spearman == pytest.approx(0.866, abs=1e-3)
    assert compare_selections(a, table({"a": 1.0, "b": 1.0, "c": 1.0}, 1)).spearman is None
    assert compare_selections(a, table({"a": 1.0, "b": 0.0}, 1)).spearman is None
    twice = pa.concat_tables([a, a.slice(0, 1)])
    with pytest.raises(SelectionError, match="1 prompt ids of the second selection occur twice"):
        compare_selections(b, twice)


# -- in a store --------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """Return a store with a run with random selection, and the same pool drawn with another seed."""
    store = Store(tmp_path / "root")
    config = Config.model_validate({"data": {"pool": WORLD, "validation": {"v": WORLD}}})
    pool = run_step(
        StepSpec(
            step="prompts",
            slot="prompts/pool",
            settings={"source": WORLD | {"seed": 0}, "split": "pool"},
            runtime={"device": "cpu"},
        ),
        store,
    ).ref
    refs = [
        run_step(
            StepSpec(
                step="selection",
                slot="selection@1",
                settings={"selection": {"strategy": "random", "ratio": 0.5}, "seed": seed},
                inputs={"prompts": pool},
                runtime={"device": "cpu"},
            ),
            store,
        ).ref
        for seed in (0, 1)
    ]
    record = new_run(config)
    record.slots["selection@1"] = SlotRecord(ref=refs[0], origin="computed")
    save_run(store, record)
    store.tag("mine", refs[1].key)
    return store, record.run, pool, refs


def test_selections_are_named_by_key_tag_and_slot(made):
    store, run, _, (one, other) = made
    diff = selection_diff(store, one.key, other.key)
    assert selection_diff(store, f"{run}:selection@1", "mine") == diff
    assert diff.selected == (6, 6)
    assert diff.added
    for moved in [*diff.added, *diff.removed]:
        assert moved.source in ("reverse", "sort")
        assert moved.level is not None


def test_the_command_prints_a_table_or_json(made):
    store, run, _, _ = made
    arguments = ["artifacts", "diff", f"{run}:selection@1", "mine", "--root", str(store.root)]
    shown = CliRunner().invoke(app, [*arguments, "--top", "1"])
    assert shown.exit_code == 0, shown.output
    assert "6 and 6," in shown.output
    assert "came, the best 1:" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found == selection_diff(store, f"{run}:selection@1", "mine").as_json() | {
        "pools": [12, 12],
        "selected": [6, 6],
    }


def test_an_imported_selection_can_be_compared_although_it_names_no_pool(made, tmp_path):
    store, _, pool, (one, _) = made
    ids = pq.read_table(store.path(pool) / "prompts.parquet")["prompt_id"].to_pylist()
    path = tmp_path / "own.parquet"
    pq.write_table(table({name: float(i) for i, name in enumerate(ids)}, 3), path)
    own = import_artifact(store, "selection", path)
    diff = selection_diff(store, one.key, own.key)
    assert diff.selected == (6, 3)
    assert diff.spearman is None  # a random draw has no scores


def test_other_kinds_and_unknown_names_are_errors(made):
    store, run, pool, (one, _) = made
    with pytest.raises(ArtifactError, match="of kind prompts; selections are what is compared"):
        selection_diff(store, one.key, pool.key)
    with pytest.raises(ArtifactError, match="no run 'other'"):
        selection_diff(store, "other:selection@1", one.key)
    with pytest.raises(ArtifactError, match="has no 'selection@9'"):
        selection_diff(store, f"{run}:selection@9", one.key)
    with pytest.raises(ArtifactError, match="no artifact or tag"):
        selection_diff(store, "nothing", one.key)
