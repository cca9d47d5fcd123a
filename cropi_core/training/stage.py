"""One GRPO stage on exactly the selected prompts, with TRL's trainer.

TRL computes advantages, loss and optimizer steps. cropi provides the rest, so that an interrupted and resumed stage
gives the same result as an uninterrupted one: the order of prompts is a function of the seed, completions are drawn by
the counter-based sampler of the rollouts, and rewards come from the verifier of the rollouts
(:mod:`cropi_core.training.trainer`).

Checkpoints inside the stage are in ``scratch``. A checkpoint is complete when it has its marker, which is written
last; a stage killed at any instant resumes from a complete one and gives the same bytes.

The trained weights are float32 whatever ``dtype``: near a typical weight of 0.02 bfloat16 numbers are 1e-4
apart, and updates of 1e-6 would be lost. ``dtype`` is the type that the forward pass computes in (autocast).
"""

import copy
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim import Optimizer
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cropi_core.artifacts import BELIEF_FILE, GROUPS_FILE, floats, read_parquet, write_parquet
from cropi_core.errors import ConfigError, DataError, SelectionError
from cropi_core.gradients import save_moments, second_moments
from cropi_core.policy import (
    ADAPTER,
    Checkpoint,
    attach,
    checkpoint_files,
    end_tokens,
    is_out_of_memory,
    load_policy,
    merged,
    pick_device,
    prepare_device,
    save_adapter,
    save_state,
)
from cropi_core.progress import Report, silent
from cropi_core.prompts import read_prompts
from cropi_core.rewards import open_verifier
from cropi_core.selection import (
    Belief,
    aligned,
    from_rollouts,
    observe,
    rank_weights,
    read_belief,
    reward_sums,
    write_belief,
)
from cropi_core.training.arguments import trainer_arguments
from cropi_core.training.command import run_command
from cropi_core.training.draws import STATE, Draws
from cropi_core.training.features import FeatureCollector
from cropi_core.training.files import StageFiles
from cropi_core.training.metrics import TrainingError, metrics_table, reward_summary, token_counts, used_up
from cropi_core.training.ranks import Processes
from cropi_core.training.trainer import (
    MARKER,
    GRPOConfig,
    Stage,
    StageTrainer,
    Watch,
    build_trainer,
    file_sums,
)
from data_schemas import Grading, Objective, Runtime, Training


