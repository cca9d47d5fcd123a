"""Find the files of a table that other programs wrote, and read them in batches of rows.

    for batch in read_batches(Path("shards/"), None, faults):   # a file, a directory or a glob
        for number, count, row in batch.rows(): ...

A batch of a Parquet file contains equal rows once, with their count: a file that repeats 17,000 prompts a hundred times
takes little more time than a file that contains them once.
"""

import gc
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cropi_core.artifacts.parquet import (
    PARQUET,
    SUFFIXES,
    Faults,
    check_field_names,
    jsonl_rows,
    read_csv,
    read_json,
    table_format,
    text_name,
)
from cropi_core.errors import ConfigError, foreign_errors, recorded_errors

pc: Any = pyarrow.compute  # its functions are created at import time; type checkers do not see them
BATCH = 1 << 17
"""Rows per batch: enough to find repeated prompts; about 200 MB of Arrow memory at 1.5 kB per row."""
SHARD = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})")
"""Name of a shard on the Hugging Face hub: `train-00000-of-00005`."""
SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "eval"},
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}
"""Words in names of files that name a split."""
MOST_COMPARED = 500
"""Files of a table whose splits are compared."""


@dataclass(frozen=True)
class Batch:
    """Some rows of one file.

    Attributes:
        values: The rows.
        numbers: First position of each row, counted from 1 in its file; in JSONL the line number.
        counts: Occurrences of each row in this batch.
        file: Name of the file if the table has several, otherwise empty.
    """

    values: Sequence[dict[str, Any]]
    numbers: Sequence[int]
    counts: Sequence[int]
    file: str = ""

    def rows(self) -> Iterator[tuple[int | str, int, dict[str, Any]]]:
        """Return the position, the count and the values of each row."""
        places: Iterable[int | str] = self.numbers
        if self.file:
            places = (f"{self.file}:{number}" for number in self.numbers)
        return zip(places, self.counts, self.values, strict=True)


