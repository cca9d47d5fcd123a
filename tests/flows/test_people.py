"""People in the loop: approval in the UI and on the terminal, messages, and runs whose process is gone.

One `cropi serve`, a browser, and a webhook that listens on this machine: a block of the kind every server has.
"""

import contextlib
import http.server
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run, run_id
from data_schemas.config import Config
from flows.serving.protection import entrance_link
from tests.support import processes
from tests.support.browser import Browser, keep
from tests.support.commands import (
    CROPI,
    Served,
    command_of,
    descendants,
    free_port,
    person,
    servers_of,
    tiny_config,
    written,
)
from tests.support.paths import CHECKOUT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
body = {"s": "{{subject}}", "b": "{{body}}"}
CustomWebhookNotificationBlock(name="here", url=sys.argv[1], json_data=body).save("here")
"""
INSTALL = """
import sys
from datetime import timedelta
from flows.serving import install
install(None, timedelta(seconds=int(sys.argv[1])))
"""
SILENCE_S = 15
ENDS = ("Completed", "Failed", "Crashed", "Cancelled")


class Office:
    """A served root, and what its server has sent."""

    def __init__(self, served: Served, inbox: list[dict[str, str]]) -> None:
        self.served, self.inbox = served, inbox

    def environment(self) -> dict[str, str]:
        return person(
            PREFECT_API_URL=self.served.url,
            PREFECT_API_AUTH_STRING=self.served.password,
            PREFECT_HOME=str(self.served.root / ".prefect"),
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = processes.run(
            command, env=self.environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, config: Config, *more: str) -> str:
        """Ask for a run of the deployment; return the flow run's id."""
        known = {run["id"] for run in self.served.answer("flow_runs/filter", {})}
        done = self.served.ask(config, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        (new,) = [r for r in self.served.answer("flow_runs/filter", {}) if r["id"] not in known]
        return new["id"]

    def until(self, flow_run: str, *states: str, seconds: float = 500) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (run := self.served.answer(f"flow_runs/{flow_run}"))["state"]["name"] not in states:
            assert run["state"]["name"] not in ENDS, run["state"]
            assert time.monotonic() < deadline, (run["state"], self.served.out.read_text()[-3000:])
            time.sleep(0.5)
        return run

    def resume(self, flow_run: str, **answers: Any) -> dict[str, Any]:
        """Give an answer, and wait until the run has gone on with it, if it was taken."""
        before = self.served.answer(f"flow_runs/{flow_run}")["state"]["id"]
        said = self.served.answer(f"flow_runs/{flow_run}/resume", {"run_input": answers})
        deadline = time.monotonic() + 500
        going = ("Resuming", "Submitting", "Pending", "Running")
        while said["status"] == "ACCEPT":
            state = self.served.answer(f"flow_runs/{flow_run}")["state"]
            if state["id"] != before and state["name"] not in going:
                break
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return said

    def message(self, *words: str, seconds: float = 500) -> dict[str, str]:
        """Wait for a message that says all of this."""
        deadline = time.monotonic() + seconds
        while True:
            for sent in list(self.inbox):
                if all(word in sent["s"] + "\n" + sent["b"] for word in words):
                    return sent
            assert time.monotonic() < deadline, (words, self.inbox)
            time.sleep(0.5)

    def record(self, config: Config):
        return load_run(Store(self.served.root), run_id(config))


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, known: Path) -> Iterator[Office]:
    inbox: list[dict[str, str]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            inbox.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    place = tmp_path_factory.mktemp("office")
    # The database alone: events of a run that finds everything come so fast that SQLite loses some.
    shutil.copytree(known / ".prefect", place / "root" / ".prefect")
    served = Served(place / "root", free_port(), place / "out")
    office = Office(served, inbox)
    try:
        office.run(CROPI[0], "-c", BLOCK, f"http://127.0.0.1:{hook.server_port}/")
        made = office.run(*CROPI, "automations", "--notify", "custom-webhook/here")
        again = office.run(*CROPI, "automations", "--notify", "custom-webhook/here")
        assert made.stdout == again.stdout
        assert len(served.answer("automations/filter", {})) == len(made.stdout.splitlines()) == 5
        yield office
    finally:
        hook.shutdown()
        served.process.send_signal(signal.SIGTERM)
        try:
            served.process.wait(500)
        finally:
            if served.process.poll() is None:
                os.killpg(served.process.pid, signal.SIGKILL)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_person_is_asked_in_the_ui_and_notified_of_finished_stages(office: Office, tmp_path: Path):
    config = tiny_config(name="asked")
    flow_run = office.start(config, "-p", "approve=true")
    office.until(flow_run, "Suspended")
    page = f"{office.served.url.removesuffix('/api')}/runs/flow-run/{flow_run}"
    assert page in office.message("waits for you", office.record(config).run)["b"]
    assert (office.record(config).status, "policy@1" in office.record(config).slots) == ("waiting", False)
    # The worker is free for others meanwhile.
    office.until(
        office.start(tiny_config(name="other", stages=1, selection={"strategy": "random"})), "Completed"
    )
    with Browser(str(CHROMIUM), tmp_path / "chromium") as browser:
        browser.open(entrance_link(office.served.url, office.served.password)).wait_for("Runs")
        shown = browser.open(page)
        shown.wait_for("Suspended", "Resume")
        shown.click("Resume")
        text = shown.wait_for("Train stage 1 on this selection?", "reverse", "10 of 40", "another ratio")
        assert office.record(config).slots["selection@1"].ref.key in text
        keep(shown, "approval", tmp_path)
    for wrong in ({}, {"answer": "perhaps"}, {"answer": "another ratio", "ratio": 2}):
        assert office.resume(flow_run, **wrong)["status"] == "REJECT"
    office.resume(flow_run, answer="another ratio")  # and which?
    office.until(flow_run, "Suspended")
    first = office.record(config).slots["selection@1"].ref.key
    office.resume(flow_run, answer="another ratio", ratio=0.5)
    office.until(flow_run, "Suspended")
    office.resume(flow_run, answer="yes")
    office.until(flow_run, "Completed")
    record, store = office.record(config), Store(office.served.root)
    assert record.approved == {first: 0.5}
    assert store.manifest(record.slots["selection@1"].ref).summary["ratio"] == 0.5
    assert office.message("stage 1 is finished", "goal", "%")
    # Started again, it knows what was answered.
    office.until(office.start(config, "-p", "approve=true"), "Completed")


@pytest.mark.slow
def test_what_is_declined_is_not_trained_on(office: Office):
    config = tiny_config(name="declined")
    flow_run = office.start(config, "-p", "approve=true")
    office.until(flow_run, "Suspended")
    office.resume(flow_run, answer="no")
    state = office.until(flow_run, "Cancelled")["state"]
    record = office.record(config)
    assert record.slots["selection@1"].ref.key in state["message"]
    assert "policy@1" not in record.slots
    assert (record.status, record.approved) == ("cancelled", {})


@pytest.mark.slow
def test_a_failure_is_notified(office: Office):
    flow_run = office.start(tiny_config(name="bad"), "-p", "ratio=0.01")
    office.until(flow_run, "Failed")
    assert "training.prompts_per_step=4" in office.message("bad-", "failed")["b"]


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_recorded_as_crashed_and_notified(office: Office):
    config = tiny_config(name="gone", training={**tiny_config().training.model_dump(), "steps": 200})
    idle = descendants(office.served.process.pid)
    flow_run = office.start(config)
    office.served.trains()
    for pid in descendants(office.served.process.pid) - idle:
        if b"resource_tracker" not in command_of(pid):  # the command's own
            os.kill(pid, signal.SIGKILL)
    office.until(flow_run, "Crashed")
    assert "Crashed" in office.message("gone-", "failed")["b"]


@pytest.mark.slow
@pytest.mark.extended
def test_after_a_kill_of_the_command_its_next_start_records_the_run_as_crashed(tmp_path: Path, known: Path):
    root, port = shutil.copytree(known, tmp_path / "root"), free_port()
    training = tiny_config().training.model_dump() | {"steps": 4000}
    office = Office(Served(root, port, tmp_path / "out"), [])
    try:
        # Shorter than the command accepts, so that this test need not wait for three heartbeats.
        office.run(sys.executable, "-c", INSTALL, str(SILENCE_S))
        flow_run = office.start(tiny_config(training=training))
        office.until(flow_run, "Running")
        time.sleep(3)  # its first heartbeat is sent
        for pid in servers_of(root):  # as when the machine is lost
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while servers_of(root):  # a killed server holds its port until its memory is freed
            time.sleep(0.1)
        office = Office(Served(root, port, tmp_path / "again"), [])
        state = office.until(flow_run, "Crashed", seconds=120)["state"]
        assert f"sent no heartbeat for {SILENCE_S} s" in state["message"]
    finally:
        for pid in servers_of(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(CHECKOUT)
            os.execvpe(command[0], command, person(TERM="xterm", COLUMNS="160", **environment))
        self.seen = ""

    def until(self, words: str, seconds: float = 500) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen[-3000:]
            try:
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended: {self.seen[-3000:]}") from None

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self.screen, f"{line}\n".encode())

    def end(self) -> int:
        try:
            while chunk := os.read(self.screen, 65536):
                self.seen += chunk.decode(errors="replace")
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_a_person_is_asked_on_the_terminal(tmp_path: Path, known: Path, address: str):
    config, root = written(tmp_path / "tiny.yaml"), shutil.copytree(known, tmp_path / "root")
    command = [*CROPI, "run", str(config), "--root", str(root), "--approve", "--no-report"]
    question = "Train on it? [y]es, [n]o, or another ratio"
    terminal = Terminal(*command, PREFECT_API_URL=address)
    terminal.until(question)
    assert "10 of 40" in terminal.seen
    terminal.type("n")
    assert terminal.end() == 1
    assert "was declined" in terminal.seen
    terminal = Terminal(*command, PREFECT_API_URL=address)
    terminal.until(question)
    terminal.type("most")
    terminal.until("'most' is neither")
    terminal.type("0.05")
    terminal.until("fewer than training.prompts_per_step=4")
    terminal.type("0.5")
    terminal.until(question)
    terminal.type("y")
    assert terminal.end() == 0, terminal.seen
    store = Store(root)
    record = load_run(store, list_runs(store)[0])
    assert list(record.approved.values()) == [0.5]
    assert store.manifest(record.slots["policy@1"].ref).inputs["selection"] == record.slots["selection@1"].ref
    terminal = Terminal(*command, PREFECT_API_URL=address)  # answered already
    assert terminal.end() == 0, terminal.seen
    assert "Train on it?" not in terminal.seen
