"""Read untrusted files within bounds: limit the unpacked size by the file size, before memory is allocated.

782 bytes of Parquet can unpack to 1.5 GB, and 521 kB of gzip to 537 MB of text and 13 GB of Python objects. An ordinary
file unpacks to a few times its size; the bounds below leave room for repeated system messages and constant columns.
"""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cropi_core.errors import CropiError, DataError, foreign_errors

MOST_TEXT = 4 << 30
"""Maximum bytes of a text file after decompression."""
PACKED = (".gz", ".zst")
CHUNK_BYTES = 1 << 22
PACKED_FREE, PACKED_RATIO = 16 << 20, 50
"""A compressed text may unpack to the first number plus the second times its size; texts compress 3 to 20 times."""
PARQUET_FREE, PARQUET_RATIO = 64 << 20, 256
"""The same for the decoded bytes of a Parquet file; a system message that every prompt repeats is stored once."""
ROWS_FREE = 1 << 16
"""Maximum rows of a Parquet file, in addition to one per byte: every table here has an id or a text per row."""
BATCH_ROWS = 256


POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a file whose content Git LFS has left on its server."""
PAGES = (b"<!doctype html", b"<html")
"""Beginnings of a page that a server sent in place of a file, in lower case."""
OTHER_CONTENT = (
    (b"\xff\xfe", (), "is UTF-16; write it as UTF-8"),
    (b"\xfe\xff", (), "is UTF-16; write it as UTF-8"),
    (b"\x1f\x8b", (".gz",), "is compressed by gzip; give it the suffix .gz"),
    (b"\x28\xb5\x2f\xfd", (".zst",), "is compressed by zstd; give it the suffix .zst"),
    (b"PK\x03\x04", (), "is a ZIP archive; unpack it"),
    (b"PAR1", (".parquet", ".pq"), "is a Parquet file; give it the suffix .parquet"),
    (b"[", (".json", ".csv", ".tsv", ".gz", ".zst"), "holds a JSON list; give it the suffix .json"),
)
"""Beginning of a table's content, the suffixes that announce it, and what to do where the name announces another."""


def refuse_pointer(path: Path, kind: type[CropiError] = DataError) -> None:
    """Refuse a pointer of Git LFS and an HTML page in place of a file, which any reader would call damaged.

    Raises:
        CropiError: Of the class ``kind``: the file is one of the two.
    """
    with foreign_errors(f"{path} cannot be read", kind), path.open("rb") as stream:
        beginning = stream.read(len(POINTER))
    if beginning == POINTER:
        raise kind(
            f"{path} is a pointer of Git LFS, not the file itself: it was cloned without its content. Run "
            "`git lfs pull` in that repository, or download the file again"
        )
    if beginning.lower().startswith(PAGES):
        raise kind(
            f"{path} is an HTML page, not the file itself: a server sent a page, for example to log in. Download the "
            "file again"
        )


def refuse_other_content(path: Path) -> None:
    """Refuse a table whose content is of another kind than its name says.

    Raises:
        DataError: Says what the content is.
    """
    refuse_pointer(path)
    with foreign_errors(f"{path} cannot be read"), path.open("rb") as stream:
        beginning = stream.read(64)
    for magic, suffixes, remedy in OTHER_CONTENT:
        if beginning.startswith(magic) and path.suffix not in suffixes:
            raise DataError(f"{path} {remedy}")


def text_chunks(path: Path) -> Iterator[bytes]:
    """Read a text file in chunks; decompress it if its name ends in ``.gz`` or ``.zst``.

    A compressed file is decompressed twice: its unpacked size is checked before a reader creates objects from the first
    chunk.

    Raises:
        DataError: It cannot be read, or unpacks to more than its bound.
    """
    refuse_pointer(path)
    size = path.stat().st_size
    packed = path.suffix in PACKED
    most = min(MOST_TEXT, PACKED_FREE + PACKED_RATIO * size) if packed else MOST_TEXT
    if packed:
        for _ in _chunks(path, size, most):
            pass
    yield from _chunks(path, size, most)


def _chunks(path: Path, size: int, most: int) -> Iterator[bytes]:
    total = 0
    with foreign_errors(f"{path} cannot be read"), _opened(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            total += len(chunk)
            if total > most:
                raise _too_large(path, size, most)
            yield chunk


def _opened(path: Path) -> Any:
    if path.suffix == ".zst":
        return pa.input_stream(str(path), compression="zstd")
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _too_large(path: Path, size: int, most: int) -> DataError:
    if most < MOST_TEXT:
        return DataError(
            f"{path} has {size:,} bytes and unpacks to more than {most:,}, {PACKED_RATIO} times as much and "
            f"{PACKED_FREE >> 20} MB; if you trust it, unpack it yourself"
        )
    return DataError(
        f"{path} holds more than {MOST_TEXT >> 30} GB of text; split it, or convert it to Parquet"
    )


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns.

    Raises:
        DataError: It is not a Parquet file, is damaged, or unpacks to more than its bound.
    """
    # ParquetFile instead of read_table: a path such as a=1/x.parquet must not become a partition column.
    refuse_pointer(path)
    with (
        foreign_errors(f"{path} cannot be read as Parquet"),
        path.open("rb") as stream,
        pq.ParquetFile(stream) as file,
    ):
        return read_open_table(file, path, columns)


def read_open_table(file: pq.ParquetFile, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an open Parquet file as :func:`read_table` does; ``path`` is the path of the file."""
    size, metadata = path.stat().st_size, file.metadata
    most = PARQUET_FREE + PARQUET_RATIO * size
    if metadata.num_rows > ROWS_FREE + size:
        raise DataError(
            f"{path} has {size:,} bytes and declares {metadata.num_rows:,} rows; at most {ROWS_FREE:,} and one a byte "
            "are read"
        )
    wanted = None if columns is None else list(columns)
    if _largest(metadata) <= most:
        return file.read(columns=wanted)
    batches, decoded = [], 0
    for batch in _batches(file, wanted):
        decoded += batch.nbytes
        if decoded > most:
            raise DataError(
                f"{path} has {size:,} bytes and unpacks to more than {most:,}, {PARQUET_RATIO} times as much and "
                f"{PARQUET_FREE >> 20} MB; if you trust it, write it again without repeated values"
            )
        batches.append(batch)
    schema = batches[0].schema if batches else file.schema_arrow
    return (
        pa.Table.from_batches(batches, schema)
        .replace_schema_metadata(file.schema_arrow.metadata)
        .combine_chunks()
    )


def _batches(file: pq.ParquetFile, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    # At least one row of each row group is decoded at once, and a dictionary value is at most as large as a page.
    yield from file.iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _largest(metadata: Any) -> int:
    """Return an upper bound of the decoded size from the metadata: a dictionary value may occur in every row."""
    total = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.row_group(group).num_columns):
            column = metadata.row_group(group).column(index)
            encoded, count = column.total_uncompressed_size, column.num_values
            width = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}.get(column.physical_type, 8)
            repeats = any("DICTIONARY" in one for one in column.encodings)
            variable = column.physical_type.endswith("BYTE_ARRAY")
            total += count * (width + (encoded if variable and repeats else 0)) + (encoded if variable else 0)
    return total
