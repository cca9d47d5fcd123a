"""The nine steps as functions from input directories to an output directory.

Each function fills ``work.out`` and returns the summary for the manifest. It uses the settings of the step
(:mod:`data_schemas.steps`) and the file names (:mod:`cropi_core.artifacts.layout`); the package of the step does the
rest.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cropi_core.artifacts import (
    ACCURACY_FILE,
    BELIEF_FILE,
    CHECKPOINT,
    DIAGNOSTICS_FILE,
    EVALUATION_FILE,
    FEATURES,
    FEATURES_FILE,
    GRADIENTS,
    METRICS_FILE,
    PROMPTS_FILE,
    ROLLOUTS,
    SCORES_FILE,
    SCRATCH,
    SELECTION_FILE,
)
from cropi_core.curriculum.work import Work
from cropi_core.policy import Checkpoint
from cropi_core.rewards import grading_of
from data_schemas import (
    DiagnosticsSettings,
    EvaluationSettings,
    GradientsSettings,
    HalvedRolloutsSettings,
    MergedRolloutsSettings,
    MixSource,
    Objective,
    PilotPromptsSettings,
    PolicySettings,
    PromptsSettings,
    RolloutsSettings,
    ScoresSettings,
    SelectionSettings,
    Source,
    SpotPromptsSettings,
    StepName,
    TrainingSettings,
    WakingPromptsSettings,
)

StepFunction = Callable[[Work], dict[str, Any]]


def prompts_step(work: Work) -> dict[str, Any]:
    """Read or generate one set of prompts."""
    from cropi_core.prompts import decontaminated, load_mix, load_source, summarise, write_prompts

    if "spot" in work.spec.settings:
        return _spot_prompts(work)
    if "pilot" in work.spec.settings:
        return _pilot_prompts(work)
    if "waking" in work.spec.settings:
        return _waking_prompts(work)
    settings = PromptsSettings.model_validate(work.spec.settings)
    source: Source = TypeAdapter(Source).validate_python(settings.source)
    if isinstance(source, MixSource):
        table, dropped = load_mix(source, settings.split, work.spec.location)
    else:
        table, dropped = load_source(source, settings.split, work.spec.location.get("path"))
    facts: dict[str, Any] = {"dropped": dropped}
    if settings.decontaminate is not None:
        others = {name: path / PROMPTS_FILE for name, path in _named(work.inputs, "against.").items()}
        table, facts["decontamination"] = decontaminated(table, others, settings.decontaminate.model_dump())
    write_prompts(table, work.out / PROMPTS_FILE)
    return summarise(table) | facts


def _spot_prompts(work: Work) -> dict[str, Any]:
    """Draw the prompts of a spot check from a scored pool."""
    from cropi_core.diagnostics import draw_spot
    from cropi_core.prompts import summarise, write_prompts

    settings = SpotPromptsSettings.model_validate(work.spec.settings)
    table = draw_spot(
        work.inputs["prompts"] / PROMPTS_FILE,
        work.inputs["scores"] / SCORES_FILE,
        wanted=settings.spot.prompts,
        dead_share=settings.spot.dead_share,
        seed=settings.seed,
    )
    write_prompts(table, work.out / PROMPTS_FILE)
    return summarise(table)


def _pilot_prompts(work: Work) -> dict[str, Any]:
    """Draw the part of a pool that is sampled."""
    from cropi_core.prompts import draw_prompts, read_prompts, summarise, write_prompts
    from cropi_core.selection import subset_size

    settings = PilotPromptsSettings.model_validate(work.spec.settings)
    pool = read_prompts(work.inputs["prompts"] / PROMPTS_FILE)
    table = draw_prompts(pool, subset_size(settings.pilot, pool.num_rows), settings.seed)
    write_prompts(table, work.out / PROMPTS_FILE)
    return summarise(table)


def _waking_prompts(work: Work) -> dict[str, Any]:
    """Choose the prompts of the pool that a later stage samples again."""
    from cropi_core.prompts import read_prompts, summarise, write_prompts
    from cropi_core.rollouts import list_lengths, read_rollouts
    from cropi_core.selection import Sampled, reward_sums, waking_prompts

    settings = WakingPromptsSettings.model_validate(work.spec.settings)
    sets = []
    for name, path in _named(work.inputs, "validation.").items():
        prompts = read_prompts(path / PROMPTS_FILE)
        rollouts = work.inputs[f"rollouts.{name}"] / ROLLOUTS
        sets.append(Sampled(prompts, *reward_sums(rollouts, prompts["prompt_id"].to_pylist())))
    stored = list_lengths(read_rollouts(work.inputs["stored"] / ROLLOUTS)["completion_ids"])
    table = waking_prompts(
        read_prompts(work.inputs["prompts"] / PROMPTS_FILE),
        sets,
        settings.waking,
        group=settings.group,
        tokens=float(stored.mean()) * settings.samples,
        seed=settings.seed,
    )
    write_prompts(table, work.out / PROMPTS_FILE)
    return summarise(table)


def policy_step(work: Work) -> dict[str, Any]:
    """Check a checkpoint, copy it into the store, and give it the run's chat template."""
    from cropi_core.policy import copy_checkpoint

    settings = PolicySettings.model_validate(work.spec.settings)
    return copy_checkpoint(Path(work.spec.location["path"]), work.out / CHECKPOINT, settings.chat)


