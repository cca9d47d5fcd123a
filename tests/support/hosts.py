"""Two hosts on one machine: network namespaces with an address, a name and a cable each, for tests that root runs.

:func:`inside` starts a process in network, mount and process namespaces of its own, the hub. All that it makes there
ends with it: bridges, names of namespaces, processes. In it, :class:`Network` makes the hosts.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HUB, HOSTS = "10.77.0.254", {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
NAMES = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in {"hub": HUB, **HOSTS}.items())
UNSHARED = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def missing() -> str:
    """Say what hosts need and this machine lacks; empty if nothing."""
    if os.geteuid():
        return "network namespaces need root"
    if any(shutil.which(program) is None for program in ("ip", "unshare")):
        return "the programs ip and unshare are needed"
    tried = subprocess.run(
        [*UNSHARED, "ip", "link", "add", "hub", "type", "bridge"], capture_output=True, check=False
    )
    return f"namespaces cannot be made here: {tried.stderr.decode()}" if tried.returncode else ""


def inside(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in the hub."""
    return [*UNSHARED, sys.executable, "-m", module, *arguments]


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"


class Network:
    """The bridge of this hub, and the hosts at its cables.

    Args:
        folder: Directory for the command of each host, ``on-HOST``, which runs its arguments there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not Path("/run/hosts").exists():
            self._connect()
        for name in HOSTS:
            script = self.command(name)
            script.write_text(
                f'#!/bin/sh\nexec ip netns exec {name} unshare --uts sh -c \'hostname {name}; exec "$@"\' sh "$@"\n'
            )
            script.chmod(0o755)

    def _connect(self) -> None:
        _do("mount", "-t", "tmpfs", "none", "/run")
        Path("/run/hosts").write_text(NAMES)
        _do("mount", "--bind", "/run/hosts", "/etc/hosts")
        _do("ip", "link", "set", "lo", "up")
        _do("ip", "link", "add", "hub", "type", "bridge")
        _do("ip", "addr", "add", f"{HUB}/24", "dev", "hub")
        _do("ip", "link", "set", "hub", "up")
        for name, address in HOSTS.items():
            _do("ip", "netns", "add", name)
            _do("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "wire", "netns", name)
            _do("ip", "link", "set", f"to-{name}", "master", "hub", "up")
            _do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            _do("ip", "-n", name, "link", "set", "wire", "up")
            _do("ip", "-n", name, "link", "set", "lo", "up")

    def command(self, host: str) -> Path:
        """Return the command that runs its arguments on a host, with its standard input, as ssh does."""
        return self.folder / f"on-{host}"

    def start(
        self, host: str, command: Sequence[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a program on a host."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [str(self.command(host)), *command], env=environment, stdin=-3, stdout=out, stderr=out
            )

    def cable(self, host: str, state: str) -> None:
        """Cut the cable of a host (``down``), or plug it in again (``up``)."""
        _do("ip", "link", "set", f"to-{host}", state)

    def kill(self, host: str) -> int:
        """Kill every process of a host, as a loss of power does; return their number."""
        found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True)
        pids = [int(pid) for pid in found.stdout.split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)
