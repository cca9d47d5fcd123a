"""The bridge to TRL's GRPO trainer: settings in, callbacks out, and nothing that leaves the machine.

TRL computes advantages, loss and optimizer steps. It gets its completions and rewards from a :class:`Stage`
and is followed by a :class:`Watch`.
"""

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from cropi_core.checkpoint import checkpoint_files
from cropi_core.counter import key64
from cropi_core.errors import ConfigError
from cropi_core.policy import pick_device, render
from cropi_core.progress import Progress, Report
from cropi_core.sampling import sample
from cropi_core.store import write_atomic
from cropi_core.training_metrics import TrainingError, check_finite
from cropi_core.verifiers import Verifier
from data_schemas.config import Objective, Runtime, Training

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ConfigError(
        f"training needs TRL ({error}); install it with `pip install 'cropi[train]'`"
    ) from error

MARKER = "whole.json"
"""Written last into a checkpoint of the stage's scratch directory: the names and sizes of its files."""

RECOMPUTE_FROM = 50_000_000
"""Parameters from which the backward recomputes activations: less memory, a third more time."""


class Stage:
    """What TRL calls back for: the completions of a generation batch, and their rewards.

    TRL's prompts are prompt ids here; :func:`cropi_core.policy.render` turns them into tokens, as everywhere
    else, and nothing tokenises them a second time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        batches: list[list[dict[str, Any]]],
        verifier: Verifier,
        training: Training,
        seed: int,
        generation_rows: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.batches = batches
        self.verifier = verifier
        self.training = training
        self.seed = seed
        self.generation_rows = generation_rows
        self.rows = {row["prompt_id"]: row for batch in batches for row in batch}

    def dataset(self) -> Dataset:
        """List the prompt ids in the order of training; TRL repeats each ``samples`` times."""
        return Dataset.from_dict({"prompt": [row["prompt_id"] for batch in self.batches for row in batch]})

    def prompt_tokens(self, row: dict[str, Any]) -> list[int]:
        """Return a prompt's token ids."""
        return render(self.tokenizer, row["messages"])

    def rollout(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[list[Any]]]:
        """Sample the completions of one generation batch (TRL's ``rollout_func``).

        Args:
            prompts: Prompt ids, each ``samples`` times in a row.
            trainer: TRL's trainer, at the step that wants them.

        Raises:
            TrainingError: TRL asks for other prompts than this step's, or the policy's logits are not
                finite.
        """
        sampling, step = self.training.sampling, trainer.state.global_step
        number = step // self.training.iterations
        wanted = [row["prompt_id"] for row in self.batches[number] for _ in range(sampling.samples)]
        if prompts != wanted:
            raise TrainingError(
                f"step {step + 1}: the trainer's prompts are not those of generation batch {number}"
            )
        model = cast(PreTrainedModel, trainer.model)
        ids = [(row["prompt_id"], self.prompt_tokens(row)) for row in self.batches[number]]
        model.eval()  # else gradient checkpointing would switch the key-value cache off
        try:
            groups = sample(
                model,
                self.tokenizer,
                ids,
                sampling,
                seed=key64("training", self.seed, number),
                rows=self.generation_rows,
            )
        except (RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError) or _finite_logits(model, ids[0][1]):
                raise
            raise TrainingError(
                f"step {step + 1}: the policy's logits are not finite after step {step}; lower "
                f"training.learning_rate={self.training.learning_rate}"
            ) from error
        finally:
            model.train()
        return {
            "prompt_ids": [list(tokens) for _, tokens in ids for _ in range(sampling.samples)],
            "completion_ids": [c.ids for group in groups for c in group],
            "logprobs": [c.logprobs for group in groups for c in group],
        }

    def reward(
        self, prompts: list[str], completions: list[str], log_metric: Any, **_: Any
    ) -> list[float | None]:
        """Grade completions; None is not gradable, which TRL leaves out of the group and gives advantage 0.

        Args:
            prompts: Prompt id of every completion.
            completions: Texts, decoded without special tokens as the rollouts' are.
            log_metric: TRL's, takes a name and a number.
            _: What else TRL passes.
        """
        rows = [self.rows[name] for name in prompts]
        items = [(row["verifier"], text, row["answer"]) for row, text in zip(rows, completions, strict=True)]
        rewards = [grade.reward for grade in self.verifier.grade_many(items)]
        log_metric("not_gradable", float(sum(r is None for r in rewards)))
        return rewards


