"""The job of docs/guides/slurm.md: SIGTERM stops the run and queues the job again; it ends with its run's status."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

JOB = CHECKOUT / "examples" / "slurm.sbatch"
PROGRAMS = {
    "cropi": '#!/bin/sh\necho "cropi $*" >> "$RECORD"\ntrap "echo stopped >> $RECORD; exit 143" TERM\n'
    'if [ "$2" = wrong.yaml ]; then exit 2; fi\nif [ "$2" = short.yaml ]; then exit 0; fi\n'
    "while :; do sleep 0.05; done\n",
    "scontrol": '#!/bin/sh\necho "scontrol $*" >> "$RECORD"\n',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which recorders take the place of cropi and of SLURM's command."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    record.touch()
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_JOB_ID": "42"}


def test_a_stopped_job_stops_its_run_and_is_queued_again(environment):
    record = Path(environment["RECORD"])
    with subprocess.Popen(["sh", str(JOB), "my.yaml", "--root", "a root"], env=environment) as job:
        deadline = time.monotonic() + 60
        while not record.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # until the recorder has its trap
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0
    assert record.read_text().splitlines() == [
        "cropi run my.yaml --root a root",
        "stopped",
        "scontrol requeue 42",
    ]


@pytest.mark.parametrize(("config", "status"), [("short.yaml", 0), ("wrong.yaml", 2)])
def test_a_job_ends_as_its_run(environment, config, status):
    done = subprocess.run(["sh", str(JOB), config], env=environment, check=False)
    assert done.returncode == status
    assert "scontrol" not in Path(environment["RECORD"]).read_text()
