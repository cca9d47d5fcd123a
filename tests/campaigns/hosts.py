"""Two hosts of network namespaces, their root on an S3 server: cables are cut and hosts are lost in every step.

The hub has the S3 server and a Prefect server; each host has a worker, and a node of one Ray cluster. The worker of
``alpha`` executes a curriculum: gradients on the Ray cluster, training on both hosts. In the middle of a step a host
loses its cable or all its processes. Then the run ends, or fails with an error; in that case the worker of ``beta``, or
of ``alpha`` if ``beta`` was lost, takes the same run and resumes it. Every digest must be that of one machine except
for what two ranks trained: those weights differ by at most :data:`TOLERANCE`. What the step had on disk
at the fault must be in its artifact, not written again.

    python -m tests.campaigns.hosts --root /data/hosts          # as root; --count 3: training alone, without services

A case takes one to three minutes on two cores.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cropi_core.artifacts.remote_store import cache_directory
from cropi_core.artifacts.store import Store
from cropi_core.errors import CropiError
from cropi_core.progress import silent
from cropi_core.runs.records import load_run, run_id
from cropi_core.training.launch import launched
from data_schemas.config import Config
from data_schemas.runtime import Launch
from tests.campaigns.ledger import Case, main
from tests.support.bucket import CREDENTIALS, Server, s3
from tests.support.commands import CROPI, PREFECT, Desk, answer, person, tiny_config, wait_for_server
from tests.support.hosts import HUB, Network, inside
from tests.support.paths import CHECKOUT
from tests.support.training import CPU, SMALL, arguments_of, write_policy, write_tables

MARK = "CROPI_CAMPAIGN_HUB"
SERVER = f"http://{HUB}:4200/api"
RAY = str(Path(sys.executable).parent / "ray")
TOLERANCE = 1e-4
"""Largest difference of a weight after training on two hosts: gradients are added in another order."""
SILENCE_S = 25
"""Seconds after which a training process gives up waiting for another one."""
LIMIT_S = 900
"""Seconds for a run, at most."""
BY_TWO = ("policy@1", "evaluation@1")
"""Slots that depend on weights that two ranks trained."""
PROGRESS = {
    "rollouts": ("rollouts-*", "part-*.parquet", 3),
    "gradients": ("gradients-*", "**/c/*/0", 3),
    "training": ("policy-*", "**/checkpoint-*/whole.json", 1),
    "evaluation": ("evaluation-*", "**/completions.parquet", 1),
}
"""Where the work of a step is, its files, and after how many of them the fault comes."""
CASES = [
    *(
        (step, fault, host)
        for fault in ("kill", "cut")
        for host in ("beta", "alpha")
        for step in ("gradients", "training")
    ),
    *((step, fault, "alpha") for fault in ("kill", "cut") for step in ("rollouts", "evaluation")),
]
"""Step, fault and host; ``beta`` has no part in the other two steps."""
ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}


def config() -> Config:
    """Return the curriculum of all cases; steps last some seconds."""
    world = {"kind": "world", "families": {"reverse": 48, "copy": 24, "sort": 24}, "seed": 0}
    return tiny_config(
        data=tiny_config().data.model_dump() | {"pool": world},
        rollouts={"pool": {"samples": 4}, "validation": {"samples": 4}, "shard_prompts": 6},
        gradients={"rows_per_shard": 6, "block_rows": 6},
        training={"steps": 12, "prompts_per_step": 4, "sampling": {"samples": 4}, "learning_rate": 1e-5},
        runtime={"device": "cpu", "threads": 1, "save_steps": 1, "generation_rows": 24},
    )


class Cluster:
    """The services of the hub, and the worker and Ray node of each host."""

    def __init__(self, root: Path) -> None:
        self.root, self.network = root, Network(root / "hosts")
        self.bucket = Server(root, host=HUB)
        os.environ |= self.bucket.environment | {"CROPI_CACHE": str(root / "cache")}
        s3().mkdir("campaign")
        self.home = root / "prefect"
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.nodes: dict[str, list[subprocess.Popen[bytes]]] = {}
        with (self.home / "server.log").open("w") as log:
            command = [PREFECT, "server", "start", "--host", HUB, "--port", "4200", "--no-ui"]
            self.server = subprocess.Popen(command, env=self.environment("hub"), stdout=log, stderr=log)
        wait_for_server(self.server, SERVER, self.home / "server.log", 300)
        self.desk = Desk(self.environment("hub"), SERVER, root)
        self.desk.run("work-pool", "create", "cropi", "--type", "process")
        self.desk.run("--no-prompt", "deploy", "--name", "curriculum")
        for host in ("alpha", "beta"):
            self.desk.run("work-queue", "create", host, "--pool", "cropi")

    def environment(self, host: str) -> dict[str, str]:
        """Return the environment of a person on a host: a home and temporary files of its own, the cache of all."""
        home = self.root / f"home-{host}"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        return person(
            **CREDENTIALS,
            AWS_ENDPOINT_URL=self.bucket.address,
            CROPI_CACHE=str(self.root / "cache"),
            CROPI_COMMANDS="*",
            CROPI_HOME=str(CHECKOUT),
            HOME=str(home),
            NO_COLOR="1",
            PREFECT_API_URL=SERVER,
            PREFECT_HOME=str(home / "prefect"),
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_WORKER_QUERY_SECONDS="1",
            PYTHONPATH=str(CHECKOUT),
            RAY_USAGE_STATS_ENABLED="0",
            TMPDIR=str(home / "tmp"),
        )

    def up(self, host: str) -> None:
        """Start the worker and the Ray node of a host, if they do not run."""
        nodes = self.nodes.get(host)
        if nodes and all(node.poll() is None for node in nodes):
            return
        self.down(host)
        address = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}[host]
        place = ["--head", "--port=6379", "--ray-client-server-port=10001", "--include-dashboard=false"]
        place = place if host == "alpha" else ["--address=alpha:6379"]
        size = ["--num-cpus=1", "--object-store-memory=100000000", f"--node-ip-address={address}", "--block"]
        variables = self.environment(host)
        worker = ["worker", "start", "--pool", "cropi", "--work-queue", host, "--limit", "1", "--name", host]
        logs = self.root / f"home-{host}"
        self.nodes[host] = [
            self.network.start(host, [RAY, "start", *place, *size], logs / "ray.log", variables),
            self.network.start(host, [str(PREFECT), *worker], logs / "worker.log", variables),
        ]

    def down(self, host: str) -> None:
        """Kill what runs on a host."""
        self.network.kill(host)
        for node in self.nodes.get(host, []):
            node.wait()
        self.nodes.pop(host, None)

    def restore(self) -> None:
        """Bring both hosts up; the Ray cluster is a new one if either of them was lost."""
        for host in ("alpha", "beta"):
            self.network.cable(host, "up")
        deadline = time.monotonic() + LIMIT_S
        status = [str(self.network.command("alpha")), RAY, "status", "--address=alpha:6379"]
        while "2.0 CPU" not in (said := self._said(status) if self.nodes else ""):
            assert time.monotonic() < deadline, said
            if not self.nodes or any(node.poll() is not None for node in self.nodes.get("alpha", [])):
                self.down("beta")
                self.down("alpha")
                self.up("alpha")
            elif "1.0 CPU" in said:
                self.up("beta")
            time.sleep(1)

    def _said(self, command: list[str]) -> str:
        return subprocess.run(
            command, env=self.environment("alpha"), capture_output=True, text=True, check=False
        ).stdout

    def submit(self, host: str, root: str, *, both: bool) -> str:
        """Queue the run for the worker of a host; return its id on the server."""
        other = "beta" if host == "alpha" else "alpha"
        runtime = config().runtime.model_dump(mode="json")
        if both:
            launch = {"processes": 2, "machines": [str(self.network.command(other))], "address": host}
            runtime |= {"ray": {"address": "ray://alpha:10001", "workers": 2}, "launch": launch}
            runtime["trl"] |= {"ddp_timeout": SILENCE_S}
        whole = config().model_dump(mode="json") | {"runtime": runtime}
        (deployment,) = answer(
            f"{SERVER}/deployments/filter", {"deployments": {"name": {"any_": ["curriculum"]}}}
        )
        body = {"parameters": {"config": whole, "root": root}, "state": {"type": "SCHEDULED"}}
        made = answer(
            f"{SERVER}/deployments/{deployment['id']}/create_flow_run", body | {"work_queue_name": host}
        )
        return made["id"]

    def state(self, run: str) -> tuple[str, str]:
        """Return the name and the message of a run's state."""
        found = answer(f"{SERVER}/flow_runs/{run}")["state"]
        return found["name"], found["message"] or ""

    def close(self) -> None:
        """End everything."""
        for host in list(self.nodes):
            self.down(host)
        self.server.kill()
        self.server.wait()
        self.bucket.stop()


