"""The examples run unmodified, in a process of their own."""

import os
import runpy
import sys

import pyarrow.parquet as pq
import torch

from cropi_core.artifacts import Store
from cropi_core.importing.artifacts import import_artifact
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import base_checkpoint, build
from data_schemas import Sampling
from tests.support import processes
from tests.support.paths import CHECKOUT
from tests.support.rollouts import run

ROOT = CHECKOUT


def test_own_rollouts(tmp_path):
    families = {"pool": {"reverse": 24, "sort": 8, "noise": 8}, "validation": {"reverse": 16}}
    for name, counts in families.items():
        write_prompts(build(counts, name, 0), tmp_path / f"{name}.parquet")
        run(tmp_path / name, tmp_path / f"{name}.parquet", shard=64)
    arguments = [base_checkpoint(), tmp_path / "pool", tmp_path / "validation", tmp_path / "out"]
    done = processes.run(
        [sys.executable, ROOT / "examples" / "own_rollouts.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    chosen = pq.read_table(tmp_path / "out" / "selection.parquet", filters=[("selected", "=", True)])
    assert chosen.num_rows == 4
    assert all(name in done.stdout for name in chosen["prompt_id"].to_pylist())
    assert sum(name.startswith("reverse") for name in chosen["prompt_id"].to_pylist()) >= 3


def test_a_batch_of_verl_is_imported_with_its_mask(tmp_path):
    """The batch has verl's field names and padding: prompts on the left, responses on the right."""
    example = runpy.run_path(str(ROOT / "examples" / "verl_rollouts.py"))
    batch = {
        "prompts": torch.tensor([[0, 5, 6], [0, 5, 6]]),
        "responses": torch.tensor([[7, 8, 9, 2, 0], [7, 8, 9, 10, 11]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]]),
        "response_mask": torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "rollout_log_probs": torch.full((2, 5), -0.5),
        "token_level_scores": torch.tensor([[0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0]]),
    }
    rows = example["rollout_rows"](batch, ["p", "p"], lambda ids: " ".join(map(str, ids)))
    example["append"](tmp_path / "rollouts.jsonl", rows)
    store = Store(tmp_path / "root")
    sampling = Sampling(samples=2, max_new_tokens=3)  # of the policy's tokens
    ref = import_artifact(store, "rollouts", tmp_path / "rollouts.jsonl", policy="unknown", sampling=sampling)
    first, second = read_rollouts(store.directory(ref.key) / "parts").to_pylist()
    assert (first["prompt_ids"], first["completion_ids"]) == ([5, 6], [7, 8, 9, 2])
    assert first["completion_mask"] == [True, False, True, True]
    assert first["behavior_logprobs"] == [-0.5, 0.0, -0.5, -0.5]
    assert (second["completion_ids"], second["completion_mask"]) == ([7, 8, 9], [True] * 3)
    assert [row["reward"] for row in (first, second)] == [1.0, 0.0]
    assert [row["finish_reason"] for row in (first, second)] == ["stop", "length"]
