"""Read rows that other programs wrote, and tell everything that is wrong with them at once.

rows = read_rows(Path("pool.jsonl"))                 # Parquet or JSONL, by suffix
faults = Faults("pool.jsonl")
faults.add("answer is empty", row=3)                 # rows count from 1; in JSONL they are line numbers
faults.check()                                       # raises one DataError with a line a fault
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.errors import ConfigError, DataError

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SHOWN_ROWS = 5


class Faults:
    """What is wrong with one table: messages in the order found, each with the rows it concerns."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._rows: dict[str, list[int]] = {}

    def add(self, message: str, row: int | None = None) -> None:
        """Note a fault of the whole table, or of a row counted from 1."""
        rows = self._rows.setdefault(message, [])
        if row is not None:
            rows.append(row)

    def add_rows(self, message: str, rows: list[int]) -> None:
        """Note the same fault in many rows; none is no fault."""
        if rows:
            self._rows.setdefault(message, []).extend(rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def lines(self) -> list[str]:
        """Say each fault in a line, with its first few rows."""
        return [message + _places(rows) for message, rows in self._rows.items()]

    def check(self) -> None:
        """Raise everything found.

        Raises:
            DataError: There is at least one fault; the message has a line for each.
        """
        if self._rows:
            raise DataError(f"{self.what} cannot be used:\n  " + "\n  ".join(self.lines()))


def _places(rows: list[int]) -> str:
    if not rows:
        return ""
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    if len(rows) == 1:
        return f" (row {shown})"
    return f" (rows {shown}{f', … {len(rows)} in all' if len(rows) > SHOWN_ROWS else ''})"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet or JSONL file as dictionaries, one a row.

    Raises:
        ConfigError: The suffix is of neither format, or there is no such file.
        DataError: The file cannot be read; every broken JSONL line is named.
    """
    return read_jsonl(path) if check_suffix(path) == "jsonl" else read_parquet(path).to_pylist()


def check_suffix(path: Path) -> str:
    """Say whether a file is ``jsonl`` or ``parquet``.

    Raises:
        ConfigError: The suffix is of neither format, or there is no such file.
    """
    if path.suffix not in JSONL + PARQUET:
        raise ConfigError(
            f"{path}: tables are read from {', '.join(JSONL + PARQUET)}, not from {path.suffix!r}"
        )
    if not path.is_file():
        raise ConfigError(
            f"{path} is no file; relative paths are taken from the current directory {Path.cwd()}"
        )
    return "jsonl" if path.suffix in JSONL else "parquet"


def read_parquet(path: Path) -> pa.Table:
    """Read a Parquet file whole.

    Raises:
        DataError: It is no Parquet file, or a damaged one.
    """
    try:
        # ParquetFile and not read_table: a path such as a=1/x.parquet must not become a partition column.
        with pq.ParquetFile(path) as file:
            return file.read()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def write_parquet(table: pa.Table, path: Path, row_group_size: int | None = None) -> None:
    """Write a Parquet file that appears whole or not at all; equal tables give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed attempt left is overwritten by the next, never published with it.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file: one object a line, UTF-8; only the last line may be empty.

    Raises:
        DataError: Lines that are no JSON objects, all named by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    rows, faults = [], Faults(str(path))
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            faults.add("not a JSON object", number)
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            faults.add("not a JSON object", number)
    faults.check()
    return rows
