"""Presets and mappings: files in the layouts of datasets and trainers, read by naming only the layout."""

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from cropi_core.curriculum.slots import source_settings
from cropi_core.errors import DataError
from cropi_core.prompts.loading import load_source
from data_schemas.data import Columns, Source, TableSource, WorldSource
from data_schemas.presets import PRESETS, PresetName
from data_schemas.steps import StepSpec

GSM8K = Path(os.environ.get("CROPI_GSM8K", "gsm8k"))
"""Directory with the dataset's `train.jsonl` and `test.jsonl`."""
USER = [{"role": "user", "content": "What is 2 + 3?"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 2 + 4?"},
]


def verl_row(number, prompt=None, **extra):
    """Return a row as verl's preprocessing of GSM8K writes it."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": prompt or [{"role": "user", "content": f"What is {number} + 1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"split": "train", "index": number, **extra},
    }


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, **settings):
    source = TypeAdapter(Source).validate_python({"kind": "file", "path": str(path), **settings})
    table, dropped = load_source(source, "pool", None)
    return table.to_pylist(), dropped


def test_every_preset_has_a_name_and_fills_in_a_source_that_holds():
    assert set(get_args(PresetName)) == set(PRESETS)
    for name, preset in PRESETS.items():
        hub = {"path": "me/mine"} if not preset.hub else {}
        source = TableSource.model_validate({"kind": "hub", "preset": name, **hub})
        assert source.columns is not None
        assert source == TableSource.model_validate(source.model_dump(mode="json"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("preset", "row", "wanted"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
            ("How many?", "42", None, "gsm8k"),
        ),
        (
            "math",
            {
                "problem": "Compute $x$.",
                "level": "Level 5",
                "type": "Algebra",
                "solution": "First $\\boxed{1}$, then $\\boxed{\\frac{1}{\\sqrt{2}}}$.",
            },
            ("Compute $x$.", "\\frac{1}{\\sqrt{2}}", "Level 5", "math"),
        ),
        (
            "math_500",
            {
                "problem": "Convert $(0,3)$.",
                "solution": "\\boxed{x}",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            },
            ("Convert $(0,3)$.", "\\left( 3, \\frac{\\pi}{2} \\right)", "2", "math_500"),
        ),
        ("deepscaler", {"problem": "P", "answer": "-1", "solution": "S"}, ("P", "-1", None, "deepscaler")),
        (
            "dapo_17k",
            {
                "prompt": "In triangle $ABC$",
                "solution": "34",
                "data_source": "math_dapo",
                "source_prompt": [{"content": "Solve the following", "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a9b6eb4"},
            },
            ("In triangle $ABC$", "34", None, "dapo_17k"),
        ),
        ("verl", verl_row(4), ("What is 4 + 1?", "5", None, "openai/gsm8k")),
        ("openrlhf", {"input": "2+2?", "label": "4", "datasource": "d"}, ("2+2?", "4", None, "file")),
        ("openrlhf", {"context_messages": USER, "answer": "5"}, ("What is 2 + 3?", "5", None, "file")),
        ("trl", {"prompt": "2+2?", "answer": "4"}, ("2+2?", "4", None, "file")),
        ("trl", {"prompt": USER, "solution": "5"}, ("What is 2 + 3?", "5", None, "file")),
    ],
)
def test_a_layout_is_read_by_its_preset(tmp_path, preset, row, wanted, suffix):
    (prompt,), _ = load(write(tmp_path / f"a.{suffix}", [row]), preset=preset)
    assert (prompt["messages"][-1]["content"], prompt["answer"], prompt["level"], prompt["source"]) == wanted


def test_conversations_keep_their_turns(tmp_path):
    rows, dropped = load(write(tmp_path / "a.parquet", [verl_row(1, CHAT), verl_row(2, CHAT)]), preset="verl")
    assert rows[0]["messages"] == CHAT
    assert rows[0]["tags"] == ["index=1"]
    assert dropped == {"duplicates": 1, "duplicates_with_another_answer": 1}


def test_system_and_template_word_a_conversation(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": CHAT, "answer": "6"}])
    (row,), _ = load(path, preset="trl", system="Think.", template="{prompt} {!}")
    assert [m["content"] for m in row["messages"]] == ["Think.", "What is 2 + 3?", "5", "And 2 + 4? {!}"]
    assert row["prompt_id"] == load(path, preset="trl")[0][0]["prompt_id"]


def test_a_prompt_is_the_same_as_a_text_and_as_a_turn(tmp_path):
    rows = [{"prompt": "What is  2 + 3?", "solution": "5"}]
    text, _ = load(write(tmp_path / "a.jsonl", rows), preset="trl")
    turn, _ = load(write(tmp_path / "b.jsonl", [{"prompt": USER, "solution": "5"}]), preset="trl")
    assert text[0]["prompt_id"] == turn[0]["prompt_id"]


def test_a_sequence_of_structs_is_read_as_messages(tmp_path):
    """`datasets` stores `sequence: {role, content}` as a struct of lists."""
    row = verl_row(1, {"role": ["system", "user"], "content": ["s", "u"]})
    rows, _ = load(write(tmp_path / "a.parquet", [row]), preset="verl")
    assert rows[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_a_flattened_table_has_the_path_for_a_name(tmp_path):
    row = {"prompt": "p", "reward_model.ground_truth": "1", "data_source": "d", "extra_info.index": 7}
    rows, _ = load(write(tmp_path / "a.jsonl", [row]), preset="verl")
    assert (rows[0]["answer"], rows[0]["tags"]) == ("1", ["index=7"])


def test_explicit_settings_override_the_preset(tmp_path):
    row = {"question": "q", "gold": "7", "hard": 3}
    rows, _ = load(
        write(tmp_path / "a.jsonl", [row]),
        preset="gsm8k",
        columns={"answer": "gold", "level": "hard"},
        answer_pattern=None,
        source="mine",
    )
    assert (rows[0]["answer"], rows[0]["level"], rows[0]["source"]) == ("7", "3", "mine")
    python = TableSource(kind="file", path="x", preset="gsm8k", columns=Columns(level="hard"))
    assert python.columns == Columns(level="hard")
    assert TableSource(kind="hub", path="my/copy", preset="gsm8k").subset is None


def test_a_preset_that_does_not_fit_lists_the_missing_columns(tmp_path):
    with pytest.raises(DataError) as raised:
        load(write(tmp_path / "a.jsonl", [verl_row(1)]), preset="trl")
    said = str(raised.value)
    assert "'solution' or 'answer' or 'ground_truth' (columns.answer) is missing" in said
    assert "reward_model.ground_truth" in said
    with pytest.raises(ValidationError, match="path"):
        TableSource.model_validate({"kind": "file", "preset": "gsm8k"})
    with pytest.raises(ValidationError, match="preset"):
        TableSource.model_validate({"kind": "hub", "preset": "gsm9k"})


def test_rows_without_an_answer_are_refused_or_counted(tmp_path):
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""}, {"problem": "c", "answer": None}]
    path = write(tmp_path / "a.jsonl", rows)
    kept, dropped = load(path, preset="deepscaler")
    assert len(kept) == 1
    assert dropped["unanswered"] == 2
    with pytest.raises(DataError, match=r"answer is empty \(row 2\)"):
        load(path, preset="deepscaler", unanswered="refuse")
    with pytest.raises(DataError, match="no row with an answer"):
        load(write(tmp_path / "b.jsonl", rows[1:]), preset="deepscaler")
    with pytest.raises(DataError, match="float, not a string"):
        load(write(tmp_path / "c.jsonl", [{"problem": "a", "answer": 1.5}]), preset="deepscaler")


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "not a string"),
        ([{"role": "tool", "content": "x"}], "the role 'tool'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "ends with"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "type 'image'"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls in addition to role and content"),
        (["a"], "not a string"),
    ],
)
def test_conversations_that_cannot_be_prompts_are_refused(tmp_path, messages, word):
    with pytest.raises(DataError) as raised:
        load(write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "1"}]), preset="trl")
    assert word in str(raised.value)
    assert "(row 1)" in str(raised.value)


def test_a_preset_has_the_key_of_its_fields_written_out_and_older_keys_hold():
    def key(source):
        settings = source_settings(source, "pool")[0].for_key()
        return StepSpec(step="prompts", slot="prompts/pool", settings=settings, runtime={}).key

    short = TableSource.model_validate({"kind": "hub", "preset": "gsm8k", "limit": 96})
    long = TableSource(
        kind="hub",
        path="openai/gsm8k",
        subset="main",
        columns=Columns(),
        answer_pattern="####\\s*(.+)",
        source="gsm8k",
        limit=96,
    )
    # Computed before presets existed.
    assert key(short) == key(long) == "prompts-v1-56b956a31cb43f03"
    assert key(TableSource(kind="hub", path="a/b")) == "prompts-v1-3756123f5ba83e53"
    assert key(WorldSource(families={"sort": 5})) == "prompts-v1-101bb68176bb9b6b"


def test_the_same_rows_are_the_same_prompts_in_every_file_format(tmp_path):
    rows = [{"question": f'Say "{n}", née\nor', "answer": f"#### {n}"} for n in range(5)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {
        "a.csv": text.getvalue().encode(),
        "b.csv": b"\xef\xbb\xbf" + text.getvalue().encode(),
        "a.csv.gz": gzip.compress(text.getvalue().encode()),
        "a.jsonl": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.json": json.dumps(rows).encode(),
    }
    found = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found.append(load(tmp_path / name, preset="gsm8k"))
    found.append(load(write(tmp_path / "a.parquet", rows), preset="gsm8k"))
    assert len(found[0][0]) == 5
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.csv", b"question,answer\na,1\nb\nc,2,3\n", "rows 2, 3"),
        ("a.csv", b"question,question\na,1\n", "each column once"),
        ("a.csv", b'question,answer\n"a" b,1\n', "line 2"),
        ("a.csv.gz", b"no gzip", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"question,answer\na,1\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.csv", b"question,answer\n\xff,1\n", "UTF-8"),
        ("a.json", b'{"question": 1}', "not a JSON list"),
        ("a.json", b"[1]", "no list of objects"),
        ("a.json", b"[" * 100_000, "not a JSON list"),
    ],
)
def test_broken_files_say_where(tmp_path, name, data, word):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=word):
        load(tmp_path / name, preset="gsm8k")


def test_a_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cropi_core.artifacts.bounded.MOST_TEXT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 2000))
    with pytest.raises(DataError, match="more than"):
        load(tmp_path / "a.jsonl.gz", preset="gsm8k")


@pytest.mark.shared
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's files are not here")
def test_gsm8k_itself_is_read_by_its_preset():
    for path in (GSM8K / "train.jsonl", GSM8K / "test.jsonl"):
        rows, dropped = load(path, preset="gsm8k")
        assert len(rows) == len(path.read_text(encoding="utf-8").splitlines())
        assert dropped["duplicates"] == 0
        assert all(row["answer"].replace(",", "").lstrip("-").replace(".", "").isdigit() for row in rows)
