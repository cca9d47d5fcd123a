"""Prefect's database of a new home is a copy of one that this account migrated: the same tables, and nothing else."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows.serving import database
from flows.serving.server import local_server


def contents(path: Path) -> tuple[list, str, set[str]]:
    """Return the schema, the revision and the tables that have rows."""
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute(
            "select type, name, tbl_name, sql from sqlite_master order by 1, 2"
        ).fetchall()
        revision = connection.execute("select version_num from alembic_version").fetchone()[0]
        tables = [name for kind, name, *_ in schema if kind == "table"]
        filled = {name for name in tables if connection.execute(f'select 1 from "{name}" limit 1').fetchone()}
    return schema, revision, filled


@pytest.mark.slow
@pytest.mark.extended
def test_the_second_home_starts_from_a_copy_with_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("one", "two"):
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path / name))
        with local_server(tmp_path / name) as server:
            server.wait()
            assert server.log.read_text() == ""
    (template,) = (tmp_path / "cache" / "cropi" / "prefect-databases").iterdir()
    assert template.stat().st_mode & 0o777 == 0o600
    schema, revision, filled = contents(template)
    assert filled == {"alembic_version"}
    for name in ("one", "two"):
        assert contents(tmp_path / name / "prefect.db")[:2] == (schema, revision)


def test_a_copy_that_another_account_may_have_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    template = database._template("1.0")
    template.parent.mkdir(parents=True)
    template.write_text("")
    template.chmod(0o600)
    template.parent.chmod(0o700)
    assert database._is_own(template)
    template.chmod(0o620)
    assert not database._is_own(template)
    template.unlink()
    (tmp_path / "elsewhere").touch(mode=0o600)
    template.symlink_to(tmp_path / "elsewhere")
    assert not database._is_own(template)
    template.unlink()
    assert not database._is_own(template)
