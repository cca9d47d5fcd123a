"""Single steps on given files, without a store or an orchestrator. Parses options and calls the steps' functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cropi_core.artifacts import ACCURACY_FILE, CHECKPOINT, EVALUATION_FILE, MANIFEST
from cropi_core.cli.output import AsJson, Overrides, named_paths, present, print_summary, progress_bar
from cropi_core.cli.outputs import claim_output, files_digest, local_path
from cropi_core.errors import ArtifactError, foreign_errors

if TYPE_CHECKING:
    from cropi_core.policy import Checkpoint

PolicyOption = Annotated[str, typer.Option(help="Checkpoint directory, hub id, or `embedded`.")]
Seed = Annotated[int, typer.Option(min=0)]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the weights.")]


def add_to(app: typer.Typer) -> None:
    """Add the seven steps to the command line."""
    for command in (rollouts, gradients, scores, diagnostics, selection, training, evaluation):
        app.command()(command)


def find_policy(path: str, dtype: str = "float32") -> "Checkpoint":
    """Find a policy and its digest; use the digest of the manifest if the checkpoint is in a store."""
    import json

    from cropi_core.policy import Checkpoint, resolve_checkpoint, tree_digest

    directory = resolve_checkpoint(path)
    manifest = directory.parent / MANIFEST
    if directory.name == CHECKPOINT and manifest.is_file():
        with foreign_errors(f"{manifest} is damaged", ArtifactError):
            return Checkpoint(
                directory, dtype, str(json.loads(manifest.read_text(encoding="utf-8"))["digest"])
            )
    return Checkpoint(directory, dtype, tree_digest(directory))


def refuse_contradictions(faults: Sequence[str]) -> None:
    """Refuse options that a whole configuration would report as a contradiction.

    Raises:
        ConfigError: There are faults.
    """
    from cropi_core.config import refuse

    if faults:
        refuse("these options", [("", fault) for fault in faults])


def rollouts(
    policy: PolicyOption,
    prompts: Annotated[Path, typer.Option(help="Prompts table (Parquet).")],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="Directory of the parts; complete parts in it are kept.")
    ],
    seed: Seed = 0,
    dtype: Dtype = "float32",
    shard_prompts: Annotated[int, typer.Option(min=1, help="Prompts per part.")] = 64,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="Sampler: transformers in this process, or vLLM servers."),
    ] = "transformers",
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Sample and grade completions. Sections of -o: sampling, grading, runtime."""
    from cropi_core.config import load_sections
    from data_schemas import Grading, Runtime, Sampling

    sections = load_sections({"sampling": Sampling, "grading": Grading, "runtime": Runtime}, override or [])
    present(prompts, "--prompts")
    from cropi_core.rollouts import RolloutPlan, sample_rollouts

    checkpoint = find_policy(policy, dtype)
    inputs = {
        "policy": checkpoint.digest,
        "prompts": files_digest(prompts),
        "seed": seed,
        "dtype": dtype,
        "engine": engine,
    }
    inputs |= {"sampling": sections["sampling"].model_dump(mode="json"), "shard_prompts": shard_prompts}
    claim_output(out, inputs | {"grading": _graders(sections["grading"])})
    with progress_bar("rollouts") as report:
        summary = sample_rollouts(
            policy=checkpoint,
            prompts=prompts,
            out=out,
            plan=RolloutPlan(sections["sampling"], seed, shard_prompts, engine),
            grading=sections["grading"],
            runtime=sections["runtime"],
            report=report,
        )
    print_summary(summary, as_json)


def _graders(grading: Any) -> dict[str, Any]:
    """Return what rewards depend on: settings, versions of verifiers, sources of functions."""
    from cropi_core.rewards import key_settings
    from data_schemas import VERIFIERS

    return key_settings(grading, VERIFIERS)


