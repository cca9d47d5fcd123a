"""Computation of gradient shards on a Ray cluster (`runtime.ray`): one Prefect task per shard, in a separate flow.

    run_step(spec, store, spread=on_ray)

The process that runs the step creates the store, holds its claim and waits. Each Ray process loads the model once and
writes complete shards into the store's directory, which all machines of the cluster must reach under the same path.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import ray
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture
from ray.job_config import JobConfig

from cropi_core.errors import ConfigError, StepError
from cropi_core.gradients import ATTEMPTS, Group, ShardPlan, compute_shard, shards_failed
from data_schemas import Ray

LOOPBACK = ("localhost", "127.0.0.1", "::1")
RAISED = "Task run encountered an exception "
"""Prefix that Prefect adds to an exception raised by a task."""

log = logging.getLogger("cropi_core.flows")


@dataclass
class _Work:
    """The shards to compute, and their state."""

    plan: ShardPlan
    shards: Mapping[int, list[Group]]
    done: Callable[[int], None]
    queue: list[int]
    attempts: dict[int, int] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)


_work: ContextVar[_Work] = ContextVar("work")


def on_ray(plan: ShardPlan, shards: Mapping[int, list[Group]], done: Callable[[int], None]) -> None:
    """Compute shards on the cluster of ``runtime.ray``; implements :data:`cropi_core.gradients.Spread`.

    Raises:
        ConfigError: The cluster's machines cannot reach Prefect's server.
        StepError: The cluster does not exist or has no machine with a worker's resources. Or a shard raised, or its
            process died twice; this is raised after all other shards are written, and names the shard.
    """
    settings = plan.job.runtime.ray
    assert settings is not None
    work = _Work(plan, shards, done, list(shards))
    context = copy_context()
    # Prefect sends a task the context it was submitted in, including parameters. The step's task has a parameter that
    # cannot be sent, its report (a terminal's display). For the same reason the shards' flow reads its own parameters
    # from a context variable.
    context.run(cast(ContextVar[Any], TaskRunContext.__var__).set, None)
    context.run(_work.set, work)
    with _cluster(settings, plan.threads):
        context.run(SHARDS, plan.store.parent.name)


def compute_one(shard: int, work: Callable[[], None]) -> None:
    """Compute one shard.

    Args:
        shard: Number of the shard.
        work: Function that computes it. (Not its arguments: Prefect would traverse every token in them.)
    """
    work()


def compute_all(key: str) -> None:
    """Compute the missing shards of one gradients artifact.

    Args:
        key: Key of the artifact.
    """
    work = _work.get()
    settings = work.plan.job.runtime.ray
    assert settings is not None
    needs = _needs(settings, work.plan)
    log.info("%s: %d shards, %d at once, %s each", key, len(work.shards), settings.workers, needs)
    # Ray would silently repeat a killed task, and end a process that holds a GPU after each task.
    with remote_options(max_retries=0, max_calls=0, **needs):
        running: dict[Any, tuple[int, PrefectRayFuture[None]]] = {}
        while work.queue or running:
            while work.queue and len(running) < settings.workers:
                shard = work.queue.pop(0)
                work.attempts[shard] = work.attempts.get(shard, 0) + 1
                compute = partial(compute_shard, work.plan, shard, work.shards[shard])
                future = cast(PrefectRayFuture[None], SHARD.submit(shard, compute))
                running[future.wrapped_future] = shard, future
            ready, _ = ray.wait(list(running))
            for reference in ready:
                _settle(work, *running.pop(reference))
    if work.faults:
        raise shards_failed(work.faults, len(work.shards))


# Not decorators: these names would then refer to a flow and a task, and pickle, finding no function under them, would
# send the functions by value with all of this module's contents.
SHARD = Task(
    compute_one,
    name="gradients shard",
    task_run_name="shard {shard}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
SHARDS = Flow(
    compute_all,
    name="cropi-shards",
    flow_run_name="shards of {key}",
    task_runner=cast(TaskRunner[PrefectFuture[Any]], RayTaskRunner()),
    persist_result=False,
)
"""The flow that computes shards; it runs on the cluster to which this process is connected."""


def _settle(work: _Work, shard: int, future: PrefectRayFuture[None]) -> None:
    """Handle the end of a shard's task: mark it done, retry it, or record its failure."""
    future.wait()
    state = future.state
    fault = (state.message or state.type).removeprefix(RAISED)
    if state.is_completed():
        work.done(shard)
    elif state.is_crashed() and work.attempts[shard] < ATTEMPTS:
        log.warning("shard %d: its process died (%s); it is computed again", shard, fault)
        work.queue.insert(0, shard)
    else:
        times = f"its process died {ATTEMPTS} times: " if state.is_crashed() else ""
        work.faults[shard] = f"{times}{fault}"
        log.warning("shard %d failed: %s", shard, work.faults[shard])


@contextmanager
def _cluster(settings: Ray, cpus: int) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; disconnect or stop it at the end."""
    if ray.is_initialized():
        raise StepError(
            "this process is connected to a Ray cluster already, and runtime.ray brings its own: "
            "call ray.shutdown() first"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns at every start that token authentication is on, which is intended (docs/guides/ray-cluster.md).
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if settings.address is None:
        # "local": otherwise Ray would use RAY_ADDRESS or a cluster left running on this machine.
        place: dict[str, Any] = {"address": "local", "num_cpus": settings.workers * cpus}
        place["include_dashboard"] = False
    else:
        _check_server(settings.address)
        place = {"address": settings.address}
    if not (settings.address or "").startswith("ray://"):
        # Ray puts this process's working directory first on the workers' module path, except for its client's jobs.
        place["job_config"] = JobConfig(_client_job=True)
    try:
        ray.init(**place, namespace="cropi", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise StepError(
            f"no Ray cluster answers at runtime.ray.address={settings.address} ({error}): start it with `ray start "
            "--head`, set RAY_AUTH_MODE=token here if it asks for a token, or remove the address for a cluster on "
            "this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_server(address: str) -> None:
    """Refuse a server that other machines cannot reach, because every shard would fail at its first request."""
    server = PREFECT_API_URL.value() or ""
    host, cluster = urlsplit(server).hostname or "", urlsplit(address).hostname
    if host in LOOPBACK and cluster not in LOOPBACK:
        raise ConfigError(
            f"runtime.ray.address={address}, and Prefect's server is {server}, which other machines cannot reach: run "
            "a server for all (deployments/README.md) and set PREFECT_API_URL to it"
        )


def _needs(settings: Ray, plan: ShardPlan) -> dict[str, float]:
    """Return the resources that a worker requests from the cluster.

    Raises:
        StepError: No machine has these resources; Ray would wait indefinitely.
    """
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    best = {name: max((m.get(name, 0.0) for m in machines), default=0.0) for name in ("CPU", "GPU")}
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if best["GPU"] and plan.job.runtime.device != "cpu" else 0.0
    for name, wanted, setting in (
        ("CPU", plan.threads, "runtime.threads"),
        ("GPU", gpus, "runtime.ray.gpus_per_worker"),
    ):
        if wanted > best[name]:
            raise StepError(
                f"a worker asks for {wanted:g} {name} ({setting}), and the cluster's best machine has {best[name]:g}"
            )
    return {"num_cpus": float(plan.threads), "num_gpus": gpus}
