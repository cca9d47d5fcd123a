"""Read rows that other programs wrote, and report all of their faults in one error.

rows = read_rows(Path("pool.jsonl"))                 # Parquet, JSONL, CSV or JSON, by suffix
faults = Faults("pool.jsonl")
faults.add("answer is empty", row=3)                 # rows count from 1; in JSONL they are line numbers
faults.check()                                       # raises one DataError with one line per fault
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.artifacts.bounded import MOST_TEXT, PACKED, read_table, refuse_other_content, text_chunks
from cropi_core.artifacts.checksums import keep_checksum
from cropi_core.errors import ConfigError, DataError, foreign_errors, recorded_errors

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
SUFFIXES = {
    **dict.fromkeys(PARQUET, "parquet"),
    **dict.fromkeys(JSONL, "jsonl"),
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
}
"""Format by suffix; all except Parquet may be compressed (``.jsonl.gz``, ``.csv.zst``)."""
MOST_DIGITS = 4_000
"""Maximum digits of an integer: Python refuses to write more than 4,300."""
SHOWN_ROWS = 5


@dataclass
class _Rows:
    """Rows with the same fault: the first few, and their number."""

    shown: list[int | str] = field(default_factory=list)
    count: int = 0

    def add(self, row: int | str, count: int) -> None:
        if len(self.shown) < SHOWN_ROWS:
            self.shown.append(row)
        self.count += count


class Faults:
    """Faults of one table: messages in the order of discovery, each with the affected rows.

    Args:
        what: Name of the table, for messages.
        drop: The caller leaves out faulty rows, which are only counted here; faults of the whole table still raise.
    """

    def __init__(self, what: str, *, drop: bool = False) -> None:
        self.what = what
        self.drop = drop
        self._rows: dict[str, _Rows] = {}

    def add(self, message: str, row: int | str | None = None, count: int = 1) -> None:
        """Add a fault of the whole table, or of a row (counted from 1) that occurs ``count`` times."""
        # A name or a value from the table may contain half of a surrogate pair, which cannot be sent to a terminal.
        rows = self._rows.setdefault(printable(message), _Rows())
        if row is not None:
            rows.add(row, count)

    def add_rows(self, message: str, rows: list[int]) -> None:
        """Add the same fault for many rows; an empty list adds nothing."""
        for row in rows:
            self.add(message, row)

    def join(self, other: "Faults", prefix: str) -> None:
        """Add the faults of one of the table's files; its rows are named ``prefix`` followed by their number."""
        for message, rows in other._rows.items():
            if not rows.count:
                self.add(message)
            for i, row in enumerate(rows.shown):
                last = i == len(rows.shown) - 1
                self.add(message, f"{prefix}{row}", rows.count - i if last else 1)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def lines(self) -> list[str]:
        """Format each fault as one line with its first few rows."""
        return [message + _places(rows) for message, rows in self._rows.items()]

    def dropped(self) -> dict[str, int]:
        """Return the number of rows that were dropped, by reason."""
        return {f"bad row: {message}": rows.count for message, rows in self._rows.items() if rows.count}

    def check(self) -> None:
        """Raise all faults; while bad rows are dropped, only faults of the whole table.

        Raises:
            DataError: There is at least one fault; the message has one line per fault.
        """
        fatal = not self.drop or any(rows.count == 0 for rows in self._rows.values())
        if self._rows and fatal:
            raise DataError(f"{self.what} cannot be used:\n  " + "\n  ".join(self.lines()))


def _places(rows: _Rows) -> str:
    if not rows.count:
        return ""
    shown = ", ".join(map(str, rows.shown))
    if rows.count == 1:
        return f" (row {shown})"
    return f" (rows {shown}{f', … {rows.count} in all' if rows.count > len(rows.shown) else ''})"


def printable(text: str) -> str:
    """Return a text that can be encoded: halves of surrogate pairs become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet, JSONL, CSV or JSON file as one dictionary per row; all values of a CSV file are texts.

    Raises:
        ConfigError: The suffix belongs to none of these formats, or the file does not exist.
        DataError: The file cannot be read; the message lists every invalid line.
    """
    match table_format(path):
        case "parquet":
            return parquet_rows(path)
        case "csv":
            return read_csv(path)
        case "json":
            return read_json(path)
        case _:
            return read_jsonl(path)


