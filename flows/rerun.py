"""Re-execution of one step of an existing run with changed settings: shared by the single-step flows.

The step is rebuilt from the manifest of the artifact that the run used in that slot, so unchanged settings keep their
values. The run's record is not modified. To use the new artifact, pin it (`pin: {scores@1: KEY}`) or pass its key to
the next single step. A tag protects it from `cropi artifacts gc`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.logging import get_run_logger
from pydantic import BaseModel, ValidationError

from cropi_core.artifacts import Store
from cropi_core.config import changed_sections
from cropi_core.errors import ConfigError, in_one_line
from cropi_core.rewards import grading_location
from cropi_core.runs import load_run, resolve_key, slot_ref
from data_schemas import (
    ArtifactRef,
    Config,
    Evaluation,
    Objective,
    Projection,
    RunRecord,
    Sampling,
    Scores,
    Selection,
    StepName,
    StepSpec,
    Training,
)
from flows.serving import artifact_root
from flows.trust import check_code
from tasks import Executor, store_at

SECTIONS: dict[str, type[BaseModel]] = {
    "sampling": Sampling,
    "objective": Objective,
    "projection": Projection,
    "scores": Scores,
    "selection": Selection,
    "training": Training,
    "evaluation": Evaluation,
}
"""The sections of a step's settings, as stored in its manifest."""


def rerun(
    slot: str,
    run: str,
    root: str | None,
    changes: Mapping[str, Any],
    inputs: Mapping[str, str | ArtifactRef | None],
    refresh: bool,
    overrides: Sequence[str] | None = None,
    tag: str | None = None,
) -> dict[str, Any]:
    """Rebuild the step at ``slot``, change it, execute it and return a summary of its artifact.

    Args:
        slot: Slot of the run, such as `scores@1`.
        run: Id of the run.
        root: Directory or address of the artifacts; None uses the deployment's.
        changes: Settings by section and name; None keeps the original value.
        inputs: Other artifacts to use, by input name; None uses the run's.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of the step, such as `scores.metric=dot`; ``changes`` win over them.
        tag: Name for the artifact, under which it can be pinned.

    Raises:
        CropiError: The run or slot does not exist, or the changed settings are invalid.
    """
    root = artifact_root(root)
    store = store_at(root)
    spec = changed_spec(store, load_run(store, run), slot, changes, inputs, overrides or ())
    log = get_run_logger()
    execute = Executor(root, log, [spec.step] if refresh else [])
    result = execute(spec)
    execute.show_rest()
    if tag is not None:
        store.tag(tag, result.ref.key)
    log.info("to use it in a run: -o pin.%s=%s", slot, tag or result.ref.key)
    return {
        "run": run,
        "slot": slot,
        "ref": result.ref.model_dump(),
        "origin": "cached" if result.cached else "computed",
        "path": store.where(result.ref),
        "pin": {slot: result.ref.key},
    }


def changed_spec(
    store: Store,
    record: RunRecord,
    slot: str,
    changes: Mapping[str, Any],
    inputs: Mapping[str, str | ArtifactRef | None],
    overrides: Sequence[str] = (),
) -> StepSpec:
    """Build a step from the artifact a run used, with other settings and inputs.

    Raises:
        ArtifactError: The run has no such slot, or an input does not exist.
        ConfigError: The artifact was imported and not produced by a step, or the settings are invalid.
    """
    manifest = store.manifest(slot_ref(record, slot))
    if manifest.step == "import":
        raise ConfigError(
            f"{slot} of run {record.run} is {manifest.key}, which was imported: no step can be repeated"
        )
    taken = dict(manifest.inputs)
    for name, other in inputs.items():
        if other is not None:
            taken[name] = (
                other if isinstance(other, ArtifactRef) else store.manifest(resolve_key(store, other)).ref
            )
    settings = changed_settings(manifest.step, manifest.settings, changes, overrides)
    config = consistent(record.config, settings)
    check_code(config)
    return StepSpec(
        step=manifest.step,
        slot=slot,
        settings=settings,
        inputs=taken,
        location=grading_location(config.grading),
        runtime=config.runtime.model_dump(mode="json"),
    )


def changed_settings(
    step: StepName, settings: Mapping[str, Any], changes: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Apply overrides and then changes to a step's settings: to a section by name, or to a value such as the seed.

    Raises:
        ConfigError: The step has no such setting, or a value is out of range.
    """
    changed = changed_sections(settings, overrides)
    touched = {text.partition(".")[0].strip() for text in overrides}
    touched |= {name for name, value in changes.items() if value is not None}
    if unknown := sorted(touched - settings.keys()):
        raise ConfigError(f"{step} has no setting {unknown[0]!r}; it has {', '.join(sorted(settings))}")
    for name in sorted(touched):
        value = changes.get(name)
        if name not in SECTIONS:
            changed[name] = value
            continue
        section = _over(changed[name], value or {})
        try:
            # A manifest may store only part of a section (training keeps three fields of the objective).
            changed[name] = (
                SECTIONS[name].model_validate(section).model_dump(mode="json", include=set(section))
            )
        except ValidationError as error:
            faults = "; ".join(f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{step}: {faults}") from error
    return changed


def consistent(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    """Insert a step's settings into its run's configuration, validate the result and return it.

    Raises:
        ConfigError: The settings contradict each other.
    """
    sections = {
        name: {**config[name], **settings[name]} for name in SECTIONS if name in config and name in settings
    }
    try:
        return Config.model_validate({**config, **sections})
    except ValidationError as error:
        raise ConfigError(in_one_line(error)) from error


def _over(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        if isinstance(value, Mapping):
            merged[name] = _over(old[name], value)
        elif value is not None:
            merged[name] = value
    return merged


def latest(record: RunRecord, name: str, stage: int) -> ArtifactRef:
    """Return the artifact a run used for ``name`` in ``stage``, or in the latest stage before it.

    Raises:
        ArtifactError: Neither this stage nor an earlier one has it.
    """
    for number in range(stage, 0, -1):
        if f"{name}@{number}" in record.slots:
            return record.slots[f"{name}@{number}"].ref
    return slot_ref(record, f"{name}@{stage}")