@dataclass(frozen=True)
class _Policy:
    """The policy of a stage as it was loaded; TRL changes both configurations of the model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    config: PretrainedConfig
    generation_config: GenerationConfig | None


def train(
    files: StageFiles,
    *,
    training: Training,
    objective: Objective,
    grading: Grading,
    dtype: str,
    seed: int,
    runtime: Runtime,
    report: Report,
    name: str = "stage",
) -> dict[str, Any]:
    """Train one stage, resuming from the last complete checkpoint in the scratch directory.

    Every process that ``accelerate launch`` starts calls this with the same arguments; the first writes the results.

    Args:
        files: What the stage reads and writes.
        training: Settings of the stage.
        objective: Loss type, reward scaling and clip.
        grading: Verifiers and their limits.
        dtype: Type the forward pass computes in.
        seed: Seed of the order of prompts and of the completions.
        runtime: Device, threads, micro-batch, checkpoint interval.
        report: Receives the progress of every optimizer step.
        name: Name of the run in trackers.

    Returns:
        Summary: steps, completions, their tokens, tokens of forward and backward (prompts included, once a
        completion and pass), epochs over the subset, rewards of its first and last quarter, optimizer steps that the
        carried state had seen. Empty on every process but the first.

    Raises:
        SelectionError: Fewer prompts are selected than a step takes.
        DataError: A selected prompt is not in the pool or too long for the policy.
        TrainingError: Loss or gradient is not finite, or memory ran out.
        ConfigError: ``runtime.device`` is a GPU other than the first visible one.
    """
    if training.engine == "command":
        return run_command(files, training, seed, report, name)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    prepare_device(runtime)
    processes = Processes.launched()
    rows = selected_rows(files.prompts, files.selection, training.prompts_per_step)
    start = last_whole(files.scratch)
    draws = prepared_draws(files, rows, training, seed, start)
    watch = Watch(training, report if processes.rank == 0 else silent, draws)
    with quiet(), open_verifier(grading) as verifier:
        verifier.check(row["verifier"] for row in rows)
        policy = _load(files, runtime, processes)
        size = policy.model.num_parameters()
        ends = end_tokens(policy.model, policy.tokenizer)
        arguments = trainer_arguments(
            training, objective, dtype, seed, runtime, files.scratch, size, processes, ends
        )
        arguments.run_name = arguments.run_name or name
        stage = Stage(policy.tokenizer, draws, verifier, training, seed, runtime.generation_rows, processes)
        trained = _with_adapter(policy.model, files, training, seed)
        trainer = _optimize(files, trained, arguments, stage, watch, start, runtime)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered from all processes
        if processes.rank == 0:
            _save(files, policy, trained, state, cast(Optimizer, trainer.optimizer), training)
    return _publish(files, trainer, stage, watch, len(rows), objective, start) if not processes.rank else {}


def _load(files: StageFiles, runtime: Runtime, processes: Processes) -> _Policy:
    """Load the policy in float32, without an adapter, and copy its configurations."""
    # The launcher gives each process a GPU, which the trainer finds.
    device = str(first_gpu(runtime.device)) if processes.count == 1 else "cpu"
    model, tokenizer = load_policy(files.base or files.policy, "float32", device, runtime.attention)
    return _Policy(model, tokenizer, copy.deepcopy(model.config), copy.deepcopy(model.generation_config))


def _with_adapter(
    model: PreTrainedModel, files: StageFiles, training: Training, seed: int
) -> torch.nn.Module:
    """Attach the adapter that the stage trains, new or continued; return the model itself without one."""
    if not training.lora:
        return model
    return attach(model, training.lora, files.policy / ADAPTER if files.base else None, seed)


def _optimize(
    files: StageFiles,
    model: torch.nn.Module,
    arguments: GRPOConfig,
    stage: Stage,
    watch: Watch,
    start: Path | None,
    runtime: Runtime,
) -> StageTrainer:
    """Run TRL's trainer to the end of the stage.

    Raises:
        TrainingError: Loss or gradient is not finite, or memory ran out.
    """
    carried = files.policy if stage.training.optimizer_state == "carried" else None
    if start and used_up(_history(start), stage.training):  # stopped after its last step
        arguments.max_steps = step_of(start)
    with tracker_files(files.logs):
        trainer = build_trainer(model, stage.tokenizer, arguments, stage, watch, files.reference, carried)
        if files.features is not None:
            trainer.collector = _collector(trainer, files)
            trainer.add_callback(trainer.collector)
        try:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory after step {trainer.state.global_step} ({error}). Lower "
                f"runtime.train_micro_batch={runtime.train_micro_batch} or runtime.generation_rows="
                f"{runtime.generation_rows}, which change no result, and run the same command again"
            ) from error
    return trainer


def _collector(trainer: StageTrainer, files: StageFiles) -> FeatureCollector:
    """Prepare the collection of features, whose files are among those that a resumed stage finds."""
    assert files.features is not None
    settings = files.features.settings
    return FeatureCollector(trainer, settings.projection, files.scratch / "features", settings.layers)


def _features(trainer: StageTrainer, files: StageFiles) -> dict[str, Any]:
    """Write the features that a stage collected, and return what the summary says of them."""
    if files.features is None or trainer.collector is None:
        return {}
    plan = files.features
    policy = Checkpoint(files.out).content_digest()
    found = trainer.collector.gather(plan.store, plan.table, plan.settings.objective, policy)
    return {"features": found}


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    """Read the trainer's log from a checkpoint."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def _save(
    files: StageFiles,
    policy: _Policy,
    trained: Any,
    state: Mapping[str, Any],
    optimizer: Optimizer,
    training: Training,
) -> None:
    """Write the trained checkpoint, with the adapter, second moments and optimizer state that the settings ask for.

    Args:
        files: The stage's files.
        policy: The policy as it was loaded.
        trained: The model the trainer trained: the policy's, or PEFT's wrapping of it.
        state: The trained weights, gathered from all processes.
        optimizer: Adam; the configuration refuses moments of any other kind.
        training: Settings of the stage.
    """
    model = policy.model
    if training.lora:
        base, adapter = files.base or files.policy, files.scratch / ADAPTER
        save_adapter(trained, state, adapter)
        save_trained(merged(base, adapter), base, files.out)
        adapter.rename(files.out / ADAPTER)
    else:
        # TRL wrote its pad token and a path into both configurations.
        model.config = policy.config
        model.generation_config = policy.generation_config  # pyright: ignore[reportAttributeAccessIssue]
        save_trained(model, files.policy, files.out, state)
    if training.second_moments:
        save_moments(second_moments(model, optimizer), files.out)
    if training.optimizer_state == "carried":
        save_state(model, optimizer, files.out)


