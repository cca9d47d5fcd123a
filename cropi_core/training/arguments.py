"""Translate a stage's settings into TRL's: the fields that cropi sets, then those that the configuration passes on."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cropi_core.errors import ConfigError, foreign_errors
from cropi_core.policy import pick_device
from cropi_core.training.ranks import ALONE, Processes
from cropi_core.training.trainer import GRPOConfig
from data_schemas import Objective, Runtime, Training

RECOMPUTE_FROM = 50_000_000
"""Number of parameters from which the backward pass recomputes activations: less memory, a third more time."""


def trainer_arguments(
    training: Training,
    objective: Objective,
    dtype: str,
    seed: int,
    runtime: Runtime,
    scratch: Path,
    parameters: int,
    processes: Processes = ALONE,
    ends: Sequence[int] = (),
) -> GRPOConfig:
    """Translate a stage's settings into TRL's.

    One optimizer step takes exactly ``prompts_per_step * samples`` completions over all processes; the micro-batch
    is the largest divisor of a process's share within ``runtime.train_micro_batch``.

    Args:
        training: Settings of the stage.
        objective: Loss type, reward scaling and clip.
        dtype: Type the forward pass computes in.
        seed: Seed of TRL's own random numbers.
        runtime: Device, micro-batch, checkpoint interval, trackers.
        scratch: Directory of the checkpoints inside the stage.
        parameters: Number of parameters of the policy.
        processes: The processes that train together.
        ends: Token ids that end a completion. TRL's sampling by vLLM stops at the tokenizer's only, which is not the
            end of a turn for some base models; these are added.

    Raises:
        ConfigError: TRL refuses a value, or a tracker is not installed.

    References:
        TRL 1.16, trl/trainer/grpo_config.py and GRPOTrainer._compute_loss.
    """
    fields = {
        "output_dir": str(scratch),
        "bf16": dtype == "bfloat16",
        "seed": seed,
        "data_seed": seed,
        **_loss_fields(training, objective),
        **_optimizer_fields(training),
        **_execution_fields(training, runtime, parameters, processes),
        **_logging_fields(training, runtime),
    }
    if training.engine == "vllm" and ends:
        fields["generation_kwargs"] = {"stop_token_ids": list(ends)}
    passed_on = training.trl.model_dump(exclude_none=True) | runtime.trl.model_dump(exclude_none=True)
    named = ", ".join(passed_on) or "none of training.trl"
    with foreign_errors(f"TRL refuses the settings of the stage ({named})", ConfigError):
        arguments = GRPOConfig(**(fields | passed_on))
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise the trainer wraps the model in DataParallel, which TRL refuses
    return arguments


def _loss_fields(training: Training, objective: Objective) -> dict[str, Any]:
    """Return the fields of sampling and loss.

    ``bnpo`` is passed as TRL's ``dapo``: over the whole step both are the mean over tokens, but TRL's ``bnpo`` is the
    mean over a micro-batch, on which no result may depend.
    """
    return {
        "num_generations": training.sampling.samples,
        "num_iterations": training.iterations,
        "max_completion_length": training.sampling.max_new_tokens,
        "temperature": training.sampling.temperature,
        "top_p": training.sampling.top_p,
        "use_vllm": training.engine == "vllm",
        "loss_type": "dapo" if objective.loss_type == "bnpo" else objective.loss_type,
        "scale_rewards": "group" if objective.scale_rewards else "none",
        "epsilon": objective.clip_epsilon,
        "beta": training.beta,
        "mask_truncated_completions": False,
        "disable_dropout": True,  # the scores are computed without dropout
    }


def _optimizer_fields(training: Training) -> dict[str, Any]:
    """Return the fields of the optimizer and its schedule."""
    # "constant" ignores warm-up.
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return {
        "max_steps": training.steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": training.warmup_steps,
        "optim": "adamw_torch",
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
    }


def _execution_fields(
    training: Training, runtime: Runtime, parameters: int, processes: Processes
) -> dict[str, Any]:
    """Return the fields of batches, memory and devices."""
    completions = training.prompts_per_step * training.sampling.samples // processes.count
    micro = max(d for d in range(1, min(runtime.train_micro_batch, completions) + 1) if completions % d == 0)
    checkpointing = runtime.gradient_checkpointing
    on_cpu = pick_device(runtime.device).type == "cpu"
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": completions // micro,
        "gradient_checkpointing": parameters >= RECOMPUTE_FROM if checkpointing is None else checkpointing,
        "use_cpu": on_cpu,
        "shuffle_dataset": False,  # cropi sets the order of prompts
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "model_init_kwargs": {"device_map": None},  # for the reference; TRL would spread it over all GPUs
        "trust_remote_code": False,
        "ddp_backend": "gloo" if on_cpu and processes.count > 1 else None,
    }


def _logging_fields(training: Training, runtime: Runtime) -> dict[str, Any]:
    """Return the fields of checkpoints, logs and trackers."""
    return {
        "save_strategy": "steps",
        # Completions used for several steps are in memory only: save once they are used up.
        "save_steps": -(-runtime.save_steps // training.iterations) * training.iterations,
        "save_total_limit": 2,  # the older one stays until the newer one has its marker
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # otherwise a NaN loss is logged as 0
        "report_to": trackers(runtime.report_to) or "none",
        "project": "cropi",
        "disable_tqdm": True,
        "log_level": "error",
        "push_to_hub": False,
    }


def trackers(names: Sequence[str]) -> list[str]:
    """Return the trackers to report to.

    Raises:
        ConfigError: A tracker is not installed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"runtime.report_to names {', '.join(missing)}, which is not installed in {sys.executable}. "
            f"Install it with pip install {' '.join(missing)}"
        )
    return list(names)