def table_format(path: Path) -> str:
    """Return the format of a file by its suffix: ``parquet``, ``jsonl``, ``csv`` or ``json``.

    Raises:
        ConfigError: The suffix belongs to none of these formats, or the file does not exist.
    """
    packed = path.suffix in PACKED
    format_name = SUFFIXES.get(text_name(path).suffix)
    if format_name is None or (packed and format_name == "parquet"):
        raise ConfigError(
            f"{path}: tables are read from {', '.join(SUFFIXES)}, the texts also with {' or '.join(PACKED)}, not from "
            f"{''.join(path.suffixes[-2:] if packed else path.suffixes[-1:])!r}"
        )
    if not path.is_file():
        raise ConfigError(
            f"{path} is not a file; relative paths are taken from the current directory {Path.cwd()}"
        )
    refuse_other_content(path)
    return format_name


def text_name(path: Path) -> Path:
    """Return the name of a file without a compression suffix."""
    return Path(path.stem) if path.suffix in PACKED else path


def check_suffix(path: Path) -> str:
    """Return whether a file is ``jsonl`` or ``parquet``, for tables with types that a CSV file would lose.

    Raises:
        ConfigError: The suffix belongs to neither format, or the file does not exist.
    """
    if path.suffix not in JSONL + PARQUET:
        raise ConfigError(
            f"{path}: tables are read from {', '.join(JSONL + PARQUET)}, not from {path.suffix!r}"
        )
    return table_format(path)


