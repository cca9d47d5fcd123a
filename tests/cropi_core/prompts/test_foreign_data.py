"""Tables of other programs: read with their intended meaning, or refused by row with an instruction, never silently."""

import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi_core.artifacts.object_storage import is_address
from cropi_core.curriculum.slots import source_settings
from cropi_core.errors import ConfigError, CropiError, DataError
from cropi_core.prompts.loading import load_source
from cropi_core.rewards.verifier import Verifier
from data_schemas.data import TableSource
from tests.support.paths import CHECKOUT

SHARED = CHECKOUT.parent / "shared" / "cases" / "data"


def load(path, **settings):
    settings = {"columns": {"prompt": "prompt"}, **settings}
    source = TableSource.model_validate({"kind": "file", "path": str(path), **settings})
    table, dropped = load_source(source, "pool", None)
    return table.to_pylist(), dropped


def jsonl(path, rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def asked(prompt, tmp_path, **settings):
    rows, _ = load(jsonl(tmp_path / "p.jsonl", [{"prompt": prompt, "answer": "7"}]), **settings)
    return [(turn["role"], turn["content"]) for turn in rows[0]["messages"]]


USER = [("user", "What is 2+5?")]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ('[{"role": "user", "content": "What is 2+5?"}]', USER),
        ('{"role": "user", "content": "What is 2+5?"}', USER),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+5?"}],
                }
            ],
            USER,
        ),
        ([{"from": "human", "value": "What is 2+5?"}], USER),
        (
            [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "What is 2+5?"},
            ],
            [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), *USER],
        ),
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is 2+5?"}],
            [("system", "Be brief."), *USER],
        ),
        ({"role": ["user"], "content": ["What is 2+5?"]}, USER),
        ([{"role": "user", "content": "What is 2+5?", "tool_calls": [], "name": None}], USER),
        ("[1, 2] and {3}: which is longer?", [("user", "[1, 2] and {3}: which is longer?")]),
    ],
)
def test_a_prompt_is_read_in_each_form_that_people_store_it_in(prompt, turns, tmp_path):
    assert asked(prompt, tmp_path) == turns


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('[{"role": "user", "content": "What is', ["looks like the text of messages", "row 1"]),
        ("[{'role': 'user', 'content': 'What?'}]", ["looks like the text of messages", "row 1"]),
        ({"role": ["user", "assistant"], "content": ["p"]}, ["2 of role", "1 of content", "row 1"]),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            ["image_url", "type text"],
        ),
        ([{"role": "user", "content": "p", "reasoning_content": "hm"}], ["reasoning_content", "lost"]),
        ([{"from": "function_call", "value": "p"}], ["function_call"]),
        ([{"from": ["human"], "value": "p"}], ["from"]),
        ([{"role": ["user"], "content": "p"}], ["role"]),
        ([{"role": "tool", "content": "p"}], ["'tool'"]),
        ([{"role": "user", "content": 7}], ["content is int"]),
        (["p"], ["prompt is list"]),
        ([{"role": "user", "content": "p"}, "q"], ["a turn is str"]),
        ([], ["prompt is list"]),
        (True, ["prompt is bool"]),
        ([{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}], ["assistant"]),
    ],
)
def test_an_ambiguous_prompt_is_refused_by_row(prompt, words, tmp_path):
    with pytest.raises(DataError) as error:
        asked(prompt, tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def answers(path, **settings):
    return [row["answer"] for row in load(path, **settings)[0]]


def test_numbers_and_lists_are_cast_only_on_request(tmp_path):
    values = [7.0, 0.25, 7, "x", 1e21, -0.0]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"p{i}", "answer": v} for i, v in enumerate(values)])
    assert answers(path, casts={"answer": "number"}) == ["7", "0.25", "7", "x", "1" + "0" * 21, "0"]
    with pytest.raises(DataError, match=r"casts\.answer=number takes 18\.0 as 18\) \(rows 1, 2, 5, 6\)"):
        answers(path)
    lists = [["7", "7.0"], [8, 9.0], "x"]
    path = jsonl(tmp_path / "l.jsonl", [{"prompt": f"p{i}", "answer": v} for i, v in enumerate(lists)])
    assert answers(path, casts={"answer": "first"}) == ["7", "8", "x"]
    assert answers(path, casts={"answer": "any_of"}) == ["7\x1e7.0", "8\x1e9", "x"]
    with pytest.raises(
        DataError, match=r"answer is a list; set casts\.answer to first or any_of \(rows 1, 2\)"
    ):
        answers(path)
    for bad in ([], [None], [["7"]], float("nan"), True, None, {"a": 1}):
        path = jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "answer": bad}])
        for cast in ("number", "first", "any_of"):
            with pytest.raises(DataError, match=r"answer.*row 1"):
                answers(path, casts={"answer": cast})


