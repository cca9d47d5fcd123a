"""Manifests and tables: versioned, strict, and as light to import as they are promised to be."""

import subprocess
import sys

import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_schemas.records import KINDS, SCHEMA_VERSION, ArtifactRef, RunRecord
from data_schemas.steps import VERSIONS, StepSpec
from data_schemas.tables import EVALUATION, PROMPTS, ROLLOUTS, SCORE_FIXED, SELECTION, STATUSES, scores_schema


def test_schemas_are_light():
    imports = "import sys, data_schemas.config, data_schemas.records, data_schemas.tables"
    script = f"{imports}; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("torch", "transformers", "zarr", "prefect", "cropi_core"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("key", ["prompts-v1-0123456789abcdef", "rollouts-v12-" + "f" * 16])
def test_a_key_names_kind_version_and_hash(key):
    assert ArtifactRef(kind="prompts", key=key, digest="d").key == key


@pytest.mark.parametrize(
    "key", ["prompts", "prompts-1-0123456789abcdef", "../prompts-v1-0123456789abcdef", "x-v1-0123"]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValidationError):
        ArtifactRef(kind="prompts", key=key, digest="d")


def test_records_survive_json_and_refuse_unknown_fields():
    ref = ArtifactRef(kind="policy", key="policy-v1-" + "0" * 16, digest="d")
    spec = StepSpec(step="training", slot="policy@1", settings={"a": [1.5, None]}, inputs={"policy": ref})
    assert StepSpec.model_validate_json(spec.model_dump_json()) == spec
    record = RunRecord(run="r", config={}, started="now")
    assert record.schema_version == SCHEMA_VERSION
    with pytest.raises(ValidationError):
        RunRecord.model_validate(record.model_dump() | {"colour": "red"})


def test_every_step_has_a_version_and_makes_a_kind():
    assert {StepSpec(step=step, slot="", settings={}).kind for step in VERSIONS} == set(KINDS)


def test_table_columns_are_the_promised_ones():
    """These names are read by other people's programs: changing one is a new schema version."""
    assert PROMPTS.names == ["prompt_id", "source", "messages", "answer", "verifier", "level", "tags"]
    assert ROLLOUTS.names == [
        "prompt_id",
        "sample",
        "prompt_ids",
        "completion_ids",
        "behavior_logprobs",
        "text",
        "reward",
        "finish_reason",
    ]
    assert SELECTION.names == ["prompt_id", "selected", "rank", "score", "status", "reason"]
    assert EVALUATION.names == ["set", "prompt_id", "sample", "text", "reward", "finish_reason", "tokens"]
    assert STATUSES == ("ok", "zero_variance", "not_finite", "too_few_gradable")
    table = scores_schema(["gsm8k", "math"])
    assert [n for n in table.names if n not in SCORE_FIXED] == ["gsm8k", "math"]
    assert {n for n in table.names if n in SCORE_FIXED} == set(SCORE_FIXED)
    assert table.field("gsm8k").type == pa.float32()
