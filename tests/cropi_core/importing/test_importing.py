"""Imports: external data is checked row by row, and nothing unsafe is imported."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.store import Store
from cropi_core.errors import ArtifactError, ConfigError, DataError, PolicyError
from cropi_core.importing.artifacts import export_artifact, import_artifact
from cropi_core.rollouts.table import read_rollouts, sampling_of
from cropi_core.world import base_checkpoint
from data_schemas.data import Columns, TableSource
from data_schemas.rollouts import Sampling
from data_schemas.tables import ROLLOUTS, SCORE_FIXED, SELECTION

SAMPLING = Sampling(samples=2, temperature=0.5, top_p=0.9, max_new_tokens=8)
NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def row(prompt="p", sample=0, **changes):
    fields = {
        "prompt_id": prompt,
        "sample": sample,
        "prompt_ids": [1, 2],
        "completion_ids": [3, 4],
        "behavior_logprobs": [-0.5, -1.0],
        "text": "ab",
        "reward": 1.0,
        "finish_reason": "stop",
    }
    return fields | changes


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def parquet(path, rows, **metadata):
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata or None), path)
    return path


def imported(store, path, **options):
    ref = import_artifact(store, "rollouts", path, **({"policy": "unknown", "sampling": SAMPLING} | options))
    return read_rollouts(store.path(ref) / "parts"), ref


GOOD = [row("a", 0), row("b", 0, reward=None), row("a", 1, behavior_logprobs=[0.0, -2.0]), row("b", 1)]


def test_rollouts_are_the_same_from_either_format_and_their_prompts_are_grouped(store, tmp_path):
    one, ref = imported(store, jsonl(tmp_path / "r.jsonl", GOOD))
    other, again = imported(store, parquet(tmp_path / "r.parquet", GOOD))
    assert ref == again
    assert one.schema.equals(ROLLOUTS)
    assert one.equals(other)
    assert list(zip(*one.select(["prompt_id", "sample"]).to_pydict().values(), strict=True)) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    assert sampling_of(one) == SAMPLING
    assert one.schema.metadata[b"cropi.policy"] == b"unknown"
    summary = store.manifest(ref).summary
    assert (summary["prompts"], summary["completions"], summary["not_gradable"]) == (2, 4, 1)


def test_what_the_file_states_needs_no_option_and_admits_no_other(store, tmp_path):
    stated = {"cropi.policy": "abc", "cropi.sampling": SAMPLING.model_dump_json()}
    path = parquet(tmp_path / "r.parquet", GOOD, **stated)
    table, ref = imported(store, path, policy=None, sampling=None)
    assert table.schema.metadata[b"cropi.policy"] == b"abc"
    exported = tmp_path / "out"
    export_artifact(store, ref.key, exported)
    assert imported(store, exported / "parts", policy=None, sampling=None)[1] == ref
    with pytest.raises(ConfigError, match="states policy abc"):
        imported(store, path, policy="xyz", sampling=None)
    with pytest.raises(ConfigError, match="does not state its sampling"):
        imported(store, jsonl(tmp_path / "r.jsonl", GOOD), sampling=None)


def test_every_fault_of_rollouts_is_in_one_error(store, tmp_path):
    rows = [
        row("a", 0, completion_ids=[], behavior_logprobs=[]),
        row("a", 1, behavior_logprobs=[-1.0]),
        row("a", 2, behavior_logprobs=[NAN, -1.0]),
        row("a", 3, behavior_logprobs=[0.5, -1.0]),
        row("a", 4, reward=NAN),
        row("a", 4, finish_reason="eos"),
        row("a", 5, completion_ids=[1] * 9, behavior_logprobs=[-1.0] * 9),
        row("a", 6, completion_ids=[-1, 2]),
        row("", 7, prompt_ids=[]),
        row("a", 8, behavior_logprobs=[float("-inf"), -1.0]),
    ]
    words = (
        "completion_ids is empty (row 1)",
        "differ in length (row 2)",
        "behavior_logprobs is not finite (rows 3, 10)",
        "positive; logarithms of probabilities are not (row 4)",
        "reward is NaN or infinite; write null for what is not gradable (row 5)",
        "(prompt_id, sample) occurs before (row 6)",
        "finish_reason is neither stop nor length (row 6)",
        "longer than sampling.max_new_tokens=8 (row 7)",
        "negative token id (row 8)",
        "prompt_ids is empty (row 9)",
        "prompt_id is empty (row 9)",
    )
    for path in (jsonl(tmp_path / "r.jsonl", rows), parquet(tmp_path / "r.parquet", rows)):
        with pytest.raises(DataError) as raised:
            imported(store, path)
        for word in words:
            assert word in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1 + len(words)
    assert store.keys() == []


def test_types_are_not_bent(store, tmp_path):
    rows = [
        row("a", 1.5),
        row("a", 1, completion_ids=[1.5, 2]),
        row("a", 2, completion_ids="12"),
        row("a", 3, text=7),
        row("a", 4, reward=True),
        row(None, 5),
        row("a", 6, completion_ids=[2**31, 1]),
        row("a", 7, behavior_logprobs=[None, -1.0], extra=1),
    ]
    with pytest.raises(DataError) as raised:
        imported(store, jsonl(tmp_path / "r.jsonl", rows))
    for word in (
        "sample is not of type int32 (row 1)",
        "completion_ids is not of type list<item: int32> (rows 2, 3, 7)",
        "text is not of type string (row 4)",
        "reward is not of type float (row 5)",
        "prompt_id is null (row 6)",
        "'extra' is unknown",
        "behavior_logprobs holds a null (row 8)",
    ):
        assert word in str(raised.value)
    strings = parquet(tmp_path / "r.parquet", [row("a", 0, reward="1", behavior_logprobs=["-1", "-1"])])
    with pytest.raises(DataError, match=r"behavior_logprobs is list.*\n.*reward is string, not float"):
        imported(store, strings)
    with pytest.raises(DataError, match="'finish_reason' is missing"):
        imported(store, jsonl(tmp_path / "s.jsonl", [{"prompt_id": "a"}]))
    with pytest.raises(DataError, match="no rows"):
        imported(store, jsonl(tmp_path / "e.jsonl", []))


def test_scores_need_an_id_and_a_score(store, tmp_path):
    path = jsonl(
        tmp_path / "s.jsonl", [{"prompt_id": p, "score": s} for p, s in (("a", 1), ("b", None), ("c", 2.5))]
    )
    ref = import_artifact(store, "scores", path)
    table = pq.read_table(store.path(ref) / "scores.parquet").to_pydict()
    assert set(table) == set(SCORE_FIXED)
    assert table["rank"] == [2, None, 1]
    assert table["status"] == ["ok", "too_few_gradable", "ok"]
    assert store.manifest(ref).summary == {"prompts": 3, "scored": 2}


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"prompt_id": "a", "score": NAN}], "NaN"),
        ([{"prompt_id": "a", "score": 1}, {"prompt_id": "a", "score": 2}], "occurs before (row 2)"),
        ([{"prompt_id": "a", "score": None}], "no prompt has a score"),
        ([{"prompt_id": "a", "score": 1, "status": "fine"}], "status is none of"),
        ([{"prompt_id": "a", "score": 1, "rank": 2}], "count 1 to 1"),
        (
            [{"prompt_id": "a", "score": 1, "rank": 1}, {"prompt_id": "b", "score": 2, "rank": 2}],
            "does not follow",
        ),
        ([{"prompt_id": "a", "score": 1, "gsm8k": "x"}], "gsm8k is not of type float"),
        ([{"prompt_id": "a"}], "'score' is missing"),
    ],
)
def test_faulty_scores_are_refused(store, tmp_path, rows, word):
    with pytest.raises(DataError) as raised:
        import_artifact(store, "scores", jsonl(tmp_path / "s.jsonl", rows))
    assert word in str(raised.value)


def test_a_selection_needs_an_id_and_a_mark(store, tmp_path):
    rows = [{"prompt_id": "a", "selected": True}, {"prompt_id": "b", "selected": False}]
    ref = import_artifact(store, "selection", jsonl(tmp_path / "s.jsonl", rows))
    table = pq.read_table(store.path(ref) / "selection.parquet")
    assert table.schema.equals(SELECTION)
    assert store.manifest(ref).summary["selected"] == 1
    with pytest.raises(DataError, match=r"selected is not of type bool \(row 1\)"):
        import_artifact(store, "selection", jsonl(tmp_path / "t.jsonl", [{"prompt_id": "a", "selected": 1}]))
    with pytest.raises(DataError, match="no prompt is selected"):
        import_artifact(store, "selection", jsonl(tmp_path / "u.jsonl", rows[1:]))


def test_prompts_are_imported_as_they_are_or_mapped(store, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "2"}])
    with pytest.raises(DataError, match="'messages' is missing"):
        import_artifact(store, "prompts", path)
    ref = import_artifact(store, "prompts", path, source=TableSource(kind="file", path="", columns=Columns()))
    assert store.manifest(ref).summary["prompts"] == 1
    again = import_artifact(store, "prompts", store.path(ref) / "prompts.parquet")
    assert again.digest == ref.digest


def test_a_policy_is_imported_completely(store, tmp_path):
    shutil.copytree(base_checkpoint(), tmp_path / "policy")
    ref = import_artifact(store, "policy", tmp_path / "policy")
    assert (store.path(ref) / "checkpoint" / "model.safetensors").is_file()
    assert store.manifest(ref).summary["parameters"] > 0


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling.py", "model.pt", "deep/state.pkl", "optimizer.PT"]
)
def test_code_and_pickles_do_not_enter(store, tmp_path, name):
    shutil.copytree(base_checkpoint(), tmp_path / "policy")
    (tmp_path / "policy" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "policy" / name).write_bytes(b"x")
    with pytest.raises(PolicyError, match=name):
        import_artifact(store, "policy", tmp_path / "policy")
    assert store.keys() == []


def test_symbolic_links_do_not_enter(store, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").symlink_to(base_checkpoint() / "model.safetensors")
    with pytest.raises(PolicyError, match=r"symbolic links: model\.safetensors"):
        import_artifact(store, "policy", tmp_path / "policy")
    (tmp_path / "link.jsonl").symlink_to(jsonl(tmp_path / "r.jsonl", GOOD))
    with pytest.raises(DataError, match="symbolic link"):
        imported(store, tmp_path / "link.jsonl")


def test_a_refused_import_lists_the_importable_kinds(store, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", GOOD)
    with pytest.raises(ConfigError, match="only prompts, rollouts"):
        import_artifact(store, "gradients", path)
    with pytest.raises(ConfigError, match="does not exist"):
        import_artifact(store, "scores", tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="describe rollouts"):
        import_artifact(store, "scores", path, policy="unknown")
    (tmp_path / "r.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\.pkl"):
        imported(store, tmp_path / "r.pkl")


def test_an_export_is_complete_and_overwrites_nothing(store, tmp_path):
    ref = imported(store, jsonl(tmp_path / "r.jsonl", GOOD))[1]
    export_artifact(store, ref.key, tmp_path / "out")
    assert (tmp_path / "out/parts/part-00000.parquet").read_bytes() == (
        store.path(ref) / "parts/part-00000.parquet"
    ).read_bytes()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_artifact(store, ref.key, tmp_path / "out")
    (store.path(ref) / "parts/part-00000.parquet").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        export_artifact(store, ref.key, tmp_path / "other")
    assert not (tmp_path / "other").exists()