def read_text(path: Path) -> str:
    """Read a text file without its byte order mark; decompress it if its name ends in ``.gz`` or ``.zst``.

    Raises:
        DataError: It is not UTF-8, is not a compressed file, or unpacks to more than its bound.
    """
    data = b"".join(text_chunks(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def _text_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file without line breaks and without a byte order mark."""
    first = True
    pieces: list[bytes] = []  # parts of a line that continues in the next chunk
    for chunk in text_chunks(path):
        head, *lines = chunk.split(b"\n")
        pieces.append(head)
        if lines:
            line = b"".join(pieces)
            pieces = [lines.pop()]
            yield line.removeprefix(codecs.BOM_UTF8) if first else line
            first = False
            yield from lines
    if line := b"".join(pieces):
        yield line.removeprefix(codecs.BOM_UTF8) if first else line


def read_csv(path: Path, faults: Faults | None = None) -> list[dict[str, Any]]:
    """Read a CSV file as in RFC 4180: comma (``.tsv``: tab), double quotes, a header; every value is a text.

    Args:
        path: The file.
        faults: Collects rows with another number of values than the header; None raises them.

    Raises:
        DataError: The header has an empty or a duplicate name, or rows have more or fewer values than the header; rows
            are counted from 1 after the header.
    """
    csv.field_size_limit(
        MOST_TEXT
    )  # of the csv module: 131,072 by default, less than a long problem with its solution
    collector, rows = Faults(str(path)) if faults is None else faults, []
    delimiter = "\t" if text_name(path).suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(header) == 1 and (other := next((sign for sign in ";\t" if sign in header[0]), "")):
            raise DataError(
                f"{path}: the first line has no {delimiter!r} and separates its columns by {other!r}. Write the table "
                "with commas, or with tabs as .tsv"
            )
        if not header or not all(name.strip() for name in header) or len(set(header)) < len(header):
            raise DataError(f"{path}: the first line must name each column once, and is {header!r}"[:400])
        for number, values in enumerate(reader, 1):
            if len(values) == len(header):
                rows.append(dict(zip(header, values, strict=True)))
            elif values:  # an empty line is not a row
                collector.add(f"not {len(header)} values, as the header has", number)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV, line {reader.line_num}: {error}") from error
    if faults is None:
        collector.check()
    return rows


def read_json(path: Path, faults: Faults | None = None) -> list[dict[str, Any]]:
    """Read a JSON file that contains one list of objects.

    Args:
        path: The file.
        faults: Collects rows that cannot be used; None raises them.

    Raises:
        DataError: It contains something else.
    """
    collector, rows = Faults(str(path)) if faults is None else faults, []
    text = read_text(path)
    with foreign_errors(
        f"{path} is not a JSON list", remedy="A file with one object a line is called .jsonl"
    ):
        for number, (row, fault) in enumerate(_items(text), 1):
            if fault:
                collector.add(fault, number)
            elif not isinstance(row, dict):
                raise DataError(f"{path} holds no list of objects: item {number} is {type(row).__name__}")
            else:
                rows.append(row)
    if faults is None:
        collector.check()
    return rows


def _items(text: str) -> Iterator[tuple[Any, str]]:
    """Yield each item of a JSON list with a description of its fault."""
    position = _blank(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("a list must begin with [", text, position)
    position = _blank(text, position + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            try:
                (row, end), fault = STRICT.raw_decode(text, position), ""
            except _RowError as error:
                (row, end), fault = PLAIN.raw_decode(text, position), str(error)
            yield row, fault or _surrogates(text[position:end], row)
            position = _blank(text, end) + 1
            if text[position - 1 : position] == "]":
                break
            if text[position - 1 : position] != ",":
                raise json.JSONDecodeError("a comma or ] must follow an item", text, position - 1)
            position = _blank(text, position)
    if _blank(text, position) < len(text):
        raise json.JSONDecodeError("there is more after the list", text, position)


def _blank(text: str, position: int) -> int:
    """Return the position of the next character that is not white space."""
    match = BLANK.match(text, position)
    return match.end() if match else position


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file as one dictionary per row.

    Raises:
        DataError: It is not a Parquet file, has duplicate field names, or contains values that Python cannot represent.
    """
    table = read_parquet(path)
    check_field_names(table.schema, str(path))
    unread: list[str] = []
    with recorded_errors(f"{path} cannot be read", unread.append):
        return table.to_pylist()
    faults = Faults(str(path))
    for number in range(1, table.num_rows + 1):
        with recorded_errors("a value cannot be read", partial(faults.add, row=number)):
            table.slice(number - 1, 1).to_pylist()
    faults.check()
    raise DataError(unread[0])


def check_field_names(schema: pa.Schema, what: str) -> None:
    """Refuse a schema with duplicate names of columns, or of fields within a nested column.

    Raises:
        DataError: Lists all duplicate names, as paths.
    """
    twice: list[str] = []

    def look(fields: list[pa.Field], above: str) -> None:
        names = [one.name for one in fields]
        twice.extend(above + name for name in dict.fromkeys(names) if names.count(name) > 1)
        for one in fields:
            kind = one.type
            while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
                kind = kind.value_type
            if pa.types.is_struct(kind):
                look([kind.field(i) for i in range(kind.num_fields)], f"{above}{one.name}.")

    look(list(schema), "")
    if twice:
        raise DataError(
            f"{what}: {', '.join(map(repr, twice[:5]))} comes more than once, so its value is ambiguous; "
            "rename or drop one of them"
        )


def read_parquet(path: Path) -> pa.Table:
    """Read a whole Parquet file.

    Raises:
        DataError: It is not a Parquet file, is damaged, or unpacks to more than its bound.
    """
    return read_table(path)


def places(wanted: Sequence[str], found: Sequence[str]) -> np.ndarray:
    """Return the index in ``found`` of each id of ``wanted``: ``(n,)`` int64, -1 for a missing id."""
    place = {one: row for row, one in enumerate(found)}
    return np.array([place.get(one, -1) for one in wanted], dtype=np.int64)


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float64; null becomes NaN."""
    return column.cast(pa.float64()).to_numpy().astype(np.float64)


def write_parquet(
    table: pa.Table, path: Path, row_group_size: int | None = None, *, checksum: bool = False
) -> None:
    """Write a Parquet file atomically; equal tables give equal bytes.

    Args:
        table: The table.
        path: The file.
        row_group_size: Rows of a group; None leaves it to the library.
        checksum: Keep a checksum until the step ends (:mod:`cropi_core.artifacts.checksums`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: the next attempt overwrites the file of a killed attempt, and never publishes it.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)
        if checksum:
            keep_checksum(temporary, path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file: one object per line, UTF-8; blank lines are skipped.

    Raises:
        DataError: Lists the numbers of all lines that are not JSON objects or cannot be used.
    """
    faults = Faults(str(path))
    rows = [row for _, row in jsonl_rows(path, faults)]
    faults.check()
    return rows


def jsonl_rows(path: Path, faults: Faults, name: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a JSONL file line by line.

    Args:
        path: The file.
        faults: Collects lines that cannot be used.
        name: Prefix of line numbers, for a table with several files.

    Yields:
        The number of a line, counted from 1, and its object.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    for number, line in enumerate(_text_lines(path), 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: line {number}: {error}") from error
        if not text.strip():
            continue
        place = f"{name}:{number}" if name else number
        row: Any = None
        try:
            row = STRICT.decode(text)
            fault = _surrogates(text, row) if isinstance(row, dict) else "not a JSON object"
        except _RowError as error:
            fault = str(error)
        except (ValueError, RecursionError, MemoryError):
            fault = "not a JSON object"
        if fault:
            faults.add(fault, place)
        else:
            yield number, row


class _RowError(Exception):
    """A row of a text file is invalid; the message describes the fault."""


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _RowError(f"holds an integer of {len(text)} digits; the most is {MOST_DIGITS}")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RowError(f"key {twice!r} comes more than once")
    return made


def _surrogates(text: str, row: Any) -> str:
    """Describe the fault of a row that contains half of a surrogate pair, which only an escape can produce."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "holds half of a surrogate pair (\\ud800 to \\udfff alone), which is not text"
    return ""


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
PLAIN = json.JSONDecoder(parse_int=float)
BLANK = re.compile(r"[ \t\r\n]*")
