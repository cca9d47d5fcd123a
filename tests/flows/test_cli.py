"""The command `cropi run` as a person starts it: in a process of its own, with a server of its own."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cropi_core.artifacts.store import Store
from cropi_core.errors import ConfigError
from cropi_core.runs.records import list_runs, load_run
from flows.command import app as cli
from flows.serving import environment
from tests.support.commands import servers_of, start, tiny_config, written
from tests.support.paths import CHECKOUT


@pytest.mark.slow
def test_a_run_and_the_same_run_again(tmp_path: Path):
    config, root = written(tmp_path / "tiny.yaml"), tmp_path / "root"
    out, err = (first := start(config, root, "--no-report")).communicate(timeout=500)
    assert first.returncode == 0, err
    assert "goal" in out
    assert "stage 1" in out
    assert "rollouts/pool@1" in err
    out, err = (second := start(config, root, "--no-report", "--json")).communicate(timeout=500)
    assert second.returncode == 0, err
    assert err == ""
    told = json.loads(out)
    assert {slot["origin"] for slot in told["slots"].values()} == {"cached"}
    assert told["report"] is None
    assert servers_of(root) == []
    # No task run is lost or left half recorded when the server ends, and the second call needed no server.
    with sqlite3.connect(root / ".prefect" / "prefect.db") as database:
        states = {state for (state,) in database.execute("select state_name from task_run")}
        assert states == {"Completed"}
        assert database.execute("select count(*) from flow_run").fetchall() == [(1,)]
    # Prefect's database is lost, and its records: a new server finds everything, and shows it.
    shutil.rmtree(root / ".prefect")
    shutil.rmtree(root / ".prefect-results")
    out, err = (third := start(config, root, "--no-report", "--json")).communicate(timeout=500)
    assert third.returncode == 0, err
    assert json.loads(out)["slots"] == told["slots"]
    with sqlite3.connect(root / ".prefect" / "prefect.db") as database:
        pages = {key for (key,) in database.execute("select key from artifact")}
        runs = database.execute("select name, state_name from flow_run").fetchall()
        cached = database.execute("select count(*) from task_run where state_name = 'Cached'").fetchall()
    assert {"cropi-run", "cropi-scores", "cropi-selection", "cropi-evaluation"} <= pages
    assert runs == [(told["run"], "Completed")]
    assert cached == [(13,)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_resumes(tmp_path: Path, how: signal.Signals):
    training = tiny_config().training.model_dump() | {"steps": 400}
    runtime = {"device": "cpu", "threads": 1, "mode": "subprocess"}
    config, root = written(tmp_path / "long.yaml", training=training, runtime=runtime), tmp_path / "root"
    run = start(config, root, "--no-report")
    assert run.stderr is not None
    lines = []
    while not any(line.startswith("policy@0") for line in lines):
        lines.append(run.stderr.readline())
        assert lines[-1], "".join(lines)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # what a terminal does
        _, err = run.communicate(timeout=500)
        assert run.returncode == 130, err
        assert err.splitlines()[-1] == "Interrupted. Run the same command again to resume."
        assert "Traceback" not in err, err
        (name,) = list_runs(Store(root))
        assert load_run(Store(root), name).status == "crashed"
    else:
        run.kill()
        run.wait()
    deadline = time.monotonic() + 500
    while servers_of(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers_of(root) == []
    again = start(config, root, "--no-report")
    assert again.stderr is not None
    assert [again.stderr.readline().split()[1] for _ in range(4)] == ["cached"] * 4
    os.killpg(again.pid, signal.SIGINT)
    again.communicate(timeout=500)
    assert again.returncode == 130


@pytest.mark.slow
def test_a_failing_step_is_one_line_and_exit_code_1(tmp_path: Path, known: Path, address: str):
    config = written(tmp_path / "tiny.yaml", selection={"ratio": 0.05})
    root = shutil.copytree(known, tmp_path / "root")
    _, err = (run := start(config, root, PREFECT_API_URL=address)).communicate(timeout=500)
    assert run.returncode == 1
    assert err.splitlines()[-1].startswith("error: stage 1 selected 2 prompts of 40")
    assert "Traceback" not in err


def test_a_wrong_command_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = written(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="scoring"):
        CliRunner().invoke(cli.app, ["run", str(config), "--refresh", "scoring"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="neither a file"):
        CliRunner().invoke(cli.app, ["run", "nosuch"], catch_exceptions=False)
    with pytest.raises(ConfigError):
        CliRunner().invoke(cli.app, ["run", str(config), "-o", "stages=no"], catch_exceptions=False)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cropi\[flows\]'"):
        CliRunner().invoke(cli.app, ["run", str(config)], catch_exceptions=False)


def test_other_commands_import_no_prefect():
    # Prefect reads its settings when it is imported, and the command sets some of them first.
    imports = "import sys, flows.command.app, flows.command.display; "
    code = imports + "print('prefect' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert out.stdout.split() == ["False", "False"]


def test_a_server_of_the_user_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    profiles = tmp_path / "profiles.toml"
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))
    assert environment.configured_api() is None
    profiles.write_text('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://a/api"\n[profiles.b]\n')
    assert environment.configured_api() == "http://a/api"
    monkeypatch.setenv("PREFECT_PROFILE", "b")
    assert environment.configured_api() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://c/api")
    assert environment.configured_api() == "http://c/api"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an environment that names no server."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


SETTINGS = {
    ".env": "prefect_api_url=http://{}/api\nOTHER=1\n",
    "prefect.toml": '[api]\nurl = "http://{}/api"\n',
    "pyproject.toml": '[tool.prefect.api]\nurl = "http://{}/api"\n',
}


def test_files_of_the_working_directory_name_a_server_in_prefects_order(directory: Path):
    from prefect.settings import get_current_settings
    from prefect.settings.models.root import Settings

    profile = directory.parent / "profiles.toml"
    profile.write_text('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://profile/api"\n')
    assert get_current_settings() is not None
    for name, text in reversed(SETTINGS.items()):
        (directory / name).write_text(text.format(name.strip(".")))
        named = environment.configured_server()
        assert named == (f"http://{name.strip('.')}/api", directory / name)
        assert Settings().api.url == named.url


@pytest.mark.parametrize("name", SETTINGS)
def test_a_server_that_a_file_names_is_used_and_reported(directory: Path, name: str, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (directory / name).write_text(SETTINGS[name].format("other.example"))
    assert environment.prepare(directory / "root") == "http://other.example/api"
    said = capsys.readouterr().err
    assert "through the Prefect server http://other.example/api" in said
    assert str(directory / name) in said
    assert os.environ["PREFECT_API_URL"] == "http://other.example/api"


@pytest.mark.parametrize("place", ["environment", "profile"])
def test_a_file_of_the_working_directory_is_not_sent_the_users_credentials(
    directory: Path, place, monkeypatch
):
    if place == "environment":
        monkeypatch.setenv("PREFECT_API_KEY", "pnu_secret")
    else:
        (directory.parent / "profiles.toml").write_text(
            'active = "a"\n[profiles.a]\nPREFECT_API_KEY = "pnu_secret"\n'
        )
    (directory / "prefect.toml").write_text(SETTINGS["prefect.toml"].format("other.example"))
    named = environment.configured_server()
    with pytest.raises(ConfigError, match="PREFECT_API_KEY of your environment or profile") as caught:
        environment.enter_named(named, print)
    assert "pnu_secret" not in str(caught.value)
    assert "export PREFECT_API_URL=http://other.example/api" in str(caught.value)
    assert "PREFECT_API_URL" not in os.environ


@pytest.mark.parametrize(
    ("name", "text"), [("prefect.toml", "[api"), ("pyproject.toml", "\xff"), (".env", "\xff=1")]
)
def test_settings_that_cannot_be_read_are_named(directory: Path, name: str, text: str):
    (directory / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=name):
        environment.configured_server()
