"""Rollouts of the embedded policy for tests."""

import pyarrow as pa

from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.progress import silent
from cropi_core.rollouts.collect import RolloutPlan, sample_rollouts
from cropi_core.world import base_checkpoint
from data_schemas import ROLLOUTS
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime


def run(
    out,
    prompts,
    policy=None,
    rows=64,
    shard=8,
    seed=0,
    sampling=None,
    passes=None,
    report=silent,
    by_source=None,
    grading=None,
):
    return sample_rollouts(
        policy=Checkpoint(policy or base_checkpoint(), digest="d"),
        prompts=prompts,
        out=out,
        plan=RolloutPlan(
            sampling or Sampling(samples=4, max_new_tokens=12),
            seed,
            shard,
            passes=passes,
            by_source=by_source or {},
        ),
        grading=grading or Grading(),
        runtime=Runtime(device="cpu", threads=1, generation_rows=rows),
        report=report,
    )


def table_of(rewards: dict[str, list[float]], sampling: Sampling) -> pa.Table:
    """Make a table of rollouts with these rewards by prompt id; the completions say nothing else."""
    rows = [
        {
            "prompt_id": name,
            "sample": sample,
            "prompt_ids": [1, 2],
            "completion_ids": [3, 4],
            "behavior_logprobs": [-0.5, -0.5],
            "text": "x",
            "reward": float(reward),
            "finish_reason": "stop",
        }
        for name, group in rewards.items()
        for sample, reward in enumerate(group)
    ]
    metadata = {b"cropi.sampling": sampling.model_dump_json().encode(), b"cropi.policy": b"one"}
    return pa.Table.from_pylist(rows, schema=ROLLOUTS.with_metadata(metadata))
