"""Data types of a plan: the work of a step, the measurements or assumptions, and the estimates.

A :class:`Work` counts what a step will do; a :class:`Sample` holds the lengths of prompts and completions and the share
of prompts with a gradient; :class:`Disk` holds the sizes of files; :class:`Speeds` holds the speed of this machine.
:mod:`cropi_core.planning.estimate` computes an :class:`Estimate` from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from data_schemas import Config, StepName

Origin = Literal["computed", "cached", "pinned"]
Source = Literal["pool", "validation"]


@dataclass(frozen=True)
class Work:
    """The work of one step.

    Attributes:
        slot: Its slot in the run, such as ``gradients/pool@2``.
        step: Name of the step.
        stage: 0 before the first stage.
        origin: ``computed``, or for an existing artifact ``cached`` or ``pinned``.
        source: Sample that describes the lengths of its prompts.
        prompts: Prompts read; in training, prompts of one generation batch.
        samples: Completions per prompt; the mean, if sources have different numbers.
        passes: Whether they are sampled in passes, and ``samples`` are the most.
        max_new_tokens: Maximum length of a completion.
        calls: Sets that are sampled one after another.
        products: Vectors that each prompt with a gradient is compared with in scoring.
        steps: Optimizer steps.
        batches: Generation batches of training.
        rows: Prompts with a gradient, if this is known more precisely than from the sample's share.
        bytes: Size of the artifact without its manifest, if known.
        seconds: Duration, if known.
    """

    slot: str
    step: StepName
    stage: int = 0
    origin: Origin = "computed"
    source: Source = "pool"
    prompts: int = 0
    samples: float = 0
    passes: bool = False
    max_new_tokens: int = 0
    calls: int = 1
    products: int = 0
    steps: int = 0
    batches: int = 0
    rows: float | None = None
    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """Lengths in tokens, and the share of prompts with a gradient.

    Attributes:
        prompts: Prompts sampled; 0 if lengths are assumed.
        prompt_tokens: Mean length of a prompt.
        lengths: Lengths of the sampled completions.
        live: Share of the prompts with a gradient.
        live_prompt_tokens: Mean length of the prompts with a gradient.
        live_lengths: Lengths of their completions.
        samples: Mean completions of a prompt, if it is sampled in passes; None if all prompts have those of the step.
        live_samples: The same of the prompts with a gradient.
    """

    prompts: int
    prompt_tokens: float
    lengths: tuple[int, ...]
    live: float
    live_prompt_tokens: float
    live_lengths: tuple[int, ...]
    samples: float | None = None
    live_samples: float | None = None


@dataclass(frozen=True)
class Line:
    """Linear size or memory model in bytes: ``fixed``, plus ``per_row`` for every row."""

    fixed: float
    per_row: float

    def at(self, rows: float) -> float:
        """Return the bytes for a number of rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Disk:
    """Sizes of artifacts in bytes.

    Attributes:
        rollouts: A part by its completions, for each source.
        evaluation: A table by its completions.
        features: The row of one prompt with a gradient.
        columns: The rest of a gradient store by its prompts.
        policy: The base checkpoint.
        trained: A trained checkpoint, in float32.
    """

    rollouts: Mapping[Source, Line]
    evaluation: Line
    features: float
    columns: Line
    policy: int
    trained: int


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the estimates of tokens and disk."""

    samples: Mapping[Source, Sample]
    disk: Disk


@dataclass(frozen=True)
class Rate:
    """Seconds of a step: ``first_s`` per process, ``start_s`` per call, ``token_s`` per token."""

    first_s: float
    start_s: float
    token_s: float


@dataclass(frozen=True)
class TrainingRate:
    """Seconds of a stage: ``first_s`` per process, ``start_s`` per stage, per completion in a step, per checkpoint."""

    first_s: float
    start_s: float
    completion_s: float
    save_s: float


@dataclass(frozen=True)
class Memory:
    """Bytes of the GPU if there is one, otherwise of this process.

    Attributes:
        base: With all libraries imported.
        sampling: With the policy and a batch of ``rows`` sequences.
        gradients: With the engine and a pass of ``rows`` tokens.
        training: While a stage trains.
    """

    base: float
    sampling: Line
    gradients: Line
    training: float


@dataclass(frozen=True)
class Speeds:
    """Measured speed of this machine."""

    imports_s: float
    step_s: float
    scores_s: float
    sampling: Mapping[Source, Rate]
    gradients: Mapping[Source, Rate]
    training: TrainingRate
    memory: Memory
    evaluation: Rate | None = None
    """Rate of evaluation if another engine samples for it; None means the rate of the validation sets."""


@dataclass(frozen=True)
class Limits:
    """Settings that shape batches, files and processes."""

    k: int
    value_bytes: int
    shard_prompts: int
    rows_per_shard: int
    block_rows: int
    generation_rows: int
    token_budget: int
    save_steps: int
    moment_bytes: int
    subprocess: bool

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Take the settings from a configuration."""
        runtime = config.runtime
        return cls(
            k=config.projection.k,
            value_bytes=2 if config.projection.dtype == "float16" else 4,
            shard_prompts=config.rollouts.shard_prompts,
            rows_per_shard=config.gradients.rows_per_shard,
            block_rows=1 if config.gradients.deterministic else config.gradients.block_rows,
            generation_rows=runtime.generation_rows,
            token_budget=runtime.token_budget,
            save_steps=runtime.save_steps,
            moment_bytes=config.training.moment_bytes,
            subprocess=runtime.mode == "subprocess",
        )


@dataclass(frozen=True)
class Estimate:
    """Cost of a step, a stage or a run.

    Attributes:
        slot: Slot of the step, or the name of a sum.
        stage: 0 before the first stage; None for a whole run.
        origin: See :class:`Work`; None for a sum.
        tokens_generated: Tokens of sampled completions.
        tokens_passed: Tokens of forward and backward passes, each completion with its prompt.
        seconds: None without a calibration.
        peak_memory_bytes: Peak so far in the process that runs the step, as in manifests.
        disk_bytes: Size of the artifact with its manifest.
    """

    slot: str
    stage: int | None
    origin: Origin | None
    tokens_generated: float = 0.0
    tokens_passed: float = 0.0
    seconds: float | None = None
    peak_memory_bytes: float | None = None
    disk_bytes: float = 0.0
