"""Steps: the settings that each result depends on, the slots of a run, and artifact keys.

The settings classes contain the settings that are part of an artifact's key. A field marked
:data:`~data_schemas.section.LATER` is excluded from the key while it has its default value, so that keys of earlier
versions stay valid.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from data_schemas.data import Decontaminate
from data_schemas.evaluation import Evaluation
from data_schemas.gradients import Gradients, Layers, LossType, Objective, Projection
from data_schemas.records import ArtifactRef, Kind, Record, StepName
from data_schemas.rollouts import Engine, Passes, Sampling, Waking
from data_schemas.scores import Scores
from data_schemas.section import LATER, Section
from data_schemas.selection import Selection
from data_schemas.training import Training

VERSIONS: dict[StepName, int] = {
    "prompts": 1,
    "policy": 1,
    "rollouts": 1,
    "gradients": 2,
    "scores": 2,
    "diagnostics": 1,
    "selection": 1,
    "training": 1,
    "evaluation": 1,
}
"""Step versions, part of the key. Increase a step's version when its result changes for the same settings."""

Dtype = Literal["float32", "bfloat16"]


class PromptsSettings(Section):
    """A set of prompts: its source and the split that it is for. A local file is identified by its content."""

    source: dict[str, Any]
    split: Literal["pool", "validation", "test"]
    decontaminate: Annotated[Decontaminate | None, LATER] = None
    reasoning_gym: Annotated[str | None, LATER] = Field(
        default=None, description="Version of the package that generated the prompts."
    )


class SpotDraw(Section):
    """The number of prompts that a spot check draws, and the share of them without a gradient."""

    prompts: int
    dead_share: float


class SpotPromptsSettings(Section):
    """The prompts of a spot check, drawn from a scored pool."""

    spot: SpotDraw
    seed: int


class PilotPromptsSettings(Section):
    """The part of a pool that is sampled: a random share."""

    pilot: float = Field(description="Share of the pool.")
    seed: int


class WakingPromptsSettings(Section):
    """The prompts of a pool that a later stage samples again."""

    waking: Waking
    samples: int = Field(description="Completions of a prompt that is sampled again.")
    group: int = Field(description="Samples of a training group.")
    seed: int


class PolicySettings(Section):
    """A base policy: the digest of its files, and the chat template that the run sets."""

    sha256: str
    chat: Annotated[dict[str, Any] | None, LATER] = None


class RolloutsSettings(Section):
    """Graded completions of a set of prompts."""

    dtype: Dtype
    grading: dict[str, Any] = Field(description="As `cropi_core.rewards.keys.key_settings` returns it.")
    sampling: Sampling
    seed: int
    shard_prompts: int
    engine: Annotated[Engine, LATER] = "transformers"
    samples_by_source: Annotated[dict[str, int], LATER] = Field(default_factory=dict)
    passes: Annotated[Passes | None, LATER] = None


class MergedRolloutsSettings(Section):
    """Stored rollouts of a pool, in which fresh ones replace those of the same prompts."""

    merged: Literal["fresh"] = "fresh"
    keep_stored: Annotated[bool, LATER] = Field(
        default=True, description="Whether the completions of other prompts keep their rewards."
    )


class HalvedRolloutsSettings(Section):
    """Halves of the completions of some prompts of a pool."""

    halves: int = Field(description="Most prompts.")
    seed: int


class GradientsSettings(Section):
    """Projected gradients of a set of rollouts."""

    dtype: Dtype
    objective: Objective
    projection: Projection
    layout: Gradients
    max_new_tokens: int


class MergedGradientsSettings(Section):
    """Stored features of a pool, in which those that a training stage collected replace the ones of its prompts."""

    merged: Literal["trained"] = "trained"


class ScoresSettings(Section):
    """Scores of a pool against validation sets."""

    scores: Scores
    seed: int


class DiagnosticsSettings(Section):
    """The comparison of scores with scores from fresh trajectories."""

    scores: Scores
    ratio: float
    seed: int


class Fallback(Section):
    """The reason for a random selection: the configured strategy, and the limits that were exceeded."""

    strategy: str
    limits: dict[str, Any] | list[Any]


class SelectionSettings(Section):
    """The selected prompts of a stage."""

    selection: Selection
    seed: int
    fallback: Annotated[Fallback | None, LATER] = None


class TrainingObjective(Section):
    """The fields of `objective` that the trainer reads."""

    loss_type: LossType
    scale_rewards: bool
    clip_epsilon: float


class TrainingFeatures(Section):
    """The features that a stage collects: as those of the pool, with which they are compared."""

    projection: Projection
    layers: Layers = "all"
    objective: Objective


class TrainingSettings(Section):
    """A GRPO stage."""

    dtype: Dtype
    grading: dict[str, Any]
    training: Training
    objective: TrainingObjective
    seed: int
    features: Annotated[TrainingFeatures | None, LATER] = None


class EvaluationSettings(Section):
    """The accuracy of a policy on validation and test sets."""

    dtype: Dtype
    grading: dict[str, Any]
    evaluation: Evaluation


@dataclass(frozen=True)
class Slot:
    """A slot of a run, written ``kind[/set][/stored][@stage]``: ``prompts/pool``, ``gradients/goal@2``, ``scores@1``.

    Attributes:
        kind: Kind of the artifact.
        set: Name of the set of prompts, or ``pool``, or ``spot``; empty if the slot has none.
        stage: Stage, counted from 1; 0 is the base policy; None if the slot has none.
        stored: Whether the artifact was computed from stored trajectories, before the stage sampled new ones.
    """

    kind: Kind
    set: str = ""
    stage: int | None = None
    stored: bool = False

    @classmethod
    def parse(cls, text: str) -> "Slot":
        """Parse a slot.

        Raises:
            ValueError: The stage is not a number.
        """
        name, at, stage = text.partition("@")
        kind, *parts = name.split("/")
        stored = parts[-1:] == ["stored"]
        places = parts[:-1] if stored else parts
        return cls(kind, "/".join(places), int(stage) if at else None, stored)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Format the slot as text."""
        parts = [self.kind, self.set, "stored" if self.stored else ""]
        name = "/".join(part for part in parts if part)
        return name if self.stage is None else f"{name}@{self.stage}"

    @property
    def name(self) -> str:
        """The slot without its stage."""
        return str(replace(self, stage=None))


def canonical_json(value: Any) -> str:
    """Serialize to canonical JSON, which is identical for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def artifact_key(
    kind: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]
) -> str:
    """Build an artifact's key from its inputs and settings: ``<kind>-v<version>-<16 hex digits>``."""
    material = {"settings": settings, "inputs": {name: ref.digest for name, ref in inputs.items()}}
    text = f"{kind}/{version}/{canonical_json(material)}"
    return f"{kind}-v{version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class StepSpec(Record):
    """A step to run: everything that its result depends on, and its execution settings."""

    step: StepName
    slot: str = Field(description="Its place in the run, such as `gradients/pool@2`.")
    settings: dict[str, Any] = Field(
        description="A settings class of this module as `for_key` returns it; part of the key."
    )
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    location: dict[str, str] = Field(default_factory=dict, description="Paths; part of no key.")
    runtime: dict[str, Any] = Field(default_factory=dict, description="A `Runtime`; part of no key.")

    @property
    def kind(self) -> Kind:
        """Kind of the artifact: `policy` for training, otherwise the name of the step."""
        return "policy" if self.step == "training" else self.step

    @cached_property
    def key(self) -> str:
        """Key of the artifact that the step produces."""
        settings = {"step": self.step, **self.settings}
        return artifact_key(self.kind, VERSIONS[self.step], settings, self.inputs)