def table_files(path: Path) -> list[Path]:
    """List the files of a table, by name: the file itself, the files of a directory, or the matches of a glob.

    In a directory, Parquet files are used, or the text files if there are none.

    Raises:
        ConfigError: Nothing matches, several formats or splits would be mixed, or a shard is missing.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        parquet = [file for file in files if file.suffix in PARQUET]
        files = parquet or [file for file in files if text_name(file).suffix in SUFFIXES]
        fault = "holds no table"
    elif any(sign in str(path) for sign in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        try:
            files = [file for file in sorted(root.glob(pattern)) if file.is_file()]
        except ValueError as error:
            raise ConfigError(f"{path} is not a glob: {error}") from error
        fault = "matches no file"
    else:
        table_format(path)  # raises with the reason
        return [path]
    if not files:
        raise ConfigError(
            f"{path} {fault}; tables are {', '.join(SUFFIXES)}, relative paths are taken from {Path.cwd()}"
        )
    formats = {table_format(file) for file in files}
    if len(formats) > 1:
        raise ConfigError(
            f"{path} has files of several formats ({', '.join(sorted(formats))}); give a glob for one of them, "
            f"such as {'*' + files[0].suffix!r}"
        )
    _check_shards(path, files)
    _check_splits(path, files)
    return files


def _check_shards(path: Path, files: list[Path]) -> None:
    """Refuse shards of several splits, and splits with a missing shard."""
    shards: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := SHARD.match(file.name):
            shards.setdefault((file.parent, match[1], int(match[3])), set()).add(int(match[2]))
    names = sorted({name for _, name, _ in shards})
    if len(names) > 1:
        raise ConfigError(
            f"{path} holds shards of several splits: {', '.join(names)}. Give a glob for one, such as "
            f"'{names[0]}-*.parquet'"
        )
    for (_, name, total), numbers in shards.items():
        if missing := sorted(set(range(total)) - numbers):
            raise ConfigError(
                f"{path}: {name}-*-of-{total:05d} lacks shards {', '.join(map(str, missing[:5]))} of {total}"
            )


def _check_splits(path: Path, files: list[Path]) -> None:
    """Refuse files of several splits by their names or directories, such as ``train.jsonl`` and ``test.jsonl``."""
    words = [re.split(r"[^a-z]+", _below(path, file).lower()) for file in files]
    named = [{SPLITS[word] for word in one if word in SPLITS} for one in words]
    if any(one and other and not one & other for one, other in combinations(named[:MOST_COMPARED], 2)):
        raise ConfigError(
            f"{path} holds files of several splits: {', '.join(sorted(set().union(*named)))}. Give one file, or a glob "
            "for one split"
        )


def _below(path: Path, file: Path) -> str:
    """Return the part of a file's path that the table's path does not fix."""
    fixed = Path(*takewhile(lambda part: not any(sign in part for sign in "*?["), path.parts))
    return file.relative_to(fixed).as_posix()


def read_batches(
    path: Path, columns: Sequence[str] | None, faults: Faults, same: Sequence[str] | None = None
) -> Iterator[Batch]:
    """Read the rows of a table in batches.

    Args:
        path: See :func:`table_files`.
        columns: Names, or paths into nested columns, to read from Parquet files; None reads all.
        faults: Collects rows that cannot be read.
        same: Columns or paths: rows of a batch with equal values in these are returned once, with their count; Parquet
            files only. None returns every row.

    Raises:
        ConfigError: See :func:`table_files`.
        DataError: A file cannot be read.
    """
    files = table_files(path)
    for file in files:
        name = file.name if len(files) > 1 else ""
        match table_format(file):
            case "parquet":
                yield from _parquet_batches(file, name, columns, faults, same)
            case "jsonl":
                yield from _grouped(jsonl_rows(file, faults, name), name)
            case "json":
                yield from _grouped(enumerate(read_json(file, faults), 1), name)
            case _:
                yield from _grouped(enumerate(read_csv(file, faults), 1), name)


def _grouped(rows: Iterable[tuple[int, dict[str, Any]]], name: str) -> Iterator[Batch]:
    values, numbers = [], []
    for number, row in rows:
        values.append(row)
        numbers.append(number)
        if len(values) == BATCH:
            yield Batch(values, numbers, [1] * len(values), name)
            values, numbers = [], []
    if values:
        yield Batch(values, numbers, [1] * len(values), name)


def _parquet_batches(
    path: Path, name: str, columns: Sequence[str] | None, faults: Faults, same: Sequence[str] | None
) -> Iterator[Batch]:
    # ParquetFile instead of a dataset: a path such as a=1/x.parquet must not become a partition column.
    with foreign_errors(f"{path} cannot be read as Parquet"), pq.ParquetFile(path) as file:
        check_field_names(file.schema_arrow, str(path))
        wanted = None if columns is None else _top_columns(file.schema_arrow, columns)
        start = 0
        for batch in file.iter_batches(BATCH, columns=wanted):
            yield arrow_batch(batch, start, name, faults, same)
            start += batch.num_rows


def _top_columns(schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """Return the columns of a file that contain the given names or paths."""
    heads = {part for name in columns for part in (name, name.split(".", 1)[0])}
    return [name for name in schema.names if name in heads]


def arrow_batch(
    batch: pa.RecordBatch, start: int, name: str, faults: Faults, same: Sequence[str] | None = None
) -> Batch:
    """Turn Arrow rows into dictionaries; record rows that Python cannot represent as faults.

    Args:
        batch: The rows.
        start: Number of rows before them in the file.
        name: Name of the file if the table has several.
        faults: Collects rows that cannot be read.
        same: Columns or paths; rows with equal values in these are returned once.
    """
    first, counts = np.arange(batch.num_rows), np.ones(batch.num_rows, dtype=np.int64)
    compared = [] if same is None else _top_columns(batch.schema, same)
    if compared and (codes := row_codes(batch.select(compared))) is not None:
        _, first, counts = np.unique(codes, return_index=True, return_counts=True)
        order = np.argsort(first)
        first, counts = first[order], counts[order]
        if len(first) < batch.num_rows:
            batch = batch.take(pa.array(first))
    numbers = (first + start + 1).tolist()
    unread: list[str] = []
    # A timestamp can be outside Python's range, and bytes need not be UTF-8: then the rows are found one by one.
    with recorded_errors(name, unread.append), _no_collection():
        return Batch(batch.to_pylist(), numbers, counts.tolist(), name)
    values, kept = [], []
    for i, number in enumerate(numbers):
        place = f"{name}:{number}" if name else number
        record = partial(faults.add, row=place, count=int(counts[i]))
        with recorded_errors("a value cannot be read", record):
            values.append(batch.slice(i, 1).to_pylist()[0])
            kept.append(i)
    return Batch(values, [numbers[i] for i in kept], counts[kept].tolist(), name)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector while many small objects without cycles are created."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def row_codes(batch: pa.RecordBatch) -> np.ndarray | None:
    """Number the rows so that equal rows have equal numbers; return None for types that cannot be sorted.

    Returns:
        (rows,) int64.
    """
    codes = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        column_codes = _codes(column)
        if column_codes is None:
            return None
        codes = _paired(codes, column_codes)
    return codes


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number the pairs of values of two numbered columns."""
    joined = first * (int(second.max(initial=0)) + 1) + second
    return np.unique(joined, return_inverse=True)[1].astype(np.int64)


def _codes(array: pa.Array) -> np.ndarray | None:
    kind = array.type
    absent = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_null(kind):
        return np.zeros(len(array), dtype=np.int64)
    if pa.types.is_struct(kind):
        codes = absent.astype(np.int64)
        for field in array.flatten():
            field_codes = _codes(field)
            if field_codes is None:
                return None
            codes = _paired(codes, field_codes)
        return codes
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = _codes(array.flatten())
        if items is None:
            return None
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths)
        numbers: dict[bytes | None, int] = {}
        text = items.tobytes()
        bounds = zip((ends - lengths).tolist(), ends.tolist(), absent.tolist(), strict=True)
        keys = (None if null else text[8 * a : 8 * b] for a, b, null in bounds)
        return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(array))
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
    try:
        encoded = array.dictionary_encode()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return None
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
