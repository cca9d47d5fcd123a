"""One flow per step: each repeats the step on the artifacts of an existing run with other settings.

    from flows.single_steps import scores
    scores(run="demo-1a2b3c4d", stage=1, fusion="max", root=".cropi")

Empty settings keep the run's values. A flow's parameters are the fields of its form in Prefect's UI, with the texts of
the docstring. Each flow returns the artifact's name, its path, and the `pin` that makes a run use it.
"""

from typing import Annotated, Any, Literal

from prefect import flow
from pydantic import Field

from cropi_core.config import section_pattern
from cropi_core.runs import load_run
from data_schemas import (
    Config,
    Evaluation,
    Fusion,
    LossType,
    Objective,
    Projection,
    Ratio,
    Sampling,
    Scores,
    Selection,
    Strategy,
    Target,
    Training,
    TrainingObjective,
)
from flows.rerun import latest, rerun
from flows.serving import artifact_root
from tasks import store_at

Run = Annotated[str, Field(min_length=1, max_length=60)]
Stage = Annotated[int, Field(ge=1, le=1000)]
Root = Annotated[
    str | None,
    Field(min_length=1),
]
Prompts = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]
Other = Annotated[str | None, Field(min_length=1)]
Seed = Annotated[int | None, Field(ge=0, lt=2**31)]
Samples = Annotated[int | None, Field(ge=1, le=1024)]
Temperature = Annotated[float | None, Field(gt=0, le=10)]
Tokens = Annotated[int | None, Field(ge=1, le=131072)]
Tag = Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
Many = Field(max_length=200)
Texts = {
    "rollouts": section_pattern({"sampling": Sampling}),
    "gradients": section_pattern({"projection": Projection, "objective": Objective}),
    "scores": section_pattern({"scores": Scores}),
    "selection": section_pattern({"selection": Selection}),
    "training": section_pattern({"training": Training, "objective": TrainingObjective}),
    "evaluation": section_pattern({"evaluation": Evaluation}),
}
"""Patterns of the overrides of each step; the server refuses any other before it schedules a run."""