class Watch(TrainerCallback):
    """Reports every step, stops at the first number that is not finite, marks whole checkpoints."""

    def __init__(self, total: int, report: Report) -> None:
        self.total = total
        self.report = report
        self.reward: float | None = None
        self.first_step = self.last_step = 0
        self.began = self.ended = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall-clock seconds of the steps taken by this process, None when there were none."""
        steps = self.last_step - self.first_step
        return round((self.ended - self.began) / steps, 4) if steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.first_step = self.last_step = state.global_step
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Check and report one optimizer step; comes before a checkpoint of that step is written."""
        if "loss" not in logs:
            return
        check_finite(state.global_step, logs)
        self.last_step, self.ended = state.global_step, time.monotonic()
        self.reward = logs["reward"] if logs.get("reward") is not None else self.reward
        note = "" if self.reward is None else f"reward {self.reward:.2f}"
        self.report(Progress(state.global_step, self.total, "step", note))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole."""
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomic(directory / MARKER, json.dumps(file_sizes(directory)))


class QuietTrainer(GRPOTrainer):
    """TRL's trainer without telemetry and model cards: a stage opens no connection."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none; checkpoints of ``scratch`` need no description."""


def file_sizes(directory: Path) -> dict[str, int]:
    """List the files of a checkpoint with their sizes in bytes, the marker left out."""
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def trainer_arguments(
    training: Training,
    objective: Objective,
    dtype: str,
    seed: int,
    runtime: Runtime,
    scratch: Path,
    parameters: int,
) -> GRPOConfig:
    """Translate a stage's settings into TRL's.

    One optimizer step takes exactly ``prompts_per_step * samples`` completions; the micro-batch is the
    largest divisor of that number within ``runtime.train_micro_batch``. ``bnpo`` is TRL's ``dapo`` here:
    over the whole step both are the mean over tokens, but TRL's ``bnpo`` is that of a micro-batch, on which
    no result may depend.

    References:
        TRL 1.16, trl/trainer/grpo_config.py and GRPOTrainer._compute_loss.
    """
    completions = training.prompts_per_step * training.sampling.samples
    micro = max(d for d in range(1, min(runtime.train_micro_batch, completions) + 1) if completions % d == 0)
    # "constant" ignores warm-up.
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    arguments = GRPOConfig(
        output_dir=str(scratch),
        max_steps=training.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=completions // micro,
        num_generations=training.sampling.samples,
        num_iterations=training.iterations,
        max_completion_length=training.sampling.max_new_tokens,
        temperature=training.sampling.temperature,
        top_p=training.sampling.top_p,
        loss_type="dapo" if objective.loss_type == "bnpo" else objective.loss_type,
        scale_rewards="group" if objective.scale_rewards else "none",
        epsilon=objective.clip_epsilon,
        beta=training.beta,
        mask_truncated_completions=False,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=training.warmup_steps,
        optim="adamw_torch",
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        disable_dropout=True,  # the scores are of the policy without it
        gradient_checkpointing=parameters >= RECOMPUTE_FROM,
        bf16=dtype == "bfloat16",
        use_cpu=pick_device(runtime.device).type == "cpu",
        seed=seed,
        data_seed=seed,
        shuffle_dataset=False,  # the order is ours
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="steps",
        # Between the passes over completions these are in memory only: save where they are used up.
        save_steps=-(-runtime.save_steps // training.iterations) * training.iterations,
        save_total_limit=2,  # the older one stays until the newer one has its marker
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a NaN loss is logged as 0
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        model_init_kwargs={"device_map": None},  # of the reference; TRL would spread it over all GPUs
        trust_remote_code=False,
        push_to_hub=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the trainer wraps the model in DataParallel, which TRL refuses
    return arguments


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: GRPOConfig,
    stage: Stage,
    watch: Watch,
    reference: Path | None,
) -> GRPOTrainer:
    """Build TRL's trainer around a stage.

    TRL loads the KL reference from the path that the policy's configuration names as its origin; that path
    is set to the reference asked for.

    Raises:
        ConfigError: A KL term without a reference.
    """
    if arguments.beta > 0:
        if reference is None:
            raise ConfigError(f"training.beta={arguments.beta} needs a reference policy, none was given")
        checkpoint_files(reference)
        model.config._name_or_path = str(reference)
    trainer = QuietTrainer(
        model=model,
        reward_funcs=stage.reward,
        args=arguments,
        train_dataset=stage.dataset(),
        processing_class=tokenizer,
        callbacks=[watch],
        rollout_func=stage.rollout,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


@torch.no_grad()
def _finite_logits(model: Any, ids: list[int]) -> bool:
    return bool(torch.isfinite(model(torch.tensor([ids], device=model.device)).logits).all())