def waited(condition: Any, seconds: float) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def work_of(root: str, step: str) -> dict[str, int]:
    """Return the files of a step's work in progress, with the time at which each was written."""
    place, files, _ = PROGRESS[step]
    found = {}
    for path in (cache_directory(root) / ".work").glob(
        f"{place}/{files}" if "**" in files else f"{place}/**/{files}"
    ):
        with contextlib.suppress(OSError):
            found["/".join(path.parts[-3:])] = path.stat().st_mtime_ns
    return found


def record_of(root: str) -> Any:
    """Return the record of the run below a root."""
    return load_run(Store(root), run_id(config()))


def weights(root: str) -> dict[str, Any]:
    """Return the trained weights."""
    store = Store(root)
    folder = store.path(record_of(root).slots["policy@1"].ref.key) / "checkpoint"
    return load_file(folder / "model.safetensors")


def train(folder: Path, name: str, *, both: bool) -> int:
    """Train a stage of a policy of 8,000 parameters, with two processes on both hosts or one here."""
    launch = Launch()
    if both:
        machines = (str(folder / "hosts" / "on-beta"),)
        launch = Launch(processes=2, machines=machines, address="alpha")
    runtime = CPU.model_copy(
        update={
            "launch": launch,
            "save_steps": 1,
            "trl": CPU.trl.model_copy(update={"ddp_timeout": SILENCE_S}),
        }
    )
    training = SMALL.model_copy(update={"steps": 40})
    arguments = arguments_of(folder, name) | {"training": training, "runtime": runtime, "name": name}
    try:
        print(json.dumps(launched(arguments, runtime, silent, folder / name / "logs")))
    except CropiError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


