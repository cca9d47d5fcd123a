"""Who can speak to a server that cropi starts: the UI by its link; no page from elsewhere, no other user."""

import json
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cropi_core.artifacts.store import Store
from cropi_core.errors import ConfigError
from cropi_core.rewards import functions
from data_schemas.vllm import Vllm
from flows import trust
from flows.serving import environment
from flows.serving.environment import Served, read_served, take_home, write_served
from flows.serving.protection import CLIENT_PASSWORD, entrance_link, refusal
from flows.serving.server import LocalServer, local_server
from tests.support.browser import Browser, Page
from tests.support.commands import free_port, person, tiny_config

FOREIGN = "left-by-another-user.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FETCH = """
fetch(%r, {method: 'POST', mode: %r, headers: {'content-type': %r}, body: '{}'})
  .then(a => 'answered ' + a.status + ' ' + a.type).catch(e => 'failed')
"""


POST = """
fetch(%r, {method: 'POST', mode: %r, headers: {'content-type': %r}, body: %r})
  .then(a => 'answered ' + a.status + ' ' + a.type).catch(e => 'failed')
"""
FORM = """
(() => {
  const frame = document.createElement('iframe'), form = document.createElement('form');
  frame.name = 'f' + Math.random();
  document.body.append(frame, form);
  Object.assign(form, {method: 'post', enctype: %r, action: %r, target: frame.name});
  form.append(Object.assign(document.createElement('input'), {name: %r, value: ''}));
  form.submit();
  return new Promise(done => { frame.onload = () => done(true); setTimeout(() => done(false), 20000); });
})()
"""
REBOUND = "rebound.example"
NO_ID = "00000000-0000-0000-0000-000000000000"


def headers(**named: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in named.items()]


@pytest.mark.parametrize(
    "host", ["evil.example:4200", "127.0.0.1:4201", "127.0.0.1", "127.0.0.1:4200.evil.example", ""]
)
def test_another_host_is_refused(host: str):
    assert "own address" in str(refusal(headers(host=host), 4200))


def test_a_host_is_named_once():
    own = headers(host="127.0.0.1:4200")
    assert refusal(own, 4200) is None
    assert refusal([], 4200)
    assert refusal(own + own, 4200)
    assert refusal(headers(host="localhost"), 80) is None


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8888", "https://127.0.0.1:4200"]
)
def test_a_page_from_elsewhere_is_refused(origin: str):
    assert "own pages" in str(refusal(headers(host="127.0.0.1:4200", origin=origin), 4200))
    assert refusal(headers(host="localhost:4200", origin="http://127.0.0.1:4200"), 4200) is None


HOSTILE_REPORT = """<!doctype html><title>a report</title><a href="#end">to the end</a><p>Accuracy</p>
<script>parent.postMessage("ran", "*"); fetch("/api/flows/filter")</script>
<img src="x" onerror="parent.postMessage('ran', '*')"><p style="margin-top: 3000px" id="end">the end</p>"""
"""The report of a root from elsewhere."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The whole server of `cropi serve`, with its UI."""
    root = tmp_path_factory.mktemp("made") / "root"
    Store(root).prepare()
    (root / ".prefect").mkdir(mode=0o700)
    (root / ".prefect" / "ui").mkdir()
    (root / ".prefect" / "ui" / FOREIGN).write_text("steal()")
    (root / "runs").mkdir(exist_ok=True)
    (root / "runs" / "demo-1.html").write_text(HOSTILE_REPORT)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("PREFECT_"):
                patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(root / ".prefect"))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_SERVER_UI_V2_ENABLED", "false")
        with local_server(root / ".prefect", free_port(), str(root)) as server:
            server.wait()
            yield server


