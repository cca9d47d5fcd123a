"""Checks of tables written by other programs before they enter the store: rollouts, scores, selections.

Every check covers the whole table; all faults are reported together, each with its first few rows.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cropi_core.artifacts import Faults, check_suffix, read_jsonl, read_parquet
from cropi_core.errors import recorded_errors
from data_schemas import SCORE_FIXED, SELECTION, STATUSES, rollouts_schema, scores_schema

pc: Any = pyarrow.compute  # its functions are created at import time, so type checkers do not see them
LOGPROB_SLACK = 1e-3
"""Tolerance above zero: a half-precision softmax gives certain tokens a slightly positive log-probability."""

Columns = Mapping[str, Any]  # name to a list of Python values (JSONL) or an Arrow column (Parquet)


def read_columns(path: Path) -> tuple[Columns, dict[bytes, bytes]]:
    """Read a Parquet or JSONL file by columns, with the Parquet file's metadata.

    Raises:
        ConfigError: The file does not exist, or has another suffix.
        DataError: It cannot be read.
    """
    if check_suffix(path) == "jsonl":
        rows = read_jsonl(path)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}, {}
    table = read_parquet(path)
    return {name: table[name] for name in table.column_names}, table.schema.metadata or {}


def conform(columns: Columns, schema: pa.Schema, defaults: Mapping[str, Any], faults: Faults) -> pa.Table:
    """Build a table of ``schema``, and record what does not fit.

    Args:
        columns: Input columns.
        schema: Target schema.
        defaults: Columns that may be omitted, with their default values.
        faults: Collects missing and unknown columns, wrong types and nulls; checked before returning.
    """
    for name in columns:
        if name not in schema.names:
            faults.add(f"column {name!r} is unknown; the columns are {', '.join(schema.names)}")
    count = len(next(iter(columns.values()), []))
    if count == 0:
        faults.add("there are no rows")
    arrays = []
    for field in schema:
        if field.name in columns:
            arrays.append(_column(columns[field.name], field, faults))
            continue
        if field.name not in defaults:
            faults.add(f"column {field.name!r} is missing")
        arrays.append(pa.array([defaults.get(field.name)] * count, field.type))
    faults.check()
    return pa.table(arrays, schema=schema)


def _column(values: Any, field: pa.Field, faults: Faults) -> pa.Array:
    """Convert one column, or record why it cannot be converted; nothing is rounded, parsed or truncated."""
    empty = pa.nulls(len(values), field.type)
    if isinstance(values, list):
        wrong = [i for i, value in enumerate(values, 1) if not _fits(value, field.type)]
        faults.add_rows(f"{field.name} is not of type {field.type}", wrong)
        array = empty if wrong else None
        if (
            array is None
        ):  # an integer can be beyond the type's exact range, a text can hold an unpaired surrogate
            array, wrong = empty, [0]
            with recorded_errors(f"{field.name} does not fit {field.type}", faults.add):
                array, wrong = pa.array(values, field.type), []
    elif not _castable(values.type, field.type):
        faults.add(f"{field.name} is {values.type}, not {field.type}")
        array, wrong = empty, [0]
    else:
        array, wrong = empty, [0]
        with recorded_errors(f"{field.name} is not of type {field.type}", faults.add):
            array, wrong = pc.cast(values, field.type).combine_chunks(), []
    if not wrong and not field.nullable:
        faults.add_rows(f"{field.name} is null", _rows(pc.is_null(array)))
    if not wrong and pa.types.is_list(field.type):
        holes = pc.filter(pc.list_parent_indices(array), pc.is_null(pc.list_flatten(array)))
        faults.add_rows(f"{field.name} holds a null", sorted({i + 1 for i in holes.to_pylist()}))
    return array


def _fits(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if pa.types.is_string(kind):
        return isinstance(value, str)
    if pa.types.is_boolean(kind) or isinstance(value, bool):
        return pa.types.is_boolean(kind) and isinstance(value, bool)
    if pa.types.is_int32(kind):
        return isinstance(value, int) and -(2**31) <= value < 2**31
    if pa.types.is_floating(kind):
        return isinstance(value, int | float)
    if pa.types.is_struct(kind):
        fields = {field.name: field for field in kind}
        return (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(
                _fits(value[n], f.type) and (f.nullable or value[n] is not None) for n, f in fields.items()
            )
        )
    return isinstance(value, list) and all(_fits(item, kind.value_type) for item in value)


def _castable(given: pa.DataType, wanted: pa.DataType) -> bool:
    kinds = pa.types
    if kinds.is_dictionary(given):
        given = given.value_type
    if kinds.is_string(wanted):
        return kinds.is_string(given) or kinds.is_large_string(given) or kinds.is_null(given)
    if kinds.is_integer(wanted):
        return kinds.is_integer(given) or kinds.is_null(given)
    if kinds.is_floating(wanted):
        return kinds.is_integer(given) or kinds.is_floating(given) or kinds.is_null(given)
    if kinds.is_list(wanted):
        lists = kinds.is_list(given) or kinds.is_large_list(given) or kinds.is_fixed_size_list(given)
        return lists and _castable(given.value_type, wanted.value_type)
    return given == wanted


def _rows(mask: Any) -> list[int]:
    """Convert a boolean Arrow array to row numbers counted from 1; null counts as false."""
    array = mask.combine_chunks() if isinstance(mask, pa.ChunkedArray) else mask
    return (np.flatnonzero(array.fill_null(False).to_numpy(zero_copy_only=False)) + 1).tolist()


def check_rollouts(columns: Columns, what: str, max_new_tokens: int) -> pa.Table:
    """Check rollouts and group rows by prompt, in the order in which prompts first appear.

    Raises:
        DataError: The table is invalid; the message has a line for every fault.
    """
    faults = Faults(what)
    table = conform(columns, rollouts_schema(columns), {}, faults)
    lengths = pc.list_value_length(table["completion_ids"])
    faults.add_rows("completion_ids is empty", _rows(pc.equal(lengths, 0)))
    faults.add_rows("prompt_ids is empty", _rows(pc.equal(pc.list_value_length(table["prompt_ids"]), 0)))
    unequal = pc.not_equal(lengths, pc.list_value_length(table["behavior_logprobs"]))
    faults.add_rows("completion_ids and behavior_logprobs differ in length", _rows(unequal))
    sampled = lengths.to_numpy(zero_copy_only=False)
    if "completion_mask" in table.column_names:
        sampled = _check_masks(table["completion_mask"].to_pylist(), sampled, faults)
    faults.add_rows(
        f"completion is longer than sampling.max_new_tokens={max_new_tokens}",
        (np.flatnonzero(sampled > max_new_tokens) + 1).tolist(),
    )
    for name in ("prompt_ids", "completion_ids"):
        _check_items(table, name, "holds a negative token id", lambda v: v < 0, faults)
    _check_items(table, "behavior_logprobs", "is not finite", lambda v: ~np.isfinite(v), faults)
    positive = lambda v: np.isfinite(v) & (v > LOGPROB_SLACK)  # noqa: E731
    _check_items(
        table, "behavior_logprobs", "is positive; logarithms of probabilities are not", positive, faults
    )
    infinite = pc.invert(pc.is_finite(table["reward"]))
    faults.add_rows("reward is NaN or infinite; write null for what is not gradable", _rows(infinite))
    valid = pc.is_in(table["finish_reason"], value_set=pa.array(["stop", "length"]))
    faults.add_rows("finish_reason is neither stop nor length", _rows(pc.invert(valid)))
    faults.add_rows("prompt_id is empty", _rows(pc.equal(table["prompt_id"], "")))
    ids, samples = table["prompt_id"].to_pylist(), table["sample"].to_pylist()
    _check_twice(list(zip(ids, samples, strict=True)), "(prompt_id, sample)", faults)
    faults.check()
    place = {name: i for i, name in enumerate(dict.fromkeys(ids))}
    order = sorted(range(len(ids)), key=lambda i: (place[ids[i]], samples[i]))
    return table.take(pa.array(order, pa.int64()))


def _check_masks(masks: list[list[bool] | None], lengths: np.ndarray, faults: Faults) -> np.ndarray:
    """Record masks that do not fit their completions; return the number of tokens that the policy sampled, (rows,)."""
    rows = list(enumerate(zip(masks, lengths, strict=True), 1))
    unequal = [i for i, (mask, length) in rows if mask is not None and len(mask) != length]
    faults.add_rows("completion_ids and completion_mask differ in length", unequal)
    empty = [i for i, (mask, _) in rows if mask is not None and not any(mask)]
    faults.add_rows("completion_mask marks no token that the policy sampled", empty)
    return np.array([length if mask is None else sum(mask) for _, (mask, length) in rows])


def _check_items(table: pa.Table, name: str, fault: str, wrong: Any, faults: Faults) -> None:
    """Record the rows with at least one wrong item in their list."""
    column = table[name].combine_chunks()
    flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    faults.add_rows(f"{name} {fault}", (np.unique(parents[wrong(flat)]) + 1).tolist())


def _check_twice(values: list[Any], name: str, faults: Faults) -> None:
    earlier: set[Any] = set()
    repeated = []
    for number, value in enumerate(values, 1):
        if value in earlier:
            repeated.append(number)
        earlier.add(value)
    faults.add_rows(f"{name} occurs before", repeated)


def check_scores(columns: Columns, what: str) -> pa.Table:
    """Check scores; only ``prompt_id`` and ``score`` are required, other columns are validation sets.

    A null score means that the prompt has no score. Ranks follow the scores; ties are ordered by ``prompt_id``.

    Raises:
        DataError: The table is invalid; the message has a line for every fault.
    """
    faults = Faults(what)
    sets = [name for name in columns if name not in SCORE_FIXED]
    defaults: dict[str, Any] = {name: None for name in SCORE_FIXED if name not in ("prompt_id", "score")}
    table = conform(columns, scores_schema(sets), {**defaults, "status": ""}, faults)
    ids, scores = table["prompt_id"].to_pylist(), table["score"].to_pylist()
    status = table["status"].to_pylist()
    if "status" not in columns:
        status = ["too_few_gradable" if score is None else "ok" for score in scores]
    _check_twice(ids, "prompt_id", faults)
    for name in ["score", *sets]:
        infinite = pc.invert(pc.is_finite(table[name]))
        faults.add_rows(f"{name} is NaN or infinite; write null for none", _rows(infinite))
    unknown = [i for i, value in enumerate(status, 1) if value not in STATUSES]
    faults.add_rows(f"status is none of {', '.join(STATUSES)}", unknown)
    pairs = enumerate(zip(scores, status, strict=True), 1)
    differ = [i for i, (score, value) in pairs if (score is None) == (value == "ok")]
    faults.add_rows("status ok goes with a score, any other status with null", differ)
    if all(score is None for score in scores):
        faults.add("no prompt has a score")
    faults.check()
    best = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: (-scores[i], ids[i]))
    place = {i: rank for rank, i in enumerate(best, 1)}
    rank = table["rank"].to_pylist()
    if "rank" not in columns:
        rank = [place.get(i) for i in range(len(ids))]
    elif any(a is not None and b is not None and scores[a] < scores[b] for a, b in _neighbours(rank)):
        faults.add("rank does not follow score; remove the column, and it is computed")
    if sorted(r for r in rank if r is not None) != list(range(1, len(best) + 1)):
        faults.add(f"rank does not count 1 to {len(best)} over the prompts with a score")
    faults.check()
    made = {"status": pa.array(status, pa.string()), "rank": pa.array(rank, pa.int32())}
    arrays = [made.get(name, table[name]) for name in table.column_names]
    return pa.table(arrays, schema=table.schema)


def _neighbours(rank: list[int | None]) -> list[tuple[int, int]]:
    order = sorted((r, i) for i, r in enumerate(rank) if r is not None)
    return [(a, b) for (_, a), (_, b) in itertools.pairwise(order)]


def check_selection(columns: Columns, what: str) -> pa.Table:
    """Check a selection; only ``prompt_id`` and ``selected`` are required.

    Raises:
        DataError: The table is invalid; the message has a line for every fault.
    """
    faults = Faults(what)
    defaults = {"rank": None, "score": None, "status": "ok", "reason": "imported"}
    table = conform(columns, SELECTION, defaults, faults)
    _check_twice(table["prompt_id"].to_pylist(), "prompt_id", faults)
    faults.add_rows("score is NaN or infinite", _rows(pc.invert(pc.is_finite(table["score"]))))
    if not pc.any(table["selected"]).as_py():
        faults.add("no prompt is selected")
    faults.check()
    return table
