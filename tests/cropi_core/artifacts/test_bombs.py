"""Decompression bombs: files are refused by their declared sizes, before memory or time is spent on them."""

import gzip
import json
import resource
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numcodecs.zstd import Zstd
from typer.testing import CliRunner

from cropi_core.artifacts.bounded import read_table
from cropi_core.artifacts.keys import parse_json
from cropi_core.artifacts.layout import MANIFEST
from cropi_core.artifacts.parquet import read_rows
from cropi_core.artifacts.store import Store
from cropi_core.cli.app import app
from cropi_core.config.loading import apply_override, load_config, parse_yaml
from cropi_core.errors import ArtifactError, ConfigError, DataError
from cropi_core.gradients.reader import unpacked
from cropi_core.gradients.store import GradientStore
from cropi_core.runs.records import descendants, new_run, save_run, unnamed
from tests.support.gradient_stores import create, features
from tests.support.stores import edit, publish


@pytest.fixture(autouse=True)
def little():
    """Fail a test that takes more than 400 MB or 10 s of processor time."""
    unit = 1 if sys.platform == "darwin" else 1024
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 400e6


def repeated(path, rows, length):
    """Write a column that repeats one text ``rows`` times, without holding it in memory."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["a" * length]))
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize(("rows", "length"), [(20_000_000, 1), (60_000, 100_000)], ids=["rows", "texts"])
def test_a_parquet_file_unpacks_to_a_bound_of_its_size(tmp_path, rows, length):
    repeated(tmp_path / "x.parquet", rows, length)
    with pytest.raises(DataError, match=r"declares 20,000,000 rows|unpacks to more than"):
        read_rows(tmp_path / "x.parquet")


def test_repeated_texts_within_bounds_are_read_completely(tmp_path):
    repeated(tmp_path / "x.parquet", 20_000, 2000)  # 40 MB: decoded in batches
    table = pa.table({"n": range(5), "text": ["é"] * 5, "ids": [[1, 2]] * 5})
    pq.write_table(table.replace_schema_metadata({"a": "b"}), tmp_path / "y.parquet", row_group_size=2)
    assert read_table(tmp_path / "x.parquet")["prompt"].to_pylist() == ["a" * 2000] * 20_000
    whole = read_table(tmp_path / "y.parquet")
    assert whole == table
    assert whole.schema.metadata == {b"a": b"b"}
    assert read_table(tmp_path / "y.parquet", ["n"]).column_names == ["n"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.json.gz"])
def test_compressed_text_unpacks_to_a_bound_of_its_size(tmp_path, name):
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(b"{}\n" * (1 << 18))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_rows(tmp_path / name)


def test_ordinary_compressed_text_is_read(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as stream:
        stream.write('{"a": "b"}\n' * 1000 + "\n")
    assert read_rows(tmp_path / "x.jsonl.gz") == [{"a": "b"}] * 1000


def rewrite(store, name, **changes):
    edit(store / name / "zarr.json", **changes)


def finished(path):
    store = create(path)
    for shard in range(store.shards):
        rows = store.shard_rows(shard)
        store.write_shard(
            shard, features()[rows.start : rows.stop], {"status": np.zeros(len(rows), np.uint8)}
        )
    store.finish()
    return path


@pytest.mark.parametrize("name", ["features", "scale", "prompt_id", "all"])
def test_a_zarr_shape_must_match_the_other_arrays_and_the_files(tmp_path, name):
    path = finished(tmp_path / "x.zarr")
    GradientStore.open(path)
    for one in [p.name for p in path.iterdir() if p.is_dir()]:
        if name in (one, "all"):
            meta = json.loads((path / one / "zarr.json").read_text())
            shape = [10**8, *meta["shape"][1:]]
            grid = meta["chunk_grid"]
            if one != "features":
                grid["configuration"]["chunk_shape"] = [10**8]
            rewrite(path, one, shape=shape, chunk_grid=grid)
    with pytest.raises(ArtifactError, match=r"features have|declares 100,000,000 rows"):
        GradientStore.open(path)


@pytest.mark.parametrize("name", ["scale", "prompt_id"])
def test_a_column_that_unpacks_to_more_than_its_rows_is_refused(tmp_path, name):
    path = finished(tmp_path / "x.zarr")
    (path / name / "c/0").write_bytes(Zstd(level=1).encode(bytes(100 << 20)))
    with pytest.raises(ArtifactError, match="declares 11 rows"):
        GradientStore.open(path)


def test_a_frame_is_unpacked_no_further_than_its_rows():
    frame = bytearray(Zstd(level=1).encode(bytes(64 << 20)))
    assert len(unpacked(bytes(frame), 1000)) == 1001
    with pytest.raises(ValueError, match="cannot be decompressed"):
        unpacked(b"not a frame at all", 10)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "100,000 values"),
        ("a: &a {b: *a}", "holds itself"),
        (
            "a: &a {x: 1}\nb: &b {<<: [*a,*a,*a]}\n"
            + "".join(
                f"c{i}: &c{i} {{<<: [{','.join([f'*c{i - 1}' if i else '*b'] * 9)}]}}\n" for i in range(8)
            ),
            "100,000 values",
        ),
        ("[" * 10_000, "nests too deeply"),
        ("a: 2001-99-99", "month"),
        ("a: " + "9" * 5000, "digits"),
        ("a" * (2 << 20), "more than 1 MB"),
    ],
    ids=["laughs", "itself", "merges", "deep", "date", "number", "long"],
)
def test_yaml_is_refused_by_what_its_aliases_stand_for(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(str(path))


def test_aliases_within_bounds_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }
    assert apply_override({}, "a=[" * 1 + "[" * 5000) is not None


DAMAGE = {
    "brackets": "[" * 100_000,
    "nested": json.dumps({"schema_version": 1, "x": [[[[0]]]]}).replace("[[[[0]]]]", "[" * 90 + "]" * 90),
    "digits": '{"schema_version": ' + "1" * 5000 + "}",
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bad_artifact_affects_only_its_own_line(tmp_path, what):
    store = Store(tmp_path / "root")
    good, bad = publish(store), publish(store, {"x.txt": "x"}, settings={"n": 2})
    text = DAMAGE[what]
    (store.path(bad) / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = json.loads(CliRunner().invoke(app, ["artifacts", "ls", "--json", "--root", store.url]).stdout)
    assert {row["key"]: "fault" in row for row in rows} == {good.key: False, bad.key: True}
    assert store.faults(bad.key)
    assert [one.key for one in descendants(store, good.key)] == [good.key]
    assert set(unnamed(store)) == {good.key, bad.key}
    ended = CliRunner().invoke(app, ["artifacts", "gc", "--json", "--root", store.url])
    assert [row["key"] for row in json.loads(ended.stdout)["artifacts"]] == [good.key]


def test_a_size_beyond_all_bounds_is_a_fault_of_its_own(tmp_path):
    store = Store(tmp_path / "root")
    made = publish(store)
    path = store.path(made) / MANIFEST
    raw = json.loads(path.read_text())
    raw["files"][0]["size"] = 10**400
    path.write_text(json.dumps(raw))
    ended = CliRunner().invoke(app, ["artifacts", "ls", "--root", store.url])
    assert ended.exit_code == 0, ended.output
    assert "damaged" in ended.output


def test_a_bad_record_affects_only_its_own_line(tmp_path):
    store = Store(tmp_path / "root")
    record = new_run(load_config("demo"))
    save_run(store, record)
    store.write("runs/bad.json", "[" * 100_000)
    rows = json.loads(CliRunner().invoke(app, ["runs", "--json", "--root", store.url]).stdout)
    assert {row["run"]: row["status"] for row in rows} == {record.run: "running", "bad": "damaged"}
    assert "nests deeper" in next(row["error"] for row in rows if row["run"] == "bad")
    assert CliRunner().invoke(app, ["runs", "--root", store.url]).exit_code == 0
    store.write("tags.json", "[" * 100_000)
    with pytest.raises(ArtifactError, match="move it away"):
        store.tags()


def test_json_is_bounded_in_depth():
    assert parse_json("[[1]]") == [[1]]
    with pytest.raises(ValueError, match="nests deeper"):
        parse_json("[" * 70 + "]" * 70)


@pytest.mark.parametrize("text", ['{"a": 1e999}', "[NaN]", "[-Infinity]", '"\\ud800"', '{"\\udc80": 1}'])
def test_json_that_could_not_be_written_again_is_refused(text):
    """One changed byte makes 1e999 of a manifest's 1.999; its checksum then ended in a traceback."""
    with pytest.raises(ValueError, match=r"not finite|surrogate"):
        parse_json(text)


def test_a_manifest_with_a_number_that_is_not_finite_is_damaged(tmp_path):
    store = Store(tmp_path)
    made = publish(store)
    path = store.path(made) / MANIFEST
    text = path.read_text()
    path.write_text(text[:-1].rstrip("}\n") + ', "summary": {"a": 1e999}}')
    assert any("not finite" in fault for fault in store.faults(made.key))