def rollouts_step(work: Work) -> dict[str, Any]:
    """Sample and grade completions, part by part."""
    from cropi_core.prompts import read_prompts
    from cropi_core.rollouts import RolloutPlan, check_sources, sample_rollouts

    if "merged" in work.spec.settings:
        return _merged_rollouts(work)
    if "halves" in work.spec.settings:
        return _halved_rollouts(work)
    settings = RolloutsSettings.model_validate(work.spec.settings)
    if settings.samples_by_source:
        table = read_prompts(work.inputs["prompts"] / PROMPTS_FILE)
        check_sources(settings.samples_by_source, table["source"].to_pylist())
    return sample_rollouts(
        policy=_checkpoint(work, settings.dtype),
        prompts=work.inputs["prompts"] / PROMPTS_FILE,
        out=work.out / ROLLOUTS,
        plan=RolloutPlan(
            settings.sampling,
            settings.seed,
            settings.shard_prompts,
            settings.engine,
            settings.passes,
            settings.samples_by_source,
            keep_checksums=True,
        ),
        grading=grading_of(work.spec),
        runtime=work.runtime,
        report=work.report,
        logs=work.logs,
    )


def _merged_rollouts(work: Work) -> dict[str, Any]:
    """Replace stored completions by fresh ones of the same prompts."""
    from cropi_core.prompts import read_prompts
    from cropi_core.rollouts import merge_rollouts

    settings = MergedRolloutsSettings.model_validate(work.spec.settings)
    prompts = read_prompts(work.inputs["prompts"] / PROMPTS_FILE)
    return merge_rollouts(
        work.inputs["stored"] / ROLLOUTS,
        work.inputs["fresh"] / ROLLOUTS,
        work.out / ROLLOUTS,
        dict(zip(prompts["prompt_id"].to_pylist(), prompts["source"].to_pylist(), strict=True)),
        keep_stored=settings.keep_stored,
    )


def _halved_rollouts(work: Work) -> dict[str, Any]:
    """Halve the completions of some prompts."""
    from cropi_core.rollouts import halve_rollouts

    settings = HalvedRolloutsSettings.model_validate(work.spec.settings)
    stored = work.inputs["rollouts"] / ROLLOUTS
    return halve_rollouts(stored, work.out / ROLLOUTS, prompts=settings.halves, seed=settings.seed)


def gradients_step(work: Work) -> dict[str, Any]:
    """Compute projected gradients of the objective, shard by shard."""
    from cropi_core.gradients import FeatureSettings, extract_gradients

    if "merged" in work.spec.settings:
        return _merged_gradients(work)
    settings = GradientsSettings.model_validate(work.spec.settings)
    features = FeatureSettings(
        settings.objective, settings.projection, settings.layout, settings.max_new_tokens
    )
    return extract_gradients(
        policy=_checkpoint(work, settings.dtype),
        rollouts=work.inputs["rollouts"] / ROLLOUTS,
        out=work.out / GRADIENTS,
        settings=features,
        runtime=work.runtime,
        report=work.report,
        spread=work.spread,
    )


def _merged_gradients(work: Work) -> dict[str, Any]:
    """Replace stored features by those that the training of the policy collected."""
    from cropi_core.gradients import merge_trained
    from cropi_core.rollouts import read_rollouts

    return merge_trained(
        work.inputs["stored"] / GRADIENTS,
        work.inputs["policy"] / FEATURES,
        work.out / GRADIENTS,
        Counter(read_rollouts(work.inputs["rollouts"] / ROLLOUTS)["prompt_id"].to_pylist()),
        work.spec.inputs["policy"].digest,
    )


def scores_step(work: Work) -> dict[str, Any]:
    """Score stored features against validation targets."""
    from cropi_core.scores import score

    settings = ScoresSettings.model_validate(work.spec.settings)
    previous, prompts, halves = (work.inputs.get(name) for name in ("previous", "prompts", "halves"))
    return score(
        train=work.inputs["train"] / GRADIENTS,
        validation={n: path / GRADIENTS for n, path in _named(work.inputs, "validation.").items()},
        out=work.out / SCORES_FILE,
        settings=settings.scores,
        seed=settings.seed,
        previous=previous / SCORES_FILE if previous else None,
        prompts=prompts / PROMPTS_FILE if prompts else None,
        halves=halves / GRADIENTS if halves else None,
        report=work.report,
    )


