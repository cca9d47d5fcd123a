"""The files that a training stage reads and writes."""

from dataclasses import dataclass
from pathlib import Path

from data_schemas import TrainingFeatures


@dataclass(frozen=True)
class FeaturePlan:
    """The features that a stage collects while it trains.

    Attributes:
        settings: Projection, layers and objective.
        store: The gradient store to write.
        table: The table of all groups to write.
    """

    settings: TrainingFeatures
    store: Path
    table: Path


@dataclass(frozen=True, kw_only=True)
class StageFiles:
    """Inputs, outputs and scratch directory of one stage.

    Attributes:
        policy: Checkpoint directory the stage starts from.
        prompts: Prompts table of the pool.
        selection: Selection table; the stage trains on its selected rows.
        out: Directory of the trained checkpoint: safetensors, configuration, the start policy's tokenizer files.
        metrics: Parquet file of metrics, see :data:`cropi_core.training.metrics.METRICS`. A stage with
            ``training.draw`` writes its belief and its groups next to it.
        scratch: Directory of the checkpoints inside the stage.
        keep_scratch: Do not delete ``scratch``; the caller removes it once the manifest is published.
        reference: Checkpoint directory of the KL reference; required when ``training.beta`` > 0.
        base: Checkpoint below the adapter that ``policy`` was trained with, to continue that adapter
            (``training.lora.carry: adapter``).
        logs: Directory for the files of trackers.
        rollouts: Stored rollouts of the pool, which ``training.draw`` learns pass rates from.
        belief: Belief table of the stage before.
        features: The features to collect; None for none.
    """

    policy: Path
    prompts: Path
    selection: Path
    out: Path
    metrics: Path
    scratch: Path
    keep_scratch: bool = False
    reference: Path | None = None
    base: Path | None = None
    logs: Path | None = None
    rollouts: Path | None = None
    belief: Path | None = None
    features: FeaturePlan | None = None
