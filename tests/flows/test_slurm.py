"""Runs of a work pool as jobs of SLURM (docs/guides/slurm.md): a cancelled job gives its run back."""

import json
import sys
import time
from pathlib import Path

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.runs.records import load_run, run_id
from tests.support import processes
from tests.support.commands import PREFECT, Desk, answer, tiny_config
from tests.support.paths import CHECKOUT
from tests.support.slurm import Slurm, missing

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(900)]
POOL = CHECKOUT / "deployments" / "slurm-pool.json"


def until(holds, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path: Path):
    if why := missing():
        pytest.skip(why)
    cluster = Slurm(tmp_path / "slurm")
    yield cluster
    cluster.stop()


def test_a_cancelled_job_gives_its_run_back_and_the_next_job_resumes_it(
    slurm: Slurm, desk: Desk, tmp_path: Path
):
    desk.run("work-pool", "update", "cropi", "--base-job-template", str(POOL))
    training = {"steps": 40, "prompts_per_step": 4, "sampling": {"samples": 4}, "learning_rate": 1e-5}
    runtime = {"device": "cpu", "threads": 1, "save_steps": 1}
    config, store = tiny_config(name="slurm", training=training, runtime=runtime), Store(tmp_path / "root")
    asked = ["-p", f"config={json.dumps(config.model_dump(mode='json'))}", "-p", f"root={store.root}"]
    desk.run("deployment", "run", "cropi/curriculum", *asked)
    (run,) = answer(f"{desk.url}/flow_runs/filter", {})

    def state() -> str:
        return answer(f"{desk.url}/flow_runs/{run['id']}")["state"]["name"]

    variables = (
        desk.environment
        | slurm.environment
        | {"PREFECT_WORKER_QUERY_SECONDS": "1", "SBATCH_OUTPUT": str(tmp_path / "job-%j.log")}
    )
    variables["PATH"] = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    with (tmp_path / "worker.log").open("w") as log:
        worker = processes.start(
            [PREFECT, "worker", "start", "--pool", "cropi", "--limit", "1"],
            env=variables,
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: list((store.root / ".work").glob("policy-*/**/checkpoint-*/whole.json")))
        first = slurm.asked("squeue", "--noheader", "--format=%i %j").split()
        assert first[1] == "cropi"
        slurm.asked("scancel", first[0])
        until(lambda: state() in ("Completed", "Failed", "Crashed", "Cancelled"))
        assert state() == "Completed", [log.read_text() for log in tmp_path.glob("*.log")]
    finally:
        worker.terminate()
        worker.wait(60)
    record = load_run(store, run_id(config))
    assert store.manifest(record.slots["policy@1"].ref.key).summary["resumed_from_step"]