def _publish(
    files: StageFiles,
    trainer: StageTrainer,
    stage: Stage,
    watch: Watch,
    prompts: int,
    objective: Objective,
    start: Path | None,
) -> dict[str, Any]:
    """Write the metrics of a finished stage, delete its scratch directory, and return its summary."""
    table = metrics_table(trainer.state.log_history)
    write_parquet(table, files.metrics)
    training, draws = stage.training, stage.draws
    samples, batches = training.sampling.samples, -(-table.num_rows // training.iterations)
    ended = used_up(trainer.state.log_history, training) if table.num_rows < training.steps else None
    per_step = training.prompts_per_step * samples
    lengths = {name: len(stage.prompt_tokens(row)) for name, row in stage.rows.items()}
    prompt_tokens = sum(lengths[name] for name in draws.trained(batches)) * samples
    tokens = token_counts(table, per_step, prompt_tokens)
    drawn = draws.summary()
    if draws.belief is not None:
        write_belief(draws.belief, samples, files.metrics.with_name(BELIEF_FILE))
        write_parquet(draws.table(), files.metrics.with_name(GROUPS_FILE))
        tokens["tokens_generated"] += drawn["tokens_dropped"]
    collected = _features(trainer, files)
    if not files.keep_scratch:
        shutil.rmtree(files.scratch)
    return {
        "steps": table.num_rows,
        "prompts": prompts,
        "completions": batches * per_step,
        **tokens,
        "epochs": batches * training.prompts_per_step / prompts,
        **reward_summary(table),
        **drawn,
        **collected,
        **({"ended": ended} if ended else {}),
        "loss_type": objective.loss_type,
        "start": training.start,
        "reference": training.reference if training.beta > 0 else None,
        "optimizer_state": training.optimizer_state,
        "carried_steps": trainer.carried_steps,
        "resumed_from_step": step_of(start) if start else None,
        "seconds_per_step": watch.seconds_per_step,
    }


def prepared_draws(
    files: StageFiles, rows: list[dict[str, Any]], training: Training, seed: int, start: Path | None
) -> Draws:
    """Prepare the draws of a stage, at the state of the checkpoint that it resumes from.

    The belief is that of the stage before, or of the uniform prior, and then what the stored rollouts say.

    Raises:
        DataError: A file is not what it should be, or a stored reward is outside [0, 1].
    """
    if not training.draw.learns:
        return Draws(rows, training, seed)
    ids = read_prompts(files.prompts)["prompt_id"].to_pylist()
    if files.rollouts is not None:
        passed, graded = reward_sums(files.rollouts, ids)
    else:
        passed = graded = np.zeros(len(ids))
    if files.belief is None:
        belief = from_rollouts(ids, passed, graded)
    else:
        before = aligned(read_belief(files.belief), ids)
        belief = Belief(ids, observe(before.cells, passed, graded))
    draws = Draws(rows, training, seed, belief, rank_weights(selected_ranks(files.selection)))
    if start is not None:
        draws.restore(json.loads((start / STATE).read_text(encoding="utf-8")))
    return draws


def selected_ranks(selection: Path) -> np.ndarray:
    """Return the ranks of the selected prompts, in the order of the selection; NaN where no score gave the rank."""
    table = read_parquet(selection)
    table = table.filter(table["selected"])
    if not {"rank", "score"} <= set(table.column_names):
        return np.full(table.num_rows, np.nan)
    return np.where(np.isnan(floats(table["score"])), np.nan, floats(table["rank"]))


def selected_rows(prompts: Path, selection: Path, least: int) -> list[dict[str, Any]]:
    """Read the selected prompts, in the order of the selection.

    Raises:
        SelectionError: Fewer than ``least``.
        DataError: The file is not a selection table, or names a prompt that the pool lacks.
    """
    table = read_parquet(selection)
    if missing := {"prompt_id", "selected"} - set(table.column_names):
        raise DataError(f"{selection} lacks the columns {sorted(missing)}; it is not a selection table")
    selected = [
        row["prompt_id"] for row in table.select(["prompt_id", "selected"]).to_pylist() if row["selected"]
    ]
    if len(selected) < least:
        raise SelectionError(
            f"{selection} selects {len(selected)} prompts, but a step takes training.prompts_per_step={least}. "
            "Raise selection.ratio, enlarge the pool, or lower training.prompts_per_step"
        )
    pool = {row["prompt_id"]: row for row in read_prompts(prompts).to_pylist()}
    if unknown := [name for name in selected if name not in pool]:
        raise DataError(f"{selection} names {len(unknown)} prompts that {prompts} lacks: {unknown[:3]}")
    return [pool[name] for name in selected]


def last_whole(scratch: Path) -> Path | None:
    """Find the newest complete checkpoint in ``scratch`` and delete incomplete and damaged ones."""
    complete = []
    for directory in scratch.glob("checkpoint-*"):
        if _is_whole(directory):
            complete.append(directory)
        else:
            shutil.rmtree(directory)
    return max(complete, key=step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / MARKER).read_bytes()) == file_sums(checkpoint)
    except (FileNotFoundError, ValueError):  # killed before the marker was written, or the marker is damaged
        return False


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name, ``checkpoint-<step>``."""
    return int(checkpoint.name.rpartition("-")[2])


def save_trained(
    model: PreTrainedModel, start: Path, out: Path, state: Mapping[str, Any] | None = None
) -> None:
    """Write the trained weights and configuration; copy the start policy's tokenizer files.

    Args:
        model: The policy.
        start: Checkpoint directory of the start policy.
        out: Directory to write; existing content is deleted.
        state: The weights, for a model that holds only a part of them.
    """
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, state_dict=None if state is None else dict(state))
    for path in checkpoint_files(start):
        is_config = path.name in ("config.json", "generation_config.json")
        if not is_config and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, out / path.name)


def first_gpu(device: str) -> torch.device:
    """Pick the device; the trainer of transformers supports only the first visible GPU."""
    picked = pick_device(device)
    if picked.type == "cuda" and picked.index not in (None, 0):
        raise ConfigError(
            f"runtime.device={device!r} is not supported: training uses the first visible GPU. Set "
            f"CUDA_VISIBLE_DEVICES={picked.index} and runtime.device=cuda"
        )
    return picked


@contextmanager
def tracker_files(logs: Path | None) -> Iterator[None]:
    """Make trackers write below ``logs`` unless the environment sets a directory; end their run with the stage."""
    places = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "", "TRACKIO_DIR": "trackio"}
    defaults = {name: str(logs / place) for name, place in places.items() if logs and name not in os.environ}
    os.environ.update(defaults)
    try:
        yield
    finally:
        for name in defaults:
            del os.environ[name]
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish()  # otherwise the next stage of this process would be logged into the same run


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of TRL and transformers; errors are still shown."""
    verbosity = transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|datasets|torch)(\.|$)")
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")  # TRL: experimental
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
