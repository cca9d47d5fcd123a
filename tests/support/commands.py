"""The commands of cropi and of Prefect as a user starts them, in processes of their own."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

from cropi_core.system.ports import free_port as free_port
from data_schemas.config import Config
from flows.serving.environment import read_served
from tests.support import processes
from tests.support.paths import CHECKOUT


def world(**families: int) -> dict:
    return {"kind": "world", "families": families}


def tiny_config(**changes) -> Config:
    """Return the smallest configuration in which every step has something to do."""
    settings = {
        "name": "tiny",
        "stages": 1,
        "data": {
            "pool": {**world(reverse=20, copy=10, sort=10), "seed": 0},
            "validation": {"goal": {**world(reverse=6), "seed": 1}},
            "test": {"held_out": {**world(reverse=6), "seed": 2}},
        },
        "rollouts": {"pool": {"samples": 4}, "validation": {"samples": 4}, "shard_prompts": 16},
        "projection": {"k": 64},
        "gradients": {"rows_per_shard": 16, "block_rows": 8},
        "selection": {"ratio": 0.25},
        "training": {"steps": 2, "prompts_per_step": 4, "sampling": {"samples": 4}, "learning_rate": 1e-5},
        "evaluation": {"sampling": {"samples": 2}},
        "runtime": {"device": "cpu", "threads": 1},
    }
    return Config.model_validate(settings | changes)


CROPI = [sys.executable, "-m", "flows.command.app"]
INSTALLED = [sys.executable, "-P", *CROPI[1:]]
"""As the script `cropi` starts it: without the working directory on the path."""


def person(**settings: str) -> dict[str, str]:
    """A user's environment: none of what the tests have set up for Prefect."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"} | settings


def wait_for_server(server: subprocess.Popen, url: str, log: Path, seconds: float) -> None:
    """Wait until a Prefect server answers; its end, or no answer in time, is an error that shows its log."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            answer(f"{url}/health")
            return
        except OSError:
            time.sleep(0.3)


MARK = "CROPI_TEST_ROOT"
"""Variable with the root of a command under test. Warm processes keep it, and none of Prefect's variables."""


def start(config: Path, root: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return processes.start(
        [*CROPI, "run", str(config), "--root", str(root), *more],
        env=person(**{MARK: str(root)}, **environment),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def written(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(tiny_config(**changes).model_dump(mode="json")), encoding="utf-8")
    return path


def servers_of(root: Path) -> list[int]:
    """Processes of a command on this root, and those whose Prefect home lies below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes()
            if any(f"{name}={root}".encode() in environment for name in ("PREFECT_HOME", MARK)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> set[int]:
    """Every process below one, and itself."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


PREFECT = Path(sys.executable).parent / "prefect"


DEPLOYMENTS = {
    "cropi/curriculum",
    "cropi/nightly",
    "cropi-select/select",
    "cropi-rollouts/collect",
    "cropi-gradients/extract",
    "cropi-scores/rescore",
    "cropi-selection/reselect",
    "cropi-training/train",
    "cropi-evaluation/evaluate",
}


def answer(url: str, body: dict | None = None, password: str | None = None):
    """Ask a server's API, again while it says that its database is busy, as Prefect's own client does."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if password is not None:
        headers["authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
    request = urllib.request.Request(url, data=data, headers=headers)
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(0.5)
    raise AssertionError(f"{url} answers 503")


class Desk:
    """A person's terminal: commands against one server."""

    def __init__(self, environment: dict[str, str], url: str, root: Path) -> None:
        self.environment, self.url, self.root = environment, url, root

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = processes.run(
            [PREFECT, *arguments],
            env=self.environment,
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def work_through(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Start a run and let a worker take it."""
        command = [PREFECT, "deployment", "run", *arguments, "--watch", "--watch-interval", "1"]
        watching = processes.start(
            command, env=self.environment, cwd=CHECKOUT, stdout=-1, stderr=-2, text=True
        )
        try:
            deadline = time.monotonic() + 500
            while not answer(
                f"{self.url}/flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}}
            ):
                assert watching.poll() is None, watching.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            worker = self.run("worker", "start", "--pool", "cropi", "--run-once", "--limit", "1")
            out, _ = watching.communicate(timeout=500)
        finally:
            watching.kill()
        return subprocess.CompletedProcess(command, watching.returncode, out, worker.stdout + worker.stderr)


class Served:
    """A running `cropi serve`."""

    def __init__(self, root: Path, port: int, out: Path, cwd: Path = CHECKOUT) -> None:
        self.root, self.out = root, out
        self.url = f"http://127.0.0.1:{port}/api"
        with out.open("w") as log:
            self.process = processes.start(
                [*INSTALLED, "serve", "--root", str(root), "--port", str(port)],
                env=person(**{MARK: str(root)}),
                cwd=cwd,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.until("Ctrl-C stops")
        served = read_served(root / ".prefect")
        assert served is not None
        self.password = served.password

    def answer(self, path: str, body: dict | None = None):
        """Ask its API, with its password."""
        return answer(f"{self.url}/{path}", body, self.password)

    def until(self, words: str, silence: float = 120) -> None:
        """Wait for words; that they do not come is told by a silence, as machines differ in how long steps take."""
        seen, deadline = "", time.monotonic() + silence
        while words not in (said := self.out.read_text()):
            if said != seen:
                seen, deadline = said, time.monotonic() + silence
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)

    def trains(self, seconds: float = 500) -> None:
        """Wait until a stage is under way."""
        deadline = time.monotonic() + seconds
        while not list((self.root / ".work").glob("policy-*/**/*")):
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.2)

    def ask(self, config, *more: str) -> subprocess.CompletedProcess[str]:
        text = json.dumps(config.model_dump(mode="json"))
        return processes.run(
            [PREFECT, "deployment", "run", "cropi/local", "-p", f"config={text}", *more],
            env=person(
                PREFECT_API_URL=self.url,
                PREFECT_API_AUTH_STRING=self.password,
                PREFECT_HOME=str(self.root / ".prefect"),
            ),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def runs(self) -> dict[str, str]:
        return {run["name"]: run["state_name"] for run in self.answer("flow_runs/filter", {})}


def command_of(pid: int) -> bytes:
    """The words of a process's command; none of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
