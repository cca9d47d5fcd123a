"""Many runs queued on one Prefect server, taken by several workers that share one root.

The runs share prompts, the base policy, rollouts, gradients and scores, and differ in what they select and train. Every
fifth one is queued twice. All must complete; every artifact of every run must be in the root and whole; every key must
have been computed once, over all records. With ``--kill`` a worker is killed with everything below it as soon
as a run is in training; its run is queued again, and another worker takes its place.

    python -m tests.campaigns.load --count 50 --workers 4 --root /data/load
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import list_runs, load_run
from tests.support.commands import (
    PREFECT,
    Desk,
    answer,
    descendants,
    free_port,
    person,
    tiny_config,
    wait_for_server,
)
from tests.support.paths import CHECKOUT

ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}
LIMIT = 3600


def served(root: Path) -> tuple[subprocess.Popen[bytes], Desk]:
    """Start a server with a work pool and the deployments of prefect.yaml."""
    home, port = root / "prefect", free_port()
    home.mkdir(parents=True)
    url = f"http://127.0.0.1:{port}/api"
    environment = person(
        PREFECT_HOME=str(home),
        PREFECT_API_URL=url,
        PREFECT_PROFILES_PATH=str(home / "profiles.toml"),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_WORKER_QUERY_SECONDS="2",
        PYTHONPATH=str(CHECKOUT),
        CROPI_HOME=str(CHECKOUT),
        CROPI_ROOT=str(root / "root"),
        NO_COLOR="1",
    )
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    wait_for_server(server, url, home / "server.log", 300)
    desk = Desk(environment, url, root / "root")
    desk.run("work-pool", "create", "cropi", "--type", "process")
    desk.run("--no-prompt", "deploy", "--all")
    return server, desk


def queued(desk: Desk, count: int) -> list[str]:
    """Queue the runs; return their ids on the server."""
    (deployment,) = answer(
        f"{desk.url}/deployments/filter", {"deployments": {"name": {"any_": ["curriculum"]}}}
    )
    base, ids = tiny_config().model_dump(mode="json"), []
    for number in range(count):
        variant = number - 1 if number % 5 == 4 else number
        config = base | {
            "name": f"load_{variant}",
            "selection": base["selection"] | {"ratio": 0.1 + variant / 200},
        }
        body = {"parameters": {"config": config}, "name": f"load-{number}", "state": {"type": "SCHEDULED"}}
        ids.append(answer(f"{desk.url}/deployments/{deployment['id']}/create_flow_run", body)["id"])
    return ids


def worker(desk: Desk, number: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a worker that executes one run at a time, as the leader of a group."""
    command = [PREFECT, "worker", "start", "--pool", "cropi", "--limit", "1", "--name", f"worker-{number}"]
    with (log / f"worker-{number}.log").open("w") as stream:
        return subprocess.Popen(
            command, env=desk.environment, cwd=CHECKOUT, stdout=stream, stderr=stream, start_new_session=True
        )


def states(desk: Desk, ids: list[str]) -> dict[str, str]:
    """Return the state of each run by its id."""
    body = {"flow_runs": {"id": {"any_": ids}}, "limit": 200}
    return {run["id"]: run["state_name"] for run in answer(f"{desk.url}/flow_runs/filter", body)}


def faults_of(root: Path) -> tuple[list[str], dict[str, int]]:
    """Return what is wrong with the records and artifacts of a root, and how many artifacts were computed and found."""
    store, computed, origins = Store(root), Counter(), Counter()
    faults = []
    for run in list_runs(store):
        record = load_run(store, run)
        if record.status != "done":
            faults.append(f"{run} is {record.status}: {record.error}")
        for slot, entry in record.slots.items():
            origins[entry.origin] += 1
            computed[entry.ref.key] += entry.origin == "computed"
            if store.manifest(entry.ref.key).digest != entry.ref.digest:
                faults.append(f"{run}: {slot} has another digest")
    faults += [f"{key}: {fault}" for key in store.keys() for fault in store.faults(key)]  # noqa: SIM118
    faults += [f"{key} was computed {times} times" for key, times in computed.items() if times > 1]
    left = [path.name for path in (root / ".work").glob("*-v*") if path.is_dir()]
    faults += [f"{name} is left in .work" for name in left]
    return faults, dict(origins)


def load(count: int, workers: int, root: Path, kill: bool) -> dict[str, Any]:
    """Queue the runs, let the workers take them, and look at what is in the root."""
    shutil.rmtree(root, ignore_errors=True)
    server, desk = served(root)
    begin, events, running = time.monotonic(), [], {}
    try:
        ids = queued(desk, count)
        running |= {number: worker(desk, number, root) for number in range(workers)}
        while True:
            now = states(desk, ids)
            counts = Counter(now.values())
            print(round(time.monotonic() - begin), dict(counts), flush=True)
            if kill and not events and list((root / "root" / ".work").glob("policy-*")):
                number = random.Random(count).choice(sorted(running))
                killed = descendants(running[number].pid)
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
                running[number].wait()
                again = [queued_again(desk, one) for one in ids if process_of(desk, one) in killed]
                ids = [one for one in ids if process_of(desk, one) not in killed] + again
                events.append(f"worker-{number} was killed after {time.monotonic() - begin:.0f} s")
                running[workers] = worker(desk, workers, root)
            if len(now) == count and set(now.values()) <= ENDED:
                break
            if time.monotonic() - begin > LIMIT:
                events.append("the limit of time was reached")
                break
            time.sleep(5)
    finally:
        for one in running.values():
            one.terminate()
        server.terminate()
        for one in (*running.values(), server):
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(60)
            one.kill()
    faults, origins = faults_of(root / "root")
    faults += [f"{state} {number}" for state, number in counts.items() if state != "Completed"]
    return {
        "runs": count,
        "workers": workers,
        "seconds": round(time.monotonic() - begin),
        "states": dict(counts),
        "records": len(list_runs(Store(root / "root"))),
        "artifacts": len(list(Store(root / "root").keys())),
        "origins": origins,
        "events": events,
        "faults": faults[:40],
    }


def process_of(desk: Desk, flow_run: str) -> int:
    """Return the process of a run; 0 before it has one."""
    place = answer(f"{desk.url}/flow_runs/{flow_run}")["infrastructure_pid"] or ":0"
    return int(place.rpartition(":")[2])


def queued_again(desk: Desk, flow_run: str) -> str:
    """Queue a run with the parameters of another one; return its id."""
    old = answer(f"{desk.url}/flow_runs/{flow_run}")
    body = {"parameters": old["parameters"], "name": f"{old['name']}-again", "state": {"type": "SCHEDULED"}}
    return answer(f"{desk.url}/deployments/{old['deployment_id']}/create_flow_run", body)["id"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill", action="store_true", help="Kill one worker while a run is in training.")
    parser.add_argument("--root", type=Path, required=True)
    given = parser.parse_args()
    told = load(given.count, given.workers, given.root.resolve(), given.kill)
    (given.root / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1))
    sys.exit(1 if told["faults"] else 0)
