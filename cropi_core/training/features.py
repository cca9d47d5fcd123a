"""Features of the prompts that TRL trains on, from the passes of the training itself.

    collector = FeatureCollector(trainer, Projection(), directory=Path("features"))
    trainer.add_callback(collector)

A feature is the one that :mod:`cropi_core.gradients` computes for the completions of a group, with the policy, the old
log-probabilities and the advantages of the training step; the normalisation of the loss is undone. Terms that the
trainer adds to the loss, such as the KL to a reference, are part of it.

A pass over a generation batch is a file in the directory, renamed into place before a checkpoint can contain its step.
A stage that resumes from a checkpoint writes the files of later steps again, with the same bytes.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from cropi_core.artifacts import write_atomic
from cropi_core.errors import ConfigError
from cropi_core.gradients import (
    NOT_FINITE,
    OK,
    TOO_FEW_GRADABLE,
    ZERO_VARIANCE,
    TrainingPass,
    divergence,
    effective_sample_size,
    gather_passes,
)
from data_schemas import Layers, Objective, Projection

WRAPPED = (
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
    "training_step",
)
"""Methods of TRL's trainer that the collector surrounds."""
PLACE = "cropi_place"
"""Name of a column that the collector adds to a generation batch: a completion's place before TRL shuffles them."""
BY_TOKENS = ("bnpo", "dapo", "cispo", "vespo")
"""Losses that are means over tokens; the others are means over completions."""
STATISTICS = ("ess", "max_ratio", "clip_fraction", "kl", "kl_k1", "entropy")


