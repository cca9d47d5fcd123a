"""A curriculum that samples again what begins to be solved, and selects by what its scores are worth."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cropi_core.analysis import read_levels
from cropi_core.artifacts import Store
from cropi_core.cli import app
from cropi_core.config import load_config
from cropi_core.curriculum import run_locally, slot_names
from cropi_core.errors import SelectionError
from cropi_core.planning.rehearsal import rehearse
from cropi_core.report.page import render
from cropi_core.runs import Artifacts
from cropi_core.study.plan import cells, load_study
from cropi_core.study.stages import mean_level
from data_schemas import Slot

SETTINGS = [
    "policy.path=embedded-ladder",
    "data.pool={kind: world, families: {reverse-4: 24, reverse-6: 24, reverse-7: 24, reverse-9: 12, noise: 12}}",
    "data.validation={goal: {kind: world, families: {reverse-6: 6, reverse-7: 6, reverse-9: 6}}}",
    "data.test={seven: {kind: world, families: {reverse-7: 10}}}",
    "rollouts.pool.samples=4",
    "rollouts.validation.samples=4",
    "rollouts.refresh=waking",
    "rollouts.waking={tokens: 900}",
    "selection.strategy=auto",
    "selection.ratio=0.2",
    "projection.k=256",
    "training.steps=2",
    "training.prompts_per_step=8",
    "evaluation.sampling.samples=1",
    "runtime.device=cpu",
    "runtime.threads=1",
]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("climb")
    config = load_config("demo", SETTINGS)
    return config, root, run_locally(config, root)


def test_a_later_stage_samples_what_begins_to_be_solved(climbed):
    config, root, record = climbed
    store = Store(root)
    summary = {slot: store.manifest(entry.ref).summary for slot, entry in record.slots.items()}
    woken = summary["prompts/waking@2"]
    assert 12 < woken["prompts"] < 48  # about 900 tokens, at 4 completions of 5 to 8
    assert summary["rollouts/waking@2"]["prompts"] == woken["prompts"]
    merged = summary["rollouts/pool@2"]
    assert (merged["prompts"], merged["sampled_tokens"]) == (96, 0)
    assert merged["prompts_sampled_again"] == woken["prompts"]
    assert (
        store.manifest(record.slots["rollouts/goal@2"].ref).inputs["policy"] == record.slots["policy@1"].ref
    )
    assert {str(Slot.parse(slot)) for slot in record.slots} <= set(slot_names(config))


def test_every_stage_states_a_verdict_and_follows_it(climbed):
    _, root, record = climbed
    store = Store(root)
    for check in record.checks:
        assert check.verdict is not None
        strategy = store.manifest(record.slots[f"selection@{check.stage}"].ref).summary["strategy"]
        expected = {"noise": {"pass_rate", "random"}}.get(check.verdict.grade, {"influence"})
        assert strategy in expected
        assert any(check.verdict.follows in note for note in record.notes)


def test_the_list_of_runs_has_the_last_verdict(climbed):
    _, root, record = climbed
    listed = CliRunner().invoke(app, ["runs", "--json", "--root", str(root)])
    (row,) = json.loads(listed.stdout)
    assert row["scores"] == record.checks[-1].verdict.grade


def test_the_same_call_finds_every_artifact(climbed):
    config, root, record = climbed
    again = run_locally(config, root)
    assert {slot: entry.ref for slot, entry in again.slots.items()} == {
        slot: entry.ref for slot, entry in record.slots.items()
    }
    assert {entry.origin for entry in again.slots.values()} == {"cached"}


def test_levels_are_read_from_the_artifacts(climbed):
    _, root, record = climbed
    found = read_levels(Artifacts(Store(root), record), 1)
    assert found is not None
    assert found.mean is not None
    assert 4 <= found.mean <= 9
    assert found.by_belief is not None
    assert found.by_belief > 0.5
    assert found.coverage is not None
    assert 0 < found.coverage <= 1


def test_the_report_shows_the_verdicts_and_the_levels(climbed):
    _, root, record = climbed
    page = render(Store(root), record)
    assert '<table class="wide" id="levels">' in page
    assert "target covered" in page
    for check in record.checks:
        assert check.verdict.grade in page[page.index('<table id="reliability">') :]


def test_the_plan_lists_the_steps(climbed, tmp_path):
    config, _, record = climbed
    planned = rehearse(config, Store(tmp_path / "root"), tmp_path / "folder")
    slots = {work.slot: work for work in planned.works}
    assert {"prompts/waking@2", "rollouts/waking@2"} <= set(slots)
    assert slots["rollouts/pool@2"].prompts == 0
    assert set(record.slots) <= set(slots) | {"rollouts/halves@1", "rollouts/halves@2"} | {
        "gradients/halves@1",
        "gradients/halves@2",
    }


def test_a_stage_that_chooses_among_too_few_fresh_prompts_says_what_to_change(climbed):
    _, root, _ = climbed
    config = load_config("demo", [*SETTINGS, "rollouts.waking={tokens: 200, keep_stored: false}"])
    with pytest.raises(SelectionError, match=r"Raise rollouts.waking.tokens=200"):
        run_locally(config, root)


def test_a_stage_that_samples_a_share_of_the_pool_selects_from_all_of_it(tmp_path):
    """Later stages may wake prompts that no earlier stage sampled."""
    share = ["rollouts.pool_share=0.5", "scores.neighbours=3", "selection.strategy=influence"]
    config = load_config("demo", [*SETTINGS, *share, "training.draw={method: belief}", "ends_with=selection"])
    record = run_locally(config, tmp_path)
    store = Store(tmp_path)
    summary = {slot: store.manifest(entry.ref).summary for slot, entry in record.slots.items()}
    assert [summary[f"{slot}@1"]["prompts"] for slot in ("prompts/pilot", "rollouts/pool")] == [48, 48]
    assert (summary["scores@1"]["prompts"], summary["scores@1"]["not_sampled"]) == (96, 48)
    assert 48 < summary["rollouts/pool@2"]["prompts"] < 96
    selected = pq.read_table(store.path(record.slots["selection@2"].ref) / "selection.parquet").to_pylist()
    assert len(selected) == 96
    sampled = pq.read_table(store.path(record.slots["rollouts/pool@2"].ref) / "parts")["prompt_id"]
    assert not {row["prompt_id"] for row in selected if row["selected"]} <= set(sampled.to_pylist())
    planned = rehearse(config, Store(tmp_path / "other"), tmp_path / "folder")
    counts = {work.slot: work.prompts for work in planned.works}
    assert [counts[f"{kind}/pool@1"] for kind in ("rollouts", "gradients")] == [48, 48]
    assert set(record.slots) <= set(counts)
    assert {str(Slot.parse(slot)) for slot in record.slots} <= set(slot_names(config))
    assert "too_few_gradable" in render(store, record)


@pytest.mark.extended
def test_the_level_of_what_is_selected_rises_over_three_stages_of_the_ladder(tmp_path):
    study = load_study("climb").model_copy(update={"seeds": [100]})
    (cell,) = (one for one in cells(study) if (one.world, one.arm) == ("ladder", "cropi"))
    config = cell.config.model_copy(update={"stages": 3, "ends_with": "selection"})
    record = run_locally(config, tmp_path)
    store = Store(tmp_path)
    summaries = [store.manifest(record.slots[f"selection@{stage}"].ref).summary for stage in (1, 2, 3)]
    first, second, third = (mean_level(summary["levels"]) or 0.0 for summary in summaries)
    assert first + 0.4 < second < third  # 6.06, 6.84, 6.98 on an AMD EPYC
