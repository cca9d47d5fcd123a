"""Prompts in the formats of other trainers, and back: TRL, verl, OpenRLHF, verifiers, NeMo Gym, a hub dataset.

    files = write_format(rows, Path("chosen"), "verl")
    assert read_format(Path("chosen"), "verl") == rows

Every format carries the fields that it has no place for (id, source, verifier, level, tags) in further fields, which
the trainer passes on or ignores: a file that is read again gives the same prompts. A prompt with several right answers
has the first one in the field that the format's own reward functions read, and all of them in ``answers``.

References, read in 2026-11:
    trl: the page *Dataset formats* of ``huggingface/trl``; its ``accuracy_reward`` reads ``solution``.
    verl: the page *Prepare Data for Post-Training* and ``verl/utils/dataset/rl_dataset.py`` of ``volcengine/verl``.
    openrlhf: ``openrlhf/datasets/prompts_dataset.py``: ``--data.input_key``, ``--data.label_key``, ``datasource``.
    verifiers: version 0.4.0, ``verifiers.v1.Taskset`` and ``TaskData.id``.
    nemo_gym: ``resources_servers/math_with_judge`` of ``NVIDIA-NeMo/Gym``: ``responses_create_params.input``,
        ``question``, ``expected_answer``.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi_core.artifacts import read_jsonl, read_parquet, write_parquet
from cropi_core.errors import ConfigError, DataError, foreign_errors
from cropi_core.prompts.rows import Row, checked_rows
from cropi_core.prompts.taskset import package_files
from data_schemas import ALTERNATIVE, MESSAGE, PromptFormat

FIELDS = ("prompt_id", "source", "messages", "answer", "verifier", "level", "tags")
EVIDENCE = ("rank", "score", "pass_rate")
"""What a selection knows about a prompt; a row may have these fields, and tables keep them as columns."""
STRINGS = pa.list_(pa.string())
PROMPT = pa.list_(MESSAGE)

TRL_SCHEMA = pa.schema(
    [
        ("prompt", PROMPT),
        ("solution", pa.string()),
        ("answers", STRINGS),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("verifier", pa.string()),
        ("level", pa.string()),
        ("tags", STRINGS),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("pass_rate", pa.float32()),
    ]
)
VERL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", PROMPT),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("answers", STRINGS),
                    ("level", pa.string()),
                    ("tags", STRINGS),
                    ("rank", pa.int32()),
                    ("score", pa.float32()),
                    ("pass_rate", pa.float32()),
                ]
            ),
        ),
    ]
)


@dataclass(frozen=True)
class Layout:
    """How a format stores a prompt.

    Attributes:
        file: The file with the prompts, relative to the exported directory.
        encode: A row and its position to the format's record.
        decode: The format's record to a row.
        schema: Schema of a Parquet file; None for JSON lines.
    """

    file: str
    encode: Callable[[Row, int], dict[str, Any]]
    decode: Callable[[dict[str, Any]], Row]
    schema: pa.Schema | None = None


def write_format(rows: Sequence[Row], out: Path, layout: PromptFormat) -> list[Path]:
    """Write prompts, in their order, into a new directory that appears only when it is complete.

    Args:
        rows: Rows of the ``prompts`` format; they may have the fields :data:`EVIDENCE`.
        out: Directory to make; it may exist if it is empty.
        layout: The format.

    Returns:
        The files.

    Raises:
        ConfigError: ``out`` exists and is not an empty directory.
    """
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; nothing is overwritten")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    written = LAYOUTS[layout]
    records = [written.encode(row, index) for index, row in enumerate(rows)]
    target = part / written.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if written.schema is not None:
        write_parquet(pa.Table.from_pylist(records, schema=written.schema), target)
    else:
        target.write_text("".join(_line(record) for record in records), encoding="utf-8")
    if layout == "verifiers":
        for name, text in package_files().items():
            (part / name).write_text(text, encoding="utf-8")
    if out.exists():
        out.rmdir()
    part.rename(out)
    return sorted(path for path in out.rglob("*") if path.is_file())


def read_format(path: Path, layout: PromptFormat) -> list[Row]:
    """Read prompts that :func:`write_format` wrote, from its directory or from the file with the prompts.

    A trainer may have left rows out or reordered them; each remaining row must have all fields of its prompt.

    Raises:
        DataError: The file is missing, or rows have lost their id or another field.
    """
    read = LAYOUTS[layout]
    file = path / read.file if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file} is not a file; format {layout} has its prompts in {read.file}")
    records = read_jsonl(file) if read.schema is None else read_parquet(file).to_pylist()
    rows: list[Row] = []
    for number, record in enumerate(records, 1):
        with foreign_errors(
            f"{file}, row {number} is not of the format {layout} as cropi writes it",
            remedy="Export it again, or read a foreign file with `cropi artifacts import prompts` and its columns",
        ):
            rows.append(read.decode(record))
    if not rows:
        raise DataError(f"{file} holds no prompts")
    return checked_rows(rows, str(file))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _answers(row: Row) -> list[str]:
    return row["answer"].split(ALTERNATIVE)


def _evidence(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in EVIDENCE if row.get(name) is not None}


def _extra_fields(row: Row) -> dict[str, Any]:
    """Return the fields that JSON-lines formats have no place for."""
    kept = {"prompt_id": row["prompt_id"], "verifier": row["verifier"], "answers": _answers(row)}
    return {**kept, "level": row["level"], "tags": row["tags"], **_evidence(row)}


def _row(record: dict[str, Any], messages: Any, source: Any) -> Row:
    """Build a row from a record that has the fields of :func:`_extra_fields`."""
    return {
        "prompt_id": record["prompt_id"],
        "source": source,
        "messages": messages,
        "answer": ALTERNATIVE.join(record["answers"]),
        "verifier": record["verifier"],
        "level": record["level"],
        "tags": record["tags"],
    }


def _to_trl(row: Row, index: int) -> dict[str, Any]:
    return {
        "prompt": row["messages"],
        "solution": _answers(row)[0],
        "source": row["source"],
        **_extra_fields(row),
    }


def trl_record(row: Row) -> dict[str, Any]:
    """Convert a row to a record of the format ``trl``."""
    return _to_trl(row, 0)


def _to_verl(row: Row, index: int) -> dict[str, Any]:
    kept = _extra_fields(row)
    return {
        "data_source": row["source"],
        "prompt": row["messages"],
        "ability": kept.pop("verifier"),
        "reward_model": {"style": "rule", "ground_truth": kept["answers"][0]},
        "extra_info": {"split": "train", "index": index, "id": kept.pop("prompt_id"), **kept},
    }


def _from_verl(record: dict[str, Any]) -> Row:
    extra = record["extra_info"]
    kept = {**extra, "prompt_id": extra["id"], "verifier": record["ability"]}
    return _row(kept, record["prompt"], record["data_source"])


def _to_openrlhf(row: Row, index: int) -> dict[str, Any]:
    label = _answers(row)[0]
    return {"input": row["messages"], "label": label, "datasource": row["source"], **_extra_fields(row)}


def _to_nemo_gym(row: Row, index: int) -> dict[str, Any]:
    return {
        "responses_create_params": {"input": row["messages"]},
        "question": row["messages"][-1]["content"],
        "expected_answer": _answers(row)[0],
        "source": row["source"],
        **_extra_fields(row),
    }


def _to_verifiers(row: Row, index: int) -> dict[str, Any]:
    messages = row["messages"]
    has_system = messages[0]["role"] == "system"
    kept = _extra_fields(row)
    return {
        "id": kept.pop("prompt_id"),
        "system_prompt": messages[0]["content"] if has_system else None,
        "prompt": messages[1:] if has_system else messages,
        "source": row["source"],
        **kept,
    }


def _from_verifiers(record: dict[str, Any]) -> Row:
    system = record["system_prompt"]
    first = [] if system is None else [{"role": "system", "content": system}]
    return _row({**record, "prompt_id": record["id"]}, [*first, *record["prompt"]], record["source"])


LAYOUTS: dict[PromptFormat, Layout] = {
    "trl": Layout("train.parquet", _to_trl, lambda r: _row(r, r["prompt"], r["source"]), TRL_SCHEMA),
    "hf": Layout(
        "data/train-00000-of-00001.parquet",
        _to_trl,
        lambda r: _row(r, r["prompt"], r["source"]),
        TRL_SCHEMA,
    ),
    "verl": Layout("train.parquet", _to_verl, _from_verl, VERL_SCHEMA),
    "openrlhf": Layout("train.jsonl", _to_openrlhf, lambda r: _row(r, r["input"], r["datasource"])),
    "nemo_gym": Layout(
        "train.jsonl",
        _to_nemo_gym,
        lambda r: _row(r, r["responses_create_params"]["input"], r["source"]),
    ),
    "verifiers": Layout("cropi_selection/tasks.jsonl", _to_verifiers, _from_verifiers),
}