def test_decimals_and_float_levels_are_cast(tmp_path):
    table = pa.table(
        {"prompt": ["a", "b"], "answer": pa.array([Decimal("18.00"), Decimal("0.50")]), "level": [7.0, 0.25]}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    columns = {"prompt": "prompt", "level": "level"}
    rows, _ = load(tmp_path / "p.parquet", columns=columns, casts={"answer": "number", "level": "number"})
    assert [(row["answer"], row["level"]) for row in rows] == [("18", "7"), ("0.5", "0.25")]
    with pytest.raises(DataError, match=r"level is float, not a string \(casts: number\)"):
        load(tmp_path / "p.parquet", columns=columns, casts={"answer": "number"})


def test_any_of_several_answers_is_right():
    with Verifier() as verifier:
        items = [
            ("numeric", "It is 8.", "7\x1e8"),
            ("numeric", "It is 9.", "7\x1e8"),
            ("numeric", "It is 9.", "x\x1e8"),
        ]
        assert [grade.reward for grade in verifier.grade_many(items)] == [1.0, 0.0, None]


def test_boxes_are_found_as_tex_and_math_write_them(tmp_path):
    solutions = {
        r"So $\boxed{\dfrac{1}{2}}$.": r"\dfrac{1}{2}",
        r"So $y=\boxed 2$.": "2",
        r"So $y=\boxed 12$ and no more $x$": "12",
        r"So $z=\fbox{3}$.": "3",
        r"$\framebox{4}$": "4",
        r"thus \boxed 5.": "5",
        r"$\text{so \boxed 6}$": "6",
        r"\[ \boxed\frac12 \]": r"\frac12",
        r"$\boxed{\{1,2\}}$": r"\{1,2\}",
        r"$\boxed{1}$ or $\boxed{2}$.": "2",
    }
    path = jsonl(
        tmp_path / "m.jsonl",
        [{"problem": f"p{i}", "solution": s, "level": "1"} for i, s in enumerate(solutions)],
    )
    rows, dropped = load(path, preset="math", columns={})
    assert [row["answer"] for row in rows] == list(solutions.values())
    assert dropped["kept_with_the_last_of_several_boxes"] == 1


def test_a_bad_row_is_dropped_on_request(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "", "answer": "1"},
        "not json",
        {"prompt": "b", "answer": 2.5},
        '{"prompt": "c", "answer": "1", "answer": "2"}',
        {"prompt": "d \ud83d", "answer": "4"},
        '{"prompt": "e", "answer": ' + "9" * 5000 + "}",
        "",
        {"prompt": "f", "answer": "6"},
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError) as error:
        load(path)
    told = str(error.value)
    for words in (
        "empty (row 2)",
        "not a JSON object (row 3)",
        "(row 4)",
        "'answer' comes more than once (row 5)",
    ):
        assert words in told
    assert "surrogate" in told
    assert "(row 6)" in told
    assert "5000 digits" in told
    assert "(row 7)" in told
    kept, dropped = load(path, on_bad_rows="drop")
    assert [row["answer"] for row in kept] == ["1", "6"]
    assert sum(count for reason, count in dropped.items() if reason.startswith("bad row: ")) == 6
    with pytest.raises(DataError, match="no row with an answer"):
        load(jsonl(tmp_path / "n.jsonl", rows[1:7]), on_bad_rows="drop")


