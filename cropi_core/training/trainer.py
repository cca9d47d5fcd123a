"""Adapter to TRL's GRPO trainer: completions and rewards for its callbacks; nothing leaves the machine.

TRL computes advantages, loss and optimizer steps. A :class:`Stage` supplies its completions
and rewards; a :class:`Watch` observes its steps.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from cropi_core.artifacts import file_crc32c, write_atomic
from cropi_core.errors import ConfigError
from cropi_core.policy import checkpoint_files, is_out_of_memory, render, restore_state
from cropi_core.progress import Progress, Report
from cropi_core.random_bits import key64
from cropi_core.rewards import Grade, Item, Verifier
from cropi_core.rollouts import Completion, sample_completions
from cropi_core.training.draws import STATE, Draws, Group, group_of
from cropi_core.training.features import FeatureCollector
from cropi_core.training.metrics import TERM, TrainingError, check_finite, step_metrics, used_up
from cropi_core.training.ranks import ALONE, Processes
from data_schemas import Sampling, Training

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import unwrap_model_for_generation
except ImportError as error:
    raise ConfigError(
        f"training needs TRL ({error}); install it with `pip install 'cropi[train]'`"
    ) from error

MARKER = "whole.json"
"""Written last into a checkpoint of the stage's scratch directory: the names, sizes and checksums of its files."""


@dataclass(frozen=True)
class Sampled:
    """A prompt with its group of completions: their tokens and behaviour log-probabilities."""

    row: dict[str, Any]
    prompt: list[int]
    completions: list[list[int]]
    logprobs: list[list[float]]


