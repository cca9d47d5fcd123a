"""Several servers with one queue: concurrent requests, retries, and removal of servers that fail.

    with Fleet(endpoints, settings, sampling, vocabulary) as fleet:
        for job, completions, source in fleet.run(jobs): ...        # in the order in which they finish

The event loop runs in a separate thread, because the caller may have a running loop (a notebook). The completions of a
job do not depend on the server or the time, because the seed belongs to the job.
"""

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from cropi_core.errors import ServerError
from cropi_core.rollouts.sampling import Completion
from cropi_core.rollouts.vllm.client import (
    Job,
    TransientError,
    UnusableServerError,
    Vocabulary,
    ask,
    send,
)
from cropi_core.system import running_loop
from data_schemas import Sampling, Vllm

log = logging.getLogger(__name__)

CONNECT_S = 10.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
POLL_S = 0.5
ADVICE = "Complete shards are kept. Repair the servers (memory, --max-model-len, log) and run the same command again"


@dataclass(frozen=True)
class Source:
    """The server that answered, and how often it had recovered before: it may then have been started again."""

    url: str
    recoveries: int


@dataclass
class Endpoint:
    """One server.

    Attributes:
        url: Address, without ``/v1``.
        model: Name of the served model.
        key: Bearer token, if the server requires one.
        exit_status: Returns the exit status of a started server; None while it runs.
        tail: Returns the end of the log of a started server.
        down: Why the server was removed; None while it is in use.
        answer_count: Number of answered requests.
        recoveries: How often it was healthy again after a failure.
        healthy_at: Last time of the monotonic clock at which ``/health`` answered.
        lock: Held by the request that waits for recovery.
        usable: Set while requests may be sent.
    """

    url: str
    model: str = ""
    key: str | None = None
    exit_status: Callable[[], int | None] = lambda: None
    tail: Callable[[], str] = lambda: ""
    down: str | None = None
    answer_count: int = 0
    recoveries: int = 0
    healthy_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    usable: asyncio.Event = field(default_factory=asyncio.Event)

    def renew(self) -> None:
        """Replace the lock and the event of an earlier event loop."""
        self.lock, self.usable = asyncio.Lock(), asyncio.Event()

    def client(self, settings: Vllm) -> httpx.AsyncClient:
        """Open a client, which ignores proxies of the environment."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(settings.request_timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency + 1),
            trust_env=False,
            follow_redirects=False,
        )

    def fault(self) -> str:
        """Describe why the server was removed, with the end of its log."""
        return f"{self.url}: {self.down}" + (f"; {tail}" if (tail := self.tail()) else "")


class Fleet:
    """Servers, and the thread that sends requests to them."""

    def __init__(
        self, endpoints: Sequence[Endpoint], settings: Vllm, sampling: Sampling, vocabulary: Vocabulary
    ) -> None:
        self.endpoints = list(endpoints)
        self.settings = settings
        self.sampling = sampling
        self.vocabulary = vocabulary
        self.running = running_loop("cropi-vllm")
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.attempts: dict[int, int] = {}
        for endpoint in self.endpoints:
            endpoint.renew()

    def __enter__(self) -> Self:
        self.loop = self.running.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running.__exit__(None, None, None)  # the loop ends in the same way after an error

    def remove(self, url: str, why: str) -> None:
        """Send no more requests to a server; the others continue."""
        for server in [one for one in self.endpoints if one.url == url and one.down is None]:
            server.down = why
            log.warning("%s is no longer used; the others continue: %s", url, why)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Completion], Source]]:
        """Yield every job with its completions and the server that sampled them, in the order in which they finish.

        Raises:
            ServerError: A request was refused or failed too often, or no server is left.
        """
        future = asyncio.run_coroutine_threadsafe(self._serve(jobs), self.loop)
        future.add_done_callback(lambda _: self.results.put(None))
        while True:
            try:
                # With a timeout: cancellation sets an exception on this thread, which takes effect between bytecodes.
                item = self.results.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is None:
                break
            yield item
        future.result()

    # -- in the event loop ---------------------------------------------------------------------------------------------

    async def _serve(self, jobs: Sequence[Job]) -> None:
        """Let every server take jobs until all are done."""
        waiting: asyncio.PriorityQueue[tuple[int, Job]] = asyncio.PriorityQueue()
        for place, job in enumerate(jobs):
            waiting.put_nowait((place, job))
        complete = asyncio.Event()
        if not jobs:
            return
        remaining = [len(jobs)]

        def deliver(job: Job, completions: list[Completion], source: Source) -> None:
            self.results.put((job, completions, source))
            remaining[0] -= 1
            if not remaining[0]:
                complete.set()

        tasks = [asyncio.create_task(self._server(server, waiting, deliver)) for server in self.endpoints]
        finished = asyncio.create_task(complete.wait())
        try:
            pending = {finished, *tasks}
            while not complete.is_set():
                ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()  # raises an error that another server cannot correct
                if not complete.is_set() and pending == {finished}:
                    raise ServerError(
                        f"no server is left, {remaining[0]} of {len(jobs)} prompts are not sampled: "
                        + "; ".join(server.fault() for server in self.endpoints)
                        + f". {ADVICE}"
                    )
        finally:
            for task in (finished, *tasks):
                task.cancel()
            await asyncio.gather(finished, *tasks, return_exceptions=True)

    async def _server(self, server: Endpoint, waiting: Any, deliver: Callable[..., None]) -> None:
        """Send ``concurrency`` requests at a time to one server until it is removed."""
        server.usable.set()
        async with server.client(self.settings) as client:
            workers = [
                asyncio.create_task(self._worker(server, client, waiting, deliver))
                for _ in range(self.settings.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(
        self, server: Endpoint, client: httpx.AsyncClient, waiting: Any, deliver: Callable[..., None]
    ) -> None:
        """Send one request after another to a server."""
        while True:
            await server.usable.wait()
            if server.down is not None:
                return
            place, job = await waiting.get()
            if not server.usable.is_set() or server.down is not None:
                waiting.put_nowait((place, job))  # the request would fail, and failures are counted
                continue
            began, source = time.monotonic(), Source(server.url, server.recoveries)
            try:
                completions = await ask(client, server.model, job, self.sampling, self.vocabulary)
            except UnusableServerError as error:
                waiting.put_nowait((place, job))
                if server.down is None:
                    server.down = str(error)
                    log.warning("%s is no longer used; the others continue: %s", server.url, error)
                return
            except TransientError as error:
                server.usable.clear()
                self._count(job, server, error)
                waiting.put_nowait((place, job))
                await self._recover(server, client, began, error)
                await asyncio.sleep(pause(self.attempts[job.index]))
            else:
                server.answer_count += 1
                deliver(job, completions, source)

    def _count(self, job: Job, server: Endpoint, error: Exception) -> None:
        """Count a failed attempt; a request that fails on every server must not remove all servers in turn."""
        self.attempts[job.index] = self.attempts.get(job.index, 0) + 1
        if self.attempts[job.index] > self.settings.retries:
            raise ServerError(
                f"prompt {job.prompt_id} failed {self.attempts[job.index]} times (runtime.vllm.retries="
                f"{self.settings.retries}), at last at {server.url}: {error}"
                + (f"; {tail}" if (tail := server.tail()) else "")
                + f". {ADVICE}"
            )

    async def _recover(
        self, server: Endpoint, client: httpx.AsyncClient, began: float, error: Exception
    ) -> None:
        """Wait until a failed server is healthy again, or remove it."""
        async with server.lock:
            # Another request of this server may have checked its health in the meantime.
            if server.down is None and server.healthy_at <= began:
                fault = await self._health_fault(server, client, error)
                if fault is None:
                    server.recoveries += 1
                elif server.down is None:  # it may have been removed in the meantime
                    server.down = fault
                    log.warning("%s is no longer used; the others continue: %s", server.url, fault)
            server.usable.set()

    async def _health_fault(
        self, server: Endpoint, client: httpx.AsyncClient, error: Exception
    ) -> str | None:
        """Request a server's health until it is healthy (None), or until the deadline (the fault)."""
        deadline, tries = time.monotonic() + self.settings.recovery_s, 0
        while True:
            if (status := server.exit_status()) is not None:
                return f"it ended (exit {status}); {error}"
            try:
                code, _ = await asyncio.wait_for(send(client, "/health", None, 1 << 16), CONNECT_S)
                if code == 200:
                    server.healthy_at = time.monotonic()
                    return None
                last = f"/health answers {code}; {error}"
            except (TransientError, TimeoutError) as unhealthy:
                last = f"{str(unhealthy) or 'no answer'} at /health; {error}"
            if time.monotonic() > deadline:
                return f"not healthy within runtime.vllm.recovery_s={self.settings.recovery_s:g} s: {last}"
            tries += 1
            await asyncio.sleep(pause(tries))


def pause(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt, doubled with each attempt up to a bound."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
