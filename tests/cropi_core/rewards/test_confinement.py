"""Verifiers without network and writable files, where the kernel can take them away, and what users are told."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cropi_core.errors import ConfigError
from cropi_core.rewards.cache import GradeCache
from cropi_core.rewards.process import MAY, GradingProcess, functions_limits
from cropi_core.rewards.verifier import Verifier
from cropi_core.rewards.worker import HINT, LARGEST_FILE
from cropi_core.system.children import child_environment
from cropi_core.system.confinement import Limits, confine, described, filter_program

linux = pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")

PROBE = """
import json, os, resource, socket, sys
from cropi_core.system.confinement import Limits, confine
limits, landlock, place, inside = json.loads(sys.argv[1])
said = confine(Limits(**limits), landlock=landlock)
actions = {
    "reads": lambda: open(f"{place}/own").read(),
    "writes": lambda: open(f"{place}/own", "a"),
    "makes": lambda: open(f"{place}/new", "x"),
    "writes inside": lambda: open(f"{inside}/new", "w"),
    "truncates": lambda: os.truncate(f"{place}/own", 0),
    "removes": lambda: os.unlink(f"{place}/old"),
    "renames": lambda: os.rename(f"{place}/other", f"{place}/moved"),
    "links": lambda: os.symlink("/", f"{place}/link"),
    "makes a directory": lambda: os.mkdir(f"{place}/directory"),
    "changes a mode": lambda: os.chmod(f"{place}/own", 0o777),
    "changes a time": lambda: os.utime(f"{place}/own"),
    "TCP": lambda: socket.socket(),
    "UDP": lambda: socket.socket(type=socket.SOCK_DGRAM),
    "UNIX": lambda: socket.socket(socket.AF_UNIX),
    "pair": lambda: socket.socketpair(),
    "starts": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "reads the parent": lambda: open(f"/proc/{os.getppid()}/environ", "rb").read(1),
    "signals the parent": lambda: os.kill(os.getppid(), 0),
    "limits the parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0)),
    "limits itself": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
}
done = []
for name, action in actions.items():
    try:
        action()
        done.append(name)
    except OSError:
        pass
