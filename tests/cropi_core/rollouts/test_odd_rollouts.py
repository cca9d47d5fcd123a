"""Rollouts with one malformed row: it affects only its own prompt or is reported; other prompts are unchanged."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from cropi_core.errors import ConfigError, DataError
from cropi_core.gradients.store import GradientStore
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import base_checkpoint
from data_schemas.gradients import Projection
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import ROLLOUTS


def write(path, prompts=6, **odd):
    """Write two completions per prompt; ``odd`` replaces fields of the third prompt's first row."""
    rows = []
    for prompt in range(prompts):
        for sample in range(2):
            row = {
                "prompt_id": f"p{prompt}",
                "sample": sample,
                "prompt_ids": [1, 5, 6],
                "completion_ids": [10 + sample, 11, 2],
                "behavior_logprobs": [-3.0, -3.0, -3.0],
                "text": "t",
                "reward": float(sample),
                "finish_reason": "stop",
            }
            rows.append({**row, **odd} if (prompt, sample) == (2, 0) else row)
    metadata = {b"cropi.sampling": Sampling(samples=2, max_new_tokens=8).model_dump_json().encode()}
    pq.write_table(pa.Table.from_pylist(rows, schema=ROLLOUTS.with_metadata(metadata)), path)
    return path


def status(rollouts, out):
    extract_gradients(
        policy=Checkpoint(base_checkpoint()),
        rollouts=rollouts,
        out=out,
        settings=FeatureSettings(projection=Projection(k=64)),
        runtime=Runtime(device="cpu", threads=1),
    )
    return GradientStore.open(out).column("status")


def test_an_impossible_log_probability_affects_only_its_own_prompt(tmp_path):
    found = status(
        write(tmp_path / "r.parquet", behavior_logprobs=[-3.0, -9999.0, -3.0]), tmp_path / "g.zarr"
    )
    assert np.flatnonzero(found).tolist() == [2]


def test_rollouts_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a prompt has no tokens \(row 5\)"):
        read_rollouts(write(tmp_path / "e.parquet", prompt_ids=[]))
    with pytest.raises(DataError, match=r"completion_ids of row 5 holds the token 151643"):
        status(write(tmp_path / "v.parquet", completion_ids=[10, 151643, 2]), tmp_path / "v.zarr")
    (tmp_path / "r.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="artifacts import rollouts"):
        read_rollouts(tmp_path / "r.jsonl")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rollouts(tmp_path / "d.parquet")