def test_a_report_is_text_for_those_who_know_the_password(server: LocalServer):
    place = server.url.removesuffix("/api") + "/reports/"
    user, password = server.password.split(":")
    own = (user, password)
    assert httpx.get(f"{place}demo-1/content").status_code == 401
    assert httpx.get(f"{place}demo-1/content", auth=(user, "wrong")).status_code == 401
    told = httpx.get(f"{place}demo-1/content", auth=own)
    assert (told.status_code, told.text) == (200, HOSTILE_REPORT)
    assert told.headers["content-type"].startswith("text/plain")
    assert told.headers["content-security-policy"] == "sandbox"
    assert httpx.get(f"{place}demo-2/content", auth=own).status_code == 404
    assert "Accuracy" not in httpx.get(f"{place}demo-1").text
    for name in ("../.prefect/served.env", "..%2F.prefect%2Fserved.env", "", "a/b", "%2e%2e/x"):
        assert httpx.get(f"{place}{name}/content", auth=own).status_code == 404, name
    assert httpx.post(f"{place}demo-1/content", auth=own).status_code in (404, 405)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_report_is_shown_without_its_scripts(server: LocalServer, tmp_path: Path):
    with Browser(str(CHROMIUM), tmp_path / "chromium") as browser:
        site = server.url.removesuffix("/api")
        stranger = browser.open(f"{site}/reports/demo-1")
        stranger.wait_for("Open the UI by the link")
        page = browser.open(entrance_link(server.url, server.password))
        page.wait_for("Runs")
        report = browser.open(f"{site}/reports/demo-1")
        report.wait_until("!!document.querySelector('iframe')")
        assert report.evaluate("document.querySelector('iframe').contentDocument") is None  # no origin
        ran = "new Promise(done => { addEventListener('message', e => done(e.data)); setTimeout(done, 3000, 0) })"
        assert report.evaluate(ran) == 0
        assert {urlsplit(url).path for url in report.requests if url.startswith("http")} <= {
            "/reports/demo-1",
            "/reports/demo-1/content",
            "/favicon.ico",
        }


def test_pages_that_a_root_brings_are_not_served(server: LocalServer):
    """Their scripts would read the password from the browser's storage."""
    site = server.url.removesuffix("/api")
    assert "<html" in httpx.get(site, headers={"accept": "text/html"}, follow_redirects=True).text
    assert "steal" not in httpx.get(f"{site}/{FOREIGN}").text
    assert not list((server.log.parent / "ui").rglob(FOREIGN))


def test_another_user_of_the_machine_needs_the_password(server: LocalServer):
    asked = f"{server.url}/flows/filter"
    assert httpx.post(asked, json={}).status_code == 401
    assert httpx.post(asked, json={}, auth=("cropi", "guess")).status_code == 401
    user, password = server.password.split(":")
    assert httpx.post(asked, json={}, auth=(user, password)).status_code == 200
    own = {"Host": "evil.example"}
    assert httpx.post(asked, json={}, auth=(user, password), headers=own).status_code == 403
    assert httpx.get(server.url.removesuffix("/api"), headers=own).status_code == 403
    foreign = {"Origin": "http://evil.example"}
    assert httpx.post(asked, json={}, auth=(user, password), headers=foreign).status_code == 403
    answer = httpx.get(server.url.removesuffix("/api"), headers={"accept": "text/html"})
    assert answer.headers["x-frame-options"] == "DENY"


def test_no_command_line_holds_the_password(server: LocalServer):
    lines = b"".join(path.read_bytes() for path in Path("/proc").glob(f"{server.process.pid}/cmdline"))
    assert lines
    assert server.password.encode() not in lines
    assert Path(f"/proc/{server.process.pid}/environ").stat().st_mode & 0o077 == 0


def test_a_websocket_from_elsewhere_is_refused(server: LocalServer):
    url = server.url.replace("http", "ws") + "/events/out"
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin="http://evil.example", subprotocols=["prefect"])  # type: ignore[arg-type,list-item]
    with connect(url, subprotocols=["prefect"]) as socket_:  # type: ignore[list-item]
        socket_.send(json.dumps({"type": "auth", "token": server.password}))
        assert "auth_success" in socket_.recv(timeout=20)


