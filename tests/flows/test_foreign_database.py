"""A Prefect database that came with a root is not opened: its deployments and blocks would be code."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from cropi_core.errors import ConfigError
from flows.serving import ownership
from flows.serving.environment import take_home
from flows.serving.ownership import MARK, TRUST, check_database, record_home
from flows.serving.server import LocalServer


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["XDG_STATE_HOME"] = str(tmp_path / "state")
    os.environ.pop("PREFECT_HOME", None)


def hostile(root: Path, name: str = "prefect.db") -> Path:
    """Make a root whose deployment pulls by calling a function."""
    home = root / ".prefect"
    home.mkdir(parents=True)
    with sqlite3.connect(home / name) as database:
        database.execute("CREATE TABLE deployment (pull_steps JSON, entrypoint TEXT)")
        database.execute("INSERT INTO deployment VALUES ('[{\"os.system\": {}}]', 'evil.py:flow')")
    return home


@pytest.mark.parametrize("name", ["prefect.db", "prefect.db-wal", "prefect.db-journal", "prefect.db-shm"])
def test_a_database_from_elsewhere_is_not_opened(tmp_path: Path, name: str):
    home = hostile(tmp_path / "root", name)
    before = (home / name).read_bytes()
    with pytest.raises(ConfigError, match="this account did not make"):
        take_home(tmp_path / "root")
    assert "PREFECT_HOME" not in os.environ
    assert [path.name for path in home.iterdir()] == [name]
    assert (home / name).read_bytes() == before


def test_a_root_cannot_vouch_for_itself(tmp_path: Path):
    home = hostile(tmp_path / "root")
    for token in ("", "0" * 32, "../../state", "f" * 64):
        (home / MARK).write_text(token)
        with pytest.raises(ConfigError):
            check_database(home)
    (home / MARK).unlink()
    other = tmp_path / "own"
    other.mkdir()
    record_home(other)
    (home / MARK).symlink_to(other / MARK)
    with pytest.raises(ConfigError):
        check_database(home)
    (home / MARK).unlink()
    os.mkfifo(home / MARK)  # a read would wait for ever
    with pytest.raises(ConfigError):
        check_database(home)


def test_another_account_does_not_take_the_database_for_its_own(tmp_path: Path):
    home = tmp_path / "root" / ".prefect"
    home.mkdir(parents=True)
    record_home(home)
    (home / "prefect.db").touch()
    check_database(home)
    check_database(shutil.copytree(home, tmp_path / "copy" / ".prefect"))  # a copy of one's own
    os.environ["XDG_STATE_HOME"] = str(tmp_path / "state of another")
    with pytest.raises(ConfigError):
        check_database(home)


def test_the_operator_accepts_a_database_once(tmp_path: Path):
    home = hostile(tmp_path / "root")
    os.environ[TRUST] = "1"
    assert take_home(tmp_path / "root") == home
    os.environ.pop(TRUST)
    check_database(home)
    assert (home / MARK).stat().st_mode & 0o077 == 0


def test_a_server_records_its_home_before_it_makes_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flows.serving.server.python_command", lambda *_: ["/bin/true"])
    home = tmp_path / "root" / ".prefect"
    server = LocalServer(home)
    server.stop()
    token = (home / MARK).read_text()
    (home / "prefect.db").touch()
    check_database(home)
    LocalServer(home).stop()  # an existing database is not recorded again
    assert (home / MARK).read_text() == token


def test_a_home_that_cannot_be_recorded_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "state").write_text("a file in the way")
    record_home(tmp_path)
    assert ownership.TRUST in caplog.text
