"""Features from the passes of training equal those that the gradients step computes for the same completions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from cropi_core.errors import ConfigError, ProjectionError
from cropi_core.gradients.extract import extract_gradients
from cropi_core.gradients.job import FeatureSettings
from cropi_core.gradients.store import GradientStore
from cropi_core.gradients.trained import gather_passes
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.policy.loading import load_policy
from cropi_core.progress import Progress
from cropi_core.training.features import FeatureCollector
from cropi_core.training.files import FeaturePlan
from cropi_core.training.stage import train
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.runtime import Runtime
from data_schemas.steps import TrainingFeatures
from tests.support.models import random_rollouts, save_tiny
from tests.support.training import arguments_of, digest, run, write_policy, write_tables

LONGEST = 12
SKETCH = Projection(k=256, min_side=8, dtype="float32")


def trainer_on(rollouts: Path, policy: Path, out: Path, **options) -> GRPOTrainer:
    """Build TRL's trainer, which "samples" the stored completions and gets their stored rewards."""
    rows = pq.read_table(rollouts).to_pylist()
    names = list(dict.fromkeys(row["prompt_id"] for row in rows))
    groups = {name: [row for row in rows if row["prompt_id"] == name] for name in names}
    samples = len(groups[names[0]])

    def rollout(prompts, trainer):
        chosen = [groups[name][i % samples] for i, name in enumerate(prompts)]
        return {
            "prompt_ids": [row["prompt_ids"] for row in chosen],
            "completion_ids": [row["completion_ids"] for row in chosen],
            "logprobs": [row["behavior_logprobs"] for row in chosen],
        }

    def reward(prompts, **others):
        return [groups[name][i % samples]["reward"] for i, name in enumerate(prompts)]

    model, tokenizer = load_policy(policy, "float32", "cpu", "eager")
    settings = {
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-2,
        "max_steps": 1,
        "gradient_checkpointing": False,
    }
    arguments = GRPOConfig(
        output_dir=str(out),
        num_generations=samples,
        max_completion_length=LONGEST,
        shuffle_dataset=False,
        disable_dropout=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **(settings | options),
    )
    dataset = Dataset.from_dict({"prompt": names, "prompt_id": names})
    return GRPOTrainer(model, reward, arguments, dataset, processing_class=tokenizer, rollout_func=rollout)


def collected(tmp_path: Path, trainer: GRPOTrainer, projection: Projection, layers="all") -> GradientStore:
    """Train, and return the features that were collected."""
    directory = tmp_path / "passes"
    trainer.add_callback(FeatureCollector(trainer, projection, directory, layers))
    trainer.train()
    gather_passes(
        directory,
        out=tmp_path / "features.zarr",
        table=tmp_path / "features.parquet",
        attributes={},
        dtype="float32",
    )
    return GradientStore.open(tmp_path / "features.zarr")


def extracted(tmp_path: Path, policy: Path, rollouts: Path, objective: Objective, projection, layers="all"):
    settings = FeatureSettings(objective, projection, Gradients(layers=layers), LONGEST)
    out = tmp_path / "extracted.zarr"
    extract_gradients(
        policy=Checkpoint(policy),
        rollouts=rollouts,
        out=out,
        settings=settings,
        runtime=Runtime(device="cpu"),
    )
    return GradientStore.open(out)


def largest_difference(found: GradientStore, expected: GradientStore) -> float:
    """Return the largest distance of two features of a prompt, relative to the feature's norm."""
    place = {name: i for i, name in enumerate(expected.column("prompt_id"))}
    order = [place[name] for name in found.column("prompt_id")]
    theirs, ours = expected.rows(0, expected.n)[order], found.rows(0, found.n)
    norms = np.linalg.norm(theirs, axis=1)
    assert list(found.column("status")) == list(expected.column("status")[order])
    live = found.column("status") == 0
    for name, tolerance in (("norm", 1e-3), ("mean_reward", 1e-6), ("tokens", 0)):
        np.testing.assert_allclose(
            found.column(name)[live], expected.column(name)[order][live], rtol=tolerance, atol=0
        )
    assert not ours[~live].any()
    return float((np.linalg.norm(theirs - ours, axis=1)[live] / norms[live]).max())


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
CASES = [
    ("llama", True, "dapo", {**SPLIT, "gradient_checkpointing": True}, "all"),
    ("qwen3", False, "grpo", SPLIT, "all"),
    ("gemma2", True, "dr_grpo", {}, "all"),
    ("llama", True, "bnpo", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, "head"),
    ("llama", False, "dapo", {}, "last_quarter"),
]