def gradients(
    policy: PolicyOption,
    rollouts: Annotated[Path, typer.Option(help="Directory of parts, or one Parquet file.")],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="Zarr group to write; it keeps complete shards.")
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length limit of training; default: that of the rollouts.")
    ] = None,
    dtype: Dtype = "float32",
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute projected gradients. Sections of -o: objective, projection, gradients, runtime.

    Unprojected gradients (projection.kind=none) are stored in float32.
    """
    from cropi_core.config import load_sections
    from data_schemas import Gradients, Objective, Projection, Runtime, consistency

    schemas = {"objective": Objective, "projection": Projection, "gradients": Gradients, "runtime": Runtime}
    sections = load_sections(schemas, override or [])
    projection = sections["projection"]
    if projection.kind == "none" and "dtype" not in projection.model_fields_set:
        projection = projection.model_copy(update={"dtype": "float32"})
    refuse_contradictions(
        [*consistency.exact_projection(projection), *consistency.block_rows(sections["gradients"])]
    )
    present(rollouts, "--rollouts")
    from cropi_core.gradients import FeatureSettings, extract_gradients

    settings = FeatureSettings(sections["objective"], projection, sections["gradients"], max_new_tokens)
    # The store states its other inputs, and refuses others.
    claim_output(out, {"rollouts": files_digest(rollouts)})
    with progress_bar("gradients") as report:
        summary = extract_gradients(
            policy=find_policy(policy, dtype),
            rollouts=rollouts,
            out=out,
            settings=settings,
            runtime=sections["runtime"],
            report=report,
        )
    print_summary(summary, as_json)


def scores(
    train: Annotated[Path, typer.Option(help="Gradients of the pool (Zarr).")],
    validation: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="A validation set's gradients.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="Parquet file to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order among equal scores.")] = 0,
    previous: Annotated[
        Path | None, typer.Option(help="Scores of the previous stage, for scores.memory.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts of the pool, for scores.neighbours.")] = None,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score the pool against validation sets. Section of -o: scores."""
    from cropi_core.config import load_sections
    from data_schemas import Scores

    settings = load_sections({"scores": Scores}, override or [])["scores"]
    sets = named_paths(validation, "--validation")
    present(train, "--train")
    if previous:
        present(previous, "--previous")
    if prompts:
        present(prompts, "--prompts")
    from cropi_core.scores import score

    with progress_bar("scores") as report:
        summary = score(
            train=train,
            validation=sets,
            out=out,
            settings=settings,
            seed=seed,
            previous=previous,
            prompts=prompts,
            report=report,
        )
    print_summary(summary, as_json)


