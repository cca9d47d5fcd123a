"""Files that an interrupted step keeps: a changed byte costs that file, and never goes into the result."""

import os

import pyarrow as pa
import pytest

from cropi_core.artifacts.checksums import forget_checksums, remove_damaged
from cropi_core.artifacts.parquet import read_parquet, write_parquet

TABLE = pa.table({"a": ["x"] * 50, "b": list(range(50))})


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    for number in range(3):
        write_parquet(TABLE, folder / f"part-{number}.parquet", checksum=True)
    return folder


def sums_of(parts):
    return parts.parent / ".scratch" / "parts.sums"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_anywhere_is_found(parts):
    path = parts / "part-1.parquet"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flip(path, at)
        assert remove_damaged(parts, "part-*.parquet") == [path]
        assert not path.exists()
        path.write_bytes(whole)
    assert remove_damaged(parts, "part-*.parquet") == []


@pytest.mark.parametrize("size", [0, 10])
def test_a_cut_file_and_one_without_a_checksum_are_removed(parts, size):
    os.truncate(parts / "part-0.parquet", size)
    (sums_of(parts) / "part-2.parquet.crc32c").unlink()
    assert [p.name for p in remove_damaged(parts, "part-*")] == ["part-0.parquet", "part-2.parquet"]


def test_checksums_change_no_file_and_leave_nothing(parts, tmp_path):
    write_parquet(TABLE, tmp_path / "plain.parquet")
    assert (tmp_path / "plain.parquet").read_bytes() == (parts / "part-0.parquet").read_bytes()
    forget_checksums(parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "plain.parquet"]
    flip(parts / "part-0.parquet", 5)
    assert remove_damaged(parts, "part-*") == [], "a finished directory has a manifest instead"
    assert read_parquet(parts / "part-1.parquet").equals(TABLE)


def test_what_a_kill_left_of_the_end_is_removed(parts, tmp_path):
    sums_of(parts).rename(tmp_path / ".scratch" / "parts.sums.ended")
    assert remove_damaged(parts, "part-*") == []
    assert not list((tmp_path / ".scratch").iterdir())
    assert len(remove_damaged(parts, "part-*", required=True)) == 3, (
        "a workspace keeps its checksums to its end"
    )