def test_a_root_that_is_made_is_this_users_alone(server: LocalServer):
    home = server.log.parent
    assert stat.S_IMODE(home.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for name in ("prefect.db", server.log.name):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """A page of another origin."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>elsewhere</title>a page from elsewhere")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{page.server_address[1]}"
        page.shutdown()


def attack(foreign: Page, server: LocalServer, mark: Path) -> None:
    """Try, as a page from elsewhere, to submit a run whose reward function is a file of the attacker's."""
    reward = mark.with_suffix(".py")
    reward.write_text(f"open({str(mark)!r}, 'w')\ndef grade(completion, answer): return 1.0\n")
    run = {
        "name": "attack",
        "parameters": {"config": {"preset": "demo", "grading": {"functions": {"mine": f"{reward}:grade"}}}},
        "state": {"type": "SCHEDULED"},
    }
    body = json.dumps(run)
    paths = [
        "flows/",
        "flow_runs/",
        "deployments/",
        f"deployments/{NO_ID}/create_flow_run",
        "admin/database/clear",
    ]
    for api in (server.url, server.url.replace("127.0.0.1", "localhost")):
        for path in paths:
            for mode, kind in (
                ("no-cors", "text/plain"),
                ("cors", "text/plain"),
                ("cors", "application/json"),
            ):
                said = foreign.evaluate(POST % (f"{api}/{path}", mode, kind, body))
                # A simple request reaches the server, which refuses it; the page cannot read the answer.
                assert said in ("answered 0 opaque", "failed"), (path, mode, kind)
            for form in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                foreign.evaluate(FORM % (form, f"{api}/{path}", body))
        opened = "new Promise(d => {const s = new WebSocket(%r, 'prefect'); "
        opened += "s.onopen = () => d(true); s.onerror = () => d(false)})"
        for path in ("events/in", "events/out", "logs/out", "flow-runs/subscribe"):
            assert foreign.evaluate(opened % f"{api.replace('http', 'ws')}/{path}") is False, path
    # DNS rebinding: the attacker's name resolves to this machine, and for the browser it is one origin.
    port = server.url.removesuffix("/api").rpartition(":")[2]
    foreign.go(f"http://{REBOUND}:{port}/")
    foreign.wait_for("own address")
    said = foreign.evaluate(
        POST % (f"http://{REBOUND}:{port}/api/flow_runs/", "cors", "application/json", body)
    )
    assert said == "answered 403 basic"


@pytest.mark.skipif(
    shutil.which("setpriv") is None or os.getuid() != 0, reason="becomes another user with setpriv"
)
def test_another_user_with_curl_gets_nothing(server: LocalServer):
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    ask = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-H",
        "content-type:application/json",
        "-d",
        "{}",
    ]
    for path in ("flows/filter", "flow_runs/", "deployments/"):
        told = subprocess.run(
            [*other, *ask, f"{server.url}/{path}"], capture_output=True, text=True, check=True
        )
        assert told.stdout == "401", path
    for place in (server.log.parent / "prefect.db", server.log, Path(f"/proc/{server.process.pid}/environ")):
        read = subprocess.run([*other, "head", "-c", "1", str(place)], capture_output=True, check=False)
        assert read.returncode != 0, place


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_the_ui_opens_by_its_link_and_a_page_from_elsewhere_gets_nothing(
    server: LocalServer, elsewhere: str, tmp_path: Path
):
    with Browser(
        str(CHROMIUM), tmp_path / "chromium", f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"
    ) as browser:
        page = browser.open(entrance_link(server.url, server.password))
        page.wait_for("Runs")
        assert "enter" not in page.evaluate("location.href")
        events = f"{server.url}/flows/filter"
        told = "fetch(%r,{method:'POST',headers:{'content-type':'application/json',Authorization:'Basic '+"
        told += "localStorage.getItem('prefect-password')},body:'{}'}).then(a=>a.status)"
        assert page.evaluate(told % events) == 200
        assert page.faults == []
        foreign = browser.open(elsewhere)
        foreign.wait_for("a page from elsewhere")
        assert foreign.evaluate("localStorage.getItem('prefect-password')") is None
        assert foreign.evaluate(FETCH % (events, "cors", "application/json")) == "failed"
        attack(foreign, server, tmp_path / "ran")
    user, password = server.password.split(":")
    own = (user, password)
    for kind in ("flows", "flow_runs", "deployments"):
        assert httpx.post(f"{server.url}/{kind}/filter", json={}, auth=own).json() == [], kind
    assert not (tmp_path / "ran").exists()


def test_the_file_of_a_served_root_is_private_and_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flows.serving.server.answers", lambda url: True)
    served = Served("http://127.0.0.1:4200/api", "cropi:it's secret")
    marker = write_served(tmp_path, served)
    assert stat.S_IMODE(marker.stat().st_mode) == 0o600
    assert read_served(tmp_path) == served
    write_served(tmp_path, served)  # of a server that was killed
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="another user serves"):
        read_served(tmp_path)