def diagnostics(
    scores: Annotated[Path, typer.Option(help="Scores table of the pool.")],
    spot: Annotated[Path, typer.Option(help="Scores of some of its prompts, from fresh trajectories.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="JSON file to write.")],
    ratio: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the prompts that is the top.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order among equal scores.")] = 0,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare scores with those from other trajectories of the same prompts. Section of -o: scores."""
    from cropi_core.config import load_sections
    from data_schemas import Scores

    settings = load_sections({"scores": Scores}, override or [])["scores"]
    present(scores, "--scores")
    present(spot, "--spot")
    from cropi_core.diagnostics import compare_scores

    print_summary(
        compare_scores(scores=scores, spot=spot, out=out, settings=settings, ratio=ratio, seed=seed), as_json
    )


def selection(
    out: Annotated[Path, typer.Option(callback=local_path, help="Parquet file to write.")],
    scores: Annotated[Path | None, typer.Option(help="Scores table.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts table; default: the ids of the scores.")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="Rollouts, for strategies that read pass rates.")
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts table of a validation set, for text_similarity. Repeatable."),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the pool: selection.ratio.")] = None,
    strategy: Annotated[str | None, typer.Option(help="How to choose: selection.strategy.")] = None,
    seed: Seed = 0,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Select the subset to train on. Section of -o: selection."""
    from cropi_core.config import load_sections
    from data_schemas import Selection

    short = {"ratio": ratio, "strategy": strategy}
    given = [f"selection.{name}={value}" for name, value in short.items() if value is not None]
    settings = load_sections({"selection": Selection}, [*(override or []), *given])["selection"]
    targets = {str(path): path for path in validation or []}
    options = {
        "--scores": [scores],
        "--prompts": [prompts],
        "--rollouts": [rollouts],
        "--validation": targets.values(),
    }
    for option, paths in options.items():
        for path in filter(None, paths):
            present(path, option)
    from cropi_core.selection import select

    inputs = {"prompts": prompts, "scores": scores, "rollouts": rollouts, "targets": targets}
    summary = select(out=out, settings=settings, seed=seed, **inputs)
    print_summary(summary, as_json)


def training(
    policy: PolicyOption,
    prompts: Annotated[Path, typer.Option(help="Prompts table (Parquet).")],
    selection: Annotated[Path, typer.Option(help="Selection table (Parquet).")],
    out: Annotated[Path, typer.Option(callback=local_path, help="Checkpoint directory to write.")],
    metrics: Annotated[
        Path | None,
        typer.Option(
            callback=local_path, help="Parquet of the steps' metrics; default: OUT.metrics.parquet."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="KL reference policy, for training.beta > 0.")] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train one GRPO stage. Sections of -o: training, objective, grading, runtime."""
    from cropi_core.config import load_sections
    from data_schemas import Grading, Objective, Runtime, Training, consistency

    schemas = {"training": Training, "objective": Objective, "grading": Grading, "runtime": Runtime}
    sections = load_sections(schemas, override or [])
    stage, runtime = sections["training"], sections["runtime"]
    refuse_contradictions(
        [
            *consistency.training_stage(stage),
            *consistency.kl_reference(stage, given=reference is not None),
            *consistency.loss_parameters(sections["objective"], stage.trl),
            *consistency.training_processes(stage, runtime.launch, runtime.trl),
        ]
    )
    present(prompts, "--prompts")
    present(selection, "--selection")
    from cropi_core.training import StageFiles, train

    checkpoint, base = find_policy(policy), find_policy(reference) if reference else None
    scratch = out.with_name(f".{out.name}.scratch")
    inputs: dict[str, Any] = {"prompts": files_digest(prompts), "selection": files_digest(selection)}
    inputs |= {"policy": checkpoint.digest, "seed": seed}
    inputs |= {name: sections[name].model_dump(mode="json") for name in ("training", "objective")}
    inputs |= {"reference": base.digest if base else None, "dtype": dtype}
    claim_output(out, inputs | {"grading": _graders(sections["grading"])}, scratch)
    with progress_bar("training") as report:
        summary = train(
            StageFiles(
                policy=checkpoint.path,
                prompts=prompts,
                selection=selection,
                out=out,
                metrics=metrics or out.with_name(f"{out.name}.metrics.parquet"),
                scratch=scratch,
                reference=base.path if base else None,
            ),
            dtype=dtype,
            seed=seed,
            report=report,
            **sections,
        )
    print_summary(summary, as_json)


def evaluation(
    policy: PolicyOption,
    sets: Annotated[list[str], typer.Option("--set", metavar="NAME=PATH", help="A set's prompts (Parquet).")],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="Directory for completions.parquet and accuracy.json.")
    ],
    dtype: Dtype = "float32",
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy by set. Sections of -o: evaluation, grading, runtime."""
    from cropi_core.config import load_sections
    from data_schemas import Evaluation, Grading, Runtime

    schemas = {"evaluation": Evaluation, "grading": Grading, "runtime": Runtime}
    sections = load_sections(schemas, override or [])
    paths = named_paths(sets, "--set")
    from cropi_core.evaluation import EvaluationFiles, evaluate

    checkpoint = find_policy(policy, dtype)
    inputs = {f"set {name}": files_digest(path) for name, path in paths.items()}
    inputs |= {
        "policy": checkpoint.digest,
        "dtype": dtype,
        "evaluation": sections["evaluation"].model_dump(mode="json"),
    }
    claim_output(out, inputs | {"grading": _graders(sections["grading"])})
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("evaluation") as report:
        summary = evaluate(
            policy=checkpoint,
            sets=paths,
            files=EvaluationFiles(
                completions=out / EVALUATION_FILE, accuracy=out / ACCURACY_FILE, scratch=out / ".scratch"
            ),
            settings=sections["evaluation"],
            grading=sections["grading"],
            runtime=sections["runtime"],
            report=report,
        )
    print_summary(summary, as_json)