@pytest.mark.parametrize(("kind", "tie", "loss_type", "options", "layers"), CASES)
def test_the_first_step_gives_the_features_of_the_gradients_step(
    tmp_path, kind, tie, loss_type, options, layers
):
    """For micro-batches that split groups, padding, a completion without a reward and a group with one reward."""
    policy = save_tiny(tmp_path / "policy", kind, tie=tie)
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=4, dead=(2,), ungraded=((1, 3),))
    trainer = trainer_on(rollouts, policy, tmp_path / "out", loss_type=loss_type, **options)
    found = collected(tmp_path, trainer, SKETCH, layers)
    objective = Objective(loss_type=loss_type, ratio="none")
    expected = extracted(tmp_path, policy, rollouts, objective, SKETCH, layers)
    assert largest_difference(found, expected) < 2e-5


def test_steps_of_several_passes_and_groups_over_several_steps(tmp_path):
    """Every pass over a generation batch gives a row a group, of the policy at its beginning."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=4)
    options = {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 4}
    trainer = trainer_on(rollouts, policy, tmp_path / "out", max_steps=8, loss_type="grpo", **options)
    store = collected(tmp_path, trainer, SKETCH)
    rows = pq.read_table(tmp_path / "features.parquet").to_pylist()
    assert [(row["step"], row["policy_step"]) for row in rows] == [(4, 0)] * 4 + [(8, 4)] * 4
    assert all(row["cosine"] is None for row in rows[:4])
    assert all(-1 < row["cosine"] < 1 for row in rows[4:])
    assert (store.column("ess") < 4).all()
    assert (store.column("max_ratio") > 1).all()


def test_what_cannot_be_followed_is_refused_by_name(tmp_path):
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=2)
    policy = save_tiny(tmp_path / "policy")
    trainer = trainer_on(rollouts, policy, tmp_path / "out", entropy_coef=0.1)
    with pytest.raises(ConfigError, match="an entropy bonus"):
        FeatureCollector(trainer, SKETCH, tmp_path)
    positions = trainer_on(rollouts, save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "out")
    with pytest.raises(ProjectionError, match="is not that of single prompts"):
        collected(tmp_path, positions, SKETCH)


def test_an_interrupted_stage_leaves_the_features_of_an_uninterrupted_one(tmp_path):
    """And the policy of a stage without features, to the byte."""
    write_policy(tmp_path / "policy", seed=0)
    write_tables(tmp_path)

    def plan(name: str) -> FeaturePlan:
        settings = TrainingFeatures(projection=Projection(k=64, min_side=4), objective=Objective())
        return FeaturePlan(settings, tmp_path / name / "features.zarr", tmp_path / name / "features.parquet")

    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    summary, whole = run(tmp_path, "whole", features=plan("whole"))
    _, plain = run(tmp_path, "plain")
    arguments = arguments_of(tmp_path, "stopped")
    arguments["files"] = replace(arguments["files"], features=plan("stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(**arguments, report=stop)
    resumed, again = run(tmp_path, "stopped", features=plan("stopped"))
    assert resumed["resumed_from_step"] == 4
    assert digest(again) == digest(whole)
    assert resumed["features"] == summary["features"]
    assert summary["features"]["groups"] == 24
    features = {name for name in digest(whole) if name.startswith("features")}
    assert {name: value for name, value in digest(whole).items() if name not in features} == digest(plain)
    rows = pq.read_table(whole / "features.parquet").to_pylist()
    assert [row["policy_step"] for row in rows] == [row["step"] - 1 for row in rows]
    assert any(row["cosine"] is not None for row in rows)
