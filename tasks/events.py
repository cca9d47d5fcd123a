"""Prefect events that announce a finished stage or a verifier that looks broken, for use in automations.

The event `cropi.stage.finished` has the resource `cropi.run.<run>` and the payload `run`, `stage`, `accuracy` by set
and `text`, a one-line message. `cropi.verifier.suspicious` has the same resource and the payload `run`, `slot` and
`text`. Prefect adds the flow run and the deployment.
"""

from collections.abc import Callable, Sequence

from prefect.events import emit_event

from cropi_core.artifacts import Store
from cropi_core.curriculum import StepResult
from cropi_core.runs import Accuracy, accuracies, stage_of
from data_schemas import StepSpec
from tasks.ui import plain

STAGE_FINISHED = "cropi.stage.finished"
VERIFIER_SUSPICIOUS = "cropi.verifier.suspicious"
MOST_SETS = 20
"""Maximum number of sets named in the message."""


def announced(
    execute: Callable[[StepSpec], StepResult], run: str, store: Store
) -> Callable[[StepSpec], StepResult]:
    """Wrap ``execute`` to announce stages and suspicious verifiers of computed steps; cached ones were announced."""
    resource = {"prefect.resource.id": f"cropi.run.{run}", "prefect.resource.name": run}

    def executed(spec: StepSpec) -> StepResult:
        result = execute(spec)
        if spec.step == "evaluation" and not result.cached:
            stage = stage_of(spec.slot)
            rows = accuracies(store.manifest(result.ref).summary, stage)
            emit_event(
                STAGE_FINISHED,
                resource=resource,
                payload={
                    "run": run,
                    "stage": stage,
                    "accuracy": {plain(row.set): plain(row.accuracy) for row in rows},
                    "text": in_one_line(run, stage, rows),
                },
            )
        if spec.step == "rollouts" and not result.cached:
            for warning in store.manifest(result.ref).summary.get("verifier_warnings", []):
                emit_event(
                    VERIFIER_SUSPICIOUS,
                    resource=resource,
                    payload={
                        "run": run,
                        "slot": str(spec.slot),
                        "text": f"{run}, {spec.slot}: {plain(warning)}",
                    },
                )
        return result

    return executed


def in_one_line(run: str, stage: int, rows: Sequence[Accuracy]) -> str:
    """Summarise a stage in one line with 95 % intervals: ``demo-1a2b3c4d, stage 1: reverse 62.5 % (55.8–68.8)``."""
    sets = [f"{plain(row.set)} {row.text}" for row in rows[:MOST_SETS]]
    more = [f"and {len(rows) - MOST_SETS} more"] if len(rows) > MOST_SETS else []
    return f"{run}, {'the base' if stage == 0 else f'stage {stage}'}: {', '.join([*sets, *more])}"