def newest(folder: Path) -> int:
    """Return the step of the newest whole checkpoint inside a stage; older ones are removed as it trains."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in folder.rglob("whole.json")), default=0)


def launch_case(root: Path, fault: str) -> dict[str, Any]:
    """Train on both hosts by ``runtime.launch.machines``; lose ``beta`` after three steps, and train again."""
    folder, begin = root / "launch", time.monotonic()
    network = Network(folder / "hosts")
    script = "import sys; from tests.campaigns.hosts import *; folder, name, places = sys.argv[1:]; "
    script += "sys.exit(train(Path(folder), name, both=places == 'both'))"
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}

    def started(name: str, places: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", script, str(folder), name, places]
        return network.start("alpha", command, folder / f"{name}.log", environment)

    def told(name: str) -> dict[str, Any]:
        return json.loads((folder / f"{name}.log").read_text().splitlines()[-1])

    if not (folder / "one" / "metrics.parquet").exists():
        write_policy(folder / "policy", seed=0)
        write_tables(folder)
        assert started("one", "alone").wait() == 0, (folder / "one.log").read_text()
    name, faults, error, noticed, had = f"two-{fault}", [], "", 0.0, 0
    shutil.rmtree(folder / name, ignore_errors=True)
    child = started(name, "both")
    if fault != "none":
        waited(lambda: newest(folder / name) > 2 or child.poll() is not None, LIMIT_S)
        had, at = newest(folder / name), time.monotonic()
        _ = network.kill("beta") if fault == "kill" else network.cable("beta", "down")
        faults += ["a lost host is not an error"] if child.wait() == 0 else []
        error, noticed = told(name).get("error", ""), time.monotonic() - at
        faults += [] if "on-beta" in error else ["the error does not name the machine"]
        network.cable("beta", "up")
        left = subprocess.run(
            ["ip", "netns", "pids", "beta"], capture_output=True, text=True, check=True
        ).stdout
        faults += [f"processes are left: {left.split()}"] if left.strip() else []
        child = started(name, "both")
    faults += [] if child.wait() == 0 else [f"it fails: {told(name)}"]
    resumed = told(name).get("resumed_from_step")
    faults += (
        [] if fault == "none" or (resumed or 0) >= had > 0 else [f"resumed from {resumed} of {had} steps"]
    )
    if not faults:
        a, b = (load_file(folder / one / "checkpoint" / "model.safetensors") for one in ("one", name))
        difference = max(float((a[part] - b[part]).abs().max()) for part in a)
        faults += [f"weights differ by {difference:.1e}"] if difference > TOLERANCE else []
    return {
        "ok": not faults,
        "found": "complete"
        if fault == "none"
        else f"resumed from step {resumed}, the last whole checkpoint {had}",
        "error": error[:600],
        "noticed": round(noticed, 1),
        "whole": round(time.monotonic() - begin, 1),
        "faults": faults,
    }


def reference(cluster: Cluster) -> str:
    """Return the root of the same run on one machine, made once."""
    root = "s3://campaign/one"
    if cache_directory(root).exists():
        return root
    mark = cluster.root / "config.yaml"
    mark.write_text(json.dumps(config().model_dump(mode="json")))
    done = subprocess.run(
        [str(cluster.network.command("alpha")), *CROPI, "run", str(mark), "--root", root],
        env=cluster.environment("alpha"),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def compared(one: str, root: str) -> list[str]:
    """Return what differs from the run on one machine."""
    ours, theirs, faults = record_of(root), record_of(one), []
    if ours.status != "done" or set(ours.slots) != set(theirs.slots):
        return [
            f"the run is {ours.status}: {ours.error}; slots {sorted(set(theirs.slots) ^ set(ours.slots))}"
        ]
    for slot, entry in theirs.slots.items():
        same = entry.ref.digest == ours.slots[slot].ref.digest
        if not same and slot not in BY_TWO:
            faults.append(f"{slot} has another digest")
    a, b = weights(one), weights(root)
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    return faults + ([f"weights differ by {difference:.1e}"] if difference > TOLERANCE else [])


def kept(root: str, step: str, before: dict[str, int]) -> list[str]:
    """Return the files that a step had at the fault, and that its artifact has not, or has anew."""
    if step == "training":  # checkpoints inside a stage are not part of its artifact
        resumed = Store(root).manifest(record_of(root).slots["policy@1"].ref.key).summary["resumed_from_step"]
        had = max(int(name.split("/")[-2].rpartition("-")[2]) for name in before)
        return [] if resumed and resumed >= had else [f"training resumed from step {resumed} of {had}"]
    place = PROGRESS[step][0].removesuffix("-*")
    now = {
        "/".join(path.parts[-3:]): path.stat().st_mtime_ns
        for path in cache_directory(root).glob(f"{place}-*/**/*")
        if path.is_file()
    }
    return [name for name, at in before.items() if now.get(name) != at]


def fault_case(cluster: Cluster, step: str, fault: str, host: str) -> dict[str, Any]:
    """Lose a host in the middle of a step, let the run end, and look at what is in the root."""
    root = f"s3://campaign/{step}-{fault}-{host}"
    cluster.restore()
    one, begin, error = reference(cluster), time.monotonic(), ""
    run = cluster.submit("alpha", root, both=True)
    count = PROGRESS[step][2]
    if not waited(lambda: len(work_of(root, step)) >= count or cluster.state(run)[0] in ENDED, LIMIT_S):
        return {"ok": False, "found": "the step never came", "state": cluster.state(run)}
    before, at = work_of(root, step), time.monotonic()
    if fault == "kill":
        cluster.down(host)
    else:
        cluster.network.cable(host, "down")
    lost = fault == "kill" and host == "alpha"  # no process is left to record the end
    ended = lost or waited(lambda: cluster.state(run)[0] in ENDED, 300 if host == "beta" else 60)
    state, error = cluster.state(run)
    seconds, again = time.monotonic() - at, state != "Completed"
    if again:
        successor = "beta" if host == "alpha" else "alpha"
        cluster.up(successor)
        run = cluster.submit(successor, root, both=False)
        if fault == "cut" and host == "alpha" and not ended:
            cluster.network.cable(host, "up")
        waited(lambda: cluster.state(run)[0] in ENDED, LIMIT_S)
    cluster.network.cable(host, "up")
    final, said = cluster.state(run)
    faults = compared(one, root) if final == "Completed" else [f"the run is {final}: {said}"]
    written = kept(root, step, before) if final == "Completed" and before else []
    faults += [f"written again: {written[:4]}"] if written else []
    found = f"resumed after {state}" if again else "went to its end"
    return {
        "ok": not faults,
        "found": found,
        "error": error[:500],
        "had": len(before),
        "noticed": round(seconds, 1),
        "whole": round(time.monotonic() - begin, 1),
        "faults": faults,
    }


def whole_case(cluster: Cluster) -> dict[str, Any]:
    """Run the curriculum on both hosts without a fault."""
    root = "s3://campaign/both"
    cluster.restore()
    one, begin = reference(cluster), time.monotonic()
    run = cluster.submit("alpha", root, both=True)
    waited(lambda: cluster.state(run)[0] in ENDED, LIMIT_S)
    state, said = cluster.state(run)
    faults = compared(one, root) if state == "Completed" else [f"the run is {state}: {said}"]
    return {"ok": not faults, "found": state, "whole": round(time.monotonic() - begin, 1), "faults": faults}


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases; the services start with the first that needs them."""
    faults = ("kill", "cut", "none")[:count]
    for fault in faults:
        yield f"launch:{fault} beta", lambda f=fault: launch_case(root, f)
    if count <= len(faults):
        return
    cluster = Cluster(root)
    try:
        yield "whole:both", lambda: whole_case(cluster)
        for step, fault, host in CASES[: count - len(faults) - 1]:
            yield (
                f"{step}:{fault} {host}",
                lambda s=step, f=fault, h=host: fault_case(cluster, s, f, h),
            )
    finally:
        cluster.close()


if __name__ == "__main__":
    if MARK not in os.environ:
        os.environ[MARK] = "1"
        os.execvp("unshare", inside("tests.campaigns.hosts", *sys.argv[1:]))
    sys.exit(main("hosts that are lost", 4 + len(CASES), campaign))