def test_bad_rows_of_the_native_format_are_dropped_on_request(tmp_path):
    good = {
        "prompt_id": "a",
        "source": "s",
        "messages": [{"role": "user", "content": "p"}],
        "answer": "1",
        "verifier": "math",
    }
    path = jsonl(
        tmp_path / "p.jsonl", [good, {**good, "prompt_id": "b", "answer": ""}, {**good, "prompt_id": "c"}]
    )
    kept, dropped = load(path, columns=None, on_bad_rows="drop")
    assert [row["prompt_id"] for row in kept] == ["a", "c"]
    assert dropped == {"bad row: answer is empty": 1}
    with pytest.raises(DataError, match=r"answer is empty \(row 2\)"):
        load(path, columns=None)


def test_names_that_come_twice_are_named(tmp_path):
    struct = pa.StructArray.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["g", "g"])
    pq.write_table(pa.table({"prompt": ["p"], "answer": struct}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"'answer\.g' comes more than once"):
        load(tmp_path / "s.parquet", columns={"prompt": "prompt", "answer": "answer.g"})
    pq.write_table(
        pa.Table.from_arrays([pa.array(["p"])] * 2, names=["prompt", "prompt"]), tmp_path / "c.parquet"
    )
    for columns in ({"prompt": "prompt"}, None):
        with pytest.raises(DataError, match="'prompt' comes more than once"):
            load(tmp_path / "c.parquet", columns=columns)
    (tmp_path / "l.json").write_text(
        '[{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1", "answer": "2"}]'
    )
    with pytest.raises(DataError, match=r"'answer' comes more than once \(row 2\)"):
        load(tmp_path / "l.json")


def test_compressed_and_tab_separated_texts_are_read(tmp_path):
    text = 'prompt\tanswer\n"a ""b"""\t1\nc, d\t2\n'
    (tmp_path / "p.tsv").write_text(text)
    (tmp_path / "p.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "p.tsv.zst").write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    with pa.CompressedOutputStream(str(tmp_path / "q.jsonl.zst"), "zstd") as out:
        out.write(b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}\r\n\r\n{"prompt": "b", "answer": "2"}')
    for name in ("p.tsv", "p.tsv.gz", "p.tsv.zst"):
        rows, _ = load(tmp_path / name)
        assert [row["messages"][0]["content"] for row in rows] == ['a "b"', "c, d"]
    assert answers(tmp_path / "q.jsonl.zst") == ["1", "2"]
    (tmp_path / "bad.jsonl.zst").write_bytes(b"no frame")
    with pytest.raises(DataError, match=r"bad\.jsonl\.zst cannot be read"):
        load(tmp_path / "bad.jsonl.zst")


def test_shards_are_one_table_in_the_order_of_their_names(tmp_path):
    for i in range(3):
        table = pa.table({"prompt": [f"p{i}", f"q{i}"], "answer": [str(i), str(i)]})
        pq.write_table(table, tmp_path / f"train-{i:05d}-of-00003.parquet")
    (tmp_path / "README.md").write_text("about")
    for path in (tmp_path, tmp_path / "train-*.parquet", tmp_path / "*-of-*"):
        assert answers(path) == ["0", "0", "1", "1", "2", "2"]
    settings = [
        source_settings(TableSource(kind="file", path=str(p)), "pool")[0].for_key()
        for p in (tmp_path, tmp_path / "t*.parquet")
    ]
    assert settings[0] == settings[1]
    assert settings[0]["source"]["path"].startswith("sha256:")
    bad = pa.table({"prompt": ["r", ""], "answer": ["1", "1"]})
    pq.write_table(bad, tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(DataError, match=r"prompt is empty \(row train-00001-of-00003.parquet:2\)"):
        load(tmp_path)
    (tmp_path / "train-00001-of-00003.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="several splits: test, train"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks shards 1 of 3"):
        load(tmp_path / "train-*")
    for path in (tmp_path / "none-*.parquet", tmp_path / "**x", tmp_path / "absent.jsonl"):
        with pytest.raises(ConfigError):
            load(path)


def test_repeated_rows_are_counted_as_when_each_is_read(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"p{i % 7}"}], "reward_model": {"ground_truth": str(i % 14)}}
        for i in range(500)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    jsonl(tmp_path / "d.jsonl", rows)
    one = load(tmp_path / "d.parquet", preset="dapo_17k", columns={})
    other = load(tmp_path / "d.jsonl", preset="dapo_17k", columns={})
    assert one == other
    assert len(one[0]) == 7
    assert one[1] == {"duplicates": 493, "duplicates_with_another_answer": 248}


def test_a_value_that_python_cannot_represent_drops_its_row(tmp_path):
    late = pa.array([0, 2**60], pa.timestamp("ms"))
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "answer": ["1", "2"], "when": late}), tmp_path / "p.parquet"
    )
    columns = {"prompt": "prompt", "level": "when"}
    with pytest.raises(DataError, match="row 2"):
        load(tmp_path / "p.parquet", columns=columns)
    assert answers(tmp_path / "p.parquet") == ["1", "2"]  # an unused column costs nothing
    with pytest.raises(DataError, match="row 2"):
        load(tmp_path / "p.parquet", columns=None)


