"""Take the network and the writable file system away from a process on Linux, without root and without a package.

    confine(Limits())                       # no network, no file can be written
    confine(Limits(writable=(scratch,)))    # files only below one directory
    confine(Limits(network=True))           # network, but no files

Two mechanisms of the kernel do it, and every child inherits both; neither can be undone. A seccomp filter (Linux 3.17)
refuses system calls by number: sockets, access to other processes, and, if nothing is writable, all calls that change
files. Landlock (5.13, TCP 6.7, signals 6.12) refuses access by path, which a filter cannot read. Where one is missing
the other remains, and :func:`confine` says what is active. A process of root also loses root's capabilities, except
those to read its own files.

Not covered: reading files, files that are open already (standard error), and, where a directory is writable, the modes
and times of files elsewhere, which Landlock does not control.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1

_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
"""Landlock's rights to write, remove and make files, of its first version."""
_REFER = 1 << 13
_TCP = 1 << 0 | 1 << 1
_SCOPES = 1 << 0 | 1 << 1  # abstract UNIX sockets, signals

# Numbers of system calls by architecture; a call that an architecture lacks has another form there.
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "open": 2, "openat": 257, "openat2": 437, "creat": 85,
        "socket": 41, "io_uring_setup": 425,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
        "truncate": 76, "ftruncate": 77, "fallocate": 285,
        "rename": 82, "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266,
        "unlink": 87, "unlinkat": 263, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "mknod": 133, "mknodat": 259,
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452,
        "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
        "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "removexattrat": 466, "file_setattr": 469,
        "mount": 165, "open_by_handle_at": 304, "execve": 59, "execveat": 322,
        "memfd_create": 319, "memfd_secret": 447, "prlimit64": 302,
    },
    "aarch64": {
        "openat": 56, "openat2": 437,
        "socket": 198, "io_uring_setup": 425,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
        "truncate": 45, "ftruncate": 46, "fallocate": 47,
        "renameat": 38, "renameat2": 276, "linkat": 37, "symlinkat": 36, "unlinkat": 35, "mkdirat": 34, "mknodat": 33,
        "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchownat": 54, "fchown": 55, "utimensat": 88,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "setxattrat": 463,
        "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "removexattrat": 466, "file_setattr": 469,
        "mount": 40, "open_by_handle_at": 265, "execve": 221, "execveat": 281,
        "memfd_create": 279, "memfd_secret": 447, "prlimit64": 261,
    },
}  # fmt: skip
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_PROCESSES = {"ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"}
_NETWORK = {"socket"}
_UNCHECKED = {"io_uring_setup"}  # its requests are system calls that no filter sees
_FLAGGED = {"open": 1, "openat": 2}
"""Calls that open files, with the position of their flags, which tell reading from writing."""
_LIMITS = "prlimit64"
"""The call that sets limits, of which one on processor time would kill cropi's process; its own are process 0."""
_X32 = 0x40000000

_CAPABILITIES = 0x20080522  # version 3
_KEPT_CAPABILITIES = 1 << 1 | 1 << 2
"""Of root: read and write files whose mode does not say so. With others it could read the environment of its parent."""

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Limits:
    """What a confined process may do.

    Attributes:
        network: Sockets of all families, UNIX sockets included.
        files: Files anywhere, as the user may.
        writable: Directories below which files may be written if ``files`` is false.
    """

    network: bool = False
    files: bool = False
    writable: Sequence[str] = ()


class NotEnforcedError(OSError):
    """The kernel has none of the mechanisms."""


def confine(limits: Limits, *, landlock: bool = True) -> str:
    """Restrict the calling thread and everything that it starts from now on; call it before other threads exist.

    Args:
        limits: What stays allowed.
        landlock: Use Landlock where the kernel has it.

    Returns:
        What is active, for people: ``no network, no writable files (seccomp, Landlock 7)``.
    """
    if limits.network and limits.files:
        return "no limits on network and files"
    if sys.platform != "linux":
        return f"no limits on network and files: {sys.platform} has no such mechanism for single processes"
    libc = ctypes.CDLL(None, use_errno=True)
    active, missing = [], []
    for name, enforce in (("Landlock", _landlock if landlock else _unused), ("seccomp", _seccomp)):
        try:
            active.append(f"{name}{enforce(libc, limits)}")
        except OSError as error:
            missing.append(f"{name}: {error.strerror}")
    _drop_capabilities(libc)
    return described(limits, active, missing)