@dataclass
class Batch:
    """The groups of a generation batch during one pass over it.

    Attributes:
        names: Prompt id of each group.
        rewards: (groups, G); NaN where a completion has no reward.
        advantages: (groups, G).
        lengths: (groups, G) tokens of the completions that count in the loss.
        tokens: (groups, G) tokens of the sequences, each with its prompt.
        policy_step: Optimizer steps that the policy had taken when the pass began.
        features: (groups, k) sums so far.
        log_ratios: By completion, its token log-ratios log π − log π_old.
        entropies: By completion, the mean entropy of its tokens.
    """

    names: list[str]
    rewards: np.ndarray
    advantages: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    policy_step: int
    features: Tensor
    log_ratios: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, float] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Completions of a group."""
        return self.rewards.shape[1]

    def status(self) -> np.ndarray:
        """Return the status of each group, (groups,) uint8."""
        graded = np.isfinite(self.rewards).sum(1)
        status = np.where((self.advantages != 0).any(1), OK, ZERO_VARIANCE)
        return np.where(graded < 2, TOO_FEW_GRADABLE, status).astype(np.uint8)


class FeatureCollector(TrainerCallback):
    """Collects the features of every group that a GRPO trainer trains on."""

    def __init__(
        self,
        trainer: Any,
        projection: Projection,
        directory: Path,
        layers: Layers = "all",
        name_of: Callable[[Mapping[str, Any]], str] = lambda row: str(row["prompt_id"]),
    ) -> None:
        """Surround the methods of a trainer, before it trains.

        Args:
            trainer: TRL's ``GRPOTrainer``.
            projection: Kind, size and seed of the projection.
            directory: Directory of the files, one for each pass.
            layers: See :func:`cropi_core.gradients.layers.parameter_names`.
            name_of: Prompt id of a row of the trainer's dataset.

        Raises:
            ConfigError: The trainer's settings do not allow it.
        """
        self.trainer, self.directory, self.name_of = trainer, directory, name_of
        check_trainer(trainer)
        self.passes: TrainingPass | None = None
        self.projection: Projection = projection
        self.layers: Layers = layers
        self.described: dict[str, Any] | None = None
        self.batch: Batch | None = None
        self._micro: Mapping[str, Any] | None = None
        self._rewards: Tensor | None = None
        self._written = (0, 0)
        for name in WRAPPED:
            self._surround(name, getattr(self, f"_around{name if name[0] == '_' else '_' + name}"))

    def _surround(self, name: str, around: Callable[..., Any]) -> None:
        """Replace a method of the trainer by one that calls ``around`` with the original and its arguments."""
        original = getattr(self.trainer, name)
        setattr(self.trainer, name, lambda *args, **options: around(original, *args, **options))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attach the hooks to the model that trains."""
        self.directory.mkdir(parents=True, exist_ok=True)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        self.passes = TrainingPass(model, self.projection, self.layers)
        self.described = {
            "parameters": sum(s.shape[0] * s.shape[1] for s in self.passes.sketches.values()),
            "left_out": self.passes.left_out,
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the hooks."""
        if self.passes is not None:
            self.passes.close()
            self.passes = None

    def gather(self, out: Path, table: Path, objective: Objective, policy: str) -> dict[str, Any]:
        """Write the features that the directory has; see :func:`cropi_core.gradients.trained.gather_passes`.

        Args:
            out: The gradient store.
            table: The table of all groups.
            objective: Objective of the gradients that the features are compared with.
            policy: Digest of the trained policy, as whose features they count.
        """
        assert self.described is not None
        attributes = {
            "projection": self.projection.model_dump(mode="json"),
            "objective": objective.model_dump(mode="json"),
            "max_new_tokens": self.trainer.max_completion_length,
            "temperature": self.trainer.temperature,
            "samples": self.trainer.num_generations,
            "policy": policy,
            **self.described,
            **({} if self.layers == "all" else {"layers": self.layers}),
            "pool_features": "training",
        }
        return gather_passes(
            self.directory, out=out, table=table, attributes=attributes, dtype=self.projection.dtype
        )

    # -- what surrounds the methods of the trainer ---------------------------------------------------------------

    def _around_calculate_rewards(
        self, original: Callable[..., Tensor], *args: Any, **options: Any
    ) -> Tensor:
        rewards = original(*args, **options)
        weights = self.trainer.reward_weights.to(rewards.device)
        total = (rewards * weights[None]).nansum(1)
        self._rewards = total.masked_fill(rewards.isnan().all(1), float("nan"))
        return rewards

    def _around_generate_and_score_completions(
        self, original: Callable[..., dict[str, Any]], inputs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        found = original(inputs)
        if self.passes is None or not self.trainer.model.training:
            return found
        samples = self.trainer.num_generations
        mask = _loss_mask(found)
        assert self._rewards is not None
        shape = (len(inputs) // samples, samples)
        self._names = [self.name_of(inputs[i]) for i in range(0, len(inputs), samples)]
        tokens = found["prompt_mask"].sum(1) + found["completion_mask"].sum(1)
        self._figures = [
            x.double().cpu().numpy().reshape(shape)
            for x in (self._rewards, found["advantages"], mask.sum(1), tokens)
        ]
        self.batch = None
        return {**found, PLACE: torch.arange(len(inputs), device=found["advantages"].device)}

    def _around_compute_loss(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **options: Any
    ) -> Any:
        if self.passes is None or PLACE not in inputs or not self.trainer.model.training:
            return original(model, inputs, *args, **options)
        if self.batch is None:
            self.batch = self._new_batch()
        self._micro = inputs
        groups = inputs[PLACE] // self.batch.samples
        live = torch.from_numpy(self.batch.status() == OK).to(groups.device)[groups]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        places = torch.where(live, groups, -1)
        self.passes.begin(ids, mask, places, inputs["completion_ids"].shape[1])
        return original(model, inputs, *args, **options)

    def _around_get_per_token_logps_and_entropies(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        logprobs, entropies, *rest = original(*args, **options)
        if self._micro is not None and logprobs.requires_grad:
            self._observe(self._micro, logprobs.detach(), entropies.detach())
            values, temperature, passes = logprobs.detach(), self.trainer.temperature, self.passes
            logprobs.register_hook(lambda weights: passes.head(weights, values, temperature))  # type: ignore[union-attr]
        return logprobs, entropies, *rest

    def _around_training_step(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        policy_step = self.trainer.state.global_step
        if self.batch is None:
            self._policy_step = policy_step
        result = original(*args, **options)
        if self.passes is None or self._micro is None or self.batch is None:
            return result
        places, features = self.passes.end()
        if len(places):
            self.batch.features.index_add_(0, places, features * -self._loss_scale(self._micro))
        self._micro = None
        if self.trainer._step % self.trainer.args.steps_per_generation == 0:
            self._write(self.batch, policy_step + 1)
            self.batch = None
        return result

    # -- the figures of a pass -----------------------------------------------------------------------------------

    def _new_batch(self) -> Batch:
        assert self.passes is not None
        rewards, advantages, lengths, tokens = self._figures
        features = torch.zeros(len(rewards), self.passes.k, device=self.trainer.accelerator.device)
        return Batch(self._names, rewards, advantages, lengths, tokens, self._policy_step, features)

    def _observe(self, micro: Mapping[str, Any], logprobs: Tensor, entropies: Tensor) -> None:
        """Keep the log-ratios and entropies of a micro-batch's completions, for the statistics of their groups."""
        assert self.batch is not None
        old = micro.get("old_per_token_logps")
        log_ratio = torch.zeros_like(logprobs) if old is None else logprobs - old
        mask = _loss_mask(micro).bool()
        for row, place in enumerate(micro[PLACE].tolist()):
            self.batch.log_ratios[place] = log_ratio[row][mask[row]].double().cpu()
            self.batch.entropies[place] = float(entropies[row][mask[row]].sum())

    def _loss_scale(self, micro: Mapping[str, Any]) -> float:
        """Return what undoes the loss's normalisation over micro-batches.

        References:
            TRL 1.16, GRPOTrainer._compute_loss; :func:`cropi_core.gradients.objective.length_scale`.
        """
        steps, loss_type = self.trainer.current_gradient_accumulation_steps, self.trainer.loss_type
        if loss_type == "bnpo":
            return float(_loss_mask(micro).sum().clamp(min=1)) * steps
        if loss_type in BY_TOKENS:
            items = float(micro["num_items_in_batch"].clamp(min=1))
            return items * steps / self.trainer.args.steps_per_generation
        return len(micro["advantages"]) * steps

    def _write(self, batch: Batch, step: int) -> None:
        """Normalise the features of a pass by group, and write its file."""
        graded = np.isfinite(batch.rewards)
        by_tokens = self.trainer.loss_type in BY_TOKENS
        size = np.where(graded, batch.lengths if by_tokens else 1.0, 0.0).sum(1)
        features = batch.features.cpu().numpy() / np.maximum(size, 1)[:, None].astype(np.float32)
        status = batch.status()
        status[(status == OK) & ~np.isfinite(features).all(1)] = NOT_FINITE
        rows = [self._statistics(batch, group) for group in range(len(batch.names))]
        with np.errstate(invalid="ignore"):
            means = np.where(graded, batch.rewards, 0).sum(1) / np.maximum(graded.sum(1), 1)
        arrays = {
            "features": np.where((status == OK)[:, None], features, 0).astype(np.float32),
            "prompt_id": np.array(batch.names, dtype=np.str_),
            "status": status,
            "tokens": np.where(status == OK, np.where(graded, batch.tokens, 0).sum(1), 0).astype(np.int32),
            "mean_reward": np.where(graded.any(1), means, np.nan).astype(np.float32),
            "policy_step": np.full(len(batch.names), batch.policy_step, dtype=np.int32),
            **{name: np.array([row[name] for row in rows], dtype=np.float32) for name in STATISTICS},
        }
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        last, number = self._written
        self._written = step, number + 1 if step == last else 0
        write_atomic(self.directory / f"{step:08d}-{self._written[1]}.npz", stream.getvalue())

    def _statistics(self, batch: Batch, group: int) -> dict[str, float]:
        """Return the statistics of a group's ratios and its mean entropy; NaN without a gradient."""
        own = range(group * batch.samples, (group + 1) * batch.samples)
        members = [i for i in own if np.isfinite(batch.rewards.flat[i]) and len(batch.log_ratios[i])]
        if batch.status()[group] != OK or not members:
            return dict.fromkeys(STATISTICS, float("nan"))
        padded = torch.nn.utils.rnn.pad_sequence([batch.log_ratios[i] for i in members], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(batch.log_ratios[i]) for i in members], batch_first=True
        ).bool()
        ratio = padded.exp()
        advantage = torch.tensor([batch.advantages.flat[i] for i in members])[:, None]
        low, high = self.trainer.epsilon_low, self.trainer.epsilon_high
        clipped = ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))
        kl, kl_k1 = divergence(padded, mask)
        return {
            "ess": effective_sample_size(padded),
            "max_ratio": float(ratio[mask].max()),
            "clip_fraction": float((clipped & mask).sum() / mask.sum()),
            "kl": kl,
            "kl_k1": kl_k1,
            "entropy": sum(batch.entropies[i] for i in members) / float(mask.sum()),
        }


def check_trainer(trainer: Any) -> None:
    """Refuse settings of a trainer with which its passes do not give the features of single prompts.

    Raises:
        ConfigError: Names the setting.
    """
    args = trainer.args
    if missing := [name for name in WRAPPED if not hasattr(trainer, name)]:
        raise ConfigError(
            f"{type(trainer).__name__} lacks {', '.join(missing)}, so its passes cannot be followed. Use "
            "GRPOTrainer of TRL 1.16"
        )
    refused = {
        "more than one process": trainer.accelerator.num_processes > 1,
        "fp16": bool(args.fp16),
        "an entropy bonus": bool(getattr(trainer, "_entropy_bonus_enabled", False)),
        "the auxiliary loss of a router": bool(getattr(trainer, "aux_loss_enabled", False)),
    }
    if found := [name for name, used in refused.items() if used]:
        raise ConfigError(
            f"features from training are not supported with {' and '.join(found)}. Train without them, or turn the "
            "features off"
        )


def _loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Return (B, C), 1 on the tokens that count in the loss."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
