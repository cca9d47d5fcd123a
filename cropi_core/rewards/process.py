"""Parent side of the grading process: starts it on demand, sends items, enforces time limits, kills and replaces it.

An item that hangs, crashes or exceeds its memory limit costs only its own grade and a new process. Built-in verifiers
and the user's functions have separate processes, because their limits differ
(:class:`~cropi_core.system.confinement.Limits`).
:mod:`cropi_core.rewards.worker` is the other side.
"""

import json
import logging
import math
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import IO, cast

from cropi_core.errors import ConfigError
from cropi_core.rewards.guardian import STOP
from cropi_core.rewards.worker import PARENT_DIED
from cropi_core.system import Limits, child_environment, encode_message, python_command, verifier_environment

IMPORTED = {
    "math": ("math_verify", "math-verify", "math"),
    "reasoning_gym": ("reasoning_gym", "reasoning-gym", "gym"),
}
"""Verifiers for which the worker imports a package: its module, its name, and the extra that installs it."""

_WINDOW = 64  # requests in flight; one per round trip gives about a fifth of the rate
_STARTUP_SECONDS = 60.0
_END_SECONDS = 5.0
_LONGEST_REPLY = 1 << 16
_ALARM_MARGIN = 5.0  # the worker ends itself this long after the parent should have ended it

MAY = "CROPI_FUNCTIONS_MAY"
"""Environment variable: what the user's functions may do, `network`, `files` or both, separated by a comma.

The operator of the machine sets it; no run can. Built-in verifiers never have network or writable files.
"""
ITEMS_OF_A_PROMPT = 4
"""Time limits of an item that the built-in verifiers spend on all completions of one prompt.

A policy that writes towers of powers writes them in a whole group; without this limit 64 completions cost 64 limits.
"""
_OVER = "over the budget of its prompt"

log = logging.getLogger("cropi_core.rewards")
_logged: set[str] = set()


@dataclass(frozen=True)
class Grade:
    """A verdict: a reward, or None with the reason.

    Attributes:
        reward: The reward; None if the completion is not gradable.
        reason: Why it is not gradable; empty otherwise.
        terms: Of a weighted sum: the reward that each of its verifiers gave, before its weight.
    """

    reward: float | None
    reason: str
    terms: Mapping[str, float | None] = field(default_factory=dict)


def functions_limits() -> Limits:
    """Return the limits of the user's functions, which :data:`MAY` extends.

    Raises:
        ConfigError: The variable has another word.
    """
    words = {word.strip() for word in os.environ.get(MAY, "").split(",")} - {""}
    if unknown := sorted(words - {"network", "files"}):
        raise ConfigError(
            f"{MAY}={os.environ[MAY]!r}: {', '.join(unknown)} is unknown. Set it to `network`, `files` or "
            "`network,files`, or unset it"
        )
    return Limits(network="network" in words, files="files" in words)


def verifier_confinement() -> str:
    """Start the process of the built-in verifiers and return what the kernel refuses to it, with what functions may do.

    Raises:
        ConfigError: It does not start, or :data:`MAY` has an unknown word.
    """
    process, allowed = GradingProcess(_STARTUP_SECONDS, 1024, {}), functions_limits()
    try:
        process.start()
    finally:
        process.close()
    more = [name for name, given in (("network", allowed.network), ("files", allowed.files)) if given]
    return process.confinement + (f"; {MAY} allows {', '.join(more)} to functions" if more else "")


class _Budget:
    """Seconds spent on the completions of each prompt.

    Args:
        seconds: Maximum for a prompt; None for no limit.
        prompts: The prompt of each item.
    """

    def __init__(self, seconds: float | None, prompts: Sequence[Hashable]) -> None:
        self.seconds = seconds
        self.prompts = prompts
        self.spent: dict[Hashable, float] = {}

    def charge(self, item: int, seconds: float) -> None:
        """Add the time that an item took."""
        prompt = self.prompts[item]
        self.spent[prompt] = self.spent.get(prompt, 0.0) + seconds

    def exceeded(self, item: int) -> bool:
        """Return whether the item's prompt has used its time."""
        return self.seconds is not None and self.spent.get(self.prompts[item], 0.0) >= self.seconds