def test_new_settings_leave_keys_as_they_were(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "1"}])
    settings = source_settings(TableSource(kind="file", path=str(path)), "pool")[0].for_key()
    assert not {"casts", "on_bad_rows"} & set(settings["source"])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/cases, which only some machines have")
@pytest.mark.parametrize("name", sorted(p.name for p in SHARED.glob("*")) if SHARED.is_dir() else [])
def test_shared_cases_end_in_a_result_or_one_error(name):
    for settings in (
        {"preset": "trl", "columns": {}},
        {"columns": {"prompt": "problem"}},
        {"preset": "math", "columns": {}},
    ):
        try:
            load(SHARED / name, **settings)
        except CropiError as error:
            assert str(SHARED / name) in str(error)  # noqa: PT017


@pytest.mark.parametrize("root", ["S3://bucket/x", "s3:/bucket/x", "S3:/x"])
def test_an_address_that_is_misspelt_is_no_local_directory(root):
    with pytest.raises(ConfigError, match="two slashes"):
        is_address(root)
    assert is_address("s3://bucket/x")
    assert not is_address("data/x")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"<!DOCTYPE html><html></html>", "is an HTML page"),
        ("a.jsonl", b"<html>\n<body>sign in</body>", "is an HTML page"),
        ("a.jsonl", '{"prompt": "a?"}\n'.encode("utf-16"), "is UTF-16; write it as UTF-8"),
        ("a.jsonl", gzip.compress(b"{}\n", mtime=0), "is compressed by gzip; give it the suffix .gz"),
        ("a.csv", b"PK\x03\x04and more", "is a ZIP archive"),
        ("a.jsonl", b'[{"prompt": "a?", "answer": "1"}]', "holds a JSON list; give it the suffix .json"),
        ("a.csv", b"prompt;answer\na?;1\n", "separates its columns by ';'"),
        ("a.csv", b"Prompt,answer\na?,1\n", "set columns.prompt to 'Prompt'"),
        ("a.csv", b"prompt, answer\na?,1\n", "set columns.answer to ' answer'"),
    ],
)
def test_content_of_another_kind_than_the_name_says_is_refused_with_advice(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CropiError, match=words):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("train.jsonl", "test.jsonl"), True),
        (("gsm8k_train.jsonl", "gsm8k-validation.jsonl"), True),
        (("train_a.jsonl", "train_b.jsonl"), False),
        (("algebra.jsonl", "geometry.jsonl"), False),
        (("test_problems_train.jsonl", "more_train.jsonl"), False),
    ],
)
def test_files_of_several_splits_are_not_mixed(names, refused, tmp_path):
    for name in names:
        jsonl(tmp_path / name, [{"prompt": f"What is {name}?", "answer": "7"}])
    if refused:
        with pytest.raises(ConfigError, match="several splits"):
            load(tmp_path)
    else:
        assert len(load(tmp_path)[0]) == 2
