"""TRL's GRPOTrainer trains on a selection, and follows it to the next one."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.keys import content_digest, file_entries
from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import provenance
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.gradients.extract import extract_gradients
from cropi_core.gradients.job import FeatureSettings
from cropi_core.gradients.store import GradientStore
from cropi_core.importing.artifacts import import_artifact
from cropi_core.integrations.trl import InfluenceCallback, selected_dataset
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.runs.records import new_run, save_run
from cropi_core.scores.influence import score
from data_schemas.gradients import Projection
from data_schemas.records import Manifest, SlotRecord
from data_schemas.steps import artifact_key
from data_schemas.tables import SELECTION
from tests.support.models import random_rollouts
from tests.support.tiny import tiny
from tests.support.training import write_policy, write_tables


def publish(store, pool, ids, chosen):
    """Publish a selection of ``chosen``, in this order of ranks, as the step does."""
    key = artifact_key("selection", 1, {"chosen": chosen}, {"prompts": pool})
    work = store.workspace(key)
    rows = [
        {
            "prompt_id": one,
            "selected": one in chosen,
            "rank": chosen.index(one) + 1 if one in chosen else None,
            "score": None,
            "status": "ok",
            "reason": "",
        }
        for one in ids
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTION), work / "selection.parquet")
    entries = file_entries(work)
    fields = {"kind": "selection", "key": key, "digest": content_digest(entries), "step": "selection"}
    fields |= {"inputs": {"prompts": pool}, "settings": {}, "files": entries, "summary": {}, "seconds": 0}
    return store.publish(Manifest(**fields, device="", **provenance()))


@pytest.fixture
def place(tmp_path):
    """A store with a pool of twelve prompts and the tag `chosen` on two selections, one after the other."""
    prompts, _ = write_tables(tmp_path)
    store = Store(tmp_path / "root")
    pool = import_artifact(store, "prompts", prompts)
    ids = pq.read_table(prompts)["prompt_id"].to_pylist()
    first, second = publish(store, pool, ids, ids[4:0:-1]), publish(store, pool, ids, ids[6:10])
    store.tag("chosen", first.key)
    return store, ids, first, second


def test_each_pass_reads_the_selection_that_the_name_means_then(place):
    store, ids, first, second = place
    dataset = selected_dataset("chosen", store.root)
    assert [row["prompt_id"] for row in dataset] == ids[4:0:-1]
    store.tag("chosen", second.key)
    rows = list(dataset)
    assert [row["prompt_id"] for row in rows] == ids[6:10]
    assert set(rows[0]) >= {"prompt", "solution", "answers", "verifier", "rank"}
    assert [row["prompt_id"] for row in selected_dataset(first.key, store.root)] == ids[4:0:-1]


def test_a_run_means_its_newest_selection(place):
    store, ids, first, second = place
    record = new_run(tiny())
    save_run(store, record)
    with pytest.raises(ArtifactError, match="has no selection yet"):
        selected_dataset(record.run, store.root)
    record.slots["selection@1"] = SlotRecord(ref=first, origin="computed")
    save_run(store, record)
    dataset = selected_dataset(record.run, store.root)
    assert next(iter(dataset))["prompt_id"] == ids[4]
    record.slots["selection@2"] = SlotRecord(ref=second, origin="computed")
    save_run(store, record)
    assert next(iter(dataset))["prompt_id"] == ids[6]


def test_another_name_is_refused_at_once(place):
    store = place[0]
    pool = store.manifest(place[2]).inputs["prompts"].key
    with pytest.raises(ArtifactError, match="is not a selection that a run made"):
        selected_dataset(pool, store.root)
    with pytest.raises(ArtifactError):
        selected_dataset("nosuch", store.root)


@pytest.mark.slow
def test_the_trainer_follows_the_selection_and_leaves_features(place, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    store, ids, _, second = place
    seen: list[list[str]] = []

    def correct(completions, solution, prompt_id, **others):
        seen.append(prompt_id)
        if len(seen) == 2:  # the first pass is over with its second batch of two prompts
            store.tag("chosen", second.key)
        return [
            float(text[0]["content"] == one) + i / 8
            for i, (text, one) in enumerate(zip(completions, solution, strict=True))
        ]

    trainer = GRPOTrainer(
        model=str(write_policy(tmp_path / "policy", 0)),
        reward_funcs=correct,
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            num_generations=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_completion_length=4,
            shuffle_dataset=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=selected_dataset("chosen", store.root),
    )
    sketch = Projection(k=64, min_side=4)
    callback = InfluenceCallback(trainer, tmp_path / "features", projection=sketch)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert seen[:2] == [[ids[4], ids[4], ids[3], ids[3]], [ids[2], ids[2], ids[1], ids[1]]]
    assert seen[2:4] == [[ids[6], ids[6], ids[7], ids[7]], [ids[8], ids[8], ids[9], ids[9]]]

    # Its features are scored against a validation set under the trained policy by the public functions.
    summary = callback.write(tmp_path / "trained.zarr", policy=tmp_path / "trained")
    assert (summary["prompts"], summary["groups"], summary["groups_ok"]) == (8, 8, 8)
    rows = pq.read_table(tmp_path / "trained.parquet").to_pylist()
    assert [(row["prompt_id"], row["step"]) for row in rows[:3]] == [(ids[4], 1), (ids[3], 1), (ids[2], 2)]
    assert GradientStore.open(tmp_path / "trained.zarr").column("prompt_id").tolist()[-1] == ids[9]
    extract_gradients(
        policy=Checkpoint(tmp_path / "trained"),
        rollouts=random_rollouts(tmp_path / "goal.parquet", vocabulary=8),
        out=tmp_path / "goal.zarr",
        settings=FeatureSettings(objective=callback.objective, projection=sketch),
    )
    score(
        train=tmp_path / "trained.zarr",
        validation={"goal": tmp_path / "goal.zarr"},
        out=tmp_path / "scores.parquet",
    )
    scored = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert sorted(row["rank"] for row in scored) == list(range(1, 9))

    other = callback.objective.model_copy(update={"loss_type": "grpo"})
    with pytest.raises(ConfigError, match="Make them equal"):
        InfluenceCallback(trainer, tmp_path, objective=other)
