"""Prompts: what a source returns, what it refuses, and the separation of sets."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_core.errors import ConfigError, DataError
from cropi_core.prompts.loading import (
    check_disjoint,
    check_verifiers,
    load_source,
    read_prompts,
    summarise,
    write_prompts,
)
from data_schemas.data import Columns, TableSource, WorldSource
from data_schemas.tables import PROMPTS


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt(number, **changes):
    row = {
        "prompt_id": f"p{number}",
        "source": "mine",
        "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
        "answer": str(number + 1),
        "verifier": "numeric",
    }
    return row | changes


def questions(count):
    return [{"question": f"What is {n} + 1?", "answer": f"easy\n#### {n + 1}"} for n in range(count)]


def source(path, **settings):
    return TableSource(kind="file", path=str(path), **settings)


def foreign(path, **settings):
    return source(path, columns=Columns(), **settings)


def fault(raised, *words):
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


def test_a_table_in_the_native_format_is_read_unchanged_from_both_file_formats(tmp_path):
    rows = [prompt(1), prompt(2, level="hard", tags=["a"])]
    jsonl, _ = load_source(source(write_jsonl(tmp_path / "a.jsonl", rows)), "pool", None)
    full = [{"level": None, "tags": [], **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(full), tmp_path / "a.parquet")
    parquet, dropped = load_source(source("elsewhere.parquet"), "pool", str(tmp_path / "a.parquet"))
    assert jsonl.schema == PROMPTS
    assert jsonl.equals(parquet)
    assert dropped == {}
    assert jsonl.to_pylist() == full


def test_a_foreign_table_is_mapped(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", questions(3))
    table, dropped = load_source(
        foreign(
            path, answer_pattern=r"#### (.+)", system="Be brief.", template="Q: {prompt} {x}", source="gsm8k"
        ),
        "pool",
        None,
    )
    first = table.to_pylist()[0]
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: What is 0 + 1? {x}"},
    ]
    assert (first["answer"], first["source"], first["verifier"]) == ("1", "gsm8k", "math")
    assert dropped == {"duplicates": 0, "duplicates_with_another_answer": 0}


def test_made_ids_follow_the_text_and_nothing_else(tmp_path):
    rows = questions(5)
    one, _ = load_source(foreign(write_jsonl(tmp_path / "a.jsonl", rows)), "pool", None)
    other, _ = load_source(
        foreign(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), template="! {prompt}"), "test", None
    )
    assert sorted(one["prompt_id"].to_pylist()) == sorted(other["prompt_id"].to_pylist())
    assert len(set(one["prompt_id"].to_pylist())) == 5


def test_duplicates_are_dropped_and_counted_only_when_ids_are_made(tmp_path):
    rows = [*questions(2), {"question": "What is  0 + 1? ", "answer": "9"}, questions(1)[0]]
    path = write_jsonl(tmp_path / "q.jsonl", [{**row, "n": i} for i, row in enumerate(rows)])
    table, dropped = load_source(foreign(path), "pool", None)
    assert table.num_rows == 2
    assert dropped == {"duplicates": 2, "duplicates_with_another_answer": 1}
    table, dropped = load_source(source(path, columns=Columns(prompt_id="n")), "pool", None)
    assert (table["prompt_id"].to_pylist(), dropped) == (["0", "1", "2", "3"], {})


def test_explicit_duplicate_ids_are_named(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"id": "x7", **row} for row in questions(2)])
    with pytest.raises(DataError) as raised:
        load_source(source(path, columns=Columns(prompt_id="id")), "pool", None)
    fault(raised, "not unique", "x7")


def test_every_fault_of_a_foreign_table_is_in_one_error_with_its_rows(tmp_path):
    rows = questions(8)
    rows[1]["answer"] = None
    rows[2]["answer"] = " "
    rows[3]["answer"] = float("nan")
    rows[4]["question"] = ["no"]
    rows[5]["answer"] = "no mark"
    rows[6]["answer"] = 18.0
    rows[7]["answer"] = True
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(DataError) as raised:
        load_source(foreign(path, answer_pattern="#### (.+)"), "pool", None)
    fault(
        raised,
        "answer is null (row 2)",
        "answer is empty (row 3)",
        "answer is NaN, not a string (row 4)",
        "question is list, not a string (row 5)",
        "answer does not match answer_pattern='#### (.+)' (row 6)",
        "answer is float, not a string (casts.answer=number takes 18.0 as 18) (row 7)",
        "answer is bool, not a string (row 8)",
    )


def test_every_fault_of_a_table_in_our_format_is_in_one_error(tmp_path):
    rows = [
        prompt(1),
        prompt(1),
        prompt(2, verifier="sym py"),
        prompt(3, messages=[]),
        prompt(4, messages=[{"role": "tool", "content": "x"}]),
        prompt(5, answer=7),
        prompt(6, tags="a"),
        prompt(7, colour="red"),
        prompt(8, messages=[{"role": "user", "content": "  "}]),
    ]
    with pytest.raises(DataError) as raised:
        load_source(source(write_jsonl(tmp_path / "a.jsonl", rows)), "pool", None)
    fault(raised, "p1", "'sym py'", "row 4", "row 5", "answer is int", "tags", "colour", "row 9")


def test_missing_columns_say_what_there_is(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"problem": "1+1?", "solution": "2"}])
    with pytest.raises(DataError) as raised:
        load_source(foreign(path), "pool", None)
    fault(raised, "'question'", "'answer'", "problem, solution")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"template": "no place"}, "{prompt}"),
        ({"answer_pattern": "("}, "regular expression"),
        ({"answer_pattern": "####"}, "group"),
        ({"limit": 6}, "limit=6"),
        ({"limit": 3, "skip": 3}, "skip=3"),
        ({"skip": 5}, "skip=5"),
    ],
)
def test_settings_that_cannot_be_met_are_configuration_errors(tmp_path, settings, word):
    path = write_jsonl(tmp_path / "q.jsonl", questions(5))
    with pytest.raises(ConfigError) as raised:
        load_source(foreign(path, **settings), "pool", None)
    fault(raised, word)


def test_a_pattern_that_never_ends_is_an_error(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "#### " + "a" * 60 + "b"}]
    with pytest.raises(ConfigError, match=r"takes more than 1 s for a text of 66 characters"):
        load_source(
            foreign(write_jsonl(tmp_path / "q.jsonl", rows), answer_pattern="#### (a|aa)+$"), "pool", None
        )


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [prompt(1)])
    with pytest.raises(ConfigError, match=r"system, template without columns"):
        load_source(source(path, system="x", template="{prompt}!"), "pool", None)


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        load_source(source(tmp_path / "none.jsonl"), "pool", None)
    (tmp_path / "a.xlsx").write_text("question,answer\n")
    with pytest.raises(ConfigError, match=r"\.xlsx"):
        load_source(source(tmp_path / "a.xlsx"), "pool", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="Parquet"):
        load_source(source(tmp_path / "a.parquet"), "pool", None)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a":\n\n[1]\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows 2, 4"):
        load_source(source(tmp_path / "a.jsonl"), "pool", None)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        load_source(source(tmp_path / "b.jsonl"), "pool", None)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), seed=st.integers(0, 5), cut=st.integers(1, 11))
def test_draws_are_disjoint_complete_and_independent_of_the_order_of_the_file(
    tmp_path_factory, order, seed, cut
):
    rows = questions(12)
    path = write_jsonl(tmp_path_factory.mktemp("draw") / "q.jsonl", [rows[i] for i in order])
    head, _ = load_source(foreign(path, limit=cut, sample_seed=seed), "pool", None)
    # Another template and system message do not change the draw.
    tail, _ = load_source(
        foreign(path, skip=cut, sample_seed=seed, system="s", template="T {prompt}"), "test", None
    )
    straight = write_jsonl(path.with_name("straight.jsonl"), rows)
    again, _ = load_source(foreign(straight, limit=cut, sample_seed=seed), "pool", None)
    ids = head["prompt_id"].to_pylist()
    assert ids == again["prompt_id"].to_pylist()
    assert head.num_rows == cut
    assert len({*ids, *tail["prompt_id"].to_pylist()}) == 12


def test_equal_tables_are_equal_bytes_without_leftover_files(tmp_path):
    table, _ = load_source(foreign(write_jsonl(tmp_path / "q.jsonl", questions(9))), "pool", None)
    chunked = pa.concat_tables([table.slice(0, 4), table.slice(4)]).replace_schema_metadata({"a": "b"})
    write_prompts(table, tmp_path / "out" / "a.parquet")
    write_prompts(chunked, tmp_path / "out" / "b.parquet")
    assert (tmp_path / "out/a.parquet").read_bytes() == (tmp_path / "out/b.parquet").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.parquet", "b.parquet"]
    assert read_prompts(tmp_path / "out/a.parquet").equals(table)


def test_what_is_no_prompts_table_is_not_read_as_one(tmp_path):
    pq.write_table(pa.table({"prompt_id": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'messages' is missing"):
        read_prompts(tmp_path / "a.parquet")


def test_the_world_gives_its_prompts():
    table, dropped = load_source(WorldSource(families={"sort": 5, "copy": 3}), "pool", None)
    assert table.schema == PROMPTS
    assert summarise(table)["prompts"] == 8
    assert summarise(table)["by_source"] == {"copy": 3, "sort": 5}
    assert dropped == {}


def test_sets_that_share_a_prompt_are_named_with_its_ids(tmp_path):
    """Estimator mistake 15: the set that selected the data was also used for evaluation."""
    spaced = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 2  + 1?\n"}]
    contents = {
        "pool": [prompt(1), prompt(2), prompt(3)],
        "math": [prompt(20), prompt(9, prompt_id="other", messages=spaced)],
        "held_out": [prompt(3), prompt(30)],
    }
    paths = {}
    for name, rows in contents.items():
        table, _ = load_source(source(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "pool", None)
        paths[name] = tmp_path / name
        write_prompts(table, paths[name] / "prompts.parquet")
    with pytest.raises(DataError) as raised:
        check_disjoint(paths)
    fault(raised, "pool and math share 1", "p2 = other", "pool and held_out share 1", "p3 = p3")
    check_disjoint({"math": paths["math"], "held_out": paths["held_out"] / "prompts.parquet"})


def test_an_unavailable_hub_dataset_is_refused_with_advice(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as raised:
        load_source(TableSource(kind="hub", path="nobody/nothing-at-all", columns=Columns()), "pool", None)
    fault(raised, "nobody/nothing-at-all", "kind: file")


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install"):
        load_source(TableSource(kind="hub", path="a/b", columns=Columns()), "pool", None)


def test_a_hub_dataset_is_mapped_like_a_file(tmp_path, monkeypatch):
    """A local directory of data files is read by the same loader as a hub id."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "GSM-8k").mkdir()
    write_jsonl(tmp_path / "GSM-8k" / "train.jsonl", questions(6))
    hub = TableSource(
        kind="hub", path=str(tmp_path / "GSM-8k"), columns=Columns(), answer_pattern="#### (.+)", limit=4
    )
    table, _ = load_source(hub, "pool", None)
    assert table.num_rows == 4
    assert set(table["source"].to_pylist()) == {"gsm_8k"}


def test_prompts_that_nothing_can_grade_are_named_before_anything_is_sampled(tmp_path):
    for name, verifiers in {"pool": ["exact", "magic"], "v": ["mine"]}.items():
        rows = [prompt(i, verifier=verifier) for i, verifier in enumerate(verifiers)]
        write_prompts(
            load_source(source(write_jsonl(tmp_path / "a.jsonl", rows)), name, None)[0], tmp_path / name
        )
    sets = {name: tmp_path / name for name in ("pool", "v")}
    with pytest.raises(ConfigError, match="pool: verifier 'magic' is none of exact, mine;"):
        check_verifiers(sets, ["exact", "mine"])
    check_verifiers(sets, ["exact", "mine", "magic"])
