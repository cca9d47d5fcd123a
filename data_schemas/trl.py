"""Fields of TRL's ``GRPOConfig``: settable, determined by other settings, or fixed.

Every field of ``GRPOConfig`` is in one of four places: :class:`TrlTraining` and :class:`TrlRuntime` pass it on,
:data:`SET_ELSEWHERE` names the setting that determines it, :data:`NEVER` gives the reason why it cannot be set. A test
compares these lists with the installed TRL.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from data_schemas.section import Section

Optim = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
    "lion_32bit",
    "lion_8bit",
]
"""Optimizers of transformers' trainer that make one update per optimizer step; some need additional packages."""

SET_ELSEWHERE = {
    "max_steps": "training.steps",
    "num_train_epochs": "training.steps",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "beta": "training.beta",
    "num_iterations": "training.iterations",
    "num_generations": "training.sampling.samples",
    "max_completion_length": "training.sampling.max_new_tokens",
    "temperature": "training.sampling.temperature",
    "top_p": "training.sampling.top_p",
    "loss_type": "objective.loss_type",
    "scale_rewards": "objective.scale_rewards",
    "epsilon": "objective.clip_epsilon",
    "use_vllm": "training.engine",
    "bf16": "policy.dtype",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "runtime.device",
    "per_device_train_batch_size": "runtime.train_micro_batch",
    "gradient_accumulation_steps": "training.prompts_per_step and runtime.train_micro_batch",
    "generation_batch_size": "training.prompts_per_step",
    "steps_per_generation": "training.iterations",
    "gradient_checkpointing": "runtime.gradient_checkpointing",
    "activation_checkpointing": "runtime.gradient_checkpointing",
    "save_steps": "runtime.save_steps",
    "report_to": "runtime.report_to",
    "chat_template_kwargs": "policy",
    "fsdp": "runtime.launch.config",
    "fsdp_config": "runtime.launch.config",
    "deepspeed": "runtime.launch.config",
    "accelerator_config": "runtime.launch.config",
    "parallelism_config": "runtime.launch.config",
}
"""Fields of ``GRPOConfig`` that follow from another setting, and that setting."""

_DRAWN = "completions are drawn by cropi, by the settings of training.sampling, so that a stopped stage resumes alike"
_ORDER = "the order of prompts is cropi's, a function of the seed"
_FILES = "checkpoints inside a stage are cropi's, so that a killed stage resumes exactly"
_LOCAL = "a stage sends nothing to a hub"
_EVALUATION = "a separate step evaluates the sets after the stage"
_LOG = "every step is logged once"
_TYPE = "weights are trained in float32, and policy.dtype says what the forward computes in"
_REWARDS = "the reward is the verifier's, which may be a weighted sum (grading.sums)"
_TOOLS = "there are no tools, environments or images in a stage"