@flow(name="cropi-rollouts", flow_run_name="{run} rollouts/{prompts}@{stage}")
def rollouts(
    run: Run,
    stage: Stage = 1,
    root: Root = None,
    prompts: Prompts = "pool",
    samples: Samples = None,
    temperature: Temperature = None,
    max_new_tokens: Tokens = None,
    seed: Seed = None,
    policy: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["rollouts"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Collect rollouts again.

    Args:
        run: Id of the run.
        stage: Stage whose rollouts are repeated; a run that collects once has them in stage 1.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        prompts: `pool` or a validation set.
        samples: Completions per prompt.
        temperature: Sampling temperature.
        max_new_tokens: Maximum completion length in tokens.
        seed: Another seed.
        policy: Key, tag or RUN:slot of another policy.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `sampling.top_p=0.9`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    sampling = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    changes = {"sampling": sampling, "seed": seed}
    return rerun(
        f"rollouts/{prompts}@{stage}", run, root, changes, {"policy": policy}, refresh, overrides, tag
    )


@flow(name="cropi-gradients", flow_run_name="{run} gradients/{prompts}@{stage}")
def gradients(
    run: Run,
    stage: Stage = 1,
    root: Root = None,
    prompts: Prompts = "pool",
    k: Annotated[int | None, Field(ge=16, le=1 << 20)] = None,
    density: Annotated[float | None, Field(gt=0, le=1)] = None,
    projection_seed: Annotated[int | None, Field(ge=0)] = None,
    loss_type: LossType | None = None,
    ratio: Ratio | None = None,
    rollouts: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["gradients"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Extract gradient features again.

    Args:
        run: Id of the run.
        stage: Stage whose policy is differentiated.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        prompts: `pool` or a validation set.
        k: Dimension of a gradient feature.
        density: Share of the coordinates kept before projection.
        projection_seed: Seed of the projection.
        loss_type: Token weights of the objective.
        ratio: Importance ratio of the stored trajectories.
        rollouts: Key, tag or RUN:slot of other rollouts.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `projection.k=4096`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    changes = {
        "projection": {"k": k, "density": density, "seed": projection_seed},
        "objective": {"loss_type": loss_type, "ratio": ratio},
    }
    return rerun(
        f"gradients/{prompts}@{stage}", run, root, changes, {"rollouts": rollouts}, refresh, overrides, tag
    )


@flow(name="cropi-scores", flow_run_name="{run} scores@{stage}")
def scores(
    run: Run,
    stage: Stage = 1,
    root: Root = None,
    metric: Literal["cosine", "dot"] | None = None,
    target: Target | None = None,
    fusion: Fusion | None = None,
    rrf_k0: Annotated[float | None, Field(ge=0)] = None,
    rrf_top: Annotated[int | None, Field(ge=1)] = None,
    memory: Annotated[float | None, Field(gt=0, le=1)] = None,
    gradients: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["scores"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Score the pool again from existing gradients.

    Args:
        run: Id of the run.
        stage: Stage whose scores are repeated.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        metric: Cosine similarity, or the plain inner product.
        target: How a validation set's gradients are combined into one direction.
        fusion: How the rankings by set are combined into one.
        rrf_k0: Constant of reciprocal-rank fusion.
        rrf_top: Only the best n prompts of each set vote.
        memory: Weight of the run's scores of the previous stage, from stage 2 on.
        gradients: Key, tag or RUN:slot of other gradients of the pool.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `scores.metric=dot`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    section = {"metric": metric, "target": target, "fusion": fusion, "rrf_k0": rrf_k0, "rrf_top": rrf_top}
    inputs: dict[str, Any] = {"train": gradients}
    if memory is not None:
        record = load_run(store_at(artifact_root(root)), run)
        inputs["previous"] = latest(record, "scores", stage - 1)
    return rerun(
        f"scores@{stage}",
        run,
        root,
        {"scores": section | {"memory": memory}},
        inputs,
        refresh,
        overrides,
        tag,
    )


@flow(name="cropi-selection", flow_run_name="{run} selection@{stage}")
def selection(
    run: Run,
    stage: Stage = 1,
    root: Root = None,
    strategy: Strategy | None = None,
    ratio: Annotated[float | None, Field(gt=0, le=1)] = None,
    pass_rate_target: Annotated[float | None, Field(ge=0, le=1)] = None,
    seed: Seed = None,
    scores: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["selection"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Select the subset again.

    Args:
        run: Id of the run.
        stage: Stage whose subset is selected.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        strategy: Selection strategy.
        ratio: Share of the pool.
        pass_rate_target: Target of the strategy `pass_rate`.
        seed: Another seed, for random draws.
        scores: Key, tag or RUN:slot of other scores, such as those from `cropi-scores`.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `selection.ratio=0.2`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    section = {"strategy": strategy, "ratio": ratio, "pass_rate_target": pass_rate_target}
    record = load_run(store_at(artifact_root(root)), run)
    inputs: dict[str, Any] = {"scores": scores}
    # A strategy may need inputs that the original one did not use: take the run's own scores or rollouts.
    if strategy in ("influence", "grad_norm") and scores is None:
        inputs["scores"] = latest(record, "scores", stage)
    if strategy in ("learnability", "pass_rate"):
        inputs["rollouts"] = latest(record, "rollouts/pool", stage)
    if strategy == "text_similarity":
        sets = Config.model_validate(record.config).data.validation
        inputs |= {f"validation.{name}": record.slots[f"prompts/{name}"].ref for name in sets}
    return rerun(
        f"selection@{stage}", run, root, {"selection": section, "seed": seed}, inputs, refresh, overrides, tag
    )


@flow(name="cropi-training", flow_run_name="{run} policy@{stage}")
def training(
    run: Run,
    stage: Stage = 1,
    root: Root = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    learning_rate: Annotated[float | None, Field(gt=0)] = None,
    seed: Seed = None,
    selection: Other = None,
    policy: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["training"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Train a stage again.

    Args:
        run: Id of the run.
        stage: Stage to train.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        steps: Optimizer steps.
        learning_rate: Learning rate of the optimizer.
        seed: Another seed.
        selection: Key, tag or RUN:slot of another subset, such as one from `cropi-selection`.
        policy: Key, tag or RUN:slot of another policy to start from.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `training.steps=40`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    changes = {"training": {"steps": steps, "learning_rate": learning_rate}, "seed": seed}
    return rerun(
        f"policy@{stage}",
        run,
        root,
        changes,
        {"selection": selection, "policy": policy},
        refresh,
        overrides,
        tag,
    )


@flow(name="cropi-evaluation", flow_run_name="{run} evaluation@{stage}")
def evaluation(
    run: Run,
    stage: Annotated[int, Field(ge=0, le=1000)] = 0,
    root: Root = None,
    samples: Samples = None,
    temperature: Temperature = None,
    max_new_tokens: Tokens = None,
    seed: Seed = None,
    policy: Other = None,
    refresh: bool = False,
    overrides: Annotated[
        list[Annotated[str, Field(pattern=Texts["evaluation"], max_length=2000)]] | None, Many
    ] = None,
    tag: Tag = None,
) -> dict[str, Any]:
    """Measure accuracy again.

    Args:
        run: Id of the run.
        stage: Stage after which the policy is measured; 0 is the base policy.
        root: Directory or address of the artifacts. Empty: `CROPI_ROOT`, or `.cropi` in the checkout.
        samples: Completions per prompt.
        temperature: Sampling temperature.
        max_new_tokens: Maximum completion length in tokens.
        seed: Another seed.
        policy: Key, tag or RUN:slot of another policy, such as one from `cropi-training`.
        refresh: Recompute the artifact even if it exists.
        overrides: Other settings of this step, such as `evaluation.sampling.samples=8`; fields of the form win.
        tag: Name for the artifact, under which a run can pin it and the garbage collection keeps it.
    """
    sampling = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    changes = {"evaluation": {"sampling": sampling, "seed": seed}}
    return rerun(f"evaluation@{stage}", run, root, changes, {"policy": policy}, refresh, overrides, tag)