print(json.dumps([said, done]))
"""
FILES = {
    "writes", "makes", "truncates", "removes", "renames", "links", "makes a directory",
}  # fmt: skip
MODES = {"changes a mode", "changes a time"}
SOCKETS = {"TCP", "UDP", "UNIX"}


def landlock_version() -> int:
    said = subprocess.run(
        [sys.executable, "-c", "from cropi_core.system.confinement import *; print(confine(Limits()))"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return (
        int(said.partition("Landlock ")[2].partition(")")[0]) if "Landlock" in said and ";" not in said else 0
    )


@pytest.fixture(scope="module")
def version() -> int:
    return landlock_version()


def probe(tmp_path: Path, limits: Limits, *, landlock: bool = True) -> tuple[str, set[str]]:
    """Do everything in a process with these limits; return what it says and what it could do."""
    place, inside = tmp_path / "place", tmp_path / "inside"
    place.mkdir()
    inside.mkdir()
    for name in ("own", "old", "other"):
        (place / name).write_text("text")
    fields = {"network": limits.network, "files": limits.files, "writable": limits.writable}
    given = json.dumps([fields, landlock, str(place), str(inside)])
    out = subprocess.run(
        [sys.executable, "-c", PROBE, given],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    said, done = json.loads(out.stdout)
    return said, set(done)


@linux
@pytest.mark.parametrize("landlock", [True, False])
def test_a_built_in_verifier_writes_no_file_and_opens_no_socket(tmp_path: Path, landlock: bool):
    """The filter of system calls is enough; with Landlock the parent is out of reach too."""
    said, done = probe(tmp_path, Limits(), landlock=landlock)
    assert said.startswith("no network, no writable files (seccomp")
    assert done - {"signals the parent"} == {"reads", "pair", "limits itself"}
    if "Landlock 6" in said or "Landlock 7" in said:
        assert "signals the parent" not in done


@linux
def test_a_function_writes_below_its_own_directory_only(tmp_path: Path, version: int):
    if not version:
        pytest.skip("this kernel has no Landlock")
    inside = str(tmp_path / "inside")
    said, done = probe(tmp_path, Limits(writable=(inside,)))
    assert said.startswith(f"no network, files only below {inside} (")
    assert not done & (FILES - {"truncates"} | SOCKETS | {"reads the parent", "limits the parent"})
    assert "truncates" not in done or version < 3
    assert {"reads", "writes inside", "starts", "pair"} <= done


@linux
def test_what_is_allowed_works(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    said, done = probe(tmp_path / "a", Limits(network=True))
    assert said.startswith("no writable files")
    assert done >= SOCKETS
    assert not done & (FILES | MODES)
    said, done = probe(tmp_path / "b", Limits(files=True))
    assert said.startswith("no network (")
    assert done >= FILES | MODES | {"starts"}
    assert not done & SOCKETS
    said, done = probe(tmp_path / "c", Limits(network=True, files=True))
    assert said == "no limits on network and files"
    assert done >= FILES | MODES | SOCKETS | {"reads the parent"}


def test_the_active_confinement_is_described_completely():
    both = described(Limits(), ["Landlock 7", "seccomp"], [])
    assert both == "no network, no writable files (seccomp, Landlock 7)"
    lacks = described(Limits(), ["seccomp"], ["Landlock: Function not implemented"])
    assert (
        lacks == "no network, no writable files (seccomp); not available: Landlock: Function not implemented"
    )
    # Without Landlock a function that has a directory of its own can write everywhere.
    own = described(Limits(writable=("/tmp/a",)), ["seccomp"], ["Landlock: no"])
    assert own == "no network (seccomp); not available: Landlock: no"
    old = described(Limits(), ["Landlock 3"], ["seccomp: no"])
    assert old == "no writable files (Landlock 3); not available: seccomp: no"
    assert described(Limits(), [], ["a", "b"]).startswith("no limits on network and files; not available")


def test_a_system_without_these_mechanisms_is_not_reported_as_confined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert confine(Limits()).startswith("no limits on network and files: darwin")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("limits", [Limits(), Limits(writable=("/a",)), Limits(network=True)])
def test_every_jump_of_the_filter_ends_at_an_answer(machine: str, limits: Limits):
    """Read each number of a system call through the program, as the kernel would."""
    import struct

    program = [struct.unpack("=HBBI", filter_program(machine, limits)[at : at + 8]) for at in range(
        0, len(filter_program(machine, limits)), 8
    )]  # fmt: skip
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(arch: int, number: int, flags: int) -> int:
        data = {0: number, 4: arch, 16: flags, 16 + 8: flags, 16 + 16: flags}
        held, at = 0, 0
        while True:
            code, yes, no, value = program[at]
            at += 1
            if code == 0x06:
                return value & 0x7FFF0000
            if code == 0x20:
                held = data[value]
            else:
                true = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
                at += yes if true else no

    sockets = {"x86_64": 41, "aarch64": 198}[machine]
    opens = {"x86_64": 257, "aarch64": 56}[machine]
    allowed, refused = 0x7FFF0000, 0x00050000
    assert verdict(audit, sockets, 0) == (allowed if limits.network else refused)
    assert verdict(audit, opens, os.O_RDONLY | os.O_CLOEXEC) == allowed
    assert verdict(audit, opens, os.O_WRONLY) == (allowed if limits.writable else refused)
    assert verdict(audit, 425, 0) == refused
    own_limits = {"x86_64": 302, "aarch64": 261}[machine]
    assert verdict(audit, own_limits, 0) == allowed
    assert verdict(audit, own_limits, 1) == refused  # a limit of another process
    assert verdict(audit, 0x40000000 | sockets, 0) == refused
    assert verdict(0x40000003, 0, 0) == refused
    assert sum(verdict(audit, number, 0) == allowed for number in range(470)) > 400


SOURCE = """
import os, socket, subprocess, sys, tempfile

def connects(completion, answer):
    socket.create_connection(("127.0.0.1", int(answer)), timeout=5).close()
    return 1.0

def writes(completion, answer):
    open(answer, "w").close()
    return 1.0

def compiles(completion, answer):
    with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
        program.write("print(2 + 3)")
        program.flush()
        os.chmod(program.name, 0o700)
        done = subprocess.run([sys.executable, program.name], capture_output=True, text=True)
    return float(done.stdout == "5\\\\n")

def fills(completion, answer):
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), int(answer))
    return 1.0