class Stage:
    """Supplies TRL with the completions of each generation batch and their rewards.

    TRL's prompts are places here, batch and number within it. Which prompt stands at a place is decided when its batch
    is generated, so that the draw knows all rewards before it. :func:`cropi_core.policy.loading.render` turns a prompt
    into tokens, as everywhere else, and nothing tokenises it a second time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        draws: Draws,
        verifier: Verifier,
        training: Training,
        seed: int,
        generation_rows: int,
        processes: Processes = ALONE,
    ) -> None:
        self.tokenizer = tokenizer
        self.draws = draws
        self.processes = processes
        self.verifier = verifier
        self.training = training
        self.seed = seed
        self.generation_rows = generation_rows
        self.rows = {row["prompt_id"]: row for row in draws.rows}
        self.number = 0
        self.dropped: list[Group] = []

    def dataset(self, steps: int) -> Dataset:
        """List the places of ``steps`` optimizer steps, in order; TRL repeats each ``samples`` times."""
        per_step, batches = self.training.prompts_per_step, -(-steps // self.training.iterations)
        places = [_place(b, i) for b in range(batches) for i in range(per_step)]
        return Dataset.from_dict({"prompt": places})

    def prompt_tokens(self, row: dict[str, Any]) -> list[int]:
        """Return a prompt's token ids."""
        return render(self.tokenizer, row["messages"])

    def rollout(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[list[Any]]]:
        """Sample this process's completions of one generation batch (TRL's ``rollout_func``).

        Args:
            prompts: Places, each ``samples`` times in a row.
            trainer: TRL's trainer, at the step that wants them.

        Raises:
            TrainingError: TRL asks for other prompts than this step's, or the policy's logits are not
                finite.
        """
        samples, step = self.training.sampling.samples, trainer.state.global_step
        self.number = number = step // self.training.iterations
        indices = self.processes.share(range(self.training.prompts_per_step))
        if prompts != [_place(number, i) for i in indices for _ in range(samples)]:
            raise TrainingError(
                f"step {step + 1}: the trainer's prompts are not those of generation batch {number}"
            )
        if self.training.draw.oversampling > 1:
            groups, self.dropped = self._mixed_groups(trainer)
        else:
            rows = [self.draws.rows[i] for i in self.draws.batch(number)]
            groups, self.dropped = self._complete(self.processes.share(rows), trainer, samples), []
        return {
            "prompt_ids": [list(group.prompt) for group in groups for _ in range(samples)],
            "completion_ids": [ids for group in groups for ids in group.completions],
            "logprobs": [logprobs for group in groups for logprobs in group.logprobs],
            "prompt_id": [group.row["prompt_id"] for group in groups for _ in range(samples)],
        }

    def _mixed_groups(self, trainer: GRPOTrainer) -> tuple[list[Sampled], list[Group]]:
        """Sample until the batch has groups with more than one reward only, or the limit is reached.

        All processes take part in every round, each with as many prompts as the one that lacks most. With
        ``draw.first_samples``, the rounds sample so many completions, and the groups that are trained on are
        completed after them.

        References:
            DAPO, arXiv 2503.14476, dynamic sampling. Here a round samples as many groups as are missing.
        """
        size = self.training.prompts_per_step // self.processes.count
        mixed: list[tuple[Sampled, Group]] = []
        others: list[tuple[Sampled, Group]] = []
        positions_taken: set[int] = set()
        while missing := max(self.processes.gathered([max(0, size - len(mixed))])):
            positions = self.draws.more(self.number, positions_taken, missing * self.processes.count)
            positions_taken |= set(positions)
            if not (rank_positions := self.processes.share(positions)):
                break
            rows = [self.draws.rows[i] for i in rank_positions]
            for sampled in self._complete(rows, trainer, self.draws.deciding_samples):
                texts = self.tokenizer.batch_decode(sampled.completions, skip_special_tokens=True)
                group = self._graded(sampled.row, texts, sampled.completions, trained=False)
                (mixed if group.mixed else others).append((sampled, group))
        kept = mixed + others
        groups, dropped = [sampled for sampled, _ in kept[:size]], [group for _, group in kept[size:]]
        decided, samples = self.draws.deciding_samples, self.training.sampling.samples
        if decided == samples:
            return groups, dropped
        rest = self._complete([group.row for group in groups], trainer, samples - decided, start=decided)
        return [
            Sampled(a.row, a.prompt, a.completions + b.completions, a.logprobs + b.logprobs)
            for a, b in zip(groups, rest, strict=True)
        ], dropped

    def _complete(
        self, rows: Sequence[dict[str, Any]], trainer: GRPOTrainer, samples: int, start: int = 0
    ) -> list[Sampled]:
        """Sample ``samples`` completions of every row, the first of them number ``start`` of its group."""
        ids = [(row["prompt_id"], self.prompt_tokens(row)) for row in rows]
        if self.training.engine == "vllm":
            repeated = [list(tokens) for _, tokens in ids for _ in range(samples)]
            _, flat, logprobs, _ = trainer.vllm_generation.generate(
                prompts=repeated, images=None, num_generations=samples
            )
            plain = [[one[0] for one in completion] for completion in logprobs]
            cut = [slice(i * samples, (i + 1) * samples) for i in range(len(rows))]
            groups = [(flat[part], plain[part]) for part in cut]
        else:
            sampling = self.training.sampling.model_copy(update={"samples": samples})
            drawn = self._sample(ids, trainer, sampling, start)
            groups = [([c.ids for c in group], [c.logprobs for c in group]) for group in drawn]
        return [
            Sampled(row, tokens, *group) for row, (_, tokens), group in zip(rows, ids, groups, strict=True)
        ]

    def _sample(
        self, ids: list[tuple[str, list[int]]], trainer: GRPOTrainer, sampling: Sampling, start: int
    ) -> list[list[Completion]]:
        """Sample from the policy in training; gather its weights first if they are sharded."""
        step = trainer.state.global_step
        gathered = unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=cast(Any, trainer.args.gradient_checkpointing_kwargs),
        )
        # With sharded weights (FSDP) all processes must pass through every layer equally often; transformers ensures
        # this if every process makes equally many calls.
        with gathered as unwrapped, trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False):
            model = cast(PreTrainedModel, unwrapped)
            model.eval()  # else gradient checkpointing would switch the key-value cache off
            try:
                return sample_completions(
                    model,
                    self.tokenizer,
                    ids,
                    sampling,
                    seed=key64("training", self.seed, self.number),
                    rows=self.generation_rows,
                    start=start,
                )
            except (RuntimeError, IndexError) as error:
                if is_out_of_memory(error) or _finite_logits(model, ids[0][1]):
                    raise
                raise TrainingError(
                    f"step {step + 1}: the policy's logits are not finite after step {step}; lower "
                    f"training.learning_rate={self.training.learning_rate}"
                ) from error
            finally:
                model.train()

    def reward(
        self,
        prompt_id: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        log_metric: Any,
        **_: Any,
    ) -> list[float | None]:
        """Grade completions; TRL leaves those that are not gradable (None) out of the group, with advantage 0.

        Args:
            prompt_id: Prompt id of every completion.
            completions: Texts, decoded without special tokens as in rollouts.
            completion_ids: Their token ids.
            log_metric: Function of TRL that takes a name and a number.
            _: Further arguments of TRL, unused.
        """
        grades = self._grades([self.rows[name] for name in prompt_id], completions)
        rewards = [grade.reward for grade in grades]
        for name in sorted({name for grade in grades for name in grade.terms}):
            values = [value for grade in grades if (value := grade.terms.get(name)) is not None]
            if values:
                log_metric(TERM + name, sum(values) / len(values))
        log_metric("not_gradable", float(sum(r is None for r in rewards)))
        samples = self.training.sampling.samples
        groups = [
            group_of(prompt_id[i], rewards[i : i + samples], sum(map(len, completion_ids[i : i + samples])))
            for i in range(0, len(rewards), samples)
        ]
        sampled = self.processes.gathered(groups + self.dropped)
        log_metric("sampled_mixed", sum(group.mixed for group in sampled) / len(sampled))
        self.draws.observe(self.number, sampled)
        return rewards

    def _grades(self, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[Grade]:
        items = [
            Item(row["verifier"], text, row["answer"], row["messages"])
            for row, text in zip(rows, texts, strict=True)
        ]
        return self.verifier.grade_many(items)

    def _graded(
        self, row: dict[str, Any], texts: Sequence[str], ids: Sequence[list[int]], *, trained: bool
    ) -> Group:
        """Grade one group."""
        rewards = [grade.reward for grade in self._grades([row] * len(texts), texts)]
        return group_of(row["prompt_id"], rewards, sum(map(len, ids)), trained=trained)


def _place(batch: int, number: int) -> str:
    """Name a place in the order of training."""
    return f"{batch}.{number}"


class Watch(TrainerCallback):
    """Reports every step, stops at the first number that is not finite, marks whole checkpoints.

    Args:
        training: Settings: the steps of the stage, and its end.
        report: Called after every step.
        draws: Draws whose state belongs to a checkpoint.
    """

    def __init__(self, training: Training, report: Report, draws: Draws | None = None) -> None:
        self.training = training
        self.total = training.steps
        self.report = report
        self.draws = draws
        self.reward: float | None = None
        self.first_step = self.last_step = 0
        self.started_at = self.ended_at = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall-clock seconds of the steps taken by this process, None when there were none."""
        steps = self.last_step - self.first_step
        return round((self.ended_at - self.started_at) / steps, 4) if steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.first_step = self.last_step = state.global_step
        self.started_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Check and report one optimizer step; comes before a checkpoint of that step is written."""
        if "loss" not in logs:
            return
        check_finite(state.global_step, logs)
        self.last_step, self.ended_at = state.global_step, time.monotonic()
        self.reward = logs["reward"] if logs.get("reward") is not None else self.reward
        note = "" if self.reward is None else f"reward {self.reward:.2f}"
        self.report(Progress(state.global_step, self.total, "step", note, step_metrics(logs)))
        if used_up(state.log_history, self.training):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole, once every process has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.draws is not None and self.draws.belief is not None:
            write_atomic(directory / STATE, json.dumps(self.draws.state()))
        write_atomic(directory / MARKER, json.dumps(file_sums(directory)))


class StageTrainer(GRPOTrainer):
    """TRL's trainer without telemetry and model cards; its optimizer may go on from another stage's.

    Attributes:
        carried: Checkpoint directory from which the optimizer state is continued; None for a new one.
        carried_steps: Optimizer steps that state has seen.
        collector: What collects features of the trained prompts; None if nothing does.
    """

    carried: Path | None = None
    carried_steps: int = 0
    collector: FeatureCollector | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create it with the state that is carried; a resume inside the stage loads its own over that."""
        optimizer = super().create_optimizer(model)
        if self.carried is not None:
            assert self.model is not None
            self.carried_steps = restore_state(self.model, optimizer, self.carried)
        return optimizer

    def _send_telemetry(self) -> None:
        """Send none: a stage opens no connection."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none; checkpoints of ``scratch`` need no description."""


def file_sums(directory: Path) -> dict[str, list[int | str]]:
    """List the files of a checkpoint with their sizes in bytes and their CRC-32C, the marker left out."""
    return {
        path.relative_to(directory).as_posix(): [path.stat().st_size, file_crc32c(path)]
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def build_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    arguments: GRPOConfig,
    stage: Stage,
    watch: Watch,
    reference: Path | None,
    carried: Path | None = None,
) -> StageTrainer:
    """Build TRL's trainer around a stage.

    TRL loads the KL reference from the path that the policy's configuration names as its origin; that path
    is set to the requested reference. With an adapter, TRL keeps a copy of the adapter from the start of the stage.

    Args:
        model: The policy, or PEFT's wrapping of it.
        tokenizer: Its tokenizer.
        arguments: TRL's.
        stage: Completions and rewards.
        watch: Called after every step.
        reference: Checkpoint directory of the KL reference.
        carried: Checkpoint directory from which the optimizer state is continued, if it has one.

    Raises:
        ConfigError: A KL term without a reference.
    """
    if arguments.beta > 0 and isinstance(model, PreTrainedModel):
        if reference is None:
            raise ConfigError(f"training.beta={arguments.beta} needs a reference policy, none was given")
        checkpoint_files(reference)
        model.config._name_or_path = str(reference)
    trainer = StageTrainer(
        model=cast(PreTrainedModel, model),  # or PEFT's wrapping of one
        reward_funcs=stage.reward,
        args=arguments,
        train_dataset=stage.dataset(arguments.max_steps),
        processing_class=tokenizer,
        callbacks=[watch],
        rollout_func=stage.rollout,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.carried = carried
    return trainer


@torch.no_grad()
def _finite_logits(model: Any, ids: list[int]) -> bool:
    return bool(torch.isfinite(model(torch.tensor([ids], device=model.device)).logits).all())