def test_the_password_of_a_named_server_comes_from_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("flows.serving.server.answers", lambda url: True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / ".prefect").mkdir()
    write_served(tmp_path / ".prefect", Served("http://127.0.0.1:4200/api", "cropi:p"))
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:4201/api"
    environment.prepare(tmp_path)
    assert CLIENT_PASSWORD not in os.environ
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:4200/api"
    environment.prepare(tmp_path)
    assert os.environ[CLIENT_PASSWORD] == "cropi:p"


def test_settings_and_logging_of_a_root_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", person())
    home = take_home(tmp_path)
    assert home == tmp_path / ".prefect"
    for name in ("PREFECT_PROFILES_PATH", "PREFECT_LOGGING_SETTINGS_PATH"):
        assert not Path(os.environ[name]).is_relative_to(tmp_path)
    assert Path(os.environ["PREFECT_LOGGING_SETTINGS_PATH"]).exists()


def test_functions_come_from_the_operators_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for place in (ours, theirs):
        place.mkdir()
        (place / "reward.py").write_text("def reward(completion, answer): return 1.0\n")
    (ours / "link.py").symlink_to(theirs / "reward.py")
    assert functions.source_digest(f"{theirs}/reward.py:reward")  # the command line: unset
    monkeypatch.setenv(functions.ALLOWED, str(ours))
    assert functions.source_digest(f"{ours}/reward.py:reward")
    for path in (
        f"{theirs}/reward.py:f",
        f"{ours}/../theirs/reward.py:f",
        f"{ours}/link.py:f",
        "timeit:timeit",
    ):
        with pytest.raises(ConfigError, match="no directory that this machine takes functions from"):
            functions.source_digest(path)
    monkeypatch.setenv(functions.ALLOWED, "*")
    assert functions.source_digest("timeit:timeit")


def test_a_run_through_a_server_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    python = tmp_path / "python"
    python.touch()
    vllm = {"python": str(python)}
    config = tiny_config(runtime={"device": "cpu", "vllm": vllm})
    trust.check_code(config)  # typed on the command line
    assert functions.ALLOWED not in os.environ
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "00000000-0000-0000-0000-000000000000")
    with pytest.raises(ConfigError, match=r"runtime\.vllm\.python"):
        trust.check_code(config)
    assert os.environ[functions.ALLOWED] == ""
    with pytest.raises(ConfigError, match="may load code"):
        trust.check_code(
            tiny_config(runtime={"device": "cpu", "vllm": {"environment": {"LD_PRELOAD": "x.so"}}})
        )
    os.environ[functions.ALLOWED] = str(tmp_path)
    trust.check_code(config)


def test_arguments_of_vllm_are_sizes():
    assert (
        trust.foreign_settings(Vllm(arguments=["--max-num-seqs=5", "--seed", "7", "--enforce-eager"])) == []
    )
    assert trust.foreign_settings(Vllm(arguments=["--middleware=os.system"])) == ["--middleware"]
    assert trust.foreign_settings(Vllm(arguments=["--max-num=5"])) == ["--max-num"]  # an abbreviation


@pytest.mark.parametrize("setting", ["training.command", "runtime.launch.machines"])
def test_a_run_through_a_server_runs_no_command_unless_the_operator_lists_its_program(monkeypatch, setting):
    command = {"run": ["true", "{policy}"], "version": "1"}
    config = tiny_config(training={"engine": "command", "command": command, "prompts_per_step": 4})
    if setting == "runtime.launch.machines":
        launch = {"processes": 2, "machines": ["true node2"], "address": "node1"}
        config = tiny_config(runtime={"device": "cpu", "launch": launch})
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "x")
    monkeypatch.delenv("CROPI_COMMANDS", raising=False)
    for directories in ("", "/srv/rewards", str(Path("/bin").resolve())):
        monkeypatch.setenv("CROPI_FUNCTIONS", directories)
        with pytest.raises(ConfigError, match=f"{setting} runs .*CROPI_COMMANDS"):
            trust.check_code(config)
    monkeypatch.setenv("CROPI_COMMANDS", str(shutil.which("true")))
    trust.check_code(config)
    monkeypatch.setenv("CROPI_COMMANDS", "/bin/sh")
    with pytest.raises(ConfigError, match="CROPI_COMMANDS is '/bin/sh'"):
        trust.check_code(config)