""".replace("\\\\n", "\\n")


@pytest.fixture
def functions(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "rewards.py"
    file.write_text(SOURCE)
    return {name: f"{file}:{name}" for name in ("connects", "writes", "compiles", "fills")}


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept()], daemon=True).start()
        yield server.getsockname()[1]


@linux
def test_functions_have_a_scratch_directory_and_the_rest_if_the_operator_says_so(
    functions: dict[str, str], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
):
    out = tmp_path / "out"
    with Verifier(functions=functions, cache=GradeCache()) as verifier:
        assert verifier.grade("compiles", "", "").reward == 1.0
        refused = verifier.grade("connects", "", str(port))
        assert refused.reward is None
        assert refused.reason.startswith("PermissionError")
        assert refused.reason.endswith(HINT)
        assert verifier.functions
        assert "no network" in verifier.functions.confinement
        if version:
            assert verifier.grade("writes", "", str(out)).reward is None
            assert not out.exists()
        scratch = verifier.functions._worker and verifier.functions._worker.scratch
        assert scratch
        assert Path(scratch).is_dir()
    assert not Path(scratch).exists()
    monkeypatch.setenv(MAY, "network, files")
    with Verifier(functions=functions, cache=GradeCache()) as verifier:
        assert verifier.grade("connects", "", str(port)).reward == 1.0
        assert verifier.grade("writes", "", str(out)).reward == 1.0
        assert out.exists()
        # What the operator allows to functions the built-in verifiers do not get.
        assert verifier.grade("exact", "a", "a").reward == 1.0
        assert verifier.process.confinement.startswith("no network, no writable files")


def test_no_function_writes_a_file_of_any_size(functions: dict[str, str]):
    """A sparse file of 50 GB was written once."""
    with Verifier(functions=functions, cache=GradeCache()) as verifier:
        assert verifier.grade("fills", "", str(LARGEST_FILE)).reward == 1.0
        assert "File too large" in verifier.grade("fills", "", str(LARGEST_FILE + 1)).reason
        assert verifier.grade("exact", "a", "a").reward == 1.0


def test_the_operators_settings_are_checked(monkeypatch: pytest.MonkeyPatch):
    assert functions_limits() == Limits()
    monkeypatch.setenv(MAY, "files")
    assert functions_limits() == Limits(files=True)
    monkeypatch.setenv(MAY, "files,everything")
    with pytest.raises(ConfigError, match="everything is unknown"):
        functions_limits()


def test_what_is_active_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cropi_core.rewards.process._logged", set())
    with caplog.at_level(logging.INFO, "cropi_core.rewards"):
        for _ in range(2):
            process = GradingProcess(5.0, 512, {})
            process.grade_many([("exact", "a", "a")])
            process.close()
    lines = [record for record in caplog.records if "built-in verifiers" in record.getMessage()]
    assert len(lines) == 1
    assert process.confinement in lines[0].getMessage()


SPIN = """
import time

def spins(completion, answer):
    time.sleep(float(completion.split()[1]))
    return 1.0
"""


@pytest.mark.parametrize(("seconds", "most"), [(0.4, 12), (5.0, 4)])
def test_a_prompt_has_a_budget_and_its_neighbours_keep_theirs(tmp_path: Path, seconds: float, most: int):
    """Items that end in time and items that are stopped count alike."""
    import hashlib
    import time

    file = tmp_path / "spin.py"
    file.write_text(SPIN)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    process = GradingProcess(1.0, 512, {"spins": (f"{file}:spins", digest)})
    process.budget_s = 4.0
    hostile = [("spins", f"{i} {seconds}", "") for i in range(32)]
    items = [("exact", "a", "a"), *hostile, *[("exact", str(i), "3") for i in range(8)], ("spins", "9 0", "")]
    prompts = ["first", *["hostile"] * 32, *range(8), "last"]
    began = time.monotonic()
    try:
        grades = process.grade_many(items, prompts)
    finally:
        process.close()
    assert time.monotonic() - began < 100
    given_up = [grade for grade in grades if "completions of its prompt" in grade.reason]
    assert 32 - most <= len(given_up) < 32
    assert all(grade.reward is None for grade in given_up)
    assert grades[0].reward == 1.0
    assert [grade.reward for grade in grades[33:]] == [float(i == 3) for i in range(8)] + [1.0]
