"""A file whose content Git LFS left on its server is refused as such, wherever it is read."""

import pytest

from cropi_core.artifacts.bounded import read_table
from cropi_core.artifacts.parquet import read_rows
from cropi_core.errors import CropiError
from cropi_core.importing.checks import read_columns
from cropi_core.policy import checkpoint_files
from cropi_core.rollouts.table import read_rollouts

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4e' * 32}\nsize 8404992\n"


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.json", "a.jsonl.gz", "a.csv.zst"]
)
def test_a_table_that_is_a_pointer_is_refused(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CropiError, match=r"is a pointer of Git LFS.*git lfs pull"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("read", [read_table, read_columns, read_rollouts])
def test_parquet_that_is_a_pointer_is_refused_by_every_reader(tmp_path, read):
    path = tmp_path / "part-00000.parquet"
    path.write_text(POINTER)
    with pytest.raises(CropiError, match="is a pointer of Git LFS"):
        read(path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_a_checkpoint_with_a_pointer_is_refused(tmp_path, name):
    for other in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / other).write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CropiError, match=f"{name} is a pointer of Git LFS"):
        checkpoint_files(tmp_path)


def test_a_short_or_empty_file_is_no_pointer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    assert read_rows(tmp_path / "a.jsonl") == [{"a": 1}]
    (tmp_path / "b.jsonl").write_text("")
    assert read_rows(tmp_path / "b.jsonl") == []