def described(limits: Limits, active: Iterable[str], missing: Iterable[str]) -> str:
    """Write what is refused by which mechanism, and what the kernel does not offer."""
    active, missing = list(active), list(missing)
    seccomp = "seccomp" in active
    landlock = next((int(name.split()[1]) for name in active if name.startswith("Landlock")), 0)
    network = "no network" if seccomp else "no TCP" if landlock >= 4 else None
    files = "no writable files" if not limits.writable else f"files only below {', '.join(limits.writable)}"
    files = files if landlock or (seccomp and not limits.writable) else None
    refused = [
        access for access, free in ((network, limits.network), (files, limits.files)) if access and not free
    ]
    by = f" ({', '.join(sorted(active, reverse=True))})" if refused else ""
    lacks = f"; not available: {', '.join(missing)}" if missing else ""
    return f"{', '.join(refused) or 'no limits on network and files'}{by}{lacks}"


def _unused(libc: ctypes.CDLL, limits: Limits) -> str:
    raise NotEnforcedError(errno.ENOSYS, "not used")


def _landlock(libc: ctypes.CDLL, limits: Limits) -> str:
    """Enforce limits by path; return the version of the kernel's Landlock."""
    version = _call(libc, _CREATE_RULESET, None, 0, _VERSION_FLAG)
    rights = _CHANGES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack(
        "QQQ",
        0 if limits.files else rights,
        0 if limits.network or version < 4 else _TCP,
        _SCOPES if version >= 6 and not limits.network else (_SCOPES & 2 if version >= 6 else 0),
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    if not any(handled[:size]):
        raise NotEnforcedError(errno.ENOSYS, f"version {version} has no such limits")
    rules = _call(libc, _CREATE_RULESET, handled[:size], size, 0)
    try:
        if not limits.files:
            _allow_below(libc, rules, os.devnull, rights & (_WRITE_FILE | _TRUNCATE))
            for place in limits.writable:
                _allow_below(libc, rules, place, rights)
        _without_new_privileges(libc)
        _call(libc, _RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return f" {version}"


def _allow_below(libc: ctypes.CDLL, rules: int, place: str, rights: int) -> None:
    opened = os.open(Path(place), os.O_PATH | os.O_CLOEXEC)
    try:
        _call(libc, _ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, opened), 0)
    finally:
        os.close(opened)


def _seccomp(libc: ctypes.CDLL, limits: Limits) -> str:
    """Enforce limits by system call."""
    machine = platform.machine()
    if machine not in _NUMBERS or sys.byteorder != "little":
        raise NotEnforcedError(errno.ENOSYS, f"no list of system calls for {machine}")
    program = filter_program(machine, limits)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    _without_new_privileges(libc)
    packed = Program(len(program) // 8, program)
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(packed), 0, 0) != 0:
        raise NotEnforcedError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ""


def filter_program(machine: str, limits: Limits) -> bytes:
    """Build the filter: eight bytes an instruction of the kernel's BPF."""
    numbers = _NUMBERS[machine]
    read_only = not (limits.files or limits.writable)
    names = _PROCESSES | _UNCHECKED | (set() if limits.network else _NETWORK)
    if read_only:
        names = set(numbers) - set(_FLAGGED) - {_LIMITS} - _NETWORK | names
    refused = sorted(numbers[name] for name in names)
    body: list[tuple[int, int, int, int]] = []
    for name, position in _FLAGGED.items() if read_only else ():
        if name in numbers:
            # Only what opens for writing is refused; the flags are the lower half of an argument of 64 bits.
            body += [(_EQUAL, 0, 4, numbers[name]), (_LOAD, 0, 0, 16 + 8 * position)]
            body += [
                (_ANY_BIT, 0, 1, _WRITING),
                (_RETURN, 0, 0, _REFUSE | errno.EACCES),
                (_RETURN, 0, 0, _ALLOW),
            ]
    body += [(_EQUAL, 0, 4, numbers[_LIMITS]), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, 0)]
    body += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | errno.EACCES)]
    count = len(refused)
    for index, number in enumerate(refused):
        body.append((_EQUAL, count - index, 0, number))
    body += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | errno.EACCES)]
    head = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    head += [(_LOAD, 0, 0, 0), (_GREATER, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    return b"".join(struct.pack("=HBBI", *one) for one in head + body)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop the capabilities of root; a user who is not root has none."""
    header, data = struct.pack("=Ii", _CAPABILITIES, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, data) != 0:
        raise NotEnforcedError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    effective, permitted, *_ = struct.unpack("=6I", data.raw)
    kept = struct.pack("=6I", effective & _KEPT_CAPABILITIES, permitted & _KEPT_CAPABILITIES, 0, 0, 0, 0)
    if libc.capset(header, kept) != 0:
        raise NotEnforcedError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _without_new_privileges(libc: ctypes.CDLL) -> None:
    """Let no program that the process starts gain rights, which both mechanisms require of a user who is not root."""
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise NotEnforcedError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise NotEnforcedError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