NEVER = {
    **dict.fromkeys(
        [
            *("top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
            *("num_generations_eval", "use_transformers_continuous_batching", "use_transformers_paged"),
            *("transformers_continuous_batching_config", "ds3_gather_for_generation"),
        ],
        _DRAWN,
    ),
    "vllm_structured_outputs_regex": _DRAWN,
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max has taken its place",
    **dict.fromkeys(
        [
            *("shuffle_dataset", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
            *("dataloader_multiprocessing_context", "train_sampling_strategy", "length_column_name"),
            *("remove_unused_columns", "label_names", "ignore_data_skip", "auto_find_batch_size"),
        ],
        _ORDER,
    ),
    **dict.fromkeys(
        [
            *("output_dir", "save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"),
            *("enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        ],
        _FILES,
    ),
    **dict.fromkeys(
        [
            *(
                "push_to_hub",
                "hub_token",
                "hub_private_repo",
                "hub_model_id",
                "hub_strategy",
                "hub_always_push",
            ),
            *("hub_revision", "log_completions_hub_repo", "trackio_space_id", "trackio_bucket_id"),
            *("trackio_static_space_id", "trust_remote_code", "model_init_kwargs"),
        ],
        _LOCAL,
    ),
    **dict.fromkeys(
        [
            *(
                "eval_strategy",
                "eval_steps",
                "eval_delay",
                "per_device_eval_batch_size",
                "prediction_loss_only",
            ),
            *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
            *("include_for_metrics", "batch_eval_metrics", "do_train", "do_eval", "do_predict"),
            *("bf16_full_eval", "fp16_full_eval"),
        ],
        _EVALUATION,
    ),
    **dict.fromkeys(
        [
            *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
            *("logging_nan_inf_filter", "log_level_replica", "disable_tqdm", "log_completions"),
            *("num_completions_to_print", "log_unique_prompts", "include_num_input_tokens_seen"),
            *("skip_memory_metrics", "debug"),
        ],
        _LOG,
    ),
    "fp16": _TYPE,
    "optim_target_modules": "training.lora says what of the weights is trained",
    "average_tokens_across_devices": "the loss is TRL's own, which counts the tokens of all processes",
    "label_smoothing_factor": "the loss is TRL's GRPO loss, which has none",
    "disable_dropout": "the scores are of the policy without dropout",
    "router_aux_loss_coef": "mixtures of experts are not scored",
    "use_cache": "generation keeps its own cache",
    "local_rank": "the launcher says it",
    **dict.fromkeys(["reward_weights", "multi_objective_aggregation"], _REWARDS),
    **dict.fromkeys(["max_tool_calling_iterations", "log_multimodal"], _TOOLS),
}
"""Fields of ``GRPOConfig`` that cannot be configured, and why."""


def _refuse(section: type[Section], other: str, settings: Any) -> Any:
    """Raise an error that tells, for every unsupported field, where to set it or why it cannot be set."""
    if not isinstance(settings, dict):
        return settings
    faults = []
    for name in [key for key in settings if key not in section.model_fields]:
        if name in SET_ELSEWHERE:
            faults.append(f"{name} follows from {SET_ELSEWHERE[name]}: set that")
        elif name in NEVER:
            faults.append(f"{name} cannot be set: {NEVER[name]}")
        elif any(name in one.model_fields for one in (TrlTraining, TrlRuntime)):
            faults.append(f"{name} belongs in {other}")
        else:
            faults.append(f"{name} is not a field of TRL's GRPOConfig that cropi knows")
    if faults:
        raise ValueError("; ".join(faults))
    return settings


class TrlTraining(Section):
    """Fields of TRL's ``GRPOConfig`` that change what a stage learns; empty: TRL's default."""

    optim: Optim | None = Field(default=None, description="Empty: `adamw_torch`.")
    optim_args: str | None = None
    adam_beta1: float | None = Field(default=None, ge=0, lt=1)
    adam_beta2: float | None = Field(default=None, ge=0, lt=1)
    adam_epsilon: float | None = Field(default=None, gt=0)
    lr_scheduler_kwargs: dict[str, float | int | str] | None = Field(
        default=None, description="Of `training.schedule`, such as `{min_lr_rate: 0.1}`."
    )
    epsilon_high: float | None = Field(
        default=None, gt=0, description="Upper clip (DAPO); the cap of `cispo`."
    )
    delta: float | None = Field(default=None, gt=0, description="Upper bound of the unclipped ratio.")
    importance_sampling_level: Literal["token", "sequence"] | None = None
    sapo_temperature_neg: float | None = Field(default=None, gt=0)
    sapo_temperature_pos: float | None = Field(default=None, gt=0)
    vespo_k_pos: float | None = Field(default=None, gt=0)
    vespo_lambda_pos: float | None = Field(default=None, gt=0)
    vespo_k_neg: float | None = Field(default=None, gt=0)
    vespo_lambda_neg: float | None = Field(default=None, gt=0)
    mask_truncated_completions: bool | None = Field(
        default=None,
        description="Completions that were cut are excluded from the loss; the scorer keeps them.",
    )
    top_entropy_quantile: float | None = Field(default=None, gt=0, le=1)
    entropy_coef: float | None = Field(default=None, ge=0)
    use_adaptive_entropy: bool | None = None
    entropy_coef_min: float | None = Field(default=None, ge=0)
    entropy_coef_max: float | None = Field(default=None, ge=0)
    entropy_coef_delta: float | None = Field(default=None, ge=0)
    entropy_target: float | None = Field(default=None, ge=0)
    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    use_bias_correction_kl: bool | None = Field(default=None, description="Of the KL term (`training.beta`).")
    sync_ref_model: bool | None = Field(default=None, description="The reference follows the policy.")
    ref_model_mixup_alpha: float | None = Field(default=None, ge=0, le=1)
    ref_model_sync_steps: int | None = Field(default=None, ge=1)
    vllm_importance_sampling_correction: bool | None = Field(default=None, description="`engine: vllm`.")
    vllm_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    vllm_importance_sampling_clip_max: float | None = Field(default=None, gt=0)
    vllm_importance_sampling_clip_min: float | None = Field(default=None, ge=0)
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    cast_lm_head_to_fp32: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, settings: Any) -> Any:
        return _refuse(cls, "runtime.trl", settings)


class TrlRuntime(Section):
    """Fields of TRL's ``GRPOConfig`` that change speed and placement; empty: TRL's default."""

    activation_checkpointing_kwargs: dict[str, bool | str | int] | None = None
    gradient_checkpointing_kwargs: dict[str, bool | str | int] | None = None
    torch_compile: bool | None = None
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    tf32: bool | None = None
    use_liger_kernel: bool | None = Field(default=None, description="Needs the package `liger-kernel`.")
    liger_kernel_config: dict[str, bool] | None = None
    torch_empty_cache_steps: int | None = Field(default=None, ge=1)
    full_determinism: bool | None = None
    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = Field(default=None, ge=1)
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl"] | None = None
    ddp_timeout: int | None = Field(default=None, ge=1, description="Seconds.")
    vllm_mode: Literal["colocate", "server"] | None = Field(
        default=None, description="`training.engine: vllm`: in the training processes, or `trl vllm-serve`."
    )
    vllm_server_base_url: str | None = None
    vllm_server_host: str | None = None
    vllm_server_port: int | None = Field(default=None, ge=1, le=65535)
    vllm_server_timeout: float | None = Field(default=None, gt=0, description="Seconds.")
    vllm_group_port: int | None = Field(default=None, ge=1, le=65535)
    vllm_gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    vllm_max_model_length: int | None = Field(default=None, ge=1)
    vllm_tensor_parallel_size: int | None = Field(default=None, ge=1)
    vllm_enable_sleep_mode: bool | None = None
    vllm_model_impl: Literal["vllm", "transformers"] | None = None
    run_name: str | None = Field(default=None, description="What trackers call the stage; empty: its slot.")
    project: str | None = Field(default=None, description="What trackers call the project; empty: `cropi`.")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, settings: Any) -> Any:
        return _refuse(cls, "training.trl", settings)


def set_fields(section: TrlTraining | TrlRuntime, prefix: str) -> list[str]:
    """List the names of set fields that start with ``prefix``."""
    return [name for name, value in section if name.startswith(prefix) and value is not None]