class _Worker:
    """One process and its two pipes. Reads and writes never block."""

    def __init__(self, config: dict[str, object], limits: Limits, *, scratch: bool):
        # The user's modules are found through PYTHONPATH or site-packages; secrets are not passed on.
        environment = verifier_environment(child_environment())
        self.scratch = tempfile.mkdtemp(prefix="cropi-verifier-") if scratch else None
        if self.scratch:
            environment["TMPDIR"] = self.scratch
            limits = Limits(limits.network, limits.files, (self.scratch,))
        config = config | {"limits": asdict(limits)}
        self.process = subprocess.Popen(
            python_command("cropi_core.rewards.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # its own process group, so that children of a verifier are killed with it
        )
        self.stdin, self.stdout = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self.imported = frozenset(cast(list[str], config["imported"]))
        self.served = 0
        self.replied = 0.0  # monotonic time of the latest reply
        self.ended = False
        self._unsent = memoryview(encode_message(config).encode())
        self._partial = b""

    def send(self, data: bytes) -> None:
        """Queue requests; :meth:`receive` writes them."""
        self._unsent = memoryview(bytes(self._unsent) + data)

    def receive(self, deadline: float) -> list[bytes]:
        """Write queued requests and return the replies; return none after the deadline or the end of the process."""
        poll = select.poll()
        while not self.ended:
            poll.register(self.stdout, select.POLLIN)
            if self._unsent:
                poll.register(self.stdin, select.POLLOUT)
            left = deadline - time.monotonic()
            events = dict(poll.poll(max(left, 0) * 1000))
            if not events:
                return []
            if self.stdin.fileno() in events:
                try:
                    self._unsent = self._unsent[os.write(self.stdin.fileno(), self._unsent) :]
                except BrokenPipeError:
                    self._unsent = memoryview(b"")
                if not self._unsent:
                    poll.unregister(self.stdin)
            if self.stdout.fileno() in events:
                data = os.read(self.stdout.fileno(), 1 << 16)
                self.ended = not data
                *lines, self._partial = (self._partial + data).split(b"\n")
                if len(self._partial) > _LONGEST_REPLY:
                    lines, self._partial = [*lines, self._partial], b""
                if lines:
                    return lines
        return []

    def kill(self) -> int:
        """End the process and what it has started; return its exit status, negative for a signal."""
        if self.scratch and not self.ended:
            self.process.send_signal(STOP)
        with suppress(subprocess.TimeoutExpired):
            # Its stdout has ended, so it is exiting, or it kills what a function left: wait before sending SIGKILL.
            self.process.wait(_END_SECONDS if self.ended or self.scratch else 0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.stdin.close()
        self.stdout.close()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
        return status


def _parsed(reply: bytes, number: int) -> tuple[Grade, bool, float] | None:
    """Read a reply: the grade, whether the worker must be replaced, seconds; None if it is not the worker's."""
    try:
        reward, reason, broken, seconds, counted = json.loads(reply)
        seconds = float(seconds)
    except (ValueError, TypeError, RecursionError):
        return None
    plausible = reward is None or (isinstance(reward, float) and math.isfinite(reward))
    if not plausible or not isinstance(reason, str) or counted != number:
        return None
    return Grade(reward, reason), bool(broken), seconds


class GradingProcess:
    """Grades in one process, which starts at the first item and is replaced if an item breaks it.

    If an item kills a worker that had graded others, it is retried once in a fresh one, so that memory or a thread
    left by an earlier item does not affect its grade. Thread-safe; calls are queued.

    Args:
        timeout: Time limit for an item in seconds.
        memory_mb: Address space in MiB (``RLIMIT_AS``; not enforced by macOS).
        functions: Name to path and source digest of a user's function; empty for the process of the built-in verifiers.
    """

    def __init__(self, timeout: float, memory_mb: int, functions: Mapping[str, tuple[str, str]]) -> None:
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.functions = dict(functions)
        self.limits = functions_limits() if functions else Limits()
        self.budget_s = None if functions else ITEMS_OF_A_PROMPT * timeout
        self.confinement = ""
        """What the kernel refuses to the process, once it has started."""
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def start(self) -> None:
        """Start the process now, to report functions that cannot be imported immediately.

        Raises:
            ConfigError: The process does not start, or a function cannot be loaded.
        """
        with self._lock:
            self._ready(frozenset())

    def grade_many(
        self, items: Sequence[tuple[str, str, str]], prompts: Sequence[Hashable] | None = None
    ) -> list[Grade]:
        """Grade ``(verifier, completion, answer)`` triples; the grades are in their order.

        Args:
            items: The triples.
            prompts: The prompt of each item, whose completions share a budget; None: each item has its own.

        Raises:
            ConfigError: The process does not start.
        """
        needed = {name for name, _, _ in items} & set(IMPORTED)
        lines = [encode_message(item).encode() for item in items]
        budget = _Budget(self.budget_s, range(len(items)) if prompts is None else prompts)
        grades: dict[int, Grade] = {}
        waiting = deque(range(len(items)))
        retried = -1
        with self._lock:
            try:
                while waiting:
                    worker = self._ready(needed)
                    began = time.monotonic()
                    failure = self._serve(worker, lines, waiting, grades, budget)
                    if failure is None:
                        continue
                    status, current = self._discard(), waiting[0]
                    if failure == "ended":
                        failure = (
                            f"crashed (signal {-status})" if status < 0 else f"crashed (exit code {status})"
                        )
                    innocent = worker.served > 0 or status == -PARENT_DIED
                    if failure == _OVER:
                        pass
                    elif innocent and current != retried and not failure.startswith("timed out"):
                        retried = current
                    else:
                        grades[waiting.popleft()] = Grade(None, failure)
                        budget.charge(current, time.monotonic() - max(began, worker.replied))
                    waiting = self._within_budget(waiting, grades, budget)
            except BaseException:
                self._discard()  # replies still in flight belong to this call, not to the next
                raise
        return [grades[item] for item in range(len(items))]

    def close(self) -> None:
        """End the process; a later call to grade starts a new one."""
        with self._lock:
            self._discard()

    def _within_budget(self, waiting: deque[int], grades: dict[int, Grade], budget: _Budget) -> deque[int]:
        """Give up the items whose prompts have used their time; return the others."""
        for item in waiting:
            if budget.exceeded(item):
                reason = f"not graded: the completions of its prompt took over {budget.seconds:g} s"
                grades[item] = Grade(None, reason)
        return deque(item for item in waiting if item not in grades)

    def _ready(self, needed: Set[str]) -> _Worker:
        """Return a live worker that has imported the needed packages."""
        worker = self._worker
        if worker and worker.process.poll() is None and needed <= worker.imported:
            return worker
        needed = needed | (worker.imported if worker else frozenset())
        self._discard()
        self._worker = worker = _Worker(
            {
                "memory_mb": self.memory_mb,
                "alarm": self.timeout + _ALARM_MARGIN,
                "imported": sorted(needed),
                "functions": self.functions,
            },
            self.limits,
            scratch=bool(self.functions),
        )
        hello = worker.receive(time.monotonic() + _STARTUP_SECONDS)
        started = json.loads(hello[0]) if hello else {}
        errors = started.get("errors", {})
        if hello and not errors:
            self._log_confinement(str(started["confinement"]))
            return worker
        ended, status = worker.ended, self._discard()
        if hello:
            fault = "; ".join(f"verifier {name!r}: {reason}" for name, reason in errors.items())
            raise ConfigError(f"{fault} (imported within memory_mb={self.memory_mb})")
        fault = f"ended with status {status}" if ended else f"was not ready after {_STARTUP_SECONDS:g} s"
        raise ConfigError(
            f"the verifier worker {fault}; see its messages above. memory_mb={self.memory_mb} may be too small"
        )

    def _log_confinement(self, confinement: str) -> None:
        """Log once what the kernel refuses to the process; warn if it refuses nothing that was asked for."""
        self.confinement = confinement
        verifiers = "grading.functions" if self.functions else "built-in verifiers"
        message = f"{verifiers}: {confinement}"
        if message not in _logged:
            _logged.add(message)
            wanted = not (self.limits.network and self.limits.files)
            level = logging.WARNING if wanted and confinement.startswith("no limits") else logging.INFO
            log.log(level, "%s (docs/guides/security.md)", message)

    def _serve(
        self,
        worker: _Worker,
        lines: list[bytes],
        waiting: deque[int],
        grades: dict[int, Grade],
        budget: _Budget,
    ) -> str | None:
        """Grade the waiting items until none is left (None) or the first of them broke the worker (the reason)."""
        sent = 0
        while waiting:
            # Refilling in halves keeps the pipe busy with few system calls.
            if sent < len(waiting) and sent <= _WINDOW // 2:
                more = [lines[item] for item in islice(waiting, sent, _WINDOW)]
                worker.send(b"".join(more))
                sent += len(more)
            # Requests are served in order, so the oldest unanswered one started at the latest reply, or now.
            replies = worker.receive(time.monotonic() + self.timeout)
            if not replies:
                return "ended" if worker.ended else f"timed out after {self.timeout:g} s"
            for reply in replies:
                if not sent:
                    break  # written by a verifier: the number of the next reply tells
                answer = _parsed(reply, worker.served + 1)
                if answer is None:
                    return "the verifier wrote into the worker's replies"
                grade, broken, seconds = answer
                if broken:
                    return grade.reason
                item, sent = waiting.popleft(), sent - 1
                grades[item] = grade
                worker.served += 1
                budget.charge(item, seconds)
                if budget.exceeded(item) and any(budget.exceeded(one) for one in islice(waiting, sent)):
                    return _OVER  # the worker would grade what is in its pipe
            worker.replied = time.monotonic()
        return None

    def _discard(self) -> int:
        """End the worker, if any; return its exit status."""
        worker, self._worker = self._worker, None
        return worker.kill() if worker else 0
