"""Numbers of samples by source: each prompt gets those of its source, and they are those of a plain collection."""

from collections import Counter

import pytest
from pydantic import ValidationError

from cropi_core.config import load_config
from cropi_core.errors import ConfigError
from cropi_core.evaluation.accuracy import EvaluationFiles, evaluate
from cropi_core.policy.checkpoint import Checkpoint
from cropi_core.progress import Progress
from cropi_core.prompts.loading import write_prompts
from cropi_core.rollouts.table import read_rollouts
from cropi_core.world import base_checkpoint, build
from data_schemas.evaluation import Evaluation
from data_schemas.grading import Grading
from data_schemas.rollouts import Rollouts, Sampling
from data_schemas.runtime import Runtime
from data_schemas.steps import RolloutsSettings
from tests.support.rollouts import run

PLAIN = Sampling(samples=2, max_new_tokens=8)
MORE = {"copy": 5, "add3": 1}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    write_prompts(build({"reverse": 6, "copy": 5, "add3": 5}, "pool", 0), path)
    return path


@pytest.fixture(scope="module")
def collected(prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("by_source") / "r"
    return out, run(out, prompts, sampling=PLAIN, by_source=MORE)


def test_each_prompt_has_the_samples_of_its_source(prompts, collected, tmp_path):
    out, summary = collected
    rows = read_rollouts(out).to_pylist()
    counts = Counter(row["prompt_id"] for row in rows)
    assert {name.split("-")[0]: count for name, count in counts.items()} == {
        "reverse": 2,
        "copy": 5,
        "add3": 1,
    }
    assert summary["samples_by_source"] == MORE
    assert summary["completions"] == 6 * 2 + 5 * 5 + 5
    run(tmp_path / "plain", prompts, sampling=PLAIN.model_copy(update={"samples": 5}))
    plain = {(r["prompt_id"], r["sample"]): r for r in read_rollouts(tmp_path / "plain").to_pylist()}
    for row in rows:
        other = plain[row["prompt_id"], row["sample"]]
        assert row["completion_ids"] == other["completion_ids"]
        assert row["reward"] == other["reward"]
    assert list(counts) == list(dict.fromkeys(name for name, _ in plain))
    assert not out.with_name("r.passes").exists()


def test_an_interruption_changes_no_byte(prompts, collected, tmp_path):
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", prompts, sampling=PLAIN, by_source=MORE, report=stop)
    run(tmp_path / "r", prompts, sampling=PLAIN, by_source=MORE)
    for part in sorted(collected[0].glob("part-*")):
        assert (tmp_path / "r" / part.name).read_bytes() == part.read_bytes()


def test_parts_of_another_number_are_refused(prompts, collected):
    with pytest.raises(ConfigError, match="its number of samples depends on the source"):
        run(collected[0], prompts, sampling=PLAIN)
    with pytest.raises(ConfigError, match="its samples_by_source is"):
        run(collected[0], prompts, sampling=PLAIN, by_source={"copy": 3})


def test_an_evaluation_samples_by_source(prompts, tmp_path):
    def measure(**changes):
        files = EvaluationFiles(
            completions=tmp_path / "completions.parquet",
            accuracy=tmp_path / "accuracy.json",
            scratch=tmp_path / ".scratch",
        )
        return evaluate(
            policy=Checkpoint(base_checkpoint(), digest="0" * 64),
            sets={"mixed": prompts},
            files=files,
            settings=Evaluation(sampling=PLAIN, **changes),
            grading=Grading(),
            runtime=Runtime(device="cpu", threads=1),
        )

    summary = measure(samples_by_source={"copy": 4}, pass_at=(1, 4))
    assert summary["completions"] == 11 * 2 + 5 * 4
    assert summary["accuracy"]["mixed"]["pass_at"]["4"]["prompts"] == 5
    with pytest.raises(ConfigError, match="names the source 'nothing', which no prompt has"):
        measure(samples_by_source={"nothing": 4})


def test_contradictions_and_keys():
    with pytest.raises(ConfigError, match="both decide how often a prompt is sampled"):
        load_config(
            "demo",
            ["rollouts.passes={first: 2}", "rollouts.samples_by_source={copy: 4}", "rollouts.pool.samples=8"],
        )
    with pytest.raises(ConfigError, match=r"samples_by_source.copy=1 is below objective.min_gradable"):
        load_config("demo", ["rollouts.samples_by_source={copy: 1}"])
    with pytest.raises(ValidationError):
        Rollouts(samples_by_source={"copy": 0})
    settings = RolloutsSettings(dtype="float32", grading={}, sampling=PLAIN, seed=0, shard_prompts=8)
    assert "samples_by_source" not in settings.for_key()
    assert "samples_by_source" not in Rollouts().for_key() | Evaluation().for_key()
