"""A cluster of SLURM on this machine: one node with two processors, its daemons and files below a directory."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from cropi_core.system.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "scancel")
PLACES = f"{os.environ['PATH']}:/usr/sbin"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={controller}
SlurmdPort={node}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Say what a cluster needs and this machine lacks; empty if nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]
    if absent:
        return f"SLURM is not installed: {', '.join(absent)}"
    return "the daemons of SLURM need root" if os.geteuid() else ""


class Slurm:
    """The daemons; :attr:`environment` is for programs that use the cluster."""

    def __init__(self, folder: Path) -> None:
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            controller=free_port(),
            node=free_port(),
        )
        (folder / "slurm.conf").write_text(text)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PLACES}
        munge = [
            f"--{name}={folder}/munge.{name.partition('-')[0]}"
            for name in ("pid-file", "log-file", "seed-file")
        ]
        key = [f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
        self.daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start(folder, "munged", "--force", "--foreground", *key, *munge)
            self._until(lambda: (folder / "munge.socket").exists())
            self._start(folder, "slurmctld", "-D", "-i")
            self._start(folder, "slurmd", "-D")
            self._until(lambda: "idle" in self.asked("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.stop()
            raise

    def asked(self, *command: str) -> str:
        """Run a command of SLURM; return what it prints."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout

    def stop(self) -> None:
        """End the daemons; what a job started ends with its node."""
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)

    def _start(self, folder: Path, name: str, *arguments: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    [str(shutil.which(name, path=PLACES)), *arguments],
                    env=os.environ | self.environment,
                    stdout=log,
                    stderr=log,
                )
            )

    def _until(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not ended, ended
            assert time.monotonic() < deadline, self.daemons
            time.sleep(0.1)
