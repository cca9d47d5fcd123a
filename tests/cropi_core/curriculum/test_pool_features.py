"""A later stage is scored by the features that the training before it collected."""

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cropi_core.artifacts import Store
from cropi_core.gradients.store import GradientStore
from cropi_core.planning.rehearsal import rehearse
from cropi_core.study.measure import cost
from tests.support.tiny import go, tiny

REUSED = {"scores": {"pool_features": "training"}, "stages": 3}


def test_later_scores_pass_no_prompt_of_the_pool_through_the_model(tmp_path):
    training = {"steps": 3, "prompts_per_step": 4, "sampling": {"samples": 4}, "features": True}
    config = tiny(training=training, **REUSED)
    record, store = go(config, tmp_path / "root"), Store(tmp_path / "root")
    made = {slot: store.manifest(entry.ref) for slot, entry in record.slots.items()}
    assert made["gradients/pool@1"].summary["tokens"] > 0
    assert made["gradients/goal@3"].summary["tokens"] > 0
    for stage in (2, 3):
        merged, trained = made[f"gradients/pool@{stage}"], made[f"policy@{stage - 1}"]
        assert merged.summary["tokens"] == cost("gradients/pool", merged, store).trained == 0
        assert merged.summary["trained"]["prompts"] == trained.summary["features"]["prompts"] > 0
        assert merged.inputs["stored"] == record.slots[f"gradients/pool@{stage - 1}"].ref

    # Rows of trained prompts are those that the training collected, the others are those of the stage before.
    before, after, new = (
        GradientStore.open(store.path(made[slot].ref) / name)
        for slot, name in (
            ("gradients/pool@1", "gradients.zarr"),
            ("gradients/pool@2", "gradients.zarr"),
            ("policy@1", "features.zarr"),
        )
    )
    trained_ids = list(new.column("prompt_id"))
    for row, name in enumerate(after.column("prompt_id")):
        source, place = (new, trained_ids.index(name)) if name in trained_ids else (before, row)
        assert after.column("status")[row] == source.column("status")[place]
        assert after.rows(row, row + 1) == pytest.approx(source.rows(place, place + 1), rel=2e-3, abs=1e-7)
    rows = pq.read_table(store.path(made["policy@1"].ref) / "features.parquet")
    assert set(rows["prompt_id"].to_pylist()) == set(trained_ids)
    assert any("trained prompts are those of the training" in note for note in record.notes)

    # The plan knows it, and the run finds its artifacts again.
    (tmp_path / "plan").mkdir()
    works = {work.slot: work for work in rehearse(config, Store(tmp_path / "empty"), tmp_path / "plan").works}
    assert [works[f"gradients/pool@{stage}"].samples for stage in (1, 2, 3)] == [4, 0, 0]
    assert {entry.origin for entry in go(config, tmp_path / "root").slots.values()} == {"cached"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (REUSED, "scores.pool_features=training needs training.features=true"),
        (
            {"training": {"features": True, "lora": {"r": 4}}},
            "training.features is not supported with training.lora",
        ),
        (
            {**REUSED, "training": {"features": True}, "rollouts": {"refresh": "always"}},
            "not supported with rollouts.refresh=always",
        ),
    ],
)
def test_settings_without_features_to_use_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        tiny(**changes)
