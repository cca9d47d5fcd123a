"""Prefect tasks: one for each step, cached by the key of the artifact that it makes.

The cache key of a task run is exactly the artifact's key: equal settings and equal inputs hit the cache across runs,
flows and machines that share a root, regardless of the task's source code. Records are JSON files stored next to the
artifacts, under ``<root>/.prefect-results``. A record is only a pointer, so the caller of a task must check that the
artifact is still complete, as :mod:`tasks.execution` does.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.states import Completed, State

from cropi_core.artifacts import Store
from cropi_core.curriculum import StepResult, run_step
from cropi_core.errors import ConfigError
from cropi_core.progress import Report, silent
from data_schemas import STEP_NAMES, ArtifactRef, StepName, StepSpec
from tasks.progress import in_the_ui

if TYPE_CHECKING:
    from prefect.context import TaskRunContext

    from cropi_core.gradients import Spread

Made = ArtifactRef | State[ArtifactRef]
"""What the function of a task returns: an artifact, or the state Cached with it."""
RECORDS = ".prefect-results"
"""Directory of Prefect's records, below a root or below an address's cache."""

DESCRIPTIONS: dict[StepName, str] = {
    "prompts": "Read or generate one set of prompts.",
    "policy": "Copy the base checkpoint into the store.",
    "rollouts": "Sample and grade completions of the policy.",
    "gradients": "Compute projected policy gradients, one row per prompt.",
    "scores": "Score the pool by its influence on the validation sets.",
    "diagnostics": "Compare the scores with those of fresh trajectories.",
    "selection": "Choose the prompts a stage trains on.",
    "training": "Train one GRPO stage.",
    "evaluation": "Measure accuracy on the validation and test sets.",
}


@cache
def store_at(root: str) -> Store:
    """Open a store, once per process, so that unmodified files are hashed once and not at every access."""
    return Store(root)


def artifact_cache_key(context: "TaskRunContext", parameters: dict[str, Any]) -> str:
    """Name a task run's record by the key of the artifact it makes."""
    return parameters["spec"].key


def _ignored(result: StepResult) -> None:
    """Ignore a result."""


def make_artifact(
    spec: StepSpec,
    root: str,
    report: Report = silent,
    refresh: bool = False,
    done: Callable[[StepResult], None] = _ignored,
) -> Made:
    """Find a step's artifact in the store, or compute it in this process or a child process.

    Args:
        spec: The step; `spec.runtime` defines where and how it runs.
        root: Directory or address of the artifact store.
        report: Called with progress.
        refresh: Recompute the artifact even if it exists.
        done: Called with the result, which contains more than a reference: whether the artifact was computed here, or
            by another run while this one waited for it.

    Returns:
        The artifact; in the state Cached if nothing was computed, such as after waiting for another run's claim.
    """
    store = store_at(root)
    with in_the_ui(spec.slot, report) as both:
        result = run_step(spec, store, report=both, refresh=refresh, spread=_spread(spec))
    done(result)
    return Completed(name="Cached", data=result.ref) if result.cached else result.ref


def _spread(spec: StepSpec) -> "Spread | None":
    """Return the function that computes a step's shards elsewhere, or None if its configuration does not request that.

    Raises:
        ConfigError: The configuration requests Ray, which is not installed.
    """
    if spec.step != "gradients" or spec.runtime.get("ray") is None:
        return None
    if find_spec("prefect_ray") is None:
        raise ConfigError("runtime.ray needs prefect-ray, which is not installed: pip install 'cropi[ray]'")
    from tasks.ray_shards import on_ray  # importing Ray takes a second

    return on_ray


def step_task(step: StepName, root: str, *, refresh_record: bool) -> Task[..., Made]:
    """Return a step's task with its records below ``root``; ``refresh_record`` ignores an existing record."""
    return TASKS[step].with_options(
        result_storage=store_at(root).root / RECORDS, refresh_cache=refresh_record
    )


def _task(step: StepName) -> Task[..., Made]:
    return Task(
        make_artifact,
        name=step,
        description=DESCRIPTIONS[step],
        task_run_name="{spec.slot}",
        cache_policy=CacheKeyFnPolicy(cache_key_fn=artifact_cache_key),
        persist_result=True,
        # Prefect's default is pickle, which executes code when it is loaded.
        result_serializer="json",
    )


TASKS: dict[StepName, Task[..., Made]] = {step: _task(step) for step in STEP_NAMES}
"""The tasks, by step."""
