"""Rollouts that are complete and have no manifest yet: what changes in that time is found when the step resumes."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts import Store
from cropi_core.curriculum import run_curriculum, run_step
from cropi_core.runs import load_run, run_id
from tests.support.tiny import tiny, world

SLOT = "rollouts/pool@1"
PROMPTS = 12


class StopError(Exception):
    """The process ends here."""


def rewarded(path: Path) -> None:
    """Turn the rewards of a part into 1: a valid file with other bytes, as a lost write-back of a journal leaves it."""
    table = pq.read_table(path)
    rewards = pa.array([1.0] * table.num_rows, table.schema.field("reward").type)
    place = table.schema.get_field_index("reward")
    pq.write_table(table.set_column(place, table.schema.field(place), rewards), path, compression="zstd")


def run(root: Path, *, stopped: bool = False) -> str:
    """Run until the rollouts are there, or are complete without a manifest; return their digest."""
    sampling = {"pool": {"samples": 2, "max_new_tokens": 4}, "shard_prompts": 4}
    store, config = Store(root), tiny(stages=1, rollouts=sampling, data={"pool": world(copy=PROMPTS)})

    def execute(spec):
        if SLOT in load_run(store, run_id(config)).slots:
            raise StopError

        def report(progress):
            if stopped and spec.slot == SLOT and progress.done == PROMPTS:
                raise StopError

        return run_step(spec, store, report=report)

    with pytest.raises(StopError):
        run_curriculum(config, store, execute)
    slots = load_run(store, run_id(config)).slots
    return slots[SLOT].ref.digest if SLOT in slots else ""


@pytest.mark.slow
def test_rollouts_that_changed_before_their_manifest_are_sampled_again(tmp_path: Path):
    expected = run(tmp_path / "undisturbed")
    stopped, lost = tmp_path / "stopped", tmp_path / "lost"
    assert run(stopped, stopped=True) == ""
    shutil.copytree(stopped, lost)
    parts = sorted(stopped.glob(".work/rollouts-*/parts/part-*.parquet"))
    assert len(parts) == PROMPTS // 4
    whole = parts[0].stat().st_mtime_ns
    rewarded(parts[1])
    assert run(stopped) == expected
    [kept] = stopped.glob("rollouts/*/parts/part-00000.parquet")
    assert kept.stat().st_mtime_ns == whole, "one part was changed, and one is sampled again"
    assert sorted(path.name for path in kept.parent.parent.iterdir()) == ["manifest.json", "parts"]

    for part in lost.glob(".work/rollouts-*/parts/part-00002.parquet"):
        rewarded(part)
    for sums in lost.glob(".work/rollouts-*/**/parts.sums"):
        shutil.rmtree(sums)
    assert run(lost) == expected, "without checksums everything is sampled again"