def diagnostics_step(work: Work) -> dict[str, Any]:
    """Compare scores with those from fresh trajectories."""
    from cropi_core.diagnostics import compare_scores

    settings = DiagnosticsSettings.model_validate(work.spec.settings)
    return compare_scores(
        scores=work.inputs["scores"] / SCORES_FILE,
        spot=work.inputs["spot"] / SCORES_FILE,
        out=work.out / DIAGNOSTICS_FILE,
        settings=settings.scores,
        ratio=settings.ratio,
        seed=settings.seed,
    )


def selection_step(work: Work) -> dict[str, Any]:
    """Select the prompts of a stage."""
    from cropi_core.selection import select

    settings = SelectionSettings.model_validate(work.spec.settings)
    scores, rollouts, belief = (work.inputs.get(name) for name in ("scores", "rollouts", "belief"))
    return select(
        prompts=work.inputs["prompts"] / PROMPTS_FILE,
        scores=scores / SCORES_FILE if scores else None,
        rollouts=rollouts / ROLLOUTS if rollouts else None,
        out=work.out / SELECTION_FILE,
        settings=settings.selection,
        seed=settings.seed,
        fallback=settings.fallback.model_dump() if settings.fallback else None,
        belief=belief / BELIEF_FILE if belief else None,
        targets={name: path / PROMPTS_FILE for name, path in _named(work.inputs, "validation.").items()},
    )


def training_step(work: Work) -> dict[str, Any]:
    """Train one GRPO stage on the selected prompts."""
    from cropi_core.training import FeaturePlan, StageFiles

    settings = TrainingSettings.model_validate(work.spec.settings)
    reference, base = work.inputs.get("reference"), work.inputs.get("base")
    rollouts, belief = work.inputs.get("rollouts"), work.inputs["policy"] / BELIEF_FILE
    files = StageFiles(
        policy=work.inputs["policy"] / CHECKPOINT,
        prompts=work.inputs["prompts"] / PROMPTS_FILE,
        selection=work.inputs["selection"] / SELECTION_FILE,
        out=work.out / CHECKPOINT,
        metrics=work.out / METRICS_FILE,
        scratch=work.out / SCRATCH,
        keep_scratch=True,  # the caller removes it once the manifest is published
        reference=reference / CHECKPOINT if reference else None,
        base=base / CHECKPOINT if base else None,
        logs=work.logs,
        rollouts=rollouts / ROLLOUTS if rollouts else None,
        belief=belief if settings.training.draw.learns and belief.exists() else None,
        features=FeaturePlan(settings.features, work.out / FEATURES, work.out / FEATURES_FILE)
        if settings.features
        else None,
    )
    arguments = {
        "files": files,
        "training": settings.training,
        "objective": Objective.model_validate(settings.objective.model_dump()),
        "grading": grading_of(work.spec),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "runtime": work.runtime,
        "name": work.spec.slot,
    }
    if work.runtime.launch:
        from cropi_core.training import launched

        return launched(arguments, work.runtime, work.report, work.logs)
    from cropi_core.training import train

    return train(**arguments, report=work.report)


def evaluation_step(work: Work) -> dict[str, Any]:
    """Measure accuracy on each set."""
    from cropi_core.evaluation import EvaluationFiles, evaluate

    settings = EvaluationSettings.model_validate(work.spec.settings)
    return evaluate(
        policy=_checkpoint(work, settings.dtype),
        sets={name: path / PROMPTS_FILE for name, path in _named(work.inputs, "prompts.").items()},
        files=EvaluationFiles(
            completions=work.out / EVALUATION_FILE,
            accuracy=work.out / ACCURACY_FILE,
            scratch=work.out / SCRATCH,
            keep_scratch=True,  # until the manifest is published
            logs=work.logs,
        ),
        settings=settings.evaluation,
        grading=grading_of(work.spec),
        runtime=work.runtime,
        report=work.report,
    )


def _checkpoint(work: Work, dtype: str) -> Checkpoint:
    """Return the input policy."""
    return Checkpoint(work.inputs["policy"] / CHECKPOINT, dtype, work.spec.inputs["policy"].digest)


def _named(inputs: dict[str, Path], prefix: str) -> dict[str, Path]:
    """Return the inputs with names that start with ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): path for name, path in inputs.items() if name.startswith(prefix)}


STEPS: dict[StepName, StepFunction] = {
    "prompts": prompts_step,
    "policy": policy_step,
    "rollouts": rollouts_step,
    "gradients": gradients_step,
    "scores": scores_step,
    "diagnostics": diagnostics_step,
    "selection": selection_step,
    "training": training_step,
    "evaluation": evaluation_step,
}
