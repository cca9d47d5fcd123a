"""Repeat a finished run from the store, without an orchestrator: nothing is computed."""

from collections.abc import Callable

from cropi_core.artifacts import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import StepResult
from cropi_core.errors import ArtifactError
from cropi_core.runs import load_run, run_id
from data_schemas import Config, RunRecord, StepSpec


def repeat_finished(
    config: Config, store: Store, shown: Callable[[str, StepResult], None]
) -> RunRecord | None:
    """Find every artifact of a run that has finished, and verify all their bytes.

    Args:
        config: The run's configuration.
        store: Store with the artifacts.
        shown: Called with the slot and the result of every step.

    Returns:
        The record of the run, with all slots cached; None if the run has not finished, or if an artifact is missing or
        damaged. Nothing is set aside: the run that repairs the artifact reports the damage.

    Raises:
        CropiError: The run would fail before its first step, for example because its data have changed.
    """

    def find(spec: StepSpec) -> StepResult:
        if not store.is_complete(spec.key):
            raise ArtifactError(f"{spec.slot}: {spec.key} is missing or damaged, and is computed again")
        result = StepResult(store.manifest(spec.key).ref, cached=True, seconds=0.0)
        shown(spec.slot, result)
        return result

    try:
        if load_run(store, run_id(config)).status != "done":
            return None
        return run_curriculum(config, store, find)
    except ArtifactError:
        return None
